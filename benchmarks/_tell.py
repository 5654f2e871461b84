"""What a benchmark tells: a table per case, one JSON of everything, one picture."""

import json
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

import _bench
from _bench import Case, Options, Result
from coterie import __version__
from coterie.report import format_table, human_bytes, save_figure
from coterie.training import resolve_precision, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Paul Tol's pairs of hue and tint (https://sronpersonalpages.nl/~pault/): a series and its variant stand together.
COLOURS = ("#4477AA", "#A6BFD9", "#AA3377", "#DDA8C5", "#228833", "#A5CFAC")


def format_result(result: Result, columns: Mapping[str, Callable[[str], str]]) -> str:
    """A case's table: time, ratio over the baseline, `columns`, memory and error; then who was skipped and why.

    Args:
        result: of `measure`.
        columns: further columns, title -> contender -> cell.
    """
    header = ["contender", "ms", f"× {result.baseline} [quartiles]", *columns, "peak", "saved", "error", "rounds"]
    rows = []
    for name, row in result.rows.items():
        if row.seconds:
            rows.append(
                [
                    name,
                    f"{statistics.median(row.seconds) * 1e3:.2f}",
                    str(result.ratio(name, result.baseline)),
                    *(cell(name) for cell in columns.values()),
                    human_bytes(row.peak_bytes),
                    human_bytes(row.saved_bytes),
                    f"{row.error:.0e}",
                    str(len(row.seconds)),
                ]
            )
    width = max(len(name) for name in [*result.rows, header[0]])
    skipped = [f"{name:<{width}}  skipped: {row.skipped}" for name, row in result.rows.items() if row.skipped]
    title = result.title
    # The column of names is as wide as among all contenders, so that the skipped ones line up.
    header[0] = f"{header[0]:<{width}}"
    return "\n".join([title, format_table(header, rows), *skipped, ""])


def bar_chart(
    results: Sequence[Result],
    *,
    column: Callable[[Result], str],
    row: Callable[[Result], str],
    series: Callable[[Result], str],
    title: str,
    subtitle: str = "",
) -> "Figure":
    """Ratios over the baseline: a panel per column and row, a group of bars per contender, a bar per series.

    Args:
        results: at least one.
        column: result -> the panel's column, by its title.
        row: result -> the panel's row.
        series: result -> which bar of each group it is.
        title: of the figure.
        subtitle: one line below.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib.figure
    import matplotlib.patches

    columns, rows, kinds = (list(dict.fromkeys(map(key, results))) for key in (column, row, series))
    colours = dict(zip(kinds, COLOURS if len(kinds) > 3 else COLOURS[::2], strict=False))
    tallest = max(len(result.rows) for result in results) - 1
    height = 0.85 + tallest * (0.12 + 0.16 * len(kinds))
    size = (max(2.0 + 3.6 * len(columns), 8.0), 1.25 + height * len(rows))
    figure = matplotlib.figure.Figure(figsize=size, dpi=110)
    inch = 1 / size[1]
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - 1.1 * inch), w_pad=0.08, h_pad=0.08)
    figure.text(0.01, 1 - 0.12 * inch, title, size=15, weight="bold", va="top")
    figure.text(0.01, 1 - 0.47 * inch, subtitle, size=9, color="#777777", va="top")
    marks = [matplotlib.patches.Patch(color=colours[kind]) for kind in kinds]
    corner = (0.0, 1 - 0.68 * inch)
    figure.legend(marks, kinds, loc="upper left", bbox_to_anchor=corner, ncols=len(kinds), frameon=False, fontsize=9)
    panels = figure.subplots(len(rows), len(columns), squeeze=False)
    for axes, (at_row, at_column) in zip(panels.flat, [(r, c) for r in rows for c in columns], strict=True):
        here = {series(each): each for each in results if (row(each), column(each)) == (at_row, at_column)}
        axes.set_title(f"{at_column}, {at_row}", loc="left", size=10, weight="bold", pad=16)
        if here:
            _draw_bars(axes, {kind: here[kind] for kind in kinds if kind in here}, colours)
        else:
            axes.set_axis_off()
    return figure


def _draw_bars(axes, results: Mapping[str, Result], colours: Mapping[str, str]) -> None:
    """One panel: the baseline is the dotted line at 1; who was skipped says why in place of a bar."""
    fullest = max(results.values(), key=lambda result: len(result.rows))
    names = [name for name in fullest.rows if name != fullest.baseline]
    ratios = {(name, kind): each.ratio(name, each.baseline) for kind, each in results.items() for name in names}
    furthest = max([1.0, *(ratio.high for ratio in ratios.values() if ratio)])
    thick = 0.8 / len(results)
    for place, (kind, result) in enumerate(results.items()):
        for index, name in enumerate(names):
            where = index + (place - (len(results) - 1) / 2) * thick
            ratio = ratios[name, kind]
            if ratio:
                axes.barh(where, ratio.median, thick * 0.9, color=colours[kind])
                axes.plot([ratio.low, ratio.high], [where, where], color="#222222", linewidth=1)
                end, said, faint = max(ratio.high, ratio.median), f" {ratio.median:.2f}", "#444444"
            else:
                end, said, faint = 0, f" {result.rows[name].skipped}" if name in result.rows else "", "#999999"
            axes.text(end, where, said, size=6.5, color=faint, va="center")
    axes.axvline(1, color="#777777", linewidth=0.9, linestyle=(0, (2, 3)), zorder=0)
    axes.text(1, -0.6, fullest.baseline, size=7.5, color="#777777", ha="center", va="bottom")
    axes.set_xlim(0, furthest * 1.15)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="both", length=0, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def measure_cases(
    name: str,
    cases: Sequence[tuple[str, int, str]],
    make_case: Callable[[str, int, str, Options], Case],
    bars: Callable[[Sequence[Result]], list[dict]],
    draw: Callable[[Sequence[Result], Mapping], "Figure"],
    options: Options,
) -> int:
    """Measures cases (kind, length, dtype) one after another and tells of each; then the bars, and the picture.

    The JSON is written after every case. Returns the exit code: 0 also when a bar is missed, 1 for a wrong result.
    """
    facts, results = machine(options.device), []
    print(format_machine(facts) + "\n")
    path = options.out / f"{name}.json"
    try:
        with tqdm(cases, unit="case", disable=None) as progress:
            for arguments in progress:
                case = make_case(*arguments, options)
                say = partial(_say, progress, case.title)
                results.append(_bench.measure(case, options, say=say))
                tqdm.write(format_result(results[-1], {}))
                content = {"benchmark": name, "machine": facts, "seed": options.seed}
                content |= {"cases": [result.to_dict() for result in results], "bars": bars(results)}
                write_json(path, content)
    except _bench.WrongResult as error:
        print(f"bench_{name}: wrong result: {error}", file=sys.stderr)
        return 1
    print(format_bars(bars(results), ("L", "dtype", "kind")))
    print(f"\n{path}")
    print(write_chart(path.with_suffix(".png"), lambda: draw(results, facts)))
    return 0


def _say(progress: tqdm, title: str, text: str) -> None:
    progress.set_description(f"{title}: {text}")


def format_bars(found: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> str:
    """A row for every figure that has a bar: where, what, the value, the bar, and whether it is met."""
    if not found:
        return "No bars for these cases."
    rows = [
        [
            _bench.title({name: entry[name] for name in labels}),
            entry["what"],
            f"{entry['value']:.2f}",
            f"{entry['bar']:.2f}",
            "met" if entry["met"] else "MISSED",
        ]
        for entry in found
    ]
    table = format_table(["", "figure", "value", "bar", ""], rows)
    return f"{table}\n{sum(entry['met'] for entry in found)} of {len(found)} met"


def curves(
    results: Sequence[Result],
    *,
    title: str,
    machine: Mapping[str, Any],
    kinds: Mapping[str, str],
    names: Sequence[str],
    steps: Sequence[str] = (),
) -> "Figure":
    """Microseconds a token over the length L: a row of panels a dtype, a panel a kind, a line a contender.

    Args:
        kinds: by label, how a panel is called.
        names: of contenders, in the order of colours.
        steps: kinds that are of one token, whatever the length before it.
    """
    import matplotlib.figure

    kinds = {kind: name for kind, name in kinds.items() if any(r.labels["kind"] == kind for r in results)}
    dtypes = list(dict.fromkeys(result.labels["dtype"] for result in results))
    size = (1.0 + 3.8 * len(kinds), 1.2 + 2.9 * len(dtypes))
    figure = matplotlib.figure.Figure(figsize=size, dpi=110)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - 0.75 / size[1]))
    figure.text(0.01, 1 - 0.1 / size[1], title, size=15, weight="bold", va="top")
    said = f"median times, less is faster; {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
    figure.text(0.01, 1 - 0.43 / size[1], said, size=9, color="#777777", va="top")
    panels = figure.subplots(len(dtypes), len(kinds), squeeze=False)
    for axes, (dtype, kind) in zip(panels.flat, [(d, k) for d in dtypes for k in kinds], strict=True):
        here = [r for r in results if (r.labels["dtype"], r.labels["kind"]) == (dtype, kind)]
        for name, colour in zip(names, COLOURS[::2] + COLOURS[3::2], strict=False):
            medians = {r.labels["L"]: statistics.median(r.rows[name].seconds) for r in here if _was_timed(r, name)}
            if medians:
                times = [1e6 * seconds / (1 if kind in steps else length) for length, seconds in medians.items()]
                axes.plot([*medians], times, "o-", color=colour, label=name, markersize=3)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatted("{x:g}")
        axes.tick_params(which="minor", labelsize=7)
        axes.set_title(f"{kinds[kind]}, {dtype}", loc="left", size=10, weight="bold")
        axes.set_xlabel("tokens before" if kind in steps else "L, tokens", size=8)
        axes.set_ylabel("µs a token", size=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(frameon=False, fontsize=8)
    return figure


def _was_timed(result: Result, name: str) -> bool:
    return name in result.rows and bool(result.rows[name].seconds)


def write_chart(path: Path, draw: Callable[[], "Figure"]) -> str:
    """Draws and saves a PNG; returns what to tell the user, also when matplotlib is not there to draw it."""
    try:
        figure = draw()
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return "no picture: matplotlib is not installed (pip install 'coterie[plot]')"
    save_figure(figure, path)
    return str(path)


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures were measured on."""
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "native bf16": resolve_precision("auto", device) == "bf16",
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "coterie": __version__,
    }
    for package in ("torch", "transformers", "triton"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = None
    return facts


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "") or (
        platform.processor() or platform.machine()
    )


def format_machine(facts: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    said = {True: "yes", False: "no", None: "not installed"}
    parts = []
    for name, value in facts.items():
        known = value is None or isinstance(value, bool)
        parts.append(f"{name}: {said[value] if known else value}")
    return ", ".join(parts)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes `content`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
