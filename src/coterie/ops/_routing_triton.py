"""`route_topk` as two Triton launches: the custom op, its fake and its gradient."""

import torch
from torch import Tensor


@torch.library.custom_op("coterie::route_topk", mutates_args=())
def route(
    logits: Tensor,
    selection_bias: Tensor | None,
    token_mask: Tensor | None,
    top_k: int,
    score: str,
    order: str,
    normalize: bool,
    scale: float,
    num_groups: int,
    top_groups: int,
    group_score: str,
) -> tuple[Tensor, Tensor]:
    """weights [T, K] float32 and expert_ids [T, K] int64 of logits [T, E]; 0 and E for masked tokens."""
    from coterie_kernels import routing

    return routing.route_topk(
        logits,
        selection_bias,
        token_mask,
        top_k,
        score,
        order,
        normalize,
        scale,
        num_groups,
        top_groups,
        group_score,
    )


@route.register_fake
def _(logits, selection_bias, token_mask, top_k, *settings):
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("coterie::route_topk_backward", mutates_args=())
def _route_backward(
    grad_weights: Tensor,
    logits: Tensor,
    expert_ids: Tensor,
    score: str,
    order: str,
    normalize: bool,
    scale: float,
) -> Tensor:
    from coterie_kernels import routing

    return routing.route_topk_backward(grad_weights, logits, expert_ids, score, order, normalize, scale)


@_route_backward.register_fake
def _(grad_weights, logits, *_):
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):
    logits, _, _, _, *ctx.settings = inputs
    ctx.save_for_backward(logits, output[1])


def _backward(ctx, grad_weights, _):
    score, order, normalize, scale, *_ = ctx.settings
    grad_logits = _route_backward(grad_weights, *ctx.saved_tensors, score, order, normalize, scale)
    return grad_logits, *[None] * 10


route.register_autograd(_backward, setup_context=_setup_context)
