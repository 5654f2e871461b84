"""What a long context costs a whole model: a hybrid of linear, sparse and full attention beside full attention alone.

    python benchmarks/bench_long_context.py

The preset tiny-long and the same model with full attention in every layer, untrained, one sequence: seconds to take in
a context (in chunks, as a server does), tokens a second that are generated after it, bytes of its cache. Of a long
context some chunks alone are timed, spread evenly, with a cache as full as it would be, and the others are taken to be
on the line between them.
"""

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import tyro
from tqdm import tqdm
from tyro.conf import arg

import _bench
import _tell
from coterie.models import PRESETS, KVCache, Transformer, TransformerConfig, attention_twin, preset
from coterie.report import format_table, human_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTHS = (1024, 4096, 16384, 65536, 262144)
CHUNK = 4096  # tokens taken in at a time
TIMED_CHUNKS = 8  # of a context
TURNS, STEPS = 8, 3  # of decoding: so many steps at a time, after one that is not timed
SLOWDOWN_BAR = 1.3  # of a step after 65,536 tokens over one after 1,024
CHECKED = 600  # tokens on which taking in by chunks has to agree with all at once


@dataclass
class Options:
    """Compare a model for long contexts with its full-attention twin: prefill, decoding, and bytes of the cache.

    With no options: tiny-long at five lengths up to 262,144, about ten minutes on two slow cores.
    """

    preset: Annotated[str, arg(metavar="NAME")] = "tiny-long"
    """The model."""
    length: Annotated[tuple[int, ...], arg(metavar="L ...", help_behavior_hint="(default: 1024 to 262144)")] = ()
    """Contexts."""
    quick: Annotated[bool, arg(help_behavior_hint="")] = False
    """Contexts of 1,024 and 4,096 alone."""
    threads: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: torch's choice)")] = None
    """Of torch's CPU operations."""
    out: Annotated[Path, arg(metavar="DIR", help_behavior_hint="(default: benchmarks/results)")] = _bench.RESULTS
    """Folder for the JSON and the PNG."""

    def check(self) -> None:
        """Raises ValueError for values that cannot be."""
        if self.preset not in PRESETS:
            raise ValueError(f"--preset: got {self.preset!r}, must be one of {', '.join(PRESETS)}")
        for name, values in (("length", self.length), ("threads", () if self.threads is None else (self.threads,))):
            if min(values, default=1) < 1:
                raise ValueError(f"--{name}: got {min(values)}, must be at least 1")


@dataclass(frozen=True)
class Figures:
    """Of one model at one length.

    Attributes:
        chunks, timed: of the context, and those that were timed.
        prefill: seconds, all chunks.
        step: seconds, the median.
        cache: bytes.
    """

    model: str
    length: int
    chunks: int
    timed: int
    prefill: float
    step: float
    cache: int


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code: 1 for a wrong result, 2 for options."""
    flags = (tyro.conf.FlagCreatePairsOff,)
    options = tyro.cli(Options, args=argv, prog="python benchmarks/bench_long_context.py", config=flags)
    try:
        options.check()
    except ValueError as error:
        print(f"bench_long_context: {error}", file=sys.stderr)
        return 2
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = preset(options.preset)
    models = {name: Transformer(c).eval() for name, c in (("hybrid", config), ("full", attention_twin(config)))}
    facts = _tell.machine()
    print(_tell.format_machine(facts) + "\n")
    for name, model in models.items():
        if (error := chunks_differ(model)) > 1e-4:
            print(f"bench_long_context: wrong result: {name} in chunks differs by {error:.0e}", file=sys.stderr)
            return 1
    lengths = options.length or (LENGTHS[:2] if options.quick else LENGTHS)
    with tqdm(total=len(lengths) * len(models), unit="context", disable=None) as progress:
        prefills = {}
        for length in lengths:
            for name, model in models.items():
                progress.set_description(f"{length:,} tokens, {name}")
                prefills[name, length] = prefill(model, length)
                progress.update()
    steps = decode(models, lengths)
    found = [Figures(*case, *prefills[case], *steps[case]) for case in prefills]
    print(format_figures(found))
    print(_tell.format_bars(bars(found), ("model",)))
    path = options.out / "long_context.json"
    content = {"benchmark": "long_context", "preset": options.preset, "machine": facts, "bars": bars(found)}
    _tell.write_json(path, content | {"figures": [asdict(figures) for figures in found]})
    print(f"\n{path}")
    print(_tell.write_chart(path.with_suffix(".png"), lambda: draw(found, config, options.preset, facts)))
    return 0


# --- measuring ---


@torch.no_grad()
def chunks_differ(model: Transformer) -> float:
    """The largest difference of logits, by chunks from all at once."""
    ids, cache = torch.randint(model.config.vocab_size, (1, CHECKED)), model.new_cache(1, CHECKED)
    parts = [model(part, cache=cache).logits for part in ids.split([250, 1, 1, CHECKED - 252], 1)]
    return (torch.cat(parts, 1) - model(ids).logits).abs().max().item()


@torch.no_grad()
def prefill(model: Transformer, length: int) -> tuple[int, int, float]:
    """Chunks of the context, those that are timed, and the seconds of all."""
    sizes = [min(CHUNK, length - start) for start in range(0, length, CHUNK)]
    timed = sorted({round(at) for at in np.linspace(0, len(sizes) - 1, min(TIMED_CHUNKS, len(sizes)))})
    cache, seconds = model.new_cache(1, length), []
    for index in timed:
        fill(cache, index * CHUNK)
        ids = torch.randint(model.config.vocab_size, (1, sizes[index]))
        if index == 0:
            model(ids, cache=model.new_cache(1, length), num_logits=1)  # a first time, not timed
        start = time.perf_counter()
        model(ids, cache=cache, num_logits=1)
        seconds.append(time.perf_counter() - start)
    return len(sizes), len(timed), float(np.interp(range(len(sizes)), timed, seconds).sum())


@torch.no_grad()
def decode(models: Mapping[str, Transformer], lengths: Sequence[int]) -> dict[tuple[str, int], tuple[float, int]]:
    """Of each model after each context: seconds of a step, the median over turns, and bytes of the context's cache.

    All take turns, so that a slow moment of the machine is everyone's.
    """
    token, cases = torch.zeros(1, 1, dtype=torch.int64), [(name, length) for length in lengths for name in models]
    caches = {(name, length): models[name].new_cache(1, length + TURNS * (STEPS + 1)) for name, length in cases}
    for (_, length), cache in caches.items():
        fill(cache, length)
    seconds = {case: [] for case in cases}
    for _ in range(TURNS):
        for case in cases:
            for step in range(STEPS + 1):
                start = time.perf_counter()
                models[case[0]](token, cache=caches[case], num_logits=1)
                if step:
                    seconds[case].append(time.perf_counter() - start)
    return {case: (statistics.median(seconds[case]), models[case[0]].new_cache(1, case[1]).nbytes) for case in cases}


def fill(cache: KVCache, length: int) -> None:
    """Make a cache as one that has taken in so many tokens, of which nothing is known."""
    for layer in cache.layers:
        for name in ("keys", "values"):
            if hasattr(layer, name):
                getattr(layer, name).normal_()
        for blocks in getattr(layer, "blocks", ()):
            blocks.normal_()
        if hasattr(layer, "length"):
            layer.length = length
    cache.length = length


# --- telling ---


def format_figures(found: Sequence[Figures]) -> str:
    by_length = {
        length: {f.model: f for f in found if f.length == length} for length in sorted({f.length for f in found})
    }
    rows = []
    for length, both in by_length.items():
        for name, figures in both.items():
            full = both["full"]
            ratios = [full.prefill / figures.prefill, full.step / figures.step, full.cache / figures.cache]
            rows.append(
                [
                    f"{length:,}",
                    name,
                    f"{figures.prefill:.2f}" + (" *" if figures.timed < figures.chunks else ""),
                    f"{1 / figures.step:.0f}",
                    human_bytes(figures.cache),
                    *("" if name == "full" else f"{ratio:.1f} ×" for ratio in ratios),
                ]
            )
    header = [
        "context",
        "model",
        "prefill, s",
        "tokens/s",
        "cache",
        "faster prefill",
        "faster decoding",
        "smaller cache",
    ]
    text = format_table(header, rows)
    if any(figures.timed < figures.chunks for figures in found):
        text += f"\n* of {TIMED_CHUNKS} chunks of {CHUNK:,} tokens, spread evenly"
    return text + "\n"


def bars(found: Sequence[Figures]) -> list[dict[str, Any]]:
    """How much slower a step is after a long context, where both ends were measured."""
    steps = {figures.length: figures.step for figures in found if figures.model == "hybrid"}
    if not {1024, 65536} <= steps.keys():
        return []
    value = steps[65536] / steps[1024]
    what = "a step after 65,536 tokens over one after 1,024, at most"
    return [{"model": "hybrid", "what": what, "value": value, "bar": SLOWDOWN_BAR, "met": value <= SLOWDOWN_BAR}]


def draw(found: Sequence[Figures], config: TransformerConfig, name: str, facts: Mapping[str, Any]) -> "Figure":
    """A panel each for prefill, decoding and the cache, over the length of the context."""
    import matplotlib.figure

    size = (12.5, 4.3)
    figure = matplotlib.figure.Figure(figsize=size, dpi=110)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - 0.8 / size[1]), w_pad=0.1)
    figure.text(0.01, 1 - 0.1 / size[1], "What a long context costs", size=15, weight="bold", va="top")
    kinds = {kind: config.layer_mixers.count(kind) for kind in dict.fromkeys(config.layer_mixers)}
    layers = ", ".join(
        f"{count} {kind.replace('_attention', '').replace('attention', 'full')}" for kind, count in kinds.items()
    )
    said = (
        f"{name}: {config.num_layers} layers of attention ({layers}) beside the same model with full attention alone; "
        f"one sequence, {facts['cpu']}, {facts['threads']} threads"
    )
    figure.text(0.01, 1 - 0.45 / size[1], said, size=9, color="#777777", va="top")
    panels = (
        ("Prefill", "seconds", lambda f: f.prefill),
        ("Decoding", "tokens a second", lambda f: 1 / f.step),
        ("Cache", "MiB", lambda f: f.cache / 2**20),
    )
    names = {"hybrid": (_tell.COLOURS[0], name), "full": (_tell.COLOURS[2], "full attention")}
    for axes, (title, unit, value) in zip(figure.subplots(1, 3), panels, strict=True):
        ends = {}
        for model, (colour, label) in names.items():
            own = {f.length: value(f) for f in found if f.model == model}
            axes.plot([*own], [*own.values()], "o-", color=colour, markersize=4, linewidth=2)
            last = max(own)
            ends[model] = own[last]
            axes.annotate(
                label, (last, own[last]), (6, 0), textcoords="offset points", color=colour, size=9, va="center"
            )
        ratio = max(ends.values()) / min(ends.values())
        axes.set_title(
            f"{title}: {ratio:.3g} × at {max(f.length for f in found):,}", loc="left", size=11, weight="bold"
        )
        axes.set_xscale("log", base=2)
        if title == "Decoding":
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("log")
        lengths = sorted({f.length for f in found})
        axes.set_xticks(lengths, [f"{length // 1024}k" if length >= 1024 else str(length) for length in lengths])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.set_xlim(lengths[0] * 0.8, lengths[-1] * (lengths[-1] / lengths[0]) ** 0.42)
        axes.set_xlabel("tokens of context", size=9)
        axes.set_ylabel(unit, size=9)
        axes.tick_params(labelsize=8, length=0)
        axes.grid(axis="y", color="#EEEEEE")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
