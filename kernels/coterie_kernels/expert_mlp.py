"""A two-layer MLP whose weights are chosen per row.

Narrow experts: a program owns a tile of one expert's rows and all of their hidden layer, and goes through the whole MLP
with it: gather x → up → activation → down, and backward gather dO → dĀ → dH → dX, so that nothing crosses the memory
between the two matrices. Wide experts take a launch for each matrix.

Backward keeps x and the hidden layer H, or x alone and forms H again. s is a row's routing weight; what it weighs is
the expert's output, so its gradient is ⟨dĀ, A⟩ with dĀ = dO W2, and no expert's output is kept (as in SonicMoE,
arXiv:2512.14080). Rows of outputs lie sorted and are gathered and summed afterwards, in a fixed order: no atomics.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from coterie_kernels.combine import combine
from coterie_kernels.expert_mlp_backward import backward_kernel, multiply_mlp_columns
from coterie_kernels.expert_mlp_forward import forward_kernel
from coterie_kernels.grouped_matmul import multiply_rows
from coterie_kernels.schedule import num_tiles
from coterie_kernels.sort import sort_slots
from coterie_kernels.target import dot_precision, on_its_device, target_of
from coterie_kernels.tiles import MlpTile, column_tile, mlp_tile


@dataclass(frozen=True)
class Activation:
    """φ(gate) · up, or φ alone; see `coterie_kernels.activations`."""

    function: str
    gated: bool
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0


@on_its_device
def forward(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    addend: Tensor | None,
    activation: Activation,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Σ_k weights[t, k] · MLP (+ addend), and what backward wants.

    Args:
        x [T, D], expert_ids [T, K], weights [T, K], gate_up_proj [E, 2F or F, D], down_proj [E, D, F], biases
        [E, 2F or F] and [E, D], addend [T, D]: contiguous; of x's dtype but for ids and weights.

    Returns:
        y [T, D]; hidden [N, 2F] ([0, 2F] unless kept); places and counts as `sort_slots` has them.
    """
    num_experts, width, dim = gate_up_proj.shape
    places, counts = sort_slots(expert_ids, num_experts)
    order, position = places
    num_rows, hidden_dim, top_k = expert_ids.numel(), down_proj.shape[2], expert_ids.shape[1]
    kept = x.new_empty(num_rows, width) if keep_hidden else None
    if num_rows:
        tile = mlp_tile(target_of(x), x.dtype, hidden_dim, num_rows / num_experts, "forward")
        rows = x.new_empty(num_rows, dim if tile.fused else hidden_dim)
        grid = (num_tiles(num_rows, num_experts, tile.rows), 1 if tile.fused else triton.cdiv(hidden_dim, tile.units))
        forward_kernel[grid](
            x,
            gate_up_proj,
            down_proj,
            gate_up_bias,
            down_bias,
            order,
            counts,
            kept,
            rows,
            num_rows,
            num_experts,
            top_k,
            **_constants(x, down_proj, activation, tile),
        )
        if not tile.fused:
            rows = multiply_rows(rows, down_proj, counts, bias=down_bias)
    else:
        rows = x.new_empty(0, dim)
    y = combine(rows, position, x.shape[0], top_k, weights=weights, addend=addend)
    return y, x.new_empty(0, width) if kept is None else kept, places, counts


@on_its_device
def backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    hidden: Tensor,
    places: Tensor,
    counts: Tensor,
    activation: Activation,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients to x, weights, gate_up_proj, down_proj and their biases; None where `needs` says no.

    grad: [T, D] contiguous, in x's dtype. hidden [0, 2F]: it was not kept.
    """
    needs_x, needs_weights, needs_up, needs_down, needs_up_bias, needs_down_bias = needs
    num_experts, width, dim = gate_up_proj.shape
    num_rows, hidden_dim, top_k = weights.numel(), down_proj.shape[2], weights.shape[1]
    order, position = places
    if not num_rows:
        inputs = (x, weights, gate_up_proj, down_proj, gate_up_bias, down_bias)
        return tuple(torch.zeros_like(t) if need else None for t, need in zip(inputs, needs, strict=True))
    kind = "backward" if len(hidden) else "recompute"
    tile = mlp_tile(target_of(x), x.dtype, hidden_dim, num_rows / num_experts, kind)
    chunks = 1 if tile.fused else triton.cdiv(hidden_dim, tile.units)
    up, down = needs_up or needs_up_bias, needs_down or needs_down_bias
    grad_hidden = x.new_empty(num_rows, width) if up or (needs_x and not tile.fused) else None
    scaled = x.new_empty(num_rows, hidden_dim) if down else None  # s · A
    grad_rows = x.new_empty(num_rows, dim) if needs_x and tile.fused else None
    grad_weights = None
    if needs_weights:
        dtype = weights.dtype if chunks == 1 else torch.float32
        grad_weights = torch.empty(*weights.shape, chunks, dtype=dtype, device=x.device)
    if needs_x or needs_weights or up or down:
        backward_kernel[(num_tiles(num_rows, num_experts, tile.rows), chunks)](
            grad,
            x,
            weights,
            gate_up_proj,
            down_proj,
            gate_up_bias,
            down_bias,
            hidden if len(hidden) else None,
            order,
            counts,
            grad_hidden,
            scaled,
            grad_rows,
            grad_weights,
            num_rows,
            num_experts,
            top_k,
            **_constants(x, down_proj, activation, tile),
        )
    grads = _matrix_gradients(grad, x, weights, order, counts, grad_hidden if up else None, scaled, needs[2:])
    grad_x = None
    if needs_x:
        if not tile.fused:
            grad_rows = multiply_rows(grad_hidden, gate_up_proj, counts, transposed=True)
        grad_x = combine(grad_rows, position, x.shape[0], top_k, weights=None, addend=None)
    if needs_weights:
        grad_weights = grad_weights.squeeze(-1) if chunks == 1 else grad_weights.sum(-1).to(weights.dtype)
    return grad_x, grad_weights, *grads


def _matrix_gradients(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    order: Tensor,
    counts: Tensor,
    grad_hidden: Tensor | None,
    scaled: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Of gate_up_proj, if grad_hidden is given, of down_proj, if scaled is, and of their biases: in one launch."""
    if grad_hidden is None and scaled is None:
        return (None,) * 4
    num_experts, dim = counts.shape[0], x.shape[1]
    width = 0 if grad_hidden is None else grad_hidden.shape[1]
    hidden_dim = 0 if scaled is None else scaled.shape[1]
    shapes = ((num_experts, width, dim), (num_experts, dim, hidden_dim), (num_experts, width), (num_experts, dim))
    grads = tuple(x.new_empty(shape) if need else None for shape, need in zip(shapes, needs, strict=True))
    tile = column_tile(target_of(x), x.dtype, min(dim, hidden_dim or width))
    tiles = _tiles(width, dim, tile) + _tiles(dim, hidden_dim, tile)
    multiply_mlp_columns[(num_experts * tiles,)](
        grad,
        x,
        weights,
        order,
        counts,
        grad_hidden,
        scaled,
        *grads,
        num_experts,
        weights.shape[1],
        DIM=dim,
        WIDTH=width,
        HIDDEN=hidden_dim,
        EXPERTS=triton.next_power_of_2(num_experts + 1),
        PRECISION=dot_precision(x),
        **tile.settings,
    )
    return grads


def _tiles(outer: int, inner: int, tile) -> int:
    return triton.cdiv(outer, tile.rows) * triton.cdiv(inner, tile.columns)


def _constants(x: Tensor, down_proj: Tensor, activation: Activation, tile: MlpTile) -> dict:
    num_experts, dim, hidden_dim = down_proj.shape
    return {
        "DIM": dim,
        "HIDDEN": hidden_dim,
        "FUNCTION": activation.function,
        "GATED": activation.gated,
        "ALPHA": activation.alpha,
        "LIMIT": activation.limit,
        "OFFSET": activation.up_offset,
        "EXPERTS": triton.next_power_of_2(num_experts + 1),
        "FUSED": tile.fused,
        "ROWS": tile.rows,
        "UNITS": tile.units,
        "DEPTH": tile.depth,
        "COLUMNS": tile.columns,
        "PRECISION": dot_precision(x),
        "num_warps": tile.warps,
        "enable_fp_fusion": True,  # as Triton from 3.10 on no longer has it by itself
        "num_stages": tile.stages,
    }
