"""expert_mlp beside a dense MLP and beside Hugging Face's experts, on the same weights and routings.

A mixture of experts promises the quality of many parameters at the price of few: the yardstick is a dense MLP that
does the same FLOPs per token, of hidden width K·F. Its speed is the limit; the ratio to it says how much of the
hardware the sorting, the gathering and the many small products leave to use.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro
from tqdm import tqdm
from tyro.conf import arg

import _bench
import _tell
from _bench import Ratio, Result
from _expert_mlp import (
    BOTH,
    DENSE,
    DENSE_FLOAT32,
    FORWARD,
    GROUPED,
    HF_KINDS,
    OURS,
    RECOMPUTE,
    Shape,
    make_case,
    make_parameters,
)
from coterie.report import format_table

SHAPES: tuple[Shape, ...] = (
    (4096, 512, 512, 16, 2),
    (2048, 768, 256, 64, 8),
    (32, 768, 256, 64, 8),
    (1, 768, 256, 64, 8),
)

# What the library means to reach on two cores: over dense, or over the fastest of Hugging Face's.
COLUMNS = (("bfloat16", FORWARD), ("bfloat16", BOTH), ("float32", FORWARD), ("float32", BOTH))
DENSE_BARS = {SHAPES[0]: (0.70, 0.60, 0.90, 0.85), SHAPES[1]: (0.45, 0.40, 0.65, 0.60)}
HF_BARS = {SHAPES[2]: (1.3, 2.0, 1.3, 2.0), SHAPES[3]: (1.5, None, 1.3, None)}
HF_MEAN_BAR = 2.5
PEAK_BAR, RECOMPUTE_PEAK_BAR = 1.0, 0.6


@dataclass
class Options(_bench.Options):
    """Compare coterie's expert MLP with dense MLPs and with Hugging Face's experts.

    T tokens, D model width, F expert hidden width, E experts, K experts per token. Ratios are medians over
    interleaved rounds, each with fresh inputs and a fresh routing. With no options: four shapes, two dtypes, two
    kinds of routing, forward and forward+backward, in about twelve minutes on two slow cores.
    """

    shape: Annotated[
        tuple[Shape, ...],
        tyro.conf.UseAppendAction,
        arg(metavar="T D F E K", help_behavior_hint="(repeatable; default: 4 shapes)"),
    ] = ()
    """Measure this shape instead of the default ones."""
    dtypes: Annotated[
        tuple[Literal["float32", "bfloat16"], ...], arg(help_behavior_hint="(default: both; quick: float32)")
    ] = ()
    """Of weights and inputs."""
    passes: Annotated[
        tuple[Literal["fwd", "fwd+bwd"], ...],
        arg(help_behavior_hint="(default: both, but only fwd for T = 1: decoding does not train)"),
    ] = ()
    """Forward without recording, forward and backward, or both."""
    routings: Annotated[
        tuple[Literal["balanced", "zipf"], ...], arg(help_behavior_hint="(default: both; quick: balanced)")
    ] = ()
    """Experts equally likely, or the r-th most popular 1/r as likely as the first."""

    def check(self) -> None:
        super().check()
        for shape in self.shape:
            if min(shape) < 1 or shape[4] > shape[3]:
                got = " ".join(map(str, shape))
                raise ValueError(f"--shape: got {got}, must be T D F E K, all positive, with K at most E")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code: 0 also when a bar is missed, 1 for a wrong result, 2 for options."""
    options = _bench.start(Options, argv, prog="python benchmarks/bench_expert_mlp.py")
    cases = [
        (shape, dtype, routing, passes)
        for shape in options.shape or SHAPES
        for dtype in options.dtypes or (("float32",) if options.quick else ("bfloat16", "float32"))
        for passes in options.passes or ((FORWARD,) if shape[0] == 1 else (FORWARD, BOTH))
        for routing in options.routings or (("balanced",) if options.quick else ("balanced", "zipf"))
    ]
    facts = _tell.machine(options.device)
    print(_tell.format_machine(facts))
    if not facts["native bf16"] and any(dtype == "bfloat16" for _, dtype, _, _ in cases):
        print(
            "\nnative bf16: no. Without bf16 instructions torch multiplies bf16 several times slower than float32, "
            "and coterie multiplies\nits bf16 tensors in float32: its ratio over the bf16 dense MLP then says little. "
            f"Read the one over {DENSE_FLOAT32!r}."
        )
    print()
    try:
        results = _measure(cases, options, facts)
    except _bench.WrongResult as error:
        print(f"bench_expert_mlp: wrong result: {error}", file=sys.stderr)
        return 1
    print(format_bars(results))
    print(f"\n{options.out / 'expert_mlp.json'}")
    print(
        _tell.write_chart(
            options.out / "expert_mlp.png",
            lambda: _tell.bar_chart(
                results,
                column=lambda result: "T {T}, D {D}, F {F}, E {E}, K {K}".format(**result.labels),
                row=lambda result: result.labels["dtype"],
                series=lambda result: f"{result.labels['pass']}, {result.labels['routing']}",
                title="Expert MLPs: speed over a dense MLP of equal FLOPs",
                subtitle=f"medians and quartiles of interleaved rounds; {facts['cpu']}, {facts['threads']} threads, "
                f"torch {facts['torch']}, native bf16: {'yes' if facts['native bf16'] else 'no'}",
            ),
        )
    )
    return 0


def _measure(cases: Sequence[tuple], options: Options, facts: dict) -> list[Result]:
    results: list[Result] = []
    slow: dict[tuple, str] = {}  # who was too slow need not show it again under another routing
    parameters, made_for = None, None
    with tqdm(cases, unit="case", disable=None) as bar:
        for shape, dtype, routing, passes in bar:
            if made_for != (shape, dtype):
                parameters = None  # frees the last ones before new ones are made
                parameters, made_for = make_parameters(shape, getattr(torch, dtype), options), (shape, dtype)
            skips = {name: why for (*where, name), why in slow.items() if where == [shape, dtype, passes]}
            case = make_case(shape, dtype, routing, passes, parameters, options, skips)
            result = _bench.measure(
                case, options, say=lambda text, title=case.title: bar.set_description(f"{title}: {text}")
            )
            slow |= {(shape, dtype, passes, name): row.skipped for name, row in result.rows.items() if row.skipped}
            results.append(result)
            tqdm.write(_tell.format_result(result, _columns(result)))
            # After every case, so that an interrupted run keeps what it has.
            _tell.write_json(
                options.out / "expert_mlp.json",
                {
                    "benchmark": "expert_mlp",
                    "machine": facts,
                    "seed": options.seed,
                    "default malloc": options.default_malloc,
                    "cases": [each.to_dict() for each in results],
                    "bars": bars(results),
                },
            )
    return results


# --- tables ---


def _columns(result: Result) -> dict[str, Callable[[str], str]]:
    columns = {}
    if DENSE_FLOAT32 in result.rows:
        columns[f"× {DENSE_FLOAT32}"] = lambda name: _median(result.ratio(name, DENSE_FLOAT32))
    best = result.fastest(list(HF_KINDS))
    if best:
        columns["× HF's best"] = lambda name: _median(result.ratio(name, best))
    return columns


def _median(ratio: Ratio | None) -> str:
    return f"{ratio.median:.2f}" if ratio else "–"


def bars(results: Sequence[Result]) -> list[dict]:
    """Every figure that has a bar: what, where, the value, the bar, and whether it is met."""
    found = []
    speedups = []
    for result in results:
        labels = result.labels
        shape, column = tuple(labels[letter] for letter in "TDFEK"), (labels["dtype"], labels["pass"])
        best = result.fastest(list(HF_KINDS))
        for what, kinds, over in (("over dense", DENSE_BARS, DENSE), ("over HF's best", HF_BARS, best)):
            bar = kinds[shape][COLUMNS.index(column)] if shape in kinds else None
            ratio = result.ratio(OURS, over) if over else None
            if bar is not None and ratio is not None:
                extra = result.ratio(OURS, DENSE_FLOAT32)
                more = {"over dense float32": extra.median} if extra and over == DENSE else {}
                found.append(
                    {**labels, "what": what, "value": ratio.median, **more, "bar": bar, "met": ratio.median >= bar}
                )
        if labels["pass"] != BOTH:
            continue
        if shape in DENSE_BARS and best and (ratio := result.ratio(OURS, best)):
            speedups.append(ratio.median)
        theirs = result.rows.get(GROUPED)
        for name, bar in ((OURS, PEAK_BAR), (RECOMPUTE, RECOMPUTE_PEAK_BAR)):
            own = result.rows.get(name)
            if own and own.seconds and theirs and theirs.seconds and (shape in DENSE_BARS or shape in HF_BARS):
                value = own.peak_bytes / theirs.peak_bytes
                what = f"{name}: peak over {GROUPED}'s"
                if name == RECOMPUTE and shape not in DENSE_BARS:
                    bar = None  # few tokens: the weights' gradients are most of the peak, whoever computes them
                met = value <= bar if bar else None
                found.append({**labels, "what": what, "value": value, "bar": bar, "met": met})
    if speedups:
        value = statistics.geometric_mean(speedups)
        what = f"fwd+bwd over HF's best, geometric mean of {len(speedups)} cases of the first two shapes"
        found.append({"what": what, "value": value, "bar": HF_MEAN_BAR, "met": value >= HF_MEAN_BAR})
    return found


def format_bars(results: Sequence[Result]) -> str:
    """The bars as tables: speed by shape and column, the mean over the coarse and the fine shape, and peak memory."""
    found = bars(results)
    if not found:
        return "No bars for these shapes."
    speed: dict[tuple, dict] = {}
    memory: dict[tuple, dict] = {}
    lines = ["Bars"]
    for entry in found:
        if "T" not in entry:
            continue
        where = ", ".join(str(entry[letter]) for letter in "TDFEK")
        if "peak" in entry["what"]:
            key = (f"{where} {entry['dtype']} {entry['routing']}",)
            memory.setdefault(key, {})[entry["what"]] = _judged(entry, "≤", ">")
        else:
            key = (f"{where} {entry['routing']}", entry["what"])
            speed.setdefault(key, {})[entry["dtype"], entry["pass"]] = _judged(entry, "≥", "<")
    if speed:
        rows = [[*key, *(cells.get(column, "–") for column in COLUMNS)] for key, cells in speed.items()]
        lines.append(format_table(["T, D, F, E, K", "", *(f"{d} {p}" for d, p in COLUMNS)], rows))
    if memory:
        kinds = list(dict.fromkeys(kind for cells in memory.values() for kind in cells))
        rows = [[*key, *(cells.get(kind, "–") for kind in kinds)] for key, cells in memory.items()]
        lines += ["", format_table(["fwd+bwd", *kinds], rows)]
    lines += ["", *(f"{entry['what']}: {_judged(entry, '≥', '<')}" for entry in found if "T" not in entry)]
    judged = [entry["met"] for entry in found if entry["met"] is not None]
    lines.append(f"{sum(judged)} of {len(judged)} met")
    return "\n".join(lines)


def _judged(entry: dict, good: str, bad: str) -> str:
    said = f"{entry['value']:.2f}"
    if entry["met"] is not None:
        said += f" {good if entry['met'] else bad} {entry['bar']:.2f} {'met' if entry['met'] else 'MISSED'}"
    extra = entry.get("over dense float32")
    return said + (f" (float32: {extra:.2f})" if extra else "")


if __name__ == "__main__":
    sys.exit(main())
