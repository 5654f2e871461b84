"""What the Triton kernels of `sparse_attention` cost, counted in Triton's interpreter and compiled; nothing is timed.

A window and selected blocks beside our own kernels over all keys, for the last queries of many keys and for a decoding
step; and those beside flash-linear-attention's full attention, where it is installed and its version can be
interpreted: with the first of the configurations that it would choose from by timing. Its kernels for selected blocks
(NSA) take 16 heads a group and more, so that they are not among these.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

import _bench
import _fla
import _kernel_cost
import _tell
from _kernel_cost import LayerCost
from coterie.ops import sparse_attention
from coterie.report import format_table
from kernel_cost import format_kernels

FULL, SPARSE, FLA = "all keys", "window and blocks", "all keys, flash-linear-attention"
HEADS, GROUPS, WIDTH = 8, 2, 64
WINDOW, SELECTED, BLOCK = 512, 16, 64
SIZES = {"last queries": (64, 4096), "decode": (1, 16384), "square": (256, 256)}  # L, Lk
_TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
_MB = 1e6

Compute = Callable[..., Tensor]


@dataclass
class Options(_bench.Options):
    """Count the kernels of sparse_attention: 8 heads of width 64 that share 2 of keys. Takes some minutes."""

    dtype: Literal["float16", "bfloat16"] = "float16"
    """Of q, k and v."""
    target: Literal["sm_80", "sm_90", "sm_100", "gfx942"] = "sm_90"
    """Whose tiles are counted and compiled."""


@dataclass(frozen=True)
class Problem:
    """q [1, L, H, P], k and v [1, Lk, G, P], and what a query sees."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    settings: Mapping[str, Any]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v

    @property
    def useful_flops(self) -> int:
        """Of a forward pass: two products for every key that a head sees. A backward pass has five."""
        length, num_keys = self.q.shape[1], self.k.shape[1]
        at = torch.arange(num_keys - length, num_keys)
        seen = at + 1
        if self.settings:
            key = torch.arange(num_keys)
            near = key > at[:, None] - self.settings["window"]
            ids = self.settings["block_ids"][0].transpose(0, 1)  # [G, L, S]
            chosen = torch.zeros(GROUPS, length, num_keys // BLOCK, dtype=torch.bool).scatter(2, ids, True)
            visible = (near | chosen.repeat_interleave(BLOCK, 2)) & (key <= at[:, None])
            seen = visible.sum(-1)
        return int(seen.sum()) * (HEADS // len(seen) if self.settings else HEADS) * 4 * WIDTH


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code: 1 for a wrong result, 2 for options."""
    options = _bench.start(Options, argv, prog="python benchmarks/kernel_cost_sparse_attention.py")
    os.environ["TRITON_INTERPRET"] = "1"  # before kernels are imported
    facts = _tell.machine("cpu")
    print(_tell.format_machine(facts) + "\n")
    theirs = interpreted_fla()
    if theirs is None:
        print("flash-linear-attention: not installed (pip install --no-deps fla-core), or not to be interpreted\n")
    cases = [(title, name) for title in SIZES for name in (FULL, SPARSE) if (title, name) != ("square", SPARSE)]
    cases += [("square", FLA)] * (theirs is not None)
    costs: list[LayerCost] = []
    try:
        for title, name in tqdm(cases, unit="case", disable=None):
            costs.append(count(title, name, theirs if name == FLA else _ours, options))
            tqdm.write(format_kernels(costs[-1]))
    except _bench.WrongResult as error:
        print(f"kernel_cost_sparse_attention: wrong result: {error}", file=sys.stderr)
        return 1
    print(format_costs(costs, options))
    content = {
        "benchmark": "kernel_cost_sparse_attention",
        "machine": facts,
        "counted": "requested, distinct_load, distinct_store, flops, launches, saved: bytes, FLOPs; not times",
        "target": options.target,
        "cases": [cost.to_dict() for cost in costs],
    }
    _tell.write_json(options.out / "kernel_cost_sparse_attention.json", content)
    print(options.out / "kernel_cost_sparse_attention.json")
    return 0


def count(title: str, name: str, compute: Compute, options: Options) -> LayerCost:
    """A forward and, but for decoding, a backward pass, after their results have been checked.

    Raises:
        WrongResult: they are not the reference's.
    """
    from coterie_kernels.proof.count import record
    from coterie_kernels.target import aiming_at

    problem = make_problem(*SIZES[title], name == SPARSE, options)
    records: dict[str, Any] = {}
    results: list[Tensor] = []

    def forward() -> None:
        with record() as records["forward"]:
            results.append(compute(*problem.leaves, **problem.settings))

    with aiming_at(options.target):
        saved, _ = _bench.saved_bytes(forward)
        if title != "decode":
            with record() as records["backward"]:
                results += torch.autograd.grad(results[0], problem.leaves, problem.grad)
    labels = {"case": title, "L": problem.q.shape[1], "Lk": problem.k.shape[1]}
    error = _error(results, problem, f"{title}, {name}")
    kernels = {which: [] for which in ("forward", "backward")} | {
        which: [_kernel_cost.kernel_cost(*kernel, options.target) for kernel in of_pass.by_kernel().items()]
        for which, of_pass in records.items()
    }
    cost = LayerCost(
        name, labels, **kernels, useful_flops=problem.useful_flops, saved=saved, tile_rows=None, error=error
    )
    if name != FLA:
        launches = {which: of_pass.launches for which, of_pass in records.items()}
        _kernel_cost.compile_kernels(cost, {"forward": [], "backward": []} | launches, options.target)
    return cost


def make_problem(length: int, num_keys: int, sparse: bool, options: Options) -> Problem:
    """Random numbers; every query selects the first block and others before it, each once where there are enough."""
    generator = torch.Generator().manual_seed(options.seed)
    dtype = getattr(torch, options.dtype)

    def randn(length: int, heads: int) -> Tensor:
        return torch.randn(1, length, heads, WIDTH, generator=generator).to(dtype)

    q, k, v = randn(length, HEADS), randn(num_keys, GROUPS), randn(num_keys, GROUPS)
    settings: dict[str, Any] = {}
    if sparse:
        order = torch.rand(1, length, GROUPS, num_keys // BLOCK - 1, generator=generator).argsort(-1) + 1
        ids = torch.cat((torch.zeros_like(order[..., :1]), order[..., : SELECTED - 1]), -1)
        settings = {"window": WINDOW, "block_ids": ids, "block_size": BLOCK}
    return Problem(*(t.requires_grad_() for t in (q, k, v)), randn(length, HEADS), settings)


def _error(results: Sequence[Tensor], problem: Problem, what: str) -> float:
    """The largest relative error of results, which are the output and the gradients."""
    exact = [t.detach().double().requires_grad_() for t in problem.leaves]
    o = sparse_attention(*exact, **problem.settings, impl="reference")
    wanted = [o.detach()]
    if len(results) > 1:
        wanted += torch.autograd.grad(o, exact, problem.grad.double())
    error = max(
        float((got.detach().double() - want).norm() / want.norm()) for got, want in zip(results, wanted, strict=True)
    )
    if not error <= _TOLERANCES[problem.q.dtype]:
        raise _bench.WrongResult(f"{what}: relative error {error:.1e}")
    return error


def _ours(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
    return sparse_attention(q, k, v, **settings, impl="triton")


def interpreted_fla() -> Compute | None:
    """Its parallel_attn in Triton's interpreter; None if it is not there, or does not import."""
    return _fla.interpreted("fla.ops.attn.parallel", "parallel_attn")


def format_costs(costs: Sequence[LayerCost], options: Options) -> str:
    """Cases beside each other."""
    header = [
        f"counted, {options.target}'s tiles, {options.dtype}",
        *("launches", "distinct MB", "requested MB", "GFLOP executed / useful", "saved MB", "error"),
    ]
    rows, rules = [], []
    for number, cost in enumerate(costs):
        if number and cost.labels != costs[number - 1].labels:
            rules.append(number)
        passes = [which for which in ("forward", "backward") if getattr(cost, which)]
        both = lambda what, unit, form, cost=cost, passes=passes: " + ".join(  # noqa: E731
            f"{cost.total(what, which) / unit:{form}}" for which in passes
        )
        useful = {"forward": cost.useful_flops, "backward": 2.5 * cost.useful_flops}
        executed = [f"{cost.total('flops', which) / 1e9:.3g} / {useful[which] / 1e9:.3g}" for which in passes]
        title = f"{cost.labels['case']}, L {cost.labels['L']}, Lk {cost.labels['Lk']}: {cost.name}"
        figures = [both("launches", 1, "g"), both("distinct", _MB, ".2f"), both("requested", _MB, ".2f")]
        rows.append([title, *figures, " + ".join(executed), f"{cost.saved / _MB:.2f}", f"{cost.error:.0e}"])
    return format_table(header, rows, rules=rules) + "\n"


if __name__ == "__main__":
    sys.exit(main())
