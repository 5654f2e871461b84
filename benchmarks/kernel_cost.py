"""What the Triton kernels of MoE layers cost, beside every peer that is installed.

Without a GPU nothing is timed: kernels run in Triton's interpreter, where their bytes and FLOPs are counted, and are
compiled ahead of time, which tells registers, shared memory and instructions. A bound follows from published figures of
a GPU: no kernel that moves these bytes and does these FLOPs can be faster there, and none need be as fast. With a GPU
(`--device cuda`) the same layers are timed instead, beside dense ones.

Only Triton's launches are counted: what torch's own operations around them move (a peer's zeroing of outputs, say) is
not.
"""

import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from tqdm import tqdm
from tyro.conf import arg

import _bench
import _kernel_cost
import _kernel_time
import _tell
from _kernel_cost import GPUS, OURS, RECOMPUTE, KernelCost, LayerCost, Shape
from coterie.report import format_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHAPES: tuple[Shape, ...] = (
    (1024, 256, 128, 16, 4),
    (8, 256, 128, 16, 4),
    (1024, 256, 512, 16, 4),
    (1024, 768, 256, 64, 8),
)
# How much of the last tiles is empty is a matter of luck: that bar is for the mean of so many routings.
ROUTINGS = 100
# What the library means to reach at the first shape, at most: (figure, H kept, recompute).
BARS = (
    ("distinct MB", 32.0, 28.5),
    ("requested MB", 75.0, 90.0),
    ("saved MB", 2.7, 0.6),
    ("launches forward", 4, 4),
    ("launches backward", 3, 3),
    (f"executed / useful FLOPs forward, mean of {ROUTINGS} routings", 1.13, 1.13),
)
_MB = 1e6


@dataclass
class Options(_bench.Options):
    """Count, on a CPU, or time, on a GPU, the kernels of MoE layers.

    T tokens, D model width, F expert hidden width, E experts, K experts per token. Counting takes minutes a shape and
    contender, the last of the four shapes most; --quick counts the first.
    """

    shape: Annotated[
        tuple[Shape, ...],
        tyro.conf.UseAppendAction,
        arg(metavar="T D F E K", help_behavior_hint="(repeatable; default: 4 shapes)"),
    ] = ()
    """Take this shape instead of the default ones."""
    dtype: Literal["float16", "bfloat16"] = "float16"
    """Of inputs and matrices."""
    target: Literal["sm_80", "sm_90", "sm_100", "gfx942"] = "sm_90"
    """Whose tiles are counted and compiled; on a GPU, its own are measured."""
    device: Annotated[str, arg(metavar="DEVICE", help_behavior_hint="(default: cuda where there is one)")] = (
        "cuda" if torch.cuda.is_available() else "cpu"
    )
    """cpu: count; cuda: time."""

    def check(self) -> None:
        super().check()
        for shape in self.shape:
            if min(shape) < 1 or shape[4] > shape[3]:
                got = " ".join(map(str, shape))
                raise ValueError(f"--shape: got {got}, must be T D F E K, all positive, with K at most E")

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return self.shape or (SHAPES[:1] if self.quick else SHAPES)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code: 0 also when a bar is missed, 1 for a wrong result, 2 for options."""
    options = _bench.start(Options, argv, prog="python benchmarks/kernel_cost.py")
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before kernels are imported
    facts = _tell.machine(options.device)
    print(_tell.format_machine(facts) + "\n")
    try:
        if options.device == "cpu":
            _count(options, facts)
        else:
            _kernel_time.run(options, facts)
    except _bench.WrongResult as error:
        print(f"kernel_cost: wrong result: {error}", file=sys.stderr)
        return 1
    return 0


def _count(options: Options, facts: dict[str, Any]) -> list[LayerCost]:
    gpu, bandwidth, peak = GPUS[options.target]
    print(
        f"Counted in Triton's interpreter with {options.target}'s tiles, compiled for it; nothing here is a time. "
        f"bound: by {gpu}'s {bandwidth / 1e12:.2f} TB/s and {peak / 1e12:.0f} TFLOP/s, launch by launch. warps ≤: "
        "how many registers, shared memory and block sizes let be on an SM or CU at once.\n"
    )
    computes, missing = _kernel_cost.contenders()
    for name, why in missing.items():
        print(f"{name}: {why}\n")
    costs: list[LayerCost] = []
    cases = [(shape, name) for shape in options.shapes for name in computes]
    problem = expected = made_for = None
    with tqdm(cases, unit="case", disable=None) as bar:
        for shape, name in bar:
            labels = dict(zip("TDFEK", shape, strict=True)) | {"dtype": options.dtype}
            bar.set_description(f"{_bench.title(labels)}: {name}")
            if made_for != shape:
                problem = _kernel_cost.make_problem(shape, getattr(torch, options.dtype), options.seed)
                expected, made_for = _kernel_cost.expected_results(problem), shape
            cost, launches = _kernel_cost.count(name, computes[name], problem, expected, options.target, labels)
            _kernel_cost.compile_kernels(cost, launches, options.target)
            costs.append(cost)
            tqdm.write(format_kernels(cost))
            _write(options, facts, costs)  # after every case, so that an interrupted run keeps what it has
    print(format_layers(costs))
    print(format_bars(bars(costs)))
    print(f"\n{options.out / 'kernel_cost.json'}")
    print(_tell.write_chart(options.out / "kernel_cost.png", lambda: draw(costs, options.target)))
    return costs


def _write(options: Options, facts: dict[str, Any], costs: Sequence[LayerCost]) -> None:
    gpu, bandwidth, peak = GPUS[options.target]
    content = {
        "benchmark": "kernel_cost",
        "machine": facts,
        "counted": "requested, distinct_load, distinct_store, flops, launches, saved: bytes, FLOPs; not times",
        "target": options.target,
        "bound": {"gpu": gpu, "bytes per second": bandwidth, "FLOP per second": peak},
        "seed": options.seed,
        "cases": [cost.to_dict() for cost in costs],
        "bars": bars(costs),
    }
    _tell.write_json(options.out / "kernel_cost.json", content)


# --- tables ---


def format_kernels(cost: LayerCost) -> str:
    """A contender's kernels at one shape, forward then backward, and their sums."""
    header = [
        "kernel",
        *(f"counted {what}" for what in ("launches", "requested MB", "loaded MB", "stored MB", "GFLOP")),
        *("compiled registers", "spilled", "shared KiB", "warps ≤", "tensor cores"),
        "bound µs",
    ]
    rows = [
        [f"{each} {kernel.kernel}", *_cells(kernel)]
        for each in ("forward", "backward")
        for kernel in getattr(cost, each)
    ]
    total = KernelCost("", *(cost.total(name) for name in list(KernelCost.__dataclass_fields__)[1:-1]))
    table = format_table(header, [*rows, ["in all", *_cells(total)]], rules=(len(rows),))
    return f"{_bench.title(cost.labels)}: {cost.name}\n{table}\n"


def _cells(kernel: KernelCost) -> list[str]:
    compiled = kernel.compiled
    counted = [
        str(kernel.launches),
        *(f"{value / _MB:.2f}" for value in (kernel.requested, kernel.distinct_load, kernel.distinct_store)),
        f"{kernel.flops / 1e9:.3f}",
    ]
    bound = f"{kernel.bound_seconds * 1e6:.1f}"
    if not compiled:
        return [*counted, *[""] * 5, bound]
    if compiled["error"]:
        return [*counted, "error", *[""] * 4, bound]
    used = [name for name, times in compiled["instructions"].items() if times]
    return [
        *counted,
        str(compiled["registers"]),
        str(compiled["spilled"]),
        f"{compiled['shared'] / 1024:.1f}",
        str(compiled["warps"]),
        " ".join(used) or "–",
        bound,
    ]


def format_layers(costs: Sequence[LayerCost]) -> str:
    """The contenders beside each other, shape by shape."""
    counted = ("launches", "requested MB", "distinct MB", "saved MB", "GFLOP executed / useful")
    header = ["forward + backward", *(f"counted {what}" for what in counted), "bound µs", "error"]
    rows, rules = [], []
    for number, cost in enumerate(costs):
        if number and cost.labels != costs[number - 1].labels:
            rules.append(number)
        both = lambda what, unit, cost=cost: " + ".join(  # noqa: E731
            f"{cost.total(what, each) / unit:.1f}" for each in ("forward", "backward")
        )
        executed = [
            f"{cost.total('flops', each) / 1e9:.2f} / {times * cost.useful_flops / 1e9:.2f}"
            for each, times in (("forward", 1), ("backward", 2))
        ]
        rows.append(
            [
                f"{_bench.title(cost.labels)}: {cost.name}",
                f"{cost.total('launches', 'forward')} + {cost.total('launches', 'backward')}",
                both("requested", _MB),
                both("distinct", _MB),
                f"{cost.saved / _MB:.2f}",
                " + ".join(executed),
                both("bound_seconds", 1e-6),
                f"{cost.error:.0e}",
            ]
        )
    return format_table(header, rows, rules=rules) + "\n"


def bars(costs: Sequence[LayerCost]) -> list[dict[str, Any]]:
    """Every figure of ours that has a bar: the value, the bar, and whether it is met."""
    found = []
    for cost in costs:
        if tuple(cost.labels[letter] for letter in "TDFEK") != SHAPES[0] or cost.name not in (OURS, RECOMPUTE):
            continue
        values = (
            cost.total("distinct") / _MB,
            cost.total("requested") / _MB,
            cost.saved / _MB,
            cost.total("launches", "forward"),
            cost.total("launches", "backward"),
            _mean_executed(SHAPES[0], cost.tile_rows),
        )
        for (what, kept, recompute), value in zip(BARS, values, strict=True):
            bar = kept if cost.name == OURS else recompute
            found.append(
                {**cost.labels, "contender": cost.name, "what": what, "value": value, "bar": bar, "met": value <= bar}
            )
    return found


def _mean_executed(shape: Shape, tile_rows: int) -> float:
    """Executed over useful FLOPs forward, by the height of tiles that was counted with, over random routings."""
    routings = (_kernel_cost.make_routing(shape, torch.Generator().manual_seed(seed)) for seed in range(ROUTINGS))
    return statistics.mean(
        _kernel_cost.padded_over_used(routing.expert_ids, shape[3], tile_rows) for routing in routings
    )


def format_bars(found: Sequence[dict[str, Any]]) -> str:
    if not found:
        return "No bars for these shapes."
    rows = []
    for what in dict.fromkeys(entry["what"] for entry in found):
        here = {entry["contender"]: entry for entry in found if entry["what"] == what}
        rows.append([what, *(_judged(here.get(name)) for name in (OURS, RECOMPUTE))])
    title = f"counted, {_bench.title({letter: found[0][letter] for letter in 'TDFEK'})}"
    table = format_table([title, OURS, RECOMPUTE], rows)
    return f"{table}\n{sum(entry['met'] for entry in found)} of {len(found)} met"


def _judged(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "–"
    return (
        f"{entry['value']:.4g} {'≤' if entry['met'] else '>'} {entry['bar']:.4g} {'met' if entry['met'] else 'MISSED'}"
    )


def draw(costs: Sequence[LayerCost], target: str) -> "Figure":
    """A row of panels per shape: distinct and requested bytes and FLOPs over the useful ones, of each contender.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib.figure

    shapes = list(dict.fromkeys(_bench.title(cost.labels) for cost in costs))
    figure = matplotlib.figure.Figure(figsize=(12, 1.2 + 1.5 * len(shapes)), dpi=110, layout="constrained")
    figure.suptitle(
        f"Counted in Triton's interpreter with {target}'s tiles, not timed", x=0.01, ha="left", weight="bold"
    )
    panels = figure.subplots(len(shapes), 3, squeeze=False)
    columns = (
        ("distinct MB", "distinct", _MB),
        ("requested MB", "requested", _MB),
        ("executed / useful FLOPs", "flops", 0),
    )
    for row, shape in zip(panels, shapes, strict=True):
        here = [cost for cost in costs if _bench.title(cost.labels) == shape]
        for axes, (title, what, unit) in zip(row, columns, strict=True):
            left = [0.0] * len(here)
            for colour, each in zip(_tell.COLOURS, ("forward", "backward"), strict=False):
                widths = [cost.total(what, each) / (unit or 3 * cost.useful_flops) for cost in here]
                axes.barh(range(len(here)), widths, 0.7, left=left, color=colour, label=each)
                left = [a + b for a, b in zip(left, widths, strict=True)]
            for at, end in enumerate(left):
                axes.text(end, at, f" {end:.3g}", size=7, va="center")
            axes.set_title(f"{title}, counted: {shape}" if axes is row[0] else title, loc="left", size=8, weight="bold")
            axes.set_yticks(range(len(here)), [cost.name for cost in here], size=8)
            axes.set_ylim(len(here) - 0.5, -0.5)
            axes.set_xlim(0, max(left) * 1.2)
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="upper right", ncols=2, frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    sys.exit(main())
