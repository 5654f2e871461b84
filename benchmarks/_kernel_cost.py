"""What the launches of MoE layers cost: counted in Triton's interpreter, compiled in another process, and a bound."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import _bench
from coterie.ops import Routing, expert_mlp, route_topk

Shape = tuple[int, int, int, int, int]  # T, D, F, E, K
OURS, RECOMPUTE, LIGER = "ours", "ours recompute", "Liger fused_moe"

# Published: bytes per second of device memory, and dense 16-bit FLOPs per second of the tensor cores.
GPUS = {
    "sm_80": ("A100 SXM 80 GB", 2.039e12, 312e12),
    "sm_90": ("H100 SXM", 3.35e12, 989e12),
    "sm_100": ("B200", 8.0e12, 2250e12),
    "gfx942": ("MI300X", 5.3e12, 1307e12),
}
_TOLERANCES = {torch.float16: 5e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Problem:
    """x [T, D], expert_ids [T, K], weights [T, K] float32, gate_up [E, 2F, D], down [E, D, F], grad of y [T, D]."""

    x: Tensor
    expert_ids: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor
    grad: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.x, self.weights, self.gate_up, self.down)

    @property
    def useful_flops(self) -> int:
        """Of a forward pass; a backward pass has twice as many."""
        num_experts, dim, hidden_dim = self.down.shape
        return 6 * int((self.expert_ids < num_experts).sum()) * dim * hidden_dim


Compute = Callable[[Problem], Tensor]


def make_problem(shape: Shape, dtype: torch.dtype, seed: int) -> Problem:
    """Random numbers, and a routing by random logits."""
    tokens, dim, hidden_dim, num_experts, _ = shape
    generator = torch.Generator().manual_seed(seed)

    def make(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * scale).to(dtype)

    routing = make_routing(shape, generator)
    return Problem(
        make(tokens, dim).requires_grad_(),
        routing.expert_ids,
        routing.weights.requires_grad_(),
        make(num_experts, 2 * hidden_dim, dim, scale=dim**-0.5).requires_grad_(),
        make(num_experts, dim, hidden_dim, scale=hidden_dim**-0.5).requires_grad_(),
        make(tokens, dim),
    )


def make_routing(shape: Shape, generator: torch.Generator) -> Routing:
    tokens, _, _, num_experts, top_k = shape
    return route_topk(torch.randn(tokens, num_experts, generator=generator), top_k, normalize=True)


def padded_over_used(expert_ids: Tensor, num_experts: int, tile_rows: int) -> float:
    """Rows that tiles of `tile_rows` compute, padding included, over rows that are routed."""
    counts = torch.bincount(expert_ids.flatten(), minlength=num_experts + 1)[:num_experts]
    return float((-(-counts // tile_rows) * tile_rows).sum() / counts.sum())


def contenders() -> tuple[dict[str, Compute], dict[str, str]]:
    """Problem → y by name, ours and every peer that is installed; and why the others are not there."""

    def ours(recompute: bool) -> Compute:
        return lambda problem: expert_mlp(
            problem.x,
            problem.expert_ids,
            problem.weights,
            problem.gate_up,
            problem.down,
            recompute=recompute,
            impl="triton",
        )

    found: dict[str, Compute] = {OURS: ours(False), RECOMPUTE: ours(True)}
    liger = liger_fused_moe()
    if liger is None:
        return found, {LIGER: "not installed (pip install --no-deps liger-kernel)"}
    found[LIGER] = lambda problem: liger(
        problem.x, problem.gate_up, problem.down, problem.expert_ids.int(), problem.weights
    )
    return found, {}


def liger_fused_moe(*, tuned: bool = False) -> Callable[..., Tensor] | None:
    """Liger's (x, gate_up, down, expert_ids int32, weights) → y; None if it is not there.

    tuned: it may time its configurations, which only a GPU can; otherwise it has one. Decided on the first import.
    """
    if not tuned:
        os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")
    try:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
    except ImportError:
        return None
    return LigerFusedMoEFunction.apply


@dataclass
class KernelCost:
    """One kernel in one pass. Bytes and FLOPs are counted; `compiled` is empty if it was not compiled."""

    kernel: str
    launches: int
    requested: int
    distinct_load: int
    distinct_store: int
    flops: int
    bound_seconds: float
    compiled: dict[str, Any] = field(default_factory=dict)

    @property
    def distinct(self) -> int:
        return self.distinct_load + self.distinct_store


@dataclass
class LayerCost:
    """A contender at one shape.

    Attributes:
        forward, backward: its kernels in the order of their first launches.
        useful_flops: of forward; backward has twice as many.
        saved: bytes kept for backward, x included, matrices not.
        tile_rows: of one expert that a program of ours takes forward; None of others.
        error: the largest ‖result − expected‖ / ‖expected‖ over y and the gradients.
    """

    name: str
    labels: dict[str, Any]
    forward: list[KernelCost]
    backward: list[KernelCost]
    useful_flops: int
    saved: int
    tile_rows: int | None
    error: float

    def total(self, what: str, *passes: str) -> float:
        """The sum of an attribute of KernelCost over "forward", "backward" or, if none is given, both."""
        return sum(
            getattr(kernel, what) for each in passes or ("forward", "backward") for kernel in getattr(self, each)
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def count(
    name: str, compute: Compute, problem: Problem, expected: Mapping[str, Tensor], target: str, labels: dict[str, Any]
) -> tuple[LayerCost, dict[str, list]]:
    """A forward and a backward pass, checked and counted; with it the launches of each pass.

    Raises:
        WrongResult: it computes something else than `expected`.
    """
    from coterie_kernels.proof.count import record
    from coterie_kernels.target import aiming_at

    records, y = {}, None

    def forward() -> None:
        nonlocal y
        with record() as records["forward"]:
            y = compute(problem)

    with aiming_at(target):
        saved, _ = _bench.saved_bytes(forward, (problem.gate_up, problem.down))
        with record() as records["backward"]:
            grads = torch.autograd.grad(y, problem.leaves, problem.grad)
    tolerances = dict.fromkeys(expected, _TOLERANCES[problem.x.dtype])
    contender = _bench.Contender(name, lambda inputs: {}, lambda inputs: {}, tolerances)
    error = _bench.check(contender, named(y.detach(), grads), expected, where=_bench.title(labels))
    kernels = {
        each: [kernel_cost(kernel, of_kernel, target) for kernel, of_kernel in of_pass.by_kernel().items()]
        for each, of_pass in records.items()
    }
    rows = (launch.arguments.get("ROWS") for launch in records["forward"].launches if launch.cost.flops)
    cost = LayerCost(
        name, labels, **kernels, useful_flops=problem.useful_flops, saved=saved, tile_rows=next(rows), error=error
    )
    return cost, {each: of_pass.launches for each, of_pass in records.items()}


def expected_results(problem: Problem) -> dict[str, Tensor]:
    """By the reference in float64."""
    wide = Problem(
        *(t.detach().double().requires_grad_() if t.is_floating_point() else t for t in vars(problem).values())
    )
    y = expert_mlp(wide.x, wide.expert_ids, wide.weights, wide.gate_up, wide.down, impl="reference")
    return named(y.detach(), torch.autograd.grad(y, wide.leaves, wide.grad.detach()))


def named(y: Tensor, grads: Sequence[Tensor]) -> dict[str, Tensor]:
    return {"y": y, **dict(zip(("grad x", "grad weights", "grad gate_up", "grad down"), grads, strict=True))}


def kernel_cost(kernel: str, cost, target: str) -> KernelCost:
    _, bandwidth, peak = GPUS[target]
    bound = max(cost.distinct / bandwidth, cost.flops / peak)
    return KernelCost(kernel, cost.launches, cost.requested, cost.distinct_load, cost.distinct_store, cost.flops, bound)


def compile_kernels(cost: LayerCost, launches: Mapping[str, list], target: str) -> None:
    """Fills `compiled` of each kernel, by its first launch; compilers run in a process without the interpreter."""
    kernels = [(each, kernel) for each in launches for kernel in getattr(cost, each)]
    first = [next(one for one in launches[each] if one.kernel == kernel.kernel) for each, kernel in kernels]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    request = pickle.dumps((target, [_compilable(launch) for launch in first]))
    done = subprocess.run([sys.executable, __file__], input=request, env=environment, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"compiling {cost.name} failed: {done.stderr.decode(errors='replace').strip()[-2000:]}")
    for (_, kernel), compiled in zip(kernels, pickle.loads(done.stdout), strict=True):
        kernel.compiled = compiled


def _compilable(launch):
    """A counted launch as what the compile matrix takes."""
    from coterie_kernels.proof.capture import Launch, Pointer
    from coterie_kernels.proof.count import TensorInfo

    settings = {
        name: Pointer(value.dtype, value.is_aligned, value.num_bytes) if isinstance(value, TensorInfo) else value
        for name, value in (launch.arguments | launch.options).items()
    }
    return Launch(launch.module, launch.kernel, launch.grid, (), settings)


def _compile_request() -> None:
    """The other process: (target, launches) from the standard input, figures to the standard output."""
    from coterie_kernels.proof.compile import compile_launch

    target, launches = pickle.load(sys.stdin.buffer)
    figures = [asdict(compile_launch(launch, target)) for launch in launches]
    sys.stdout.buffer.write(pickle.dumps(figures))


if __name__ == "__main__":
    _compile_request()
