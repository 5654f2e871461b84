"""The contenders of bench_expert_mlp.py, and what they must compute."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from _bench import Case, Contender, Options
from coterie.ops import expert_mlp, route_topk
from coterie.report import human_bytes

Shape = tuple[int, int, int, int, int]  # T, D, F, E, K
DENSE, DENSE_FLOAT32, DENSE_PARAMS = "dense", "dense float32", "dense, all params"
OURS, RECOMPUTE = "ours", "ours recompute"
HF_KINDS = {"HF grouped_mm": "grouped_mm", "HF batched_mm": "batched_mm", "HF eager": "eager"}
GROUPED, BATCHED = "HF grouped_mm", "HF batched_mm"
FORWARD, BOTH = "fwd", "fwd+bwd"

# Of y, and of gradients. They tell right from wrong; how exact ours is, the tests of the op say. (Hugging Face's eager
# sums experts in bfloat16, which alone is an error of 0.005.)
_TOLERANCES = {"float32": (1e-5, 1e-5), "float16": (3e-3, 5e-3), "bfloat16": (2e-2, 3e-2)}


@dataclass(frozen=True)
class Inputs:
    """One round's: x [T, D], expert_ids [T, K], weights [T, K], and the gradient of y, grad [T, D].

    `wide` are the same with x and grad in float32.
    """

    x: Tensor
    expert_ids: Tensor
    weights: Tensor
    grad: Tensor
    wide: "Inputs | None" = None


@dataclass(frozen=True)
class Parameters:
    """Of the experts, and of dense MLPs by hidden width: K·F does equal FLOPs, E·F has as many parameters."""

    gate_up: Tensor  # [E, 2F, D]
    down: Tensor  # [E, D, F]
    dense: dict[int, tuple[Tensor, Tensor]]  # hidden width -> [2·width, D], [D, width]


def make_case(
    shape: Shape,
    dtype: str,
    routing: str,
    passes: str,
    parameters: Parameters,
    options: Options,
    skips: dict[str, str] | None = None,
) -> Case:
    """The contenders of one table; `skips` are names that do not take part, and why."""
    tokens, dim, hidden_dim, num_experts, top_k = shape
    device, both, skips = options.device, passes == BOTH, dict(skips or {})
    active = parameters.dense[top_k * hidden_dim]
    experts = (parameters.gate_up, parameters.down)

    def make_inputs(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, dim, generator=generator)
        route = route_topk(_logits(routing, tokens, num_experts, generator), top_k, normalize=True)
        grad = torch.randn(tokens, dim, generator=generator)
        ids, weights = route.expert_ids.to(device), route.weights.to(device).requires_grad_()
        x, grad = x.to(device, getattr(torch, dtype)), grad.to(device, getattr(torch, dtype))
        wide = None
        if dtype != "float32":
            wide = Inputs(x.float().requires_grad_(), ids, weights, grad.float())
        return Inputs(x.requires_grad_(), ids, weights, grad, wide)

    def contender(name: str, run: Callable[[Inputs], dict], expected: Callable, params, **more) -> Contender:
        y, grads = _TOLERANCES[more.pop("dtype", dtype)]
        names = ("grad x", "grad gate_up", "grad down", "grad weights")
        tolerances = {"y": y, **dict.fromkeys(names, grads)}
        return Contender(name, run, expected, tolerances, params, skip=skips.get(name, ""), **more)

    def expected_dense(inputs: Inputs) -> dict[str, Tensor]:
        return _expected_dense(inputs, *active, both)

    def expected_experts(inputs: Inputs) -> dict[str, Tensor]:
        return _expected_experts(inputs, *experts, both)

    contenders = [contender(DENSE, _dense(*active, both), expected_dense, active)]
    if dtype != "float32":
        wide = tuple(weight.detach().float().requires_grad_() for weight in active)
        run_wide = _dense(*wide, both)
        contenders.append(
            contender(DENSE_FLOAT32, lambda inputs: run_wide(inputs.wide), expected_dense, wide, dtype="float32")
        )
    if not options.quick:
        everything = parameters.dense[num_experts * hidden_dim]

        def expected_everything(inputs: Inputs) -> dict[str, Tensor]:
            return _expected_dense(inputs, *everything, both)

        contenders.append(
            contender(
                DENSE_PARAMS, _dense(*everything, both), expected_everything, everything, work=num_experts / top_k
            )
        )
    contenders.append(contender(OURS, _ours(*experts, both, recompute=False), expected_experts, experts))
    if both and not options.quick:
        contenders.append(contender(RECOMPUTE, _ours(*experts, both, recompute=True), expected_experts, experts))
    # batched_mm copies the weights of every routed row; its backward makes as many weight gradients.
    gathered = tokens * top_k * 3 * dim * hidden_dim * getattr(torch, dtype).itemsize * (2 if both else 1)
    if gathered > options.limit_gib * 2**30:
        skips.setdefault(BATCHED, f"would gather {human_bytes(gathered)} of weights, one copy per routed row")
    for name, kind in HF_KINDS.items():
        if options.quick and name != GROUPED:
            continue
        run, leaves = (None, ()) if name in skips else _hugging_face(kind, *experts, both, top_k)
        if run is None:
            skips.setdefault(name, "transformers ≥ 5 is not installed (pip install 'coterie[hf]')")
        contenders.append(contender(name, run, expected_experts, leaves, optional=True))
    labels = dict(zip("TDFEK", shape, strict=True)) | {"dtype": dtype, "pass": passes, "routing": routing}
    return Case(labels, DENSE, contenders, make_inputs)


def _logits(routing: str, tokens: int, num_experts: int, generator: torch.Generator) -> Tensor:
    """[T, E] whose top k are a sample without replacement: uniform, or with likelihoods 1, 1/2, 1/3, … of random
    experts (the Gumbel-top-k trick, Kool et al. 2019)."""
    noise = -torch.empty(tokens, num_experts).exponential_(generator=generator).log()
    if routing == "balanced":
        return noise
    ranks = torch.randperm(num_experts, generator=generator) + 1
    return noise - ranks.log()


def make_parameters(shape: Shape, dtype: torch.dtype, options: Options) -> Parameters:
    """Random ones of variance 1 / fan-in, by the options' seed, on their device."""
    _, dim, hidden_dim, num_experts, top_k = shape
    generator = torch.Generator().manual_seed(options.seed)

    def make(*size: int) -> Tensor:
        weight = torch.randn(size, generator=generator) / size[-1] ** 0.5
        return weight.to(options.device, dtype).requires_grad_()

    widths = {top_k * hidden_dim, num_experts * hidden_dim}
    dense = {width: (make(2 * width, dim), make(dim, width)) for width in sorted(widths)}
    return Parameters(make(num_experts, 2 * hidden_dim, dim), make(num_experts, dim, hidden_dim), dense)


# --- contenders ---


def runner(compute: Callable[[Inputs], Tensor], leaves: Callable[[Inputs], dict[str, Tensor]], both: bool) -> Callable:
    def run(inputs: Inputs) -> dict[str, Tensor]:
        if not both:
            with torch.no_grad():
                return {"y": compute(inputs)}
        y, wanted = compute(inputs), leaves(inputs)
        grads = torch.autograd.grad(y, tuple(wanted.values()), inputs.grad)
        return {"y": y.detach(), **{f"grad {name}": grad for name, grad in zip(wanted, grads, strict=True)}}

    return run


def _dense(gate_up: Tensor, down: Tensor, both: bool) -> Callable:
    def compute(inputs: Inputs) -> Tensor:
        gate, up = F.linear(inputs.x, gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, down)

    return runner(compute, lambda inputs: {"x": inputs.x, "gate_up": gate_up, "down": down}, both)


def _ours(gate_up: Tensor, down: Tensor, both: bool, *, recompute: bool) -> Callable:
    def compute(inputs: Inputs) -> Tensor:
        return expert_mlp(inputs.x, inputs.expert_ids, inputs.weights, gate_up, down, recompute=recompute)

    return runner(compute, _expert_leaves(gate_up, down), both)


def _hugging_face(kind: str, gate_up: Tensor, down: Tensor, both: bool, top_k: int) -> tuple[Callable | None, tuple]:
    """transformers' own module over the same memory, and its parameters; (None, ()) without transformers."""
    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError:
        return None, ()
    num_experts, dim, hidden_dim = down.shape
    config = Qwen3MoeConfig(
        hidden_size=dim, moe_intermediate_size=hidden_dim, num_experts=num_experts, num_experts_per_tok=top_k
    )
    config._experts_implementation = kind
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj = torch.nn.Parameter(gate_up.detach())
    experts.down_proj = torch.nn.Parameter(down.detach())
    leaves = (experts.gate_up_proj, experts.down_proj)

    def compute(inputs: Inputs) -> Tensor:
        return experts(inputs.x, inputs.expert_ids, inputs.weights)

    return runner(compute, _expert_leaves(*leaves), both), leaves


def _expert_leaves(gate_up: Tensor, down: Tensor) -> Callable[[Inputs], dict[str, Tensor]]:
    return lambda inputs: {"x": inputs.x, "gate_up": gate_up, "down": down, "weights": inputs.weights}


# --- what is right ---


def _expected_dense(inputs: Inputs, gate_up: Tensor, down: Tensor, both: bool, rows: int = 64) -> dict[str, Tensor]:
    """The first rows in float64: a dense MLP treats all alike, and all would take longer than the benchmark."""
    x = inputs.x[:rows].detach().double().requires_grad_()
    with torch.set_grad_enabled(both):
        y = _mlp(x, gate_up.detach().double(), down.detach().double())
    if not both:
        return {"y": y}
    return {"y": y.detach(), "grad x": torch.autograd.grad(y, x, inputs.grad[:rows].double())[0]}


def _expected_experts(inputs: Inputs, gate_up: Tensor, down: Tensor, both: bool) -> dict[str, Tensor]:
    """y and every gradient in float64, one expert after the other.

    The op's own reference is differentiated as a whole and fills a gradient as large as all experts for each of them:
    right, but half a minute at E = 64.
    """
    x, weights, grad = inputs.x.detach().double(), inputs.weights.detach().double(), inputs.grad.double()
    y = torch.zeros_like(x)
    grads = {"x": torch.zeros_like(x), "weights": torch.zeros_like(weights)}
    for name, weight in (("gate_up", gate_up), ("down", down)):
        grads[name] = torch.zeros_like(weight, dtype=torch.float64) if both else None
    for expert in range(len(gate_up)):
        token, slot = torch.where(inputs.expert_ids == expert)
        leaves = [x[token], weights[token, slot], gate_up[expert].detach().double(), down[expert].detach().double()]
        with torch.set_grad_enabled(both):
            rows, scales, gate_up_e, down_e = [leaf.requires_grad_(both) for leaf in leaves]
            part = _mlp(rows, gate_up_e, down_e) * scales.unsqueeze(1)
        y.index_add_(0, token, part.detach())
        if both:
            grad_rows, grad_scales, grads["gate_up"][expert], grads["down"][expert] = torch.autograd.grad(
                part, leaves, grad[token]
            )
            grads["x"].index_add_(0, token, grad_rows)
            grads["weights"][token, slot] = grad_scales
    return {"y": y, **({f"grad {name}": value for name, value in grads.items()} if both else {})}


def _mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return (F.silu(gate) * up) @ down.T
