"""`delta_rule` by the Triton kernels: the custom op, its fake and its gradient.

Tokens are flat, as in `coterie::delta_rule`; `ends` are the bounds of packed sequences, which stay on the device, or
None where all sequences are of one length.
"""

import torch
from torch import Tensor


@torch.library.custom_op("coterie::delta_rule_triton", mutates_args=())
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    erase: Tensor | None,
    beta: Tensor | None,
    states: Tensor,
    ends: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, the states at the ends of the sequences, and what backward keeps: cumulative decays, solved triangles, and of
    segments, if any, the states before them and what they make of those."""
    from coterie_kernels import delta_rule as kernels

    return kernels.forward(*_contiguous(q, k, v, g, erase, beta, states), ends, scale)


@torch.library.custom_op("coterie::delta_rule_triton_backward", mutates_args=())
def _delta_rule_backward(
    grad: Tensor,
    grad_states: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    erase: Tensor | None,
    beta: Tensor | None,
    states: Tensor,
    ends: Tensor | None,
    total: Tensor,
    solved: Tensor,
    starts: Tensor,
    factors: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to q, k, v, g, erase, beta (empty for None) and to the states."""
    from coterie_kernels import delta_rule as kernels

    tensors = _contiguous(grad, grad_states, q, k, v, g, erase, beta, states)
    grads = kernels.backward(*tensors, ends, total, solved, starts, factors, scale)
    return tuple(q.new_empty(0) if gradient is None else gradient for gradient in grads)


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(t if t is None else t.contiguous() for t in tensors)


@delta_rule.register_fake
def _(q, k, v, g, erase, beta, states, ends, scale):
    from coterie_kernels import delta_rule as kernels

    erases = erase is not None or beta is not None
    total, solved, starts, factors = kernels.kept_shapes(q, v, g, erases, states.shape[0], ends is not None)
    return (
        v.new_empty(v.shape),
        states.new_empty(states.shape),
        q.new_empty(total, dtype=torch.float32),
        q.new_empty(solved, dtype=kernels.solved_dtype(q)),
        q.new_empty(starts, dtype=torch.float32),
        q.new_empty(factors, dtype=torch.float32),
    )


@_delta_rule_backward.register_fake
def _(grad, grad_states, q, k, v, g, erase, beta, states, ends, total, solved, starts, factors, scale):
    return tuple(q.new_empty(0) if t is None else t.new_empty(t.shape) for t in (q, k, v, g, erase, beta, states))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    _, states, *kept = output
    ctx.save_for_backward(*tensors, *kept)
    ctx.states = states.shape, states.dtype


def _backward(ctx, grad, grad_states, *_):
    tensors = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(tensors[2])
    if grad_states is None:
        shape, dtype = ctx.states
        grad_states = grad.new_zeros(shape, dtype=dtype)
    grads = _delta_rule_backward(grad, grad_states, *tensors, ctx.scale)
    needed = ctx.needs_input_grad
    return *(gradient if needed[i] else None for i, gradient in enumerate(grads)), None, None


delta_rule.register_autograd(_backward, setup_context=_setup_context)
