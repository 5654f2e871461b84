"""Small aligned tables and human units for the terminal: plain text that survives a pipe, a log and a README."""

from collections.abc import Sequence

_DECIMAL = ("", " k", " M", " G", " T", " P")
_BINARY = (" B", " KiB", " MiB", " GiB", " TiB", " PiB")


def human_count(value: float) -> str:
    """Three significant figures and a decimal unit: 1234567 -> "1.23 M". Whole numbers below 1000 stay whole."""
    return _human(value, 1000, _DECIMAL)


def human_bytes(value: float) -> str:
    """Three significant figures and a binary unit: 1536 -> "1.50 KiB"."""
    return _human(value, 1024, _BINARY)


def _human(value: float, base: int, units: Sequence[str]) -> str:
    if value < 0:
        return "-" + _human(-value, base, units)
    power = 0
    # 999.6 is rounded to 1000 by what follows, so it belongs to the next unit already; binary units run to 1023.
    while value >= base - 0.5 and power < len(units) - 1:
        value /= base
        power += 1
    if power == 0 and value == int(value):
        return f"{int(value)}{units[0]}"
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f}{units[power]}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, rules: Sequence[int] = ()) -> str:
    """The table as text: first column to the left, the others to the right, two spaces between.

    Args:
        header: one title per column.
        rows: strings, one per column each.
        rules: a thin rule is drawn before these rows (`len(rows)` is not a row); one always follows the header.

    Raises:
        ValueError: a row has another number of columns than the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"rows: {list(row)} has {len(row)} columns, the header {len(header)}")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()

    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [line(header), rule]
    for index, row in enumerate(rows):
        if index in rules:
            lines.append(rule)
        lines.append(line(row))
    return "\n".join(lines)
