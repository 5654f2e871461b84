"""What the Triton kernels of `delta_rule` move, counted in Triton's interpreter; nothing here is a time.

For each token and head: the bytes of the 32-byte sectors that launches touch, each once per launch, which is what
device memory must move. Counted at two lengths, so that what is read and written once per sequence, its states, is told
apart. flash-linear-attention's kernels are counted the same way, where it is installed and its version can be
interpreted: with the first of the configurations that it would choose from by timing.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import _bench
import _fla
import _tell
from coterie.ops.delta_rule import delta_rule
from coterie.report import format_table

OURS, FLA = "ours", "flash-linear-attention"
WIDTHS = (64, 128)  # P = V
# Bytes a token and head that the library means to stay below, 16 bits and a decay per head: (P = V, edit, pass).
BARS = {
    (64, "erase", "forward"): 1100,
    (128, "erase", "forward"): 2000,
    (64, "beta", "forward"): 850,
    (128, "beta", "forward"): 1500,
    (64, "erase", "backward"): 3050,
    (128, "erase", "backward"): 6900,
    (64, "beta", "backward"): 3050,
    (128, "beta", "backward"): 6900,
}
_TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
_NAMES = ("q", "k", "v", "g", "erase", "beta")

Compute = Callable[..., tuple[Tensor, Tensor]]


@dataclass
class Options(_bench.Options):
    """Count the kernels of delta_rule, with a decay per head, at P = V = 64 and 128. Takes some minutes."""

    tokens: int = 256
    """The shorter of two lengths; the other is twice that. --quick: 128."""
    dtype: Literal["float16", "bfloat16"] = "float16"
    """Of all but the decays."""
    target: Literal["sm_80", "sm_90", "sm_100", "gfx942"] = "sm_90"
    """Whose tiles are counted."""

    def check(self) -> None:
        super().check()
        if self.tokens < 64:
            raise ValueError(f"--tokens: got {self.tokens}, must be at least 64")


@dataclass(frozen=True)
class Cost:
    """Of one pass: bytes a token and head by kernel, bytes once a sequence and head, launches; error: relative."""

    name: str
    width: int
    edit: str
    which: str
    kernels: dict[str, float]
    once: float
    launches: int
    saved: float
    error: float

    @property
    def total(self) -> float:
        return sum(self.kernels.values())

    @property
    def bar(self) -> int | None:
        return BARS.get((self.width, self.edit, self.which)) if self.name == OURS else None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code: 0 also when a bar is missed, 1 for a wrong result, 2 for options."""
    options = _bench.start(Options, argv, prog="python benchmarks/kernel_cost_delta_rule.py")
    os.environ["TRITON_INTERPRET"] = "1"  # before kernels are imported
    facts = _tell.machine("cpu")
    print(_tell.format_machine(facts) + "\n")
    computes: dict[str, Compute] = {OURS: _ours}
    theirs = interpreted_fla()
    if theirs is None:
        print(f"{FLA}: not installed (pip install --no-deps fla-core), or not to be interpreted\n")
    else:
        computes[FLA] = theirs
    costs: list[Cost] = []
    cases = [
        (width, edit, name)
        for width in WIDTHS
        for edit in ("erase", "beta")
        for name in computes
        if name == OURS or edit == "beta"
    ]
    try:
        for width, edit, name in tqdm(cases, unit="case", disable=None):
            costs += count(name, computes[name], width, edit, options)
    except _bench.WrongResult as error:
        print(f"kernel_cost_delta_rule: wrong result: {error}", file=sys.stderr)
        return 1
    print(format_costs(costs, options))
    content = {
        "benchmark": "kernel_cost_delta_rule",
        "machine": facts,
        "counted": "distinct bytes a token and head by kernel, once a sequence and head, launches, saved; not times",
        "target": options.target,
        "tokens": options.tokens,
        "dtype": options.dtype,
        "cases": [asdict(cost) | {"total": cost.total, "bar": cost.bar} for cost in costs],
    }
    _tell.write_json(options.out / "kernel_cost_delta_rule.json", content)
    print(options.out / "kernel_cost_delta_rule.json")
    return 0


def count(name: str, compute: Compute, width: int, edit: str, options: Options) -> list[Cost]:
    """Of a forward and a backward pass, after their results have been checked.

    Raises:
        WrongResult: they are not the reference's.
    """
    from coterie_kernels.proof.count import record
    from coterie_kernels.target import aiming_at

    tokens = min(options.tokens, 128) if options.quick else options.tokens
    dtype = getattr(torch, options.dtype)
    counted = []
    for length in (tokens, 2 * tokens):
        inputs = make_inputs(length, width, edit, dtype, options.seed)
        leaves = [t for t in inputs.values() if t is not None]
        records: dict[str, Any] = {}
        results: list[Tensor] = []

        def forward(inputs=inputs, records=records, results=results) -> None:
            with record() as records["forward"]:
                results.extend(compute(**inputs))

        with aiming_at(options.target):
            saved, _ = _bench.saved_bytes(forward)
            o, state = results
            grad = torch.randn(o.shape, generator=torch.Generator().manual_seed(options.seed)).to(dtype)
            with record() as records["backward"]:
                grads = torch.autograd.grad(o, leaves, grad)
        error = _error((o, state, *grads), inputs, grad, f"{name}, P {width}, {edit}", dtype)
        counted.append((records, saved))
    (short, short_saved), (long, long_saved) = counted
    costs = []
    for which in ("forward", "backward"):
        per_token = {
            kernel: (of_long.distinct - short[which].by_kernel()[kernel].distinct) / tokens
            for kernel, of_long in long[which].by_kernel().items()
        }
        once = short[which].total.distinct - tokens * sum(per_token.values())
        saved = (long_saved - short_saved) / tokens
        costs.append(Cost(name, width, edit, which, per_token, once, long[which].total.launches, saved, error))
    return costs


def make_inputs(length: int, width: int, edit: str, dtype: torch.dtype, seed: int) -> dict[str, Tensor | None]:
    """One sequence, one head."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(1, length, 1, *size, generator=generator)

    key = F.normalize(randn(width), dim=-1)
    beta = torch.rand(1, length, 1, generator=generator)
    tensors = {"q": randn(width), "k": key, "v": randn(width), "erase": None, "beta": None}
    if edit == "erase":
        tensors["erase"] = beta[..., None] * key
    else:
        tensors["beta"] = beta
    inputs = {name: t if t is None else t.to(dtype).requires_grad_() for name, t in tensors.items()}
    inputs["g"] = (-torch.rand(1, length, 1, generator=generator)).requires_grad_()
    return {name: inputs[name] for name in _NAMES}


def _error(results: Sequence[Tensor], inputs: dict[str, Tensor | None], grad: Tensor, what: str, dtype) -> float:
    """The largest relative error of results, which are the outputs, the state and the gradients."""
    exact = {name: t if t is None else t.detach().double().requires_grad_() for name, t in inputs.items()}
    o, state = delta_rule(**exact, impl="reference")
    grads = torch.autograd.grad(o, [t for t in exact.values() if t is not None], grad.double())
    error = max(
        float((got.detach().double() - want).norm() / want.norm())
        for got, want in zip(results, (o.detach(), state.detach(), *grads), strict=True)
    )
    if not error <= _TOLERANCE[dtype]:
        raise _bench.WrongResult(f"{what}: relative error {error:.1e}")
    return error


def _ours(**inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    return delta_rule(**inputs, impl="triton")


def interpreted_fla() -> Compute | None:
    """Its chunk_gated_delta_rule in Triton's interpreter; None if it is not there, or does not import."""
    theirs = _fla.interpreted("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
    if theirs is None:
        return None

    def compute(q, k, v, g, erase, beta):
        return theirs(q, k, v, g, beta, output_final_state=True)

    return compute


def format_costs(costs: Sequence[Cost], options: Options) -> str:
    """Passes beside each other, then their kernels."""
    rows, rules, kernels = [], [], []
    for number, cost in enumerate(costs):
        if number and cost.width != costs[number - 1].width:
            rules.append(number)
        title = f"P = V = {cost.width}, {cost.edit}, {cost.which}: {cost.name}"
        rows.append(
            [
                title,
                str(cost.launches),
                f"{cost.total:.0f}",
                "" if cost.bar is None else f"{'≤' if cost.total <= cost.bar else '>'} {cost.bar}",
                f"{cost.once / 1024:.0f}",
                f"{cost.saved:.0f}" if cost.which == "forward" else "",
                f"{cost.error:.0e}",
            ]
        )
        kernels += [f"{title}:", *(f"    {value:6.0f} {name}" for name, value in cost.kernels.items())]
    header = [
        f"counted, {options.target}'s tiles, {options.dtype}",
        "launches",
        "bytes / token / head",
        "bar",
        "KiB once",
        "saved bytes / token / head",
        "error",
    ]
    met = [cost.total <= cost.bar for cost in costs if cost.bar is not None]
    table = format_table(header, rows, rules=rules)
    return "\n".join([table, f"{sum(met)} of {len(met)} bars met", "", "bytes / token / head by kernel", *kernels])


if __name__ == "__main__":
    sys.exit(main())
