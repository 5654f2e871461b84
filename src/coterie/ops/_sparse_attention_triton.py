"""`sparse_attention` by the Triton kernels: the custom op, its fake and its gradient.

Bounds of packed sequences and padding stay on the device: their values are not checked.
"""

import torch
from torch import Tensor

from coterie.ops._sparse_attention_tiles import Seen


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_ids: Tensor | None,
    sink_logits: Tensor | None,
    seen: Seen,
    cu_seqlens: Tensor | None,
    token_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o [B, L, H, V] and log Z [B, L, H]; arguments as `sparse_attention`'s, with an id list for every query."""
    tensors = q, k, v, block_ids, sink_logits, cu_seqlens, token_mask
    return _forward_op(*tensors, seen.window, seen.sinks, seen.block_size, seen.causal, seen.scale, seen.softcap)


@torch.library.custom_op("coterie::sparse_attention_triton", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_ids: Tensor | None,
    sink_logits: Tensor | None,
    cu_seqlens: Tensor | None,
    token_mask: Tensor | None,
    window: int,
    sinks: int,
    block_size: int,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    from coterie_kernels import sparse_attention as kernels

    tensors = _as_kernels_take(q, k, v, block_ids)
    seen = kernels.Seen(window, sinks, block_size, causal, scale, softcap)
    return kernels.forward(*tensors, sink_logits, cu_seqlens, token_mask, seen)


@torch.library.custom_op("coterie::sparse_attention_triton_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_ids: Tensor | None,
    sink_logits: Tensor | None,
    cu_seqlens: Tensor | None,
    token_mask: Tensor | None,
    o: Tensor,
    lse: Tensor,
    window: int,
    sinks: int,
    block_size: int,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to q, k, v and sink_logits (empty for None)."""
    from coterie_kernels import sparse_attention as kernels

    tensors = grad.contiguous(), grad_lse.contiguous(), *_as_kernels_take(q, k, v, block_ids)
    seen = kernels.Seen(window, sinks, block_size, causal, scale, softcap)
    *grads, grad_sinks = kernels.backward(*tensors, sink_logits, cu_seqlens, token_mask, o, lse, seen)
    return *grads, q.new_empty(0) if grad_sinks is None else grad_sinks


@torch.library.custom_op("coterie::selected_mass_triton", mutates_args=())
def selected_mass(
    q: Tensor, k: Tensor, lse: Tensor, block_ids: Tensor, token_mask: Tensor | None, block_size: int, scale: float
) -> Tensor:
    """[B, L, G, S]; see `coterie.ops.selected_mass`."""
    from coterie_kernels import sparse_attention as kernels

    q, k, _, ids = _as_kernels_take(q, k, k, block_ids)
    if ids is None:
        return lse.new_empty(block_ids.shape)
    return kernels.selected_mass(q, k, lse.contiguous(), ids, token_mask, block_size, scale)


@selected_mass.register_fake
def _(q, k, lse, block_ids, *settings):
    return lse.new_empty(block_ids.shape)


def _as_kernels_take(q: Tensor, k: Tensor, v: Tensor, block_ids: Tensor | None) -> tuple[Tensor | None, ...]:
    """k and v, a part of a cache as they may be, are copied only if their channels are apart."""
    k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (k, v))
    return q.contiguous(), k, v, block_ids.contiguous() if block_ids is not None and block_ids.numel() else None


@_forward_op.register_fake
def _(q, k, v, *rest):
    return v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@_backward_op.register_fake
def _(grad, grad_lse, q, k, v, block_ids, sink_logits, *rest):
    return tuple(q.new_empty(0) if t is None else t.new_empty(t.shape) for t in (q, k, v, sink_logits))


def _setup_context(ctx, inputs, output):
    tensors, ctx.settings = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad, grad_lse):
    *_, o, lse = tensors = ctx.saved_tensors
    grad = torch.zeros_like(o) if grad is None else grad
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    *grads, grad_sinks = _backward_op(grad, grad_lse, *tensors, *ctx.settings)
    return *grads, None, None if tensors[4] is None else grad_sinks, *[None] * (2 + len(ctx.settings))


_forward_op.register_autograd(_backward, setup_context=_setup_context)
