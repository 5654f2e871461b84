"""delta_rule on a CPU beside full attention, and beside the other implementations of it that run there.

The gated delta rule (a decay per head, β in 0..1) of one layer: B = 1 sequence, H heads, P = V. transformers' is the
torch code that its qwen3_next falls back to, flash-linear-attention's the naive one in chunks that its kernels are
tested with. Full attention computes something else: what it is compared by is the work of a layer.
"""

import inspect
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tyro.conf import arg

import _bench
import _tell
from _bench import Case, Contender, Result
from coterie.ops import delta_rule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
FORWARD, BOTH, LINEAR, DECODE = "fwd", "fwd+bwd", "linear", "decode"
OURS, SDPA, HF, FLA = "coterie", "SDPA, full attention", "transformers", "fla, naive chunks"
PARTS, AFTER_FEW = "coterie, in parts of 4096", "coterie, after 512 tokens"
PART, FEW = 4096, 512
MOST_OF_PEERS = 8192  # tokens

# What the library means to reach: times as fast as transformers' at L = 4096, forward and backward; faster than SDPA
# from L = 2048 on; time that grows with L alone; bytes kept for backward over those of the inputs.
HF_BAR, SDPA_FROM, LINEAR_BAR, SAVED_BAR, DECODE_BAR = 4.0, 2048, 1.1, 1.5, 1.1
# Checked against float64 are so many tokens; only of their outputs is there a gradient to come back.
CHECKED = 1024
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}
RESULTS = ("o", "q", "k", "v", "g", "beta")  # the output, and gradients

Inputs = tuple[Tensor, ...]  # q, k, v, g, beta, and the gradient to the output


@dataclass
class Options(_bench.Options):
    """Compare coterie's delta rule with full attention and with other implementations.

    L tokens of one sequence, H heads of width P. Ratios are medians over interleaved rounds, each with fresh inputs.
    With no options: eight lengths, two dtypes, forward and forward+backward, whether time is linear, and decoding, in
    about fifteen minutes on two slow cores.
    """

    length: Annotated[
        tuple[int, ...], arg(metavar="L ...", help_behavior_hint="(default: 512 to 65536; quick: 512 and 2048)")
    ] = ()
    """Measure these lengths."""
    dtypes: Annotated[
        tuple[Literal["float32", "bfloat16"], ...], arg(help_behavior_hint="(default: both; quick: float32)")
    ] = ()
    """Of inputs; decays are float32."""
    kinds: Annotated[
        tuple[Literal["fwd", "fwd+bwd", "linear", "decode"], ...], arg(help_behavior_hint="(default: all)")
    ] = ()
    """What to measure: a pass over the sequence, whether 65536 tokens take 16 times as long as 4096, a step of
    decoding."""
    heads: Annotated[int, arg(metavar="H")] = 8
    """H."""
    width: Annotated[int, arg(metavar="P")] = 64
    """P = V, of a head."""

    def check(self) -> None:
        super().check()
        for name, values in (("length", self.length), ("heads", (self.heads,)), ("width", (self.width,))):
            for value in values:
                if value < 1:
                    raise ValueError(f"--{name}: got {value}, must be at least 1")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code: 0 also when a bar is missed, 1 for a wrong result, 2 for options."""
    options = _bench.start(Options, argv, prog="python benchmarks/bench_delta_rule.py")
    lengths = options.length or ((512, 2048) if options.quick else LENGTHS)
    kinds = options.kinds or (FORWARD, BOTH, LINEAR, DECODE)
    cases = [
        (kind, length, dtype)
        for dtype in options.dtypes or (("float32",) if options.quick else ("float32", "bfloat16"))
        for kind in kinds
        for length in (lengths if kind != LINEAR else (max(lengths),))
        if kind != LINEAR or length > PART
    ]
    return _tell.measure_cases("delta_rule", cases, make_case, bars, draw, options)


# --- contenders ---


def make_case(kind: str, length: int, dtype: str, options: Options) -> Case:
    """One table."""
    labels = {"L": length, "H": options.heads, "P": options.width, "dtype": dtype, "kind": kind}
    make = partial(make_inputs, dtype=getattr(torch, dtype), options=options)
    if kind == DECODE:
        states = {name: _state_after(tokens, options) for name, tokens in ((OURS, length), (AFTER_FEW, FEW))}
        keys, values = _context(length, getattr(torch, dtype), options)
        found = {name: partial(_ours, state=state) for name, state in states.items()}
        found[SDPA] = partial(_attend, keys=keys, values=values)
        wide = {name: partial(_reference, state=state.double()) for name, state in states.items()}
        wide[SDPA] = partial(_attend, keys=keys.double(), values=values.double())
    else:
        found, wide = {OURS: _ours}, dict.fromkeys((OURS, PARTS, HF, FLA), _reference) | {SDPA: _sdpa}
        found |= {PARTS: _ours} if kind == LINEAR else {SDPA: _sdpa, HF: _transformers(), FLA: _fla()}
    once = _forward if kind in (FORWARD, DECODE) else _both
    contenders = []
    for name, run in found.items():
        contender = Contender(
            name,
            partial(_in_parts if name == PARTS else once, run),
            partial(_checked, once, wide[name]),
            dict.fromkeys(RESULTS if once == _both else RESULTS[:1], TOLERANCES[dtype]),
            work=length / 640 if name == SDPA and kind != DECODE else 0.0,
            skip=_why_not(name, run, length),
            optional=name in (HF, FLA),
        )
        contenders.append(contender)
    # Long keys and values would push the state, and the step's code, out of the cache.
    is_step = kind == DECODE
    return Case(labels, OURS, contenders, partial(make, length=1 if is_step else length), warm_up=is_step)


def _why_not(name: str, run: Callable | str, length: int) -> str:
    """Why a contender takes no part, or nothing."""
    if isinstance(run, str):
        return run
    if length > MOST_OF_PEERS and name in (HF, FLA):
        return f"would keep gigabytes for backward above {MOST_OF_PEERS} tokens"
    return ""


def make_inputs(seed: int, *, length: int, dtype: torch.dtype, options: Options) -> Inputs:
    """Unit keys and queries; a token's decay is about 0.98."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*last: int) -> Tensor:
        return torch.randn(1, length, options.heads, *last, generator=generator)

    q, k = (F.normalize(randn(options.width), dim=-1) for _ in range(2))
    v, beta, g, grad = randn(options.width), randn().sigmoid(), -F.softplus(randn() - 4), randn(options.width)
    grad[:, CHECKED:] = 0
    leaves = [t.to(options.device, t.dtype if t is g else dtype).requires_grad_() for t in (q, k, v, g, beta)]
    return (*leaves, grad.to(options.device, dtype))


@torch.no_grad()
def _state_after(length: int, options: Options) -> Tensor:
    *inputs, _ = make_inputs(options.seed, length=length, dtype=torch.float32, options=options)
    q, k, v, g, beta = inputs
    return delta_rule(q, k, v, g, beta=beta)[1]


def _context(length: int, dtype: torch.dtype, options: Options) -> tuple[Tensor, Tensor]:
    """The keys and values of so many tokens."""
    generator = torch.Generator().manual_seed(options.seed)
    keys, values = (torch.randn(1, options.heads, length, options.width, generator=generator) for _ in range(2))
    return keys.to(options.device, dtype), values.to(options.device, dtype)


def _forward(run: Callable, inputs: Inputs) -> Mapping[str, Tensor]:
    with torch.no_grad():
        return {"o": run(*inputs[:-1])[0]}


def _both(run: Callable, inputs: Inputs) -> Mapping[str, Tensor]:
    *leaves, grad = inputs
    o = run(*leaves)
    grads = torch.autograd.grad(o, leaves, grad, materialize_grads=True)  # attention has no decays
    return dict(zip(RESULTS, (o.detach()[0], *(t[0] for t in grads)), strict=True))


def _in_parts(run: Callable, inputs: Inputs) -> Mapping[str, Tensor]:
    """As if every 4096 tokens were a sequence of their own; the results of the first."""
    parts = zip(*(t.detach().split(PART, 1) for t in inputs), strict=True)
    first, *_ = [_both(run, tuple(t.requires_grad_() for t in part)) for part in parts]
    return first


def _checked(once: Callable, run: Callable, inputs: Inputs) -> Mapping[str, Tensor]:
    """In float64, of the tokens that are checked."""
    return once(run, tuple(t.detach()[:, :CHECKED].double().requires_grad_() for t in inputs))


def _ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, state: Tensor | None = None) -> Tensor:
    return delta_rule(q, k, v, g, beta=beta, initial_state=state)[0]


def _reference(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, state: Tensor | None = None) -> Tensor:
    return delta_rule(q, k, v, g, beta=beta, initial_state=state, impl="reference")[0]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, keys: Tensor, values: Tensor) -> Tensor:
    """One token's query over the keys of all."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values).transpose(1, 2)


def _transformers() -> Callable | str:
    """Or why there is none. What transformers runs where flash-linear-attention's kernels do not."""
    try:
        from transformers.models.qwen3_next import modeling_qwen3_next as theirs
    except ImportError as error:
        return f"{error.name} is not installed, or too old"
    run = inspect.unwrap(theirs.torch_chunk_gated_delta_rule)
    return lambda q, k, v, g, beta: run(q, k, v, g, beta)[0]


def _fla() -> Callable | str:
    """Or why there is none."""
    try:
        with warnings.catch_warnings(action="ignore"):  # that there is no GPU
            from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule as run
    except ImportError as error:
        return f"{error.name} is not installed, or too old"
    return lambda q, k, v, g, beta: run(q, k, v, g, beta)[0].to(v.dtype)


# --- bars ---


def bars(results: Sequence[Result]) -> list[dict]:
    """Every figure that has a bar: what, where, the value, the bar, and whether it is met."""
    found = []

    def judge(labels: Mapping, what: str, value: float, bar: float, *, at_least: bool) -> None:
        met = value >= bar if at_least else value <= bar
        found.append({**labels, "what": what, "value": value, "bar": bar, "met": met})

    for result in results:
        labels = result.labels
        if labels["kind"] == LINEAR and (ratio := result.ratio(PARTS, OURS)):  # times as fast are the parts
            what = f"time over that of as many tokens in parts of {PART}"
            judge(labels, what, ratio.median, LINEAR_BAR, at_least=False)
        if labels["kind"] == BOTH:
            own = result.rows[OURS].saved_bytes / input_bytes(labels)
            judge(labels, "bytes kept over bytes of the inputs", own, SAVED_BAR, at_least=False)
            if labels["L"] == PART and (ratio := result.ratio(OURS, HF)):
                judge(labels, "speed over transformers", ratio.median, HF_BAR, at_least=True)
        if labels["kind"] in (FORWARD, BOTH) and labels["L"] >= SDPA_FROM and (ratio := result.ratio(OURS, SDPA)):
            judge(labels, "speed over SDPA", ratio.median, 1.0, at_least=True)
        if labels["kind"] == DECODE and (ratio := result.ratio(AFTER_FEW, OURS)):
            judge(labels, f"time of a step over that after {FEW} tokens", ratio.median, DECODE_BAR, at_least=False)
    return found


def input_bytes(labels: Mapping) -> int:
    """Of q, k, v, beta, and of decays in float32."""
    size = getattr(torch, labels["dtype"]).itemsize
    return labels["L"] * labels["H"] * (3 * labels["P"] * size + size + 4)


def draw(results: Sequence[Result], facts: Mapping) -> "Figure":
    """Microseconds a token over the length: a panel for each kind and dtype."""
    return _tell.curves(
        results,
        title="The delta rule beside full attention",
        machine=facts,
        kinds={FORWARD: FORWARD, BOTH: BOTH, DECODE: "a step of decoding"},
        names=(OURS, SDPA, HF, FLA),
        steps=(DECODE,),
    )


if __name__ == "__main__":
    sys.exit(main())
