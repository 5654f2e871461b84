"""The one op checker: values and every gradient of an implementation against the reference in float64."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import hypothesis
import torch
from torch import Tensor

# DESIGN.md's guide by the narrowest dtype among the arguments: relative error in norm of values and of gradients.
TOLERANCES = {
    torch.float64: (1e-13, 1e-12),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (7e-4, 1.5e-3),
    torch.bfloat16: (5e-3, 1e-2),
}
GRADIENT_LAYOUTS = ("dense", "expanded", "strided")

# The same examples every run; a slow machine is no failure, a hung one is.
fuzz = hypothesis.settings(max_examples=40, derandomize=True, deadline=timedelta(seconds=20))


def check_op(
    fn: Callable[..., Any],
    args: Sequence[Any],
    impl: str,
    *,
    tolerances: tuple[float, float] | None = None,
    layouts: Sequence[str] = GRADIENT_LAYOUTS,
    autocast: torch.dtype | None = None,
    factor: float = 2.0,
) -> None:
    """Compares fn(*args, impl=impl), and its gradients to the tensors in `args` that require them, with the truth.

    The truth is fn(*args, impl="reference") in float64. Two bounds hold for every output and every gradient:

    1. ‖got − truth‖ / ‖truth‖ ≤ the tolerance of the narrowest dtype in `args`;
    2. it is no more than twice what the same arithmetic in plain torch errs at that dtype (impl="reference" on
       `args` as they are), or twice one rounding of the result. Not in float64, where plain torch is the truth.

    Both are statements about many roundings: where the smallest tensor compared has n < 256 values they are widened
    by 16 / √n.

    Also: dtypes, shapes, finite values, and that no argument is written to.

    Args:
        fn: takes `args` and `impl`, returns a tensor or a tuple of tensors.
        args: tensors and anything else.
        layouts: of the output's gradient: "dense", "expanded" (strides of zero), "strided" (transposed memory). The
            graph is kept and gone through once for each.
        autocast: run all but the truth under autocast to this dtype.
        factor: of the second bound, for an implementation whose arithmetic is not the reference's.
    """
    floating = [t for t in args if isinstance(t, Tensor) and t.is_floating_point()]
    dtypes = {t.dtype for t in floating} | ({autocast} if autocast else set())
    dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    value_tolerance, gradient_tolerance = tolerances or TOLERANCES[dtype]
    wanted = [i for i, arg in enumerate(args) if isinstance(arg, Tensor) and arg.requires_grad]
    before = [t._version for t in floating]

    exact_args = [_double(arg) for arg in args]
    exact = _run(fn, exact_args, "reference", None)
    grads = {layout: [_output_gradient(layout, y, dtype) for y in exact] for layout in layouts}
    plain = _run(fn, args, "reference", autocast)
    got = _run(fn, args, impl, autocast)
    assert [(y.dtype, y.shape) for y in got] == [(y.dtype, y.shape) for y in plain]
    smallest = min(t.numel() for t in (*exact, *(args[i] for i in wanted)))
    scatter = max(1.0, 16 / max(smallest, 1) ** 0.5)
    for i, values in enumerate(zip(got, plain, exact, strict=True)):
        _compare(f"output {i}", *values, value_tolerance, dtype, scatter, factor)

    for layout, grad in grads.items() if wanted else ():
        results = [
            torch.autograd.grad(
                outputs,
                [inputs[i] for i in wanted],
                [g(y.dtype) for g, y in zip(grad, outputs, strict=True)],
                retain_graph=True,
            )
            for outputs, inputs in ((got, args), (plain, args), (exact, exact_args))
        ]
        for i, of_got, of_plain, truth in zip(wanted, *results, strict=True):
            assert (of_got.dtype, of_got.shape) == (args[i].dtype, args[i].shape)
            what = f"gradient to argument {i} ({layout})"
            _compare(what, of_got, of_plain, truth, gradient_tolerance, dtype, scatter, factor)
    assert [t._version for t in floating] == before, "an argument was written to"


def relative_error(got: Tensor, truth: Tensor) -> float:
    """‖got − truth‖ / ‖truth‖ in float64; the numerator alone where the truth is zero."""
    got, truth = got.detach().double(), truth.detach().double()
    difference, size = (got - truth).norm(), truth.norm()
    return (difference / size if size else difference).item()


def _compare(
    what: str,
    got: Tensor,
    plain: Tensor,
    truth: Tensor,
    tolerance: float,
    dtype: torch.dtype,
    scatter: float,
    factor: float,
) -> None:
    error, plain_error = relative_error(got, truth), relative_error(plain, truth)
    tolerance *= scatter
    # `not <=` also catches NaN.
    assert error <= tolerance, f"{what}: relative error {error:.2e}, tolerance {tolerance:.0e}"
    if dtype == torch.float64:
        return
    # The typical error of rounding a result to `dtype`; but a float32 sum is rounded at every step, in any order.
    one_rounding = torch.finfo(dtype).eps / (1 if dtype == torch.float32 else 4)
    bound = factor * max(plain_error, one_rounding) * scatter
    assert error <= bound, f"{what}: relative error {error:.2e}, {factor:g} times that of plain torch {bound:.2e}"


def _run(fn: Callable[..., Any], args: Sequence[Any], impl: str, autocast: torch.dtype | None) -> tuple[Tensor, ...]:
    with torch.autocast("cpu", dtype=autocast) if autocast else nullcontext():
        out = fn(*args, impl=impl)
    return out if isinstance(out, tuple) else (out,)


def _double(arg: Any) -> Any:
    if not (isinstance(arg, Tensor) and arg.is_floating_point()):
        return arg
    return arg.detach().double().requires_grad_(arg.requires_grad)


def _output_gradient(layout: str, y: Tensor, dtype: torch.dtype) -> Callable[[torch.dtype], Tensor]:
    """A random gradient to y in that layout, as a function of the dtype; its values are exact in `dtype`."""
    shape = tuple(y.shape)
    base_shape = {"dense": shape, "expanded": shape[1:], "strided": shape[::-1]}[layout]
    base = torch.randn(base_shape).to(dtype)
    if layout == "strided":
        return lambda to: base.to(to).permute(*reversed(range(base.dim())))
    return lambda to: base.to(to).expand(shape)
