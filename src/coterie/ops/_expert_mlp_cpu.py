"""`expert_mlp` on a CPU: one expert after the other, on row tiles that stay in cache.

No tensor of N rows is made but the hidden layer, when it is kept for backward: rows are gathered into a small
buffer and results added to their tokens at once, in float32 and in a fixed order. Products run in a dtype the CPU
has instructions for (float32 for bfloat16 on AVX2), converting one expert's weights at a time.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from coterie.ops._rows import accumulator_dtype, matmul_dtype, padded, row_multiple, sort_rows
from coterie.ops.activations import activation_and_gradient, apply_activation

# Rows of one expert taken at a time: enough for the BLAS' full speed, few enough for the cache.
TILE = 1024


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
    num_experts, width, _ = gate_up_proj.shape
    order, counts = sort_rows(expert_ids, num_experts)
    hidden = x.new_empty(order.numel() if keep_hidden else 0, width)
    y = x.new_zeros(x.shape, dtype=accumulator_dtype(x.dtype))

    work = matmul_dtype(x.dtype)
    pad = row_multiple(work)
    token, scale = order // expert_ids.shape[1], weights.reshape(-1, 1)[order].to(work)
    for expert, tiles in _experts(counts):
        up_matrix, down_matrix = gate_up_proj[expert].to(work), down_proj[expert].to(work)
        for rows in tiles:
            tile = padded(x.index_select(0, token[rows]).to(work), pad)
            tile_hidden = _linear(tile, up_matrix, gate_up_bias, expert)  # [n, 2F]
            if keep_hidden:
                hidden[rows] = tile_hidden[: rows.stop - rows.start]
            tile_scale = padded(scale[rows], pad)
            activated = apply_activation(tile_hidden, activation).mul_(tile_scale)
            tile_y = torch.mm(activated, down_matrix.t())
            if down_bias is not None:
                tile_y.addcmul_(tile_scale, down_bias[expert].to(work))
            y.index_add_(0, token[rows], tile_y[: rows.stop - rows.start].to(y.dtype))
    return y.to(x.dtype), hidden, order, counts


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
    """Gradients to the first six tensors of `forward` (less expert_ids), MATH.md §1; empty where `needs` says no.

    `hidden` is what forward kept, or [0, 2F] to form it again.
    """
    needs_x, needs_weights, needs_up, needs_down, needs_up_bias, needs_down_bias = needs
    num_slots = order.numel()
    grad_x = x.new_zeros(x.shape if needs_x else 0, dtype=accumulator_dtype(x.dtype))
    grad_weights = weights.new_zeros(num_slots if needs_weights else 0)
    grad_up = _empty_where_visited(gate_up_proj, counts, needs_up)
    grad_down = _empty_where_visited(down_proj, counts, needs_down)
    grad_up_bias = torch.zeros_like(gate_up_bias) if needs_up_bias else x.new_zeros(0)
    grad_down_bias = torch.zeros_like(down_bias) if needs_down_bias else x.new_zeros(0)

    work = matmul_dtype(x.dtype)
    pad = row_multiple(work)
    token, scale = order // weights.shape[1], weights.reshape(-1, 1)[order].to(work)
    for expert, tiles in _experts(counts):
        up_matrix, down_matrix = gate_up_proj[expert].to(work), down_proj[expert].to(work)
        up_sum = _summand(grad_up[expert], work, tiles) if needs_up else None
        down_sum = _summand(grad_down[expert], work, tiles) if needs_down else None
        for rows in tiles:
            n = rows.stop - rows.start
            tile_scale = padded(scale[rows], pad)
            tile_grad = padded(grad.index_select(0, token[rows]).to(work), pad)  # [n, D]
            tile = padded(x.index_select(0, token[rows]).to(work), pad) if needs_up or not len(hidden) else None
            if len(hidden):
                tile_hidden = padded(hidden[rows].to(work), pad)
            else:
                tile_hidden = _linear(tile, up_matrix, gate_up_bias, expert)

            grad_activated = torch.mm(tile_grad, down_matrix)  # [n, F], before the routing weight
            activated, grad_hidden = activation_and_gradient(tile_hidden, grad_activated * tile_scale, activation)
            if needs_weights:
                tile_grad_weights = (grad_activated * activated).sum(1, dtype=grad_x.dtype)
                if down_bias is not None:
                    tile_grad_weights += torch.mv(tile_grad, down_bias[expert].to(work))
                grad_weights[order[rows]] = tile_grad_weights[:n].to(grad_weights.dtype)
            if needs_down:
                _add_product(down_sum, tile_grad.t(), activated.mul_(tile_scale), first=rows is tiles[0])
            if needs_down_bias:
                grad_down_bias[expert] += (tile_grad * tile_scale).sum(0)
            if needs_up:
                _add_product(up_sum, grad_hidden.t(), tile, first=rows is tiles[0])
            if needs_up_bias:
                grad_up_bias[expert] += grad_hidden[:n].sum(0)
            if needs_x:
                grad_x.index_add_(0, token[rows], torch.mm(grad_hidden, up_matrix)[:n].to(grad_x.dtype))
        if needs_up and up_sum.dtype != grad_up.dtype:
            grad_up[expert] = up_sum
        if needs_down and down_sum.dtype != grad_down.dtype:
            grad_down[expert] = down_sum
    grad_weights = grad_weights.view(weights.shape if needs_weights else 0)
    return grad_x.to(x.dtype), grad_weights, grad_up, grad_down, grad_up_bias, grad_down_bias


def _experts(counts: Tensor) -> Iterator[tuple[int, list[slice]]]:
    """The experts that have rows, each with its tiles of sorted rows."""
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            # Equal tiles: a short last one would waste the BLAS' blocking.
            number = -(-count // TILE)
            edges = [start + count * i // number for i in range(number + 1)]
            yield expert, [slice(*edge) for edge in itertools.pairwise(edges)]
            start += count


def _linear(rows: Tensor, matrix: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    if bias is None:
        return torch.mm(rows, matrix.t())
    return torch.addmm(bias[expert].to(rows.dtype), rows, matrix.t())


def _empty_where_visited(matrices: Tensor, counts: Tensor, needed: bool) -> Tensor:
    """A gradient [E, ..] whose rows are zero for experts without tokens and still to be written for the others."""
    if not needed:
        return matrices.new_empty(0)
    grad = torch.empty_like(matrices, memory_format=torch.contiguous_format)
    for expert in (counts == 0).nonzero().flatten().tolist():
        grad[expert].zero_()
    return grad


def _summand(out: Tensor, work: torch.dtype, tiles: list[slice]) -> Tensor:
    """Where to sum an expert's weight gradient: in place, unless that would round between tiles."""
    if out.dtype == accumulator_dtype(out.dtype) or (out.dtype == work and len(tiles) == 1):
        return out
    return torch.empty_like(out, dtype=torch.float32)


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total = a @ b, or += after the first."""
    if total.dtype == a.dtype:
        if first:
            torch.mm(a, b, out=total)
        else:
            total.addmm_(a, b)
    elif first:
        total.copy_(torch.mm(a, b))
    else:
        total.add_(torch.mm(a, b))
