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
import triton.language as tl
from torch import Tensor

from coterie_kernels.activations import activate, activation_and_gradient
from coterie_kernels.combine import combine
from coterie_kernels.grouped_matmul import add_columns, multiply_rows, rows_of
from coterie_kernels.schedule import locate, num_tiles
from coterie_kernels.sort import sort_slots
from coterie_kernels.target import dot_precision, target_of
from coterie_kernels.tiles import MlpTile, column_tile, mlp_tile


@dataclass(frozen=True)
class Activation:
    """φ(gate) · up, or φ alone; see `coterie_kernels.activations`."""

    function: str
    gated: bool
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0


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
        _forward[grid](
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
        _backward[(num_tiles(num_rows, num_experts, tile.rows), chunks)](
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
    _multiply_mlp_columns[(num_experts * tiles,)](
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
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        PRECISION=dot_precision(x),
        num_warps=tile.warps,
        num_stages=tile.stages,
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
        "num_stages": tile.stages,
    }


# --- forward ---


@triton.jit
def _forward(
    x_ptr,
    up_ptr,
    down_ptr,
    up_bias_ptr,
    down_bias_ptr,
    order_ptr,
    counts_ptr,
    hidden_ptr,
    rows_ptr,
    num_rows,
    num_experts,
    top_k,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    EXPERTS: tl.constexpr,
    FUSED: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """FUSED: rows [N, D] are the experts' outputs, 0 where there is none. Else rows [N, F] are activations."""
    expert, first_row, count = locate(counts_ptr, tl.program_id(0), num_rows, num_experts, ROWS, EXPERTS)
    if count == 0 or expert == num_experts:
        return  # rows of no expert are read by nobody
    row = first_row + tl.arange(0, ROWS)
    is_row = tl.arange(0, ROWS) < count
    token = tl.load(order_ptr + row, mask=is_row, other=0) // top_k
    expert = expert.to(tl.int64)
    if not FUSED:
        unit = tl.program_id(1) * UNITS
        activated = _activated(
            x_ptr, up_ptr, up_bias_ptr, hidden_ptr, token, row, is_row, expert, unit, 0, 1,
            DIM, HIDDEN, FUNCTION, GATED, ALPHA, LIMIT, OFFSET, ROWS, UNITS, DEPTH, PRECISION,
        )  # fmt: skip
        unit += tl.arange(0, UNITS)
        place = rows_ptr + row.to(tl.int64)[:, None] * HIDDEN + unit[None, :]
        tl.store(place, activated, mask=is_row[:, None] & (unit < HIDDEN)[None, :])
    else:
        CHUNKS: tl.constexpr = triton.next_power_of_2(tl.cdiv(HIDDEN, UNITS))
        activated = _activated(
            x_ptr, up_ptr, up_bias_ptr, hidden_ptr, token, row, is_row, expert, 0, 0, CHUNKS,
            DIM, HIDDEN, FUNCTION, GATED, ALPHA, LIMIT, OFFSET, ROWS, UNITS, DEPTH, PRECISION,
        )  # fmt: skip
        unit = tl.arange(0, CHUNKS * UNITS)
        matrix = down_ptr + expert * (DIM * HIDDEN)
        for first in range(0, DIM, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            is_column = column < DIM
            right = tl.load(
                matrix + column[None, :] * HIDDEN + unit[:, None],
                mask=is_column[None, :] & (unit < HIDDEN)[:, None],
                other=0,
            )
            y = tl.dot(activated, right, input_precision=PRECISION)
            if down_bias_ptr is not None:
                y += tl.load(down_bias_ptr + expert * DIM + column, mask=is_column, other=0).to(tl.float32)[None, :]
            place = rows_ptr + row.to(tl.int64)[:, None] * DIM + column[None, :]
            tl.store(place, y.to(rows_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _activated(
    x_ptr, up_ptr, up_bias_ptr, hidden_ptr, token, row, is_row, expert, unit, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    DIM: tl.constexpr, HIDDEN: tl.constexpr, FUNCTION: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr,
    LIMIT: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[ROWS, CHUNKS · UNITS]: activations in x's dtype, from chunk CHUNK on; chunk 0 begins with hidden unit `unit`.

    A chunk at a time, so that no more than one chunk's sums are in registers. Writes their H if that is kept.
    """
    if CHUNKS > 1:
        HALF: tl.constexpr = CHUNKS // 2
        left = _activated(
            x_ptr, up_ptr, up_bias_ptr, hidden_ptr, token, row, is_row, expert, unit, CHUNK, HALF,
            DIM, HIDDEN, FUNCTION, GATED, ALPHA, LIMIT, OFFSET, ROWS, UNITS, DEPTH, PRECISION,
        )  # fmt: skip
        right = _activated(
            x_ptr, up_ptr, up_bias_ptr, hidden_ptr, token, row, is_row, expert, unit, CHUNK + HALF, HALF,
            DIM, HIDDEN, FUNCTION, GATED, ALPHA, LIMIT, OFFSET, ROWS, UNITS, DEPTH, PRECISION,
        )  # fmt: skip
        return _beside(left, right)
    elif CHUNK * UNITS >= HIDDEN:
        return tl.zeros([ROWS, UNITS], x_ptr.dtype.element_ty)
    else:
        unit += CHUNK * UNITS
        gate, up = _hidden(
            x_ptr, up_ptr, up_bias_ptr, token, is_row, expert, unit, DIM, HIDDEN, GATED, ROWS, UNITS, DEPTH, PRECISION
        )
        if hidden_ptr is not None:
            _store_hidden(hidden_ptr, gate, up, row, is_row, unit, HIDDEN, GATED, UNITS)
        activated = activate(gate.to(tl.float32), up.to(tl.float32), FUNCTION, GATED, ALPHA, LIMIT, OFFSET)
        return activated.to(x_ptr.dtype.element_ty)


@triton.jit
def _hidden(
    x_ptr, up_ptr, up_bias_ptr, token, is_row, expert, unit, DIM: tl.constexpr, HIDDEN: tl.constexpr,
    GATED: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gate and up [ROWS, UNITS] of hidden units `unit` and on, rounded to x's dtype; without a gate one tensor, twice.

    Gate and up rows of the matrix are taken alternately: one product gives both, next to each other.
    """
    WIDTH: tl.constexpr = 2 * HIDDEN if GATED else HIDDEN
    matrix_row, is_unit = _matrix_rows(unit, HIDDEN, GATED, UNITS)
    x = x_ptr + token.to(tl.int64)[:, None] * DIM
    matrix = up_ptr + expert * (WIDTH * DIM) + matrix_row[None, :] * DIM
    total = tl.zeros([ROWS, matrix_row.shape[0]], tl.float32)
    for first in range(0, DIM, DEPTH):
        depth = first + tl.arange(0, DEPTH)
        is_depth = depth < DIM
        left = tl.load(x + depth[None, :], mask=is_row[:, None] & is_depth[None, :], other=0)
        right = tl.load(matrix + depth[:, None], mask=is_depth[:, None] & is_unit[None, :], other=0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    if up_bias_ptr is not None:
        bias = tl.load(up_bias_ptr + expert * WIDTH + matrix_row, mask=is_unit, other=0)
        total += bias.to(tl.float32)[None, :]
    hidden = total.to(x_ptr.dtype.element_ty)
    if GATED:
        return tl.split(tl.reshape(hidden, (ROWS, UNITS, 2)))
    else:
        return hidden, hidden


@triton.jit
def _matrix_rows(unit, HIDDEN: tl.constexpr, GATED: tl.constexpr, UNITS: tl.constexpr):
    """The rows of gate_up_proj for units `unit` and on, and which exist: gate, up, gate, up, ... if GATED."""
    if GATED:
        j = tl.arange(0, 2 * UNITS)
        own = unit + j // 2
        return (j % 2) * HIDDEN + own, own < HIDDEN
    else:
        own = unit + tl.arange(0, UNITS)
        return own, own < HIDDEN


@triton.jit
def _store_hidden(
    hidden_ptr, gate, up, row, is_row, unit, HIDDEN: tl.constexpr, GATED: tl.constexpr, UNITS: tl.constexpr
):
    own = unit + tl.arange(0, UNITS)
    mask = is_row[:, None] & (own < HIDDEN)[None, :]
    if GATED:
        place = hidden_ptr + row.to(tl.int64)[:, None] * (2 * HIDDEN) + own[None, :]
        tl.store(place, gate, mask=mask)
        tl.store(place + HIDDEN, up, mask=mask)
    else:
        tl.store(hidden_ptr + row.to(tl.int64)[:, None] * HIDDEN + own[None, :], gate, mask=mask)


@triton.jit
def _beside(left, right):
    """[n, A], [n, A] → [n, 2A]."""
    both = tl.permute(tl.join(left, right), (0, 2, 1))
    return tl.reshape(both, (left.shape[0], 2 * left.shape[1]))


# --- backward ---


@triton.jit
def _backward(
    grad_ptr,
    x_ptr,
    weights_ptr,
    up_ptr,
    down_ptr,
    up_bias_ptr,
    down_bias_ptr,
    hidden_ptr,
    order_ptr,
    counts_ptr,
    grad_hidden_ptr,
    scaled_ptr,
    grad_rows_ptr,
    grad_weights_ptr,
    num_rows,
    num_experts,
    top_k,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    EXPERTS: tl.constexpr,
    FUSED: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes those of grad_hidden [N, 2F], scaled [N, F] = s · A, grad_rows [N, D] and grad_weights that are given.

    grad_weights: [T·K, number of programs along axis 1], each with its own hidden units' part.
    """
    expert, first_row, count = locate(counts_ptr, tl.program_id(0), num_rows, num_experts, ROWS, EXPERTS)
    if count == 0:
        return
    row = first_row + tl.arange(0, ROWS)
    is_row = tl.arange(0, ROWS) < count
    slot = tl.load(order_ptr + row, mask=is_row, other=0)
    grad_weight = slot.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    if expert == num_experts:
        if grad_weights_ptr is not None:
            nothing = tl.zeros([ROWS], grad_weights_ptr.dtype.element_ty)
            tl.store(grad_weights_ptr + grad_weight, nothing, mask=is_row)
        return
    expert = expert.to(tl.int64)
    weight = tl.load(weights_ptr + slot, mask=is_row, other=0).to(tl.float32)
    CHUNKS: tl.constexpr = triton.next_power_of_2(tl.cdiv(HIDDEN, UNITS)) if FUSED else 1
    unit = 0 if FUSED else tl.program_id(1) * UNITS
    grad_hidden, by_weight = _grad_hidden(
        grad_ptr, x_ptr, up_ptr, down_ptr, up_bias_ptr, hidden_ptr, grad_hidden_ptr, scaled_ptr,
        slot // top_k, row, is_row, expert, weight, unit, 0, CHUNKS,
        DIM, HIDDEN, FUNCTION, GATED, ALPHA, LIMIT, OFFSET, ROWS, UNITS, DEPTH, PRECISION,
    )  # fmt: skip
    if grad_weights_ptr is not None:
        if down_bias_ptr is not None and tl.program_id(1) == 0:
            by_weight += _dot_bias(grad_ptr, down_bias_ptr, slot // top_k, is_row, expert, DIM, ROWS, DEPTH)
        tl.store(grad_weights_ptr + grad_weight, by_weight.to(grad_weights_ptr.dtype.element_ty), mask=is_row)
    if grad_rows_ptr is not None:
        matrix_row, is_unit = _matrix_rows(0, HIDDEN, GATED, CHUNKS * UNITS)
        matrix = up_ptr + expert * ((2 * HIDDEN if GATED else HIDDEN) * DIM) + matrix_row[:, None] * DIM
        for first in range(0, DIM, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            is_column = column < DIM
            right = tl.load(matrix + column[None, :], mask=is_unit[:, None] & is_column[None, :], other=0)
            grad_x = tl.dot(grad_hidden, right, input_precision=PRECISION)
            place = grad_rows_ptr + row.to(tl.int64)[:, None] * DIM + column[None, :]
            tl.store(place, grad_x.to(grad_rows_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _grad_hidden(
    grad_ptr, x_ptr, up_ptr, down_ptr, up_bias_ptr, hidden_ptr, grad_hidden_ptr, scaled_ptr,
    token, row, is_row, expert, weight, unit, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    DIM: tl.constexpr, HIDDEN: tl.constexpr, FUNCTION: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr,
    LIMIT: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient to H, chunks as in `_activated`, columns as in `_matrix_rows`; and ⟨dĀ, A⟩ [ROWS] over them."""
    if CHUNKS > 1:
        HALF: tl.constexpr = CHUNKS // 2
        left, left_sum = _grad_hidden(
            grad_ptr, x_ptr, up_ptr, down_ptr, up_bias_ptr, hidden_ptr, grad_hidden_ptr, scaled_ptr,
            token, row, is_row, expert, weight, unit, CHUNK, HALF,
            DIM, HIDDEN, FUNCTION, GATED, ALPHA, LIMIT, OFFSET, ROWS, UNITS, DEPTH, PRECISION,
        )  # fmt: skip
        right, right_sum = _grad_hidden(
            grad_ptr, x_ptr, up_ptr, down_ptr, up_bias_ptr, hidden_ptr, grad_hidden_ptr, scaled_ptr,
            token, row, is_row, expert, weight, unit, CHUNK + HALF, HALF,
            DIM, HIDDEN, FUNCTION, GATED, ALPHA, LIMIT, OFFSET, ROWS, UNITS, DEPTH, PRECISION,
        )  # fmt: skip
        return _beside(left, right), left_sum + right_sum
    elif CHUNK * UNITS >= HIDDEN:
        nothing = tl.zeros([ROWS, 2 * UNITS if GATED else UNITS], x_ptr.dtype.element_ty)
        return nothing, tl.zeros([ROWS], tl.float32)
    else:
        unit += CHUNK * UNITS
        own = unit + tl.arange(0, UNITS)
        is_unit = own < HIDDEN
        grad = grad_ptr + token.to(tl.int64)[:, None] * DIM
        matrix = down_ptr + expert * (DIM * HIDDEN) + own[None, :]
        grad_activated = tl.zeros([ROWS, UNITS], tl.float32)  # before the routing weight
        for first in range(0, DIM, DEPTH):
            depth = first + tl.arange(0, DEPTH)
            is_depth = depth < DIM
            left = tl.load(grad + depth[None, :], mask=is_row[:, None] & is_depth[None, :], other=0)
            right = tl.load(matrix + depth[:, None] * HIDDEN, mask=is_depth[:, None] & is_unit[None, :], other=0)
            grad_activated = tl.dot(left, right, grad_activated, input_precision=PRECISION)
        if hidden_ptr is None:
            gate, up = _hidden(
                x_ptr,
                up_ptr,
                up_bias_ptr,
                token,
                is_row,
                expert,
                unit,
                DIM,
                HIDDEN,
                GATED,
                ROWS,
                UNITS,
                DEPTH,
                PRECISION,
            )
        else:
            place = hidden_ptr + row.to(tl.int64)[:, None] * (2 * HIDDEN if GATED else HIDDEN) + own[None, :]
            gate = tl.load(place, mask=is_row[:, None] & is_unit[None, :], other=0)
            up = tl.load(place + HIDDEN, mask=is_row[:, None] & is_unit[None, :], other=0) if GATED else gate
        activated, grad_gate, grad_up = activation_and_gradient(
            gate.to(tl.float32), up.to(tl.float32), grad_activated * weight[:, None],
            FUNCTION, GATED, ALPHA, LIMIT, OFFSET,
        )  # fmt: skip
        grad_gate = grad_gate.to(x_ptr.dtype.element_ty)
        grad_up = grad_up.to(x_ptr.dtype.element_ty)
        if grad_hidden_ptr is not None:
            _store_hidden(grad_hidden_ptr, grad_gate, grad_up, row, is_row, unit, HIDDEN, GATED, UNITS)
        if scaled_ptr is not None:
            scaled = (activated * weight[:, None]).to(scaled_ptr.dtype.element_ty)
            place = scaled_ptr + row.to(tl.int64)[:, None] * HIDDEN + own[None, :]
            tl.store(place, scaled, mask=is_row[:, None] & is_unit[None, :])
        by_weight = tl.sum(grad_activated * activated, 1)
        if GATED:
            return tl.reshape(tl.join(grad_gate, grad_up), (ROWS, 2 * UNITS)), by_weight
        else:
            return grad_gate, by_weight


@triton.jit
def _dot_bias(
    grad_ptr, down_bias_ptr, token, is_row, expert, DIM: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr
):
    """⟨grad, down_bias⟩ [ROWS]: the bias's part in the gradient to the routing weight."""
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, DIM, DEPTH):
        depth = first + tl.arange(0, DEPTH)
        is_depth = depth < DIM
        place = token.to(tl.int64)[:, None] * DIM + depth[None, :]
        grad = tl.load(grad_ptr + place, mask=is_row[:, None] & is_depth[None, :], other=0).to(tl.float32)
        bias = tl.load(down_bias_ptr + expert * DIM + depth, mask=is_depth, other=0).to(tl.float32)
        total += tl.sum(grad * bias[None, :], 1)
    return total


@triton.jit
def _multiply_mlp_columns(
    grad_ptr,
    x_ptr,
    weights_ptr,
    order_ptr,
    counts_ptr,
    grad_hidden_ptr,
    scaled_ptr,
    grad_up_ptr,
    grad_down_ptr,
    grad_up_bias_ptr,
    grad_down_bias_ptr,
    num_experts,
    top_k,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dW1[e] = Σ dHᵀ x and dW2[e] = Σ dOᵀ (s · A), a tile of one of them a program, with the biases' sums."""
    UP_TILES: tl.constexpr = tl.cdiv(WIDTH, ROWS) * tl.cdiv(DIM, COLUMNS)
    TILES: tl.constexpr = UP_TILES + tl.cdiv(DIM, ROWS) * tl.cdiv(HIDDEN, COLUMNS)
    expert = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    first_row, count = rows_of(counts_ptr, expert, num_experts, EXPERTS)
    if tile < UP_TILES:
        add_columns(
            grad_hidden_ptr, None, x_ptr, order_ptr, None, grad_up_ptr, grad_up_bias_ptr, expert, tile,
            first_row, count, top_k, WIDTH, DIM, ROWS, COLUMNS, DEPTH, PRECISION,
        )  # fmt: skip
    else:
        add_columns(
            grad_ptr, order_ptr, scaled_ptr, None, weights_ptr, grad_down_ptr, grad_down_bias_ptr, expert,
            tile - UP_TILES, first_row, count, top_k, DIM, HIDDEN, ROWS, COLUMNS, DEPTH, PRECISION,
        )  # fmt: skip
