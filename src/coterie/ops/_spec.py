"""A name with parameters, as "swiglu(alpha=1.702, limit=7.0)": what configs and custom ops can hold."""

import ast


def parse_spec(text: str, what: str, example: str) -> tuple[str, dict[str, float]]:
    """The name and the parameters; ValueError says how `what` must read, like `example`."""
    name, bracket, _ = text.partition("(")
    if not bracket:
        return name, {}
    try:
        call = ast.parse(text, mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            raise ValueError("one name, one pair of brackets")
        if call.args:
            raise ValueError("parameters need names")
        return name, {keyword.arg: float(ast.literal_eval(keyword.value)) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError) as error:
        raise ValueError(f"{what} {text!r} must read like {example!r}: {error}") from None
