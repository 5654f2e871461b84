"""One matmul per expert over rows sorted by expert: the product, and the gradient to the matrices.

Kernel layout as in MegaBlocks and triton_kernels' ragged matmul, but for the schedule, which every program finds for
itself from E counts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from coterie_kernels.schedule import locate, num_tiles
from coterie_kernels.target import dot_precision, on_its_device, target_of
from coterie_kernels.tiles import column_tile, row_tile


@on_its_device
def multiply_rows(
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """y[n] = x[rows[n]] @ weight[e(n)]ᵀ + bias[e(n)]; rows past the counts give 0.

    Args:
        x: [N, D], or [T, D] with `rows`; contiguous, as everything here.
        weight: [E, O, D]; `transposed`: [E, D, O].
        counts: [E] integers.
        rows: [N] integers.
        bias: [E, O].

    Returns:
        [N, O].
    """
    num_experts = weight.shape[0]
    inner, outer = weight.shape[1:] if transposed else reversed(weight.shape[1:])
    num_rows = x.shape[0] if rows is None else rows.shape[0]
    y = torch.empty(num_rows, outer, dtype=x.dtype, device=x.device)
    if not num_rows:
        return y
    tile = row_tile(target_of(x), x.dtype, num_rows / num_experts)
    grid = (num_tiles(num_rows, num_experts, tile.rows), triton.cdiv(outer, tile.columns))
    _multiply_rows[grid](
        x,
        weight,
        counts,
        rows,
        bias,
        y,
        num_rows,
        num_experts,
        INNER=inner,
        OUTER=outer,
        TRANSPOSED=transposed,
        EXPERTS=triton.next_power_of_2(num_experts + 1),
        PRECISION=dot_precision(x),
        **tile.settings,
    )
    return y


@on_its_device
def multiply_columns(
    a: Tensor, b: Tensor, counts: Tensor, *, rows: Tensor | None = None, weight: bool = True, bias: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients to a weight and to a bias: aᵀ b and the sum of a, over each expert's rows; 0 where it has none.

    Args:
        a: [N, O], the gradient to the rows.
        b: [N, D], or [T, D] with `rows` [N].

    Returns:
        [E, O, D] if `weight` and [E, O] if `bias`.
    """
    num_experts, outer, inner = counts.shape[0], a.shape[1], b.shape[1]
    grad = torch.empty(num_experts, outer, inner, dtype=a.dtype, device=a.device) if weight else None
    grad_bias = torch.empty(num_experts, outer, dtype=a.dtype, device=a.device) if bias else None
    tile = column_tile(target_of(a), a.dtype, min(outer, inner))
    tiles = triton.cdiv(outer, tile.rows) * triton.cdiv(inner, tile.columns)
    _multiply_columns[(num_experts * tiles,)](
        a,
        b,
        counts,
        rows,
        grad,
        grad_bias,
        num_experts,
        OUTER=outer,
        INNER=inner,
        EXPERTS=triton.next_power_of_2(num_experts + 1),
        PRECISION=dot_precision(a),
        **tile.settings,
    )
    return grad, grad_bias


@triton.jit
def _multiply_rows(
    x_ptr,
    weight_ptr,
    counts_ptr,
    rows_ptr,
    bias_ptr,
    y_ptr,
    num_rows,
    num_experts,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert, first_row, count = locate(counts_ptr, tl.program_id(0), num_rows, num_experts, ROWS, EXPERTS)
    if count == 0:
        return
    row = first_row + tl.arange(0, ROWS)
    is_row = tl.arange(0, ROWS) < count
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < OUTER
    y = y_ptr + row.to(tl.int64)[:, None] * OUTER + column[None, :]
    is_y = is_row[:, None] & is_column[None, :]
    if expert == num_experts:
        tl.store(y, tl.zeros([ROWS, COLUMNS], y_ptr.dtype.element_ty), mask=is_y)
        return
    source = row if rows_ptr is None else tl.load(rows_ptr + row, mask=is_row, other=0)
    x = x_ptr + source.to(tl.int64)[:, None] * INNER
    weight = weight_ptr + expert.to(tl.int64) * (INNER * OUTER)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, INNER, DEPTH):
        depth = first + tl.arange(0, DEPTH)
        is_depth = depth < INNER
        left = tl.load(x + depth[None, :], mask=is_row[:, None] & is_depth[None, :], other=0)
        place = depth[:, None] * (OUTER if TRANSPOSED else 1) + column[None, :] * (1 if TRANSPOSED else INNER)
        right = tl.load(weight + place, mask=is_depth[:, None] & is_column[None, :], other=0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + expert.to(tl.int64) * OUTER + column, mask=is_column, other=0)
        total += bias.to(tl.float32)[None, :]
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=is_y)


@triton.jit
def _multiply_columns(
    a_ptr,
    b_ptr,
    counts_ptr,
    rows_ptr,
    grad_ptr,
    grad_bias_ptr,
    num_experts,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles: tl.constexpr = tl.cdiv(OUTER, ROWS) * tl.cdiv(INNER, COLUMNS)
    program = tl.program_id(0)
    first_row, count = rows_of(counts_ptr, program // tiles, num_experts, EXPERTS)
    add_columns(
        a_ptr,
        None,
        b_ptr,
        rows_ptr,
        None,
        grad_ptr,
        grad_bias_ptr,
        program // tiles,
        program % tiles,
        first_row,
        count,
        1,
        OUTER,
        INNER,
        ROWS,
        COLUMNS,
        DEPTH,
        PRECISION,
    )


@triton.jit
def rows_of(counts_ptr, own, num_experts, EXPERTS: tl.constexpr):
    """(first sorted row, number of rows) of an expert."""
    expert = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + expert, mask=expert < num_experts, other=0).to(tl.int32)
    return tl.sum(tl.where(expert < own, counts, 0), 0), tl.sum(tl.where(expert == own, counts, 0), 0)


@triton.jit
def add_columns(
    a_ptr,
    a_rows_ptr,
    b_ptr,
    b_rows_ptr,
    weights_ptr,
    grad_ptr,
    grad_bias_ptr,
    expert,
    tile,
    first_row,
    count,
    top_k,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes one tile of grad[expert] = aᵀ b, and its part of grad_bias[expert], over `count` sorted rows.

    a and b may be gathered: row n is then the (a_rows[n] div top_k)-th. weights_ptr: what grad_bias weighs the rows of
    a by, at a_rows[n]. Either gradient may be None.
    """
    column_tiles: tl.constexpr = tl.cdiv(INNER, COLUMNS)
    outer = (tile // column_tiles) * ROWS + tl.arange(0, ROWS)
    inner = (tile % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    is_outer = outer < OUTER
    is_inner = inner < INNER
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    total_bias = tl.zeros([ROWS], tl.float32)
    for first in range(0, count, DEPTH):
        row = first_row + first + tl.arange(0, DEPTH)
        is_row = first + tl.arange(0, DEPTH) < count
        a_row = row if a_rows_ptr is None else tl.load(a_rows_ptr + row, mask=is_row, other=0) // top_k
        a_place = a_row.to(tl.int64)[:, None] * OUTER + outer[None, :]
        a = tl.load(a_ptr + a_place, mask=is_row[:, None] & is_outer[None, :], other=0)
        if grad_ptr is not None:
            b_row = row if b_rows_ptr is None else tl.load(b_rows_ptr + row, mask=is_row, other=0) // top_k
            b_place = b_row.to(tl.int64)[:, None] * INNER + inner[None, :]
            b = tl.load(b_ptr + b_place, mask=is_row[:, None] & is_inner[None, :], other=0)
            total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
        if grad_bias_ptr is not None:
            addend = a.to(tl.float32)
            if weights_ptr is not None:
                slot = tl.load(a_rows_ptr + row, mask=is_row, other=0)
                addend *= tl.load(weights_ptr + slot, mask=is_row, other=0).to(tl.float32)[:, None]
            total_bias += tl.sum(addend, 0)
    if grad_ptr is not None:
        place = grad_ptr + expert.to(tl.int64) * (OUTER * INNER) + outer[:, None] * INNER + inner[None, :]
        tl.store(place, total.to(grad_ptr.dtype.element_ty), mask=is_outer[:, None] & is_inner[None, :])
    # Every column tile has the same sum; the first writes it.
    if grad_bias_ptr is not None and tile % column_tiles == 0:
        bias_place = grad_bias_ptr + expert * OUTER + outer
        tl.store(bias_place, total_bias.to(grad_bias_ptr.dtype.element_ty), mask=is_outer)
