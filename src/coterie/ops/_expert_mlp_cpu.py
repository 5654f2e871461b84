"""`expert_mlp` on a CPU: a few experts at a time, on chunks of rows that stay in cache.

Every chunk is gathered, goes through both layers and is written to its place; a sum over each token's rows, in a
fixed order, ends it. Besides results no tensor of N rows is made but the experts' outputs, and the hidden layer when
it is kept for backward. A handful of rows go one by one.
"""

import torch
from torch import Tensor

from coterie.ops._layout import lay_out
from coterie.ops._products import matmul_dtype, multiply_each
from coterie.ops._rows import accumulator_dtype, bias_rows, check_ids, sort_rows
from coterie.ops._sums import TokenSum, WeightGradient, add_bias_gradient
from coterie.ops.activations import activation_and_gradient, apply_activation


def forward(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y [T, D], hidden [N, 2F] ([0, 2F] unless kept), order [N], counts [E]."""
    order, counts = sort_rows(expert_ids, gate_up_proj.shape[0], radix=True)
    layout = lay_out(counts, x.dtype, gate_up_proj.shape[1:])
    work = matmul_dtype(x.dtype)
    token = layout.spread(order // expert_ids.shape[1])
    hidden = x.new_empty(order.numel() if keep_hidden else 0, gate_up_proj.shape[1])
    y = TokenSum(x, layout, order, expert_ids.shape[1], weights)
    for chunk in layout.chunks:
        chunk_x = x.index_select(0, token[chunk.rows]).to(work)
        chunk_hidden = chunk.multiply(chunk_x, gate_up_proj.mT)  # [n, 2F]
        if gate_up_bias is not None:
            chunk.add_bias(chunk_hidden, gate_up_bias)
        if keep_hidden:
            hidden[chunk.first_row : chunk.last_row] = layout.real_rows(chunk, chunk_hidden)
        activated = apply_activation(chunk_hidden, activation)
        rows = chunk.multiply(activated, down_proj.mT, y.room(chunk))
        if down_bias is not None:
            chunk.add_bias(rows, down_bias)
        y.add(chunk, rows)
    return y.result(), hidden, order, counts


def forward_unsorted(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """y [T, D] for a handful of routed rows, each by itself, at the memory's speed."""
    # Nothing to gain from converting bfloat16 at the memory's speed.
    work = x.dtype if x.dtype == torch.bfloat16 else matmul_dtype(x.dtype)
    experts = expert_ids.flatten().tolist()
    check_ids(min(experts), max(experts), gate_up_proj.shape[0])
    rows = x.to(work).repeat_interleave(expert_ids.shape[1], 0)
    hidden = multiply_each(rows, experts, gate_up_proj)
    if gate_up_bias is not None:
        hidden += bias_rows(gate_up_bias, experts)
    rows = multiply_each(apply_activation(hidden, activation), experts, down_proj)
    if down_bias is not None:
        rows += bias_rows(down_bias, experts)
    if unused := [slot for slot, expert in enumerate(experts) if expert == len(down_proj)]:
        rows[unused] = 0
    total = accumulator_dtype(x.dtype)
    slots = rows.view(*weights.shape, -1).to(total)
    return (slots * weights.unsqueeze(2).to(total)).sum(1).to(x.dtype)


def backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to the tensors of `forward` but expert_ids, as MATH.md §1 derives them; empty where `needs` says no.

    `hidden` is what forward kept, or [0, 2F] to form it again.
    """
    needs_x, needs_weights, needs_up, needs_down, needs_up_bias, needs_down_bias = needs
    total, work = accumulator_dtype(x.dtype), matmul_dtype(x.dtype)
    layout = lay_out(counts, x.dtype, gate_up_proj.shape[1:])
    grad_x = TokenSum(x, layout, order, weights.shape[1]) if needs_x else None
    grad_weights = weights.new_zeros(order.numel() if needs_weights else 0)  # zero in unused slots
    grad_up = WeightGradient(gate_up_proj.shape, gate_up_proj.dtype, counts) if needs_up else None
    grad_down = WeightGradient(down_proj.shape, down_proj.dtype, counts) if needs_down else None
    # An expert's tiles are summed as a token's rows are, and rounded once.
    grad_up_bias = x.new_zeros(gate_up_bias.shape if needs_up_bias else 0, dtype=total)
    grad_down_bias = x.new_zeros(down_bias.shape if needs_down_bias else 0, dtype=total)

    token = layout.spread(order // weights.shape[1])
    scale = layout.spread_zero(weights.reshape(-1, 1)[order])
    for chunk in layout.chunks:
        chunk_scale = scale[chunk.rows].to(work)
        chunk_grad = grad.index_select(0, token[chunk.rows]).to(work)  # [n, D]
        if needs_up or not len(hidden):
            chunk_x = x.index_select(0, token[chunk.rows]).to(work)
        if len(hidden):
            chunk_hidden = layout.laid_out_rows(chunk, hidden).to(work)
        else:
            chunk_hidden = chunk.multiply(chunk_x, gate_up_proj.mT)
            if gate_up_bias is not None:
                chunk.add_bias(chunk_hidden, gate_up_bias)

        grad_activated = chunk.multiply(chunk_grad, down_proj)  # [n, F], before the routing weight
        activated, grad_hidden = activation_and_gradient(chunk_hidden, grad_activated * chunk_scale, activation)
        if needs_weights:
            chunk_grad_weights = (grad_activated * activated).sum(1, dtype=total)
            if down_bias is not None:
                bias = chunk.add_bias(torch.zeros_like(chunk_grad), down_bias)
                chunk_grad_weights += (chunk_grad * bias).sum(1, dtype=total)
            slots = order[chunk.first_row : chunk.last_row]
            grad_weights[slots] = layout.real_rows(chunk, chunk_grad_weights).to(weights.dtype)
        if needs_down:
            grad_down.add(chunk, chunk_grad, activated.mul_(chunk_scale))
        if needs_up:
            grad_up.add(chunk, grad_hidden, chunk_x)
        if needs_down_bias:
            add_bias_gradient(grad_down_bias, chunk, chunk_grad * chunk_scale)
        if needs_up_bias:
            add_bias_gradient(grad_up_bias, chunk, grad_hidden)
        if needs_x:
            grad_x.add(chunk, chunk.multiply(grad_hidden, gate_up_proj, grad_x.room(chunk)))
    return (
        grad_x.result() if needs_x else x.new_empty(0),
        grad_weights.view(weights.shape) if needs_weights else x.new_empty(0),
        grad_up.gradient if needs_up else x.new_empty(0),
        grad_down.gradient if needs_down else x.new_empty(0),
        grad_up_bias.to(gate_up_bias.dtype if needs_up_bias else x.dtype),
        grad_down_bias.to(down_bias.dtype if needs_down_bias else x.dtype),
    )
