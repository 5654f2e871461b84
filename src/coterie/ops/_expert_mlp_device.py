"""`expert_mlp` on an accelerator, in plain torch: a whole tensor of rows at a time, each product one `grouped_mm`.

Signatures as in `_expert_mlp_cpu`. No host synchronisation.
"""

import torch
from torch import Tensor

from coterie.ops._rows import accumulator_dtype, bias_rows, sort_rows, sum_slots
from coterie.ops.activations import activation_and_gradient, apply_activation
from coterie.ops.grouped_matmul import expert_of_rows, multiply_columns, multiply_rows, sum_rows


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
    order, counts = sort_rows(expert_ids, gate_up_proj.shape[0])
    hidden = _hidden(x, order // expert_ids.shape[1], gate_up_proj, gate_up_bias, counts)
    rows = multiply_rows(apply_activation(hidden, activation), down_proj, counts)
    if down_bias is not None:
        rows += bias_rows(down_bias, expert_of_rows(counts, rows.shape[0]))
    y = sum_slots(rows, order, weights)
    return y, hidden if keep_hidden else hidden.new_empty(0, hidden.shape[1]), order, counts


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
    """MATH.md §1: neither the gathered x, nor the activation, nor the experts' outputs were kept."""
    needs_x, needs_weights, needs_up, needs_down, needs_up_bias, needs_down_bias = needs
    token = order // weights.shape[1]
    scale = weights.flatten()[order].unsqueeze(1).to(x.dtype)
    if not len(hidden):
        hidden = _hidden(x, token, gate_up_proj, gate_up_bias, counts)
    grad_rows = grad.index_select(0, token)  # [N, D]
    grad_activated = multiply_rows(grad_rows, down_proj.transpose(1, 2), counts)  # before the weight
    activated, grad_hidden = activation_and_gradient(hidden, grad_activated * scale, activation)

    # Outputs of a custom op may not alias, hence one empty tensor each.
    grad_x, grad_weights, grad_up, grad_down, grad_up_bias, grad_down_bias = (x.new_empty(0) for _ in needs)
    if needs_x:
        rows = multiply_rows(grad_hidden, gate_up_proj.transpose(1, 2), counts)
        grad_x = sum_slots(rows, order, torch.ones_like(weights))
    if needs_weights:
        by_row = (grad_activated * activated).sum(1, dtype=accumulator_dtype(x.dtype))
        if down_bias is not None:
            bias = bias_rows(down_bias, expert_of_rows(counts, order.numel())).to(x.dtype)
            by_row += (grad_rows * bias).sum(1, dtype=by_row.dtype)
        grad_weights = torch.empty_like(weights).flatten().index_copy_(0, order, by_row.to(weights.dtype))
        grad_weights = grad_weights.view(weights.shape)
    if needs_down:
        grad_down = multiply_columns(grad_rows, activated * scale, counts).to(down_proj.dtype)
    if needs_up:
        grad_up = multiply_columns(grad_hidden, x.index_select(0, token), counts).to(gate_up_proj.dtype)
    if needs_up_bias:
        grad_up_bias = sum_rows(grad_hidden, counts).to(gate_up_bias.dtype)
    if needs_down_bias:
        grad_down_bias = sum_rows(grad_rows * scale, counts).to(down_bias.dtype)
    return grad_x, grad_weights, grad_up, grad_down, grad_up_bias, grad_down_bias


def _hidden(x: Tensor, token: Tensor, gate_up_proj: Tensor, gate_up_bias: Tensor | None, counts: Tensor) -> Tensor:
    hidden = multiply_rows(x.index_select(0, token), gate_up_proj, counts)
    if gate_up_bias is not None:
        hidden += bias_rows(gate_up_bias, expert_of_rows(counts, token.numel()))
    return hidden
