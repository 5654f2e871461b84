"""A two-layer MLP whose weights are chosen per row: ragged, dropless, the MoE layer without its router."""

from contextlib import nullcontext
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from coterie.ops import _expert_mlp_cpu, _expert_mlp_device, _expert_mlp_triton
from coterie.ops._arguments import check_sizes, check_tensor, choose_impl
from coterie.ops._autocast import autocast_dtype
from coterie.ops._rows import sort_rows
from coterie.ops.activations import activation_is_gated, apply_activation
from coterie.ops.grouped_matmul import grouped_matmul

# Routed rows (T·K) up to which a CPU multiplies each by itself.
_SINGLE_ROWS = 16


def expert_mlp(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    addend: Tensor | None = None,
    activation: str = "swiglu",
    recompute: bool = False,
    impl: str | None = None,
) -> Tensor:
    """y[t] = Σ_k weights[t,k] · (activation(x[t] @ gate_up_proj[e]ᵀ + b1[e]) @ down_proj[e]ᵀ + b2[e]) + addend[t].

    with e = expert_ids[t,k], b1, b2 the optional biases and the addend optional too.

    Args:
        x: [T, D].
        expert_ids: [T, K] int64 in 0..E; E marks an unused slot, which is not computed.
        weights: [T, K], float32 as a rule.
        gate_up_proj: [E, 2F, D], gate first; [E, F, D] for an activation without a gate.
        down_proj: [E, D, F].
        gate_up_bias: [E, 2F] or [E, F].
        down_bias: [E, D].
        addend: [T, D], as a shared expert's output; the kernels add it while they sum.
        activation: see `coterie.ops.activations`.
        recompute: keep only x for backward and form the hidden layer again: 2TD bytes kept in bfloat16 instead of
            2TD + 4TKF, for 22 % more FLOPs.
        impl: "reference" (readable, any dtype, twice differentiable) | "torch" (fast on any device) | "triton" (GPUs;
            float16, bfloat16 and float32). None: triton on a GPU that it runs on, else torch.

    Returns:
        [T, D] in x's dtype (under autocast: in autocast's). Sums run in float32. Gradients to x, weights, matrices
        and biases; experts without tokens have gradient 0. Bitwise the same on every run.

    Raises:
        ValueError: a shape, an expert id (on a CPU; elsewhere one would have to wait for it) or a setting is wrong.
        TypeError: a dtype is. Every message names the argument, what came and what is accepted.
        NotImplementedError: forward-mode differentiation of another impl than the reference.
    """
    check_mlp(x, expert_ids, weights, gate_up_proj, down_proj, gate_up_bias, down_bias, activation)
    if addend is not None:
        check_tensor("addend", addend, tuple(x.shape), "[T, D]")
    impl = choose_impl(impl, x)
    device = x.device.type
    matrices = {
        "gate_up_proj": gate_up_proj,
        "down_proj": down_proj,
        "gate_up_bias": gate_up_bias,
        "down_bias": down_bias,
    }
    autocast = autocast_dtype(device)
    if autocast and x.dtype != torch.float64:  # as autocast itself has it
        x = x.to(autocast)
    else:
        for name, matrix in matrices.items():
            if matrix is not None and matrix.dtype != x.dtype:
                raise TypeError(f"{name} must have x's dtype, {x.dtype}, outside autocast; got {matrix.dtype}")
    if impl == "reference":
        cast = (t if t is None else t.to(x.dtype) for t in matrices.values())
        y = _reference(x, expert_ids, weights, *cast, activation)
        return y if addend is None else y + addend.to(x.dtype)
    inside = None  # what the op adds itself
    if impl == "triton" and addend is not None:
        inside, addend = addend.to(x.dtype), None
    tensors = (x, weights, *matrices.values())
    if forward_ad._current_level >= 0 and any(t is not None and _has_tangent(t) for t in tensors):
        raise NotImplementedError("expert_mlp has no forward-mode derivatives but with impl='reference'")
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*tensors, inside))
    if not recorded and type(x) is Tensor and device != "meta" and not _is_transformed():
        # Nothing to record or trace: a decoding step need not pay for the custom op, nor for sorting.
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            if impl == "torch" and device == "cpu" and 0 < weights.numel() <= _SINGLE_ROWS:
                y = _expert_mlp_cpu.forward_unsorted(x, expert_ids, *tensors[1:], activation)
            else:
                y, *_ = _run(impl, inside, x, expert_ids, *tensors[1:], activation, False)
    else:
        y, *_ = _op(x, expert_ids, *tensors[1:], inside, activation, recorded and not recompute, impl)
    return y if addend is None else y + addend.to(y.dtype)


def _reference(x, expert_ids, weights, gate_up_proj, down_proj, gate_up_bias, down_bias, activation):
    order, counts = sort_rows(expert_ids, gate_up_proj.shape[0])
    token = order // expert_ids.shape[1]
    hidden = grouped_matmul(x, gate_up_proj, counts, rows=token, bias=gate_up_bias, impl="reference")  # [N, 2F]
    rows = grouped_matmul(apply_activation(hidden, activation), down_proj, counts, bias=down_bias, impl="reference")
    rows = rows * weights.flatten()[order].unsqueeze(1)
    y = torch.zeros(x.shape, dtype=rows.dtype, device=x.device)
    return y.index_add(0, token, rows).to(x.dtype)


@torch.library.custom_op("coterie::expert_mlp", mutates_args=())
def _op(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    addend: Tensor | None,
    activation: str,
    keep_hidden: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [T, D], and what backward wants: hidden [N, 2F] ([0, 2F] unless kept), the sorted order, counts [E]."""
    with torch.autocast(x.device.type, enabled=False):  # the dtypes of products are chosen there
        parameters = (gate_up_proj, down_proj, gate_up_bias, down_bias)
        return _run(impl, addend, x, expert_ids, weights, *parameters, activation, keep_hidden)


@_op.register_fake
def _(x, expert_ids, weights, gate_up_proj, down_proj, gate_up_bias, down_bias, addend, activation, keep_hidden, impl):
    num_experts, width, _ = gate_up_proj.shape
    num_rows = expert_ids.numel()
    hidden = x.new_empty(num_rows if keep_hidden else 0, width)
    if impl == "triton":
        order = expert_ids.new_empty(2, _expert_mlp_triton.num_places(num_rows), dtype=torch.int32)
    else:
        order = expert_ids.new_empty(num_rows)
    return x.new_empty(x.shape), hidden, order, expert_ids.new_empty(num_experts)


@torch.library.custom_op("coterie::expert_mlp_backward", mutates_args=())
def _op_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    hidden: Tensor,
    order: Tensor,
    counts: Tensor,
    activation: str,
    needs: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    parameters = (gate_up_proj, down_proj, gate_up_bias, down_bias)
    with torch.autocast(x.device.type, enabled=False):
        return _executor(x, impl).backward(grad, x, weights, *parameters, hidden, order, counts, activation, needs)


@_op_backward.register_fake
def _(
    grad,
    x,
    weights,
    gate_up_proj,
    down_proj,
    gate_up_bias,
    down_bias,
    hidden,
    order,
    counts,
    activation,
    needs,
    impl,
):
    inputs = (x, weights, gate_up_proj, down_proj, gate_up_bias, down_bias)
    return tuple(t.new_empty(t.shape) if need else x.new_empty(0) for t, need in zip(inputs, needs, strict=True))


def _setup_context(ctx, inputs, output):
    x, _, weights, gate_up_proj, down_proj, gate_up_bias, down_bias, _, activation, _, impl = inputs
    _, hidden, order, counts = output
    ctx.save_for_backward(x, weights, gate_up_proj, down_proj, gate_up_bias, down_bias, hidden, order, counts)
    ctx.activation, ctx.impl = activation, impl


def _backward(ctx, grad, *_):
    needed = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4, 5, 6)]
    grads = _op_backward(grad, *ctx.saved_tensors, ctx.activation, needed, ctx.impl)
    grad_x, *others = (grad if need else None for grad, need in zip(grads, needed, strict=True))
    return grad_x, None, *others, grad if ctx.needs_input_grad[7] else None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def _is_transformed() -> bool:
    """Whether the compiler or a transform of torch.func looks on, which plain calls would slip past."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None


def _run(impl: str, addend: Tensor | None, x: Tensor, *args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    more = () if addend is None else (addend,)  # no other executor adds
    return _executor(x, impl).forward(x, *args, *more)


def _executor(x: Tensor, impl: str) -> ModuleType:
    if impl == "triton":
        return _expert_mlp_triton
    return _expert_mlp_cpu if x.device.type == "cpu" else _expert_mlp_device


def check_mlp(x, expert_ids, weights, gate_up_proj, down_proj, gate_up_bias, down_bias, activation):
    """Raises for the shapes and dtypes that the op's docstring does not allow."""
    check_tensor("x", x, (None, None), "[T, D]")
    check_tensor("expert_ids", expert_ids, (x.shape[0], None), "[T, K]", dtype=torch.int64)
    check_tensor("weights", weights, tuple(expert_ids.shape), "[T, K]")
    check_sizes("expert_ids", expert_ids.shape[1:], "K")
    if not weights.is_floating_point():
        raise TypeError(f"weights must be floating point, float32 as a rule, got {weights.dtype}")
    check_tensor("gate_up_proj", gate_up_proj, (None, None, x.shape[1]), "[E, 2F, D]")
    check_sizes("gate_up_proj", gate_up_proj.shape, "E, 2F, D")
    num_experts, width, dim = gate_up_proj.shape
    gated = activation_is_gated(activation)
    if gated and width % 2:
        raise ValueError(f"gate_up_proj must have 2F rows for the gated activation {activation!r}, got {width}")
    check_tensor("down_proj", down_proj, (num_experts, dim, width // 2 if gated else width), "[E, D, F]")
    if gate_up_bias is not None:
        check_tensor("gate_up_bias", gate_up_bias, (num_experts, width), "[E, 2F]")
    if down_bias is not None:
        check_tensor("down_bias", down_bias, (num_experts, dim), "[E, D]")
