"""The picture of a training run: who learns faster, per token and per second, who makes use of a long context, and what
the experts carried meanwhile.

Every title states what its panel shows, computed from the numbers drawn. Figures are made without pyplot, so nothing
global is touched and no window can open. matplotlib is imported only when a figure is made: `pip install
'coterie[plot]'`.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from coterie.models.pretrained import write_atomically
from coterie.report.summary import LONG_CONTEXT
from coterie.report.table import human_count
from coterie.report.telemetry import dead_experts, load_entropy, load_imbalance

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES = 10.0
DPI = 150

# Okabe and Ito's colours, told apart with every common kind of colour vision (https://jfly.uni-koeln.de/color/).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
INK, FAINT = "#222222", "#777777"

# Loads are drawn from a quarter of the fair share to four times it; what is beyond has the end's colour.
LARGEST_RATIO = 4.0
# Two results nearer to each other than this many bits per byte are called level.
LEVEL = 0.005

_LOSS_HEIGHT, _POSITION_HEIGHT = 3.9, 3.4  # inches


class Contender(Protocol):
    """What is drawn of one model; `coterie.training.Contender` is one."""

    tokens: np.ndarray  # [steps]
    seconds: np.ndarray  # [steps], of training alone
    train_bpb: np.ndarray  # [steps]
    valid_tokens: np.ndarray  # [evaluations]
    valid_seconds: np.ndarray  # [evaluations]
    valid_bpb: np.ndarray  # [evaluations]
    expert_load: np.ndarray | None  # [evaluations, layers, E], shares that sum to one over E
    position_edges: np.ndarray | None  # [bins + 1], positions in the context
    position_bpb: np.ndarray | None  # [bins], of the last evaluation


def report_figure(contenders: Mapping[str, Contender], *, title: str = "", subtitle: str = "") -> "Figure":
    """Draws loss over tokens, loss over seconds, loss over positions, and the expert load of every MoE layer over time.

    Positions are drawn of contexts of at least 1,024 tokens.

    Args:
        contenders: one or several models by name; at most six. Each has been evaluated at least once.
        title: what the picture is of, in large letters at its top.
        subtitle: one line below it.

    Returns:
        A figure 1500 pixels wide (see `save_figure`); its height grows with what there is to draw.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message says how to get it.
        ValueError: no contender, more than six, or one that was never evaluated.
    """
    if not 1 <= len(contenders) <= len(COLOURS):
        raise ValueError(f"contenders: got {len(contenders)}, must be 1 to {len(COLOURS)}")
    for name, contender in contenders.items():
        if len(contender.valid_bpb) == 0:
            raise ValueError(f"contenders: {name!r} was never evaluated")
    matplotlib = _matplotlib()

    loads = {name: c.expert_load for name, c in contenders.items() if c.expert_load is not None and c.expert_load.size}
    by_position = all(map(_is_long, contenders.values()))
    heights = [_LOSS_HEIGHT, *[_POSITION_HEIGHT] * by_position, *map(_heat_height, loads.values())]
    head = 0.75 if subtitle else 0.5 if title else 0.1
    with matplotlib.rc_context({"font.size": 10, "axes.edgecolor": FAINT, "text.color": INK}):
        figure = matplotlib.figure.Figure(figsize=(WIDTH_INCHES, head + sum(heights)), dpi=DPI)
        figure.set_facecolor("white")
        figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - head / figure.get_figheight()))
        parts = iter(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
        _draw_losses(next(parts), contenders)
        if by_position:
            _draw_positions(next(parts), contenders)
        for part, (name, load) in zip(parts, loads.items(), strict=True):
            _draw_load(part, load, contenders[name].valid_tokens, name if len(contenders) > 1 else "")
        inches = 1 / figure.get_figheight()
        if title:
            figure.text(0.012, 1 - 0.14 * inches, title, size=16, weight="bold", va="top")
        if subtitle:
            figure.text(0.012, 1 - 0.48 * inches, subtitle, size=10, color=FAINT, va="top")
    return figure


def save_figure(figure: "Figure", path: str | os.PathLike) -> None:
    """Writes the figure as a PNG: under a temporary name, then renamed, so a picture at `path` is always whole."""
    write_atomically(Path(path), lambda unfinished: figure.savefig(unfinished, format="png"))


def _matplotlib():
    try:
        import matplotlib
        import matplotlib.figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'coterie[plot]'", name=error.name) from error
    return matplotlib


# --- loss ---


def _draw_losses(part, contenders: Mapping[str, Contender]) -> None:
    by_tokens, by_seconds = part.subplots(1, 2, sharey=True)
    runs = list(contenders.values())
    for axes, kind, unit in (
        (by_tokens, "tokens", "training tokens"),
        (by_seconds, "seconds", "training seconds"),
    ):
        ends = [float(getattr(run, f"valid_{kind}")[-1]) for run in runs]
        for run, colour in zip(runs, COLOURS, strict=False):
            axes.plot(getattr(run, kind), smoothed(run.train_bpb), color=colour, alpha=0.35, linewidth=1.0)
            places = getattr(run, f"valid_{kind}")
            axes.plot(places, run.valid_bpb, color=colour, linewidth=2.2, marker="o", markersize=4)
        if len(runs) > 1:
            axes.axvline(min(ends), color=FAINT, linewidth=0.8, linestyle=(0, (2, 3)), zorder=0)
        axes.set_title(loss_finding(contenders, kind), loc="left", size=11, weight="bold", linespacing=1.35)
        axes.set_xlabel(unit, color=FAINT)
        axes.set_xlim(0, max(ends) * 1.2 or 1)  # room for the names at the curves' ends
        axes.set_ylim(*_loss_range(runs))
        _tidy(axes)
        _label_ends(
            axes, {name: (end, run.valid_bpb[-1]) for end, (name, run) in zip(ends, contenders.items(), strict=True)}
        )
    by_tokens.xaxis.set_major_formatter(_tick)
    by_tokens.set_ylabel("bits per byte", color=FAINT)
    key = "● validation   — training, smoothed"
    by_tokens.text(0.02, 0.03, key, transform=by_tokens.transAxes, size=9, color=FAINT)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Exponential moving average over about a fifteenth of the run, without the pull of its first value."""
    values = np.asarray(values, dtype=np.float64)
    keep = 1 - 1 / max(4.0, len(values) / 15)
    total, weight, out = 0.0, 0.0, np.empty_like(values)
    for index, value in enumerate(values):
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        out[index] = total / weight
    return out


def loss_finding(contenders: Mapping[str, Contender], kind: str) -> str:
    """What a loss panel shows, in two lines; `kind` is "tokens" or "seconds"."""
    end = min(float(getattr(run, f"valid_{kind}")[-1]) for run in contenders.values())
    where = human_count(end) if kind == "tokens" else f"{end:.0f} s" if end >= 10 else f"{end:.1f} s"
    found = {
        name: float(np.interp(end, getattr(run, f"valid_{kind}"), run.valid_bpb)) for name, run in contenders.items()
    }
    if len(found) == 1:
        after = f"{where} tokens" if kind == "tokens" else where
        return f"{found.popitem()[1]:.3f} bits per byte on unseen text\nafter {after}"
    return f"At equal {kind} ({where}) " + "\n".join(_ranking(found))


def _ranking(bpb: Mapping[str, float]) -> tuple[str, str]:
    """Who is ahead of whom, by how much, in two halves of a sentence."""
    found = sorted((value, name) for name, value in bpb.items())
    (best, winner), (second, runner_up) = found[:2]
    values = " against ".join(f"{value:.3f}" for value, _ in found)
    if second - best < LEVEL:
        return f"{winner} and {runner_up}", f"are level: {values} bits per byte"
    return f"{winner} is ahead", f"of {runner_up}: {values} bits per byte"


def _loss_range(runs: Sequence[Contender]) -> tuple[float, float]:
    """Limits that show where the runs differ: from the best value to that at 15 % of the training."""
    low = min(float(min(run.valid_bpb.min(), *smoothed(run.train_bpb)[-1:])) for run in runs)
    high = max(
        float(np.interp(run.valid_tokens[-1] * 0.15, run.valid_tokens, run.valid_bpb))
        if len(run.valid_bpb) > 2
        else float(run.valid_bpb.max())
        for run in runs
    )
    return _with_room(low, high)


def _with_room(low: float, high: float) -> tuple[float, float]:
    """Limits around all between; what differs by less than a tenth of a bit is not spread over the panel."""
    room = max(high - low, 0.1)
    return low - 0.08 * room, high + 0.08 * room


def _label_ends(axes: "Axes", ends: Mapping[str, tuple[float, float]]) -> None:
    """Each curve's name beside its end (place, bits per byte), moved apart where two would overlap."""
    from matplotlib.patheffects import withStroke

    last = sorted(
        (float(bpb), float(place), name, colour)
        for (name, (place, bpb)), colour in zip(ends.items(), COLOURS, strict=False)
    )
    low, high = axes.get_ylim()
    gap = (high - low) * 0.055
    heights = [bpb for bpb, *_ in last]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + gap)
    excess = (heights[-1] - last[-1][0]) / 2  # half of what the highest moved up is given back by all
    for height, (_, place, name, colour) in zip(heights, last, strict=True):
        axes.annotate(
            name,
            (place, height - excess),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            weight="bold",
            # A curve that goes on longer may pass behind the name.
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )


# --- loss by position ---


def _is_long(contender: Contender) -> bool:
    return contender.position_edges is not None and contender.position_edges[-1] >= LONG_CONTEXT


def position_finding(contenders: Mapping[str, Contender]) -> str:
    """What the panel of positions shows: the farthest bin, beside the nearest where there is but one contender."""
    edges = next(iter(contenders.values())).position_edges
    far = f"From position {edges[-2]:,} on"
    if len(contenders) == 1:
        (run,) = contenders.values()
        first, last = run.position_bpb[[0, -1]]
        return f"{far} {last:.3f} bits per byte, {first:.3f} before position {edges[1]:,}"
    return f"{far} " + " ".join(_ranking({name: float(run.position_bpb[-1]) for name, run in contenders.items()}))


def _draw_positions(part, contenders: Mapping[str, Contender]) -> None:
    """Bits per byte after training over the position in the context, a mark in the middle of every bin."""
    axes = part.subplots()
    ends = {}
    for (name, run), colour in zip(contenders.items(), COLOURS, strict=False):
        middles = (run.position_edges[:-1] + run.position_edges[1:] - 1) / 2
        axes.plot(middles, run.position_bpb, color=colour, linewidth=2.2, marker="o", markersize=4)
        ends[name] = middles[-1], run.position_bpb[-1]
    edges = run.position_edges
    axes.set_xscale("log", base=2)
    axes.set_xlim(middles[0] / 1.2, edges[-1] * edges[-1] ** 0.12)  # room for the names at the curves' ends
    # From the third bin on: what a model makes of its first few bytes would flatten all that comes after.
    far = np.concatenate([run.position_bpb[2:] for run in contenders.values()])
    axes.set_ylim(*_with_room(far.min(), far.max()))
    axes.set_xticks(edges[1:], [f"{edge:,}" for edge in edges[1:]])
    axes.minorticks_off()
    axes.set_title(position_finding(contenders), loc="left", size=11, weight="bold")
    axes.set_xlabel("position in the context, at the end of training", color=FAINT)
    axes.set_ylabel("bits per byte", color=FAINT)
    _tidy(axes)
    _label_ends(axes, ends)


# --- expert load ---


def _heat_height(load: np.ndarray) -> float:
    layers = load.shape[1]
    return 0.95 + layers * float(np.clip(5.0 / layers, 0.22, 0.6))


def load_finding(load: np.ndarray, name: str = "") -> str:
    """What the heat maps show, from the last evaluation; `load` is [evaluations, layers, E]."""
    last = torch.from_numpy(np.ascontiguousarray(load[-1]))
    layers, num_experts = last.shape
    dead, busiest, entropy = (
        int(dead_experts(last).sum()),
        float(load_imbalance(last).max()),
        float(load_entropy(last).mean()),
    )
    total = layers * num_experts
    used = f"all {total} experts are in use" if dead == 0 else f"{dead} of {total} experts are dead"
    used = f"{name}: {used}" if name else used.capitalize()
    return f"{used}; load entropy {entropy:.3f} of 1, the busiest carries {busiest:.1f}× its fair share"


def _draw_load(part, load: np.ndarray, tokens: np.ndarray, name: str) -> None:
    """One strip per layer: experts from top to bottom, time from left to right, white = the fair share."""
    from matplotlib.patches import Rectangle

    _, layers, num_experts = load.shape
    axes = part.subplots()
    limit = np.log2(LARGEST_RATIO)
    with np.errstate(divide="ignore"):
        ratios = np.clip(np.log2(load * num_experts), -limit, limit)  # [evaluations, layers, E]
    edges = _edges(np.asarray(tokens, dtype=np.float64))
    pitch = num_experts * 1.16
    for layer in range(layers):
        rows = layer * pitch + np.arange(num_experts + 1)
        mesh = axes.pcolormesh(edges, rows, ratios[:, layer].T, cmap="PuOr_r", vmin=-limit, vmax=limit)
        # A frame tells white, the fair share, from the paper.
        frame = Rectangle((edges[0], layer * pitch), edges[-1] - edges[0], num_experts, clip_on=False)
        axes.add_patch(frame).set(facecolor="none", edgecolor="#b5b5b5", linewidth=0.8)
    axes.set_ylim((layers - 1) * pitch + num_experts, 0)
    axes.set_yticks(np.arange(layers) * pitch + num_experts / 2, [f"MoE {layer + 1}" for layer in range(layers)])
    axes.tick_params(colors=FAINT, labelsize=9)
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(load_finding(load, name), loc="left", size=11, weight="bold")
    axes.set_xlabel(f"training tokens; in each layer, {num_experts} experts from top to bottom", color=FAINT)
    axes.xaxis.set_major_formatter(_tick)
    bar = part.colorbar(mesh, ax=axes, fraction=0.025, pad=0.012, aspect=14, ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["≤ ¼", "½", "fair share", "2×", "≥ 4×"], size=9, color=FAINT)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def _edges(centres: np.ndarray) -> np.ndarray:
    """Borders of the cells around `centres` [n] -> [n + 1]: half-way between neighbours, none beyond the ends."""
    if len(centres) == 1:
        return np.array([0.0, max(centres[0], 1.0)])
    return np.concatenate([centres[:1], (centres[1:] + centres[:-1]) / 2, centres[-1:]])


def _tick(value: float, _: int) -> str:
    """1200000 -> "1.2 M"."""
    number, _, unit = human_count(round(value)).partition(" ")
    return f"{float(number):g} {unit}".rstrip()


def _tidy(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelsize=9)
