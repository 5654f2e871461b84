"""Sparse attention on a CPU beside full attention.

One layer, B = 1 sequence: H heads of queries that share G of keys, P = V; a window, and S blocks of 64 keys that every
token and group chose for itself, at random among those before it (harder than what a scorer chooses, which neighbours
share). Full attention computes something else: what it is compared by is the work of a layer.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from tyro.conf import arg

import _bench
import _tell
from _bench import Case, Contender, Result
from coterie.ops import sparse_attention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
BLOCK = 64
FORWARD, BOTH, DECODE = "fwd", "fwd+bwd", "decode"
OURS, WINDOW, SDPA = "coterie, window and blocks", "coterie, window alone", "SDPA, full attention"
FLEX = "flex_attention, window and blocks"
PLAIN = "SDPA, enable_gqa"  # a step of decoding as one writes it: keys are read for every head of queries

# What the library means to reach, times as fast as full attention: forward and backward, by length; a step of decoding.
BOTH_BARS = {8192: 1.0, 16384: 4.0, 65536: 12.0}
DECODE_BARS = {65536: 10.0}
FORWARD_GIB = {65536: 3.0}
# Checked against float64 are so many tokens; only of their outputs is there a gradient to come back.
CHECKED = 1024
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}
RESULTS = ("o", "q", "k", "v")  # the output, and gradients

Inputs = tuple[Tensor, ...]  # q, k, v, block_ids, and the gradient to the output


@dataclass
class Options(_bench.Options):
    """Compare coterie's sparse attention with full attention.

    L tokens of one sequence. Ratios are medians over interleaved rounds, each with fresh inputs. With no options: seven
    lengths, forward, forward+backward and decoding, in about ten minutes on two slow cores; full attention sits out
    where it would take longer than --limit-seconds.
    """

    length: Annotated[
        tuple[int, ...], arg(metavar="L ...", help_behavior_hint="(default: 1024 to 65536; quick: 1024 and 4096)")
    ] = ()
    """Measure these lengths."""
    dtypes: Annotated[tuple[Literal["float32", "bfloat16"], ...], arg()] = ("float32",)
    """Of inputs."""
    kinds: Annotated[tuple[Literal["fwd", "fwd+bwd", "decode"], ...], arg(help_behavior_hint="(default: all)")] = ()
    """What to measure: a pass over the sequence, or a step of decoding after it."""
    heads: Annotated[int, arg(metavar="H")] = 8
    """H."""
    groups: Annotated[int, arg(metavar="G")] = 2
    """G, which divides H."""
    width: Annotated[int, arg(metavar="P")] = 64
    """P = V."""
    window: Annotated[int, arg(metavar="INT")] = 512
    """Keys."""
    blocks: Annotated[int, arg(metavar="S")] = 16
    """S, of 64 keys."""
    flex: Annotated[bool, arg(help_behavior_hint="")] = False
    """Measure flex_attention too, compiled (a minute a length), its mask made from the choice each time: forward alone,
    the only pass that it has on a CPU."""

    def check(self) -> None:
        super().check()
        sizes = (("heads", self.heads), ("groups", self.groups), ("width", self.width), ("window", self.window))
        for name, value in (*(("length", length) for length in self.length), *sizes, ("blocks", self.blocks)):
            if value < 1:
                raise ValueError(f"--{name}: got {value}, must be at least 1")
        if self.heads % self.groups:
            raise ValueError(f"--groups: got {self.groups}, must divide --heads, {self.heads}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code: 0 also when a bar is missed, 1 for a wrong result, 2 for options."""
    options = _bench.start(Options, argv, prog="python benchmarks/bench_sparse_attention.py")
    lengths = options.length or ((1024, 4096) if options.quick else LENGTHS)
    kinds = options.kinds or (FORWARD, BOTH, DECODE)
    cases = [(kind, length, dtype) for dtype in options.dtypes for kind in kinds for length in lengths]
    return _tell.measure_cases("sparse_attention", cases, make_case, bars, draw, options)


# --- contenders ---


def make_case(kind: str, length: int, dtype: str, options: Options) -> Case:
    """One table."""
    labels = {"L": length, "H": options.heads, "G": options.groups, "P": options.width, "dtype": dtype, "kind": kind}
    seen = {"window": options.window, "block_size": BLOCK}
    ours = {OURS: partial(_sparse, **seen), WINDOW: partial(_sparse, window=options.window, blind=True)}
    once, checked = (_both, RESULTS) if kind == BOTH else (_forward, RESULTS[:1])
    contenders = [
        Contender(
            name,
            partial(once, run),
            partial(_checked, once, wide, all_keys=kind == DECODE),
            dict.fromkeys(checked, TOLERANCES[dtype]),
            # What both pairs of products are for: half the square of keys, or what is seen.
            work=0.0 if kind == DECODE or run is not _full else length / 2 / (options.window + options.blocks * BLOCK),
        )
        for name, run, wide in (
            *((name, run, partial(run, impl="reference")) for name, run in ours.items()),
            (SDPA, _full, _full),
            *([(PLAIN, _plain, _plain)] if kind == DECODE else []),
        )
    ]
    make = partial(make_inputs, length=1 if kind == DECODE else length, keys=length, dtype=getattr(torch, dtype))
    make = partial(make, options=options)
    if options.flex and kind == FORWARD:
        run = partial(_flex, flex=torch.compile(flex_attention, dynamic=False), window=options.window)
        _forward(run, make(options.seed))  # compiles
        expected, tolerances = contenders[0].expected, contenders[0].tolerances
        contenders.append(Contender(FLEX, partial(_forward, run), expected, tolerances, optional=True))
    return Case(labels, OURS, contenders, make, warm_up=kind == DECODE)


def make_inputs(seed: int, *, length: int, keys: int, dtype: torch.dtype, options: Options) -> Inputs:
    """The last `length` queries of so many keys, and S blocks each of those that have begun: early ones repeat some."""
    generator = torch.Generator().manual_seed(seed)

    def randn(size: int, heads: int) -> Tensor:
        return torch.randn(1, size, heads, options.width, generator=generator)

    q, k, v, grad = (
        randn(*s) for s in ((length, options.heads), *[(keys, options.groups)] * 2, (length, options.heads))
    )
    begun = torch.arange(keys - length, keys).view(1, -1, 1, 1) // BLOCK + 1
    ids = (torch.rand(1, length, options.groups, options.blocks, generator=generator) * begun).long()
    grad[:, CHECKED:] = 0
    leaves = [t.to(options.device, dtype).requires_grad_() for t in (q, k, v)]
    return (*leaves, ids.to(options.device), grad.to(options.device, dtype))


def _forward(run: Callable, inputs: Inputs) -> Mapping[str, Tensor]:
    with torch.no_grad():
        return {"o": run(*inputs[:-1])[0]}


def _both(run: Callable, inputs: Inputs) -> Mapping[str, Tensor]:
    *leaves, ids, grad = inputs
    o = run(*leaves, ids)
    grads = torch.autograd.grad(o, leaves, grad)
    return dict(zip(RESULTS, (o.detach()[0], *(t[0] for t in grads)), strict=True))


def _checked(once: Callable, run: Callable, inputs: Inputs, *, all_keys: bool) -> Mapping[str, Tensor]:
    """In float64, of the tokens that are checked; of a step of decoding with all the keys."""
    *floats, ids, grad = (t if all_keys else t[:, :CHECKED] for t in inputs)
    wide = [t.detach().double().requires_grad_() for t in floats]
    return once(run, (*wide, ids, grad.double()))


def _sparse(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, *, blind: bool = False, **settings) -> Tensor:
    return sparse_attention(q, k, v, block_ids=None if blind else ids, **settings)


def _full(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    causal = q.shape[2] == k.shape[2]
    if not causal:  # one query: its heads stand as queries of one head, so that keys are read once a group
        q = q.unflatten(1, (k.shape[1], -1)).squeeze(3)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=causal)
    return (o if causal else o.flatten(1, 2).unsqueeze(2)).transpose(1, 2)


def _plain(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def _flex(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, *, flex: Callable, window: int) -> Tensor:
    """The same window and blocks, by a mask that says so."""
    (_, length, heads, _), groups = q.shape, k.shape[2]
    chosen = torch.zeros(length, groups, -(-length // BLOCK), dtype=torch.bool, device=q.device).scatter(
        2, ids[0], True
    )

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & ((query - key < window) | chosen[query, head // (heads // groups), key // BLOCK])

    mask = create_block_mask(sees, 1, heads, length, length, device=q.device)
    q, k, v = (t.detach().transpose(1, 2) for t in (q, k, v))
    return flex(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)


# --- bars ---


def bars(results: Sequence[Result]) -> list[dict]:
    """Every figure that has a bar: what, where, the value, the bar, and whether it is met."""
    found = []
    for result in results:
        kind, length = result.labels["kind"], result.labels["L"]
        bar = {BOTH: BOTH_BARS, DECODE: DECODE_BARS}.get(kind, {}).get(length)
        ratio = result.ratio(OURS, SDPA)
        if bar is not None and ratio is not None:
            entry = {"what": "speed over full attention", "value": ratio.median, "bar": bar, "met": ratio.median >= bar}
            found.append({**result.labels, **entry})
        if kind == FORWARD and length in FORWARD_GIB:
            peak, bar = result.rows[OURS].peak_bytes / 2**30, FORWARD_GIB[length]
            found.append({**result.labels, "what": "GiB at once", "value": peak, "bar": bar, "met": peak < bar})
    return found


def draw(results: Sequence[Result], facts: Mapping) -> "Figure":
    """Microseconds a token over the length: a panel for each kind and dtype."""
    return _tell.curves(
        results,
        title="Sparse attention beside full attention",
        machine=facts,
        kinds={FORWARD: FORWARD, BOTH: BOTH, DECODE: "a step of decoding"},
        names=(OURS, SDPA, WINDOW, FLEX, PLAIN),
        steps=(DECODE,),
    )


if __name__ == "__main__":
    sys.exit(main())
