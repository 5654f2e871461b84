"""The picture of a training run: who learns faster, per token and per second, and what the experts carried meanwhile.

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


class Contender(Protocol):
    """What is drawn of one model; `coterie.training.Contender` is one."""

    tokens: np.ndarray  # [steps]
    seconds: np.ndarray  # [steps], of training alone
    train_bpb: np.ndarray  # [steps]
    valid_tokens: np.ndarray  # [evaluations]
    valid_seconds: np.ndarray  # [evaluations]
    valid_bpb: np.ndarray  # [evaluations]
    expert_load: np.ndarray | None  # [evaluations, layers, E], shares that sum to one over E


def report_figure(contenders: Mapping[str, Contender], *, title: str = "", subtitle: str = "") -> "Figure":
    """Draws loss over tokens, loss over seconds, and the expert load of every MoE layer over time.

    Args:
        contenders: one or several models by name; at most six. Each has been evaluated at least once.
        title: what the picture is of, in large letters at its top.
        subtitle: one line below it.

    Returns:
        A figure 1500 pixels wide (see `save_figure`); its height grows with the number of MoE layers.

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
    heights = [_heat_height(load) for load in loads.values()]
    head = 0.75 if subtitle else 0.5 if title else 0.1
    with matplotlib.rc_context({"font.size": 10, "axes.edgecolor": FAINT, "text.color": INK}):
        figure = matplotlib.figure.Figure(figsize=(WIDTH_INCHES, head + 3.9 + sum(heights)), dpi=DPI)
        figure.set_facecolor("white")
        figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - head / figure.get_figheight()))
        parts = figure.subfigures(1 + len(loads), 1, height_ratios=[3.9, *heights], squeeze=False)[:, 0]
        _draw_losses(parts[0], contenders)
        for part, (name, load) in zip(parts[1:], loads.items(), strict=True):
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
        _label_ends(axes, contenders, kind)
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
    found = sorted(
        (float(np.interp(end, getattr(run, f"valid_{kind}"), run.valid_bpb)), name) for name, run in contenders.items()
    )
    (best, winner), *others = found
    if not others:
        after = f"{where} tokens" if kind == "tokens" else where
        return f"{best:.3f} bits per byte on unseen text\nafter {after}"
    second, runner_up = others[0]
    values = " against ".join(f"{bpb:.3f}" for bpb, _ in found)
    if second - best < LEVEL:
        return f"At equal {kind} ({where}) {winner} and {runner_up}\nare level: {values} bits per byte"
    return f"At equal {kind} ({where}) {winner} is ahead\nof {runner_up}: {values} bits per byte"


def _loss_range(runs: Sequence[Contender]) -> tuple[float, float]:
    """Limits that show where the runs differ: from the best value to that at 15 % of the training."""
    low = min(float(min(run.valid_bpb.min(), *smoothed(run.train_bpb)[-1:])) for run in runs)
    high = max(
        float(np.interp(run.valid_tokens[-1] * 0.15, run.valid_tokens, run.valid_bpb))
        if len(run.valid_bpb) > 2
        else float(run.valid_bpb.max())
        for run in runs
    )
    room = max(high - low, 0.1)
    return low - 0.08 * room, high + 0.08 * room


def _label_ends(axes: "Axes", contenders: Mapping[str, Contender], kind: str) -> None:
    """Each curve's name beside its end, moved apart where two would overlap."""
    from matplotlib.patheffects import withStroke

    last = sorted(
        (float(run.valid_bpb[-1]), float(getattr(run, f"valid_{kind}")[-1]), name, colour)
        for (name, run), colour in zip(contenders.items(), COLOURS, strict=False)
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
