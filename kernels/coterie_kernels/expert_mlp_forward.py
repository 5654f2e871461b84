"""`expert_mlp` forward: one tile of an expert's rows, and what backward shares with it."""

import triton
import triton.language as tl

from coterie_kernels.activations import activate
from coterie_kernels.schedule import locate


@triton.jit
def forward_kernel(
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
        CHUNKS: tl.constexpr = triton.next_power_of_2((HIDDEN + UNITS - 1) // UNITS)
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
    x_ptr,
    up_ptr,
    up_bias_ptr,
    hidden_ptr,
    token,
    row,
    is_row,
    expert,
    unit,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
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
        return beside(left, right)
    elif CHUNK * UNITS >= HIDDEN:
        return tl.zeros([ROWS, UNITS], x_ptr.dtype.element_ty)
    else:
        unit += CHUNK * UNITS
        gate, up = hidden_chunk(
            x_ptr, up_ptr, up_bias_ptr, token, is_row, expert, unit, DIM, HIDDEN, GATED, ROWS, UNITS, DEPTH, PRECISION
        )
        if hidden_ptr is not None:
            store_hidden(hidden_ptr, gate, up, row, is_row, unit, HIDDEN, GATED, UNITS)
        activated = activate(gate.to(tl.float32), up.to(tl.float32), FUNCTION, GATED, ALPHA, LIMIT, OFFSET)
        return activated.to(x_ptr.dtype.element_ty)


@triton.jit
def hidden_chunk(
    x_ptr,
    up_ptr,
    up_bias_ptr,
    token,
    is_row,
    expert,
    unit,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """gate and up [ROWS, UNITS] of hidden units `unit` and on, rounded to x's dtype; without a gate one tensor, twice.

    Gate and up rows of the matrix are taken alternately: one product gives both, next to each other.
    """
    WIDTH: tl.constexpr = 2 * HIDDEN if GATED else HIDDEN
    matrix_row, is_unit = matrix_rows(unit, HIDDEN, GATED, UNITS)
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
def matrix_rows(unit, HIDDEN: tl.constexpr, GATED: tl.constexpr, UNITS: tl.constexpr):
    """The rows of gate_up_proj for units `unit` and on, and which exist: gate, up, gate, up, ... if GATED."""
    if GATED:
        j = tl.arange(0, 2 * UNITS)
        own = unit + j // 2
        return (j % 2) * HIDDEN + own, own < HIDDEN
    else:
        own = unit + tl.arange(0, UNITS)
        return own, own < HIDDEN


@triton.jit
def store_hidden(
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
def beside(left, right):
    """[n, A], [n, A] → [n, 2A]."""
    both = tl.permute(tl.join(left, right), (0, 2, 1))
    return tl.reshape(both, (left.shape[0], 2 * left.shape[1]))
