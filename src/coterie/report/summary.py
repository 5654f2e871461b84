"""The figures of trained models side by side: what they cost, how fast they ran, what they reached."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from coterie.report.cost import ModelCost
from coterie.report.table import format_table, human_bytes, human_count

Figures = Mapping[str, Any]

# Bits per byte by position are shown of contexts from here on; shorter ones say little about a mixer.
LONG_CONTEXT = 1024


def _ratio(one: float, other: float) -> str:
    return f"{one / other:.2f} ×" if other else ""


def _difference(one: float, other: float) -> str:
    return f"{one - other:+.3f}".replace("-", "−")


def _same(*_) -> str:
    return ""


# (title, figure, how it is written, how two are compared)
_ROWS: tuple[tuple[str, str, Callable[[Any], str], Callable[[float, float], str]], ...] = (
    ("parameters", "params", human_count, _ratio),
    ("active parameters", "active_params", human_count, _ratio),
    ("FLOPs per token, forward", "flops_per_token", human_count, _ratio),
    ("saved for backward per token", "saved_bytes_per_token", human_bytes, _ratio),
    ("training tokens per second", "tokens_per_second", human_count, _ratio),
    ("bits per byte at equal tokens", "valid_bpb_equal_tokens", "{:.3f}".format, _difference),
    ("bits per byte at equal seconds", "valid_bpb_equal_seconds", "{:.3f}".format, _difference),
    ("load entropy (1 = even)", "load_entropy", "{:.3f}".format, _same),
    ("dead experts", "dead_experts", str, _same),
)


def summarize(costs: Mapping[str, ModelCost], measured: Mapping[str, Figures]) -> dict[str, dict[str, Any]]:
    """One flat dict of JSON-able figures per contender.

    Args:
        costs: what each contender costs, by name.
        measured: `Comparison.to_dict()` of the same contenders: bits per byte at equal tokens and seconds and by
            position, speed, load entropy and dead experts (None where there are no experts).

    Raises:
        ValueError: the names differ.
    """
    if set(costs) != set(measured):
        raise ValueError(f"costs are of {sorted(costs)}, measured are {sorted(measured)}; must be the same contenders")
    figures = {}
    for name, cost in costs.items():
        total = cost.total
        counted = {
            "params": total.params,
            "active_params": total.active_params,
            "flops_per_token": total.flops,
            "saved_bytes_per_token": total.saved_bytes,
        }
        figures[name] = {**counted, **measured[name]}
    return figures


def format_summary(figures: Mapping[str, Figures]) -> str:
    """The table that ends a training run: a column per contender, and for two of them how the first compares."""
    names = list(figures)
    rows = []
    for title, key, write, compare in _ROWS:
        if len(names) == 1 and key == "valid_bpb_equal_seconds":
            continue
        if len(names) == 1 and key == "valid_bpb_equal_tokens":
            title = "bits per byte on unseen text"
        values = [figures[name].get(key) for name in names]
        if all(value is None for value in values):
            continue
        row = [title, *("–" if value is None else write(value) for value in values)]
        if len(names) == 2:
            row.append("" if None in values else compare(*values))
        rows.append(row)
    return format_table(["", *_columns(names)], rows)


def format_positions(figures: Mapping[str, Figures]) -> str:
    """A table of the bits per byte at the end, by position in the context.

    "" where that is shorter than 1,024, or where a contender's log has no such figures.
    """
    names = list(figures)
    edges = figures[names[0]]["position_edges"]
    if any(figures[name]["position_edges"] is None for name in names) or edges[-1] < LONG_CONTEXT:
        return ""
    rows = []
    for index, (first, end) in enumerate(pairwise(edges)):
        values = [figures[name]["position_bpb"][index] for name in names]
        compared = [_difference(*values)] if len(names) == 2 else []
        rows.append([f"{first:,}–{end - 1:,}", *map("{:.3f}".format, values), *compared])
    return format_table(["bits per byte at positions", *_columns(names)], rows)


def _columns(names: list[str]) -> list[str]:
    """Titles of the columns: the names, and of two their comparison."""
    return [*names, f"{names[0]} : {names[1]}"] if len(names) == 2 else names
