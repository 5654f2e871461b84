"""`expert_mlp` backward: gradients to x, to routing weights and to H in one launch, to the matrices in another."""

import triton
import triton.language as tl

from coterie_kernels.activations import activation_and_gradient
from coterie_kernels.expert_mlp_forward import beside, hidden_chunk, matrix_rows, store_hidden
from coterie_kernels.grouped_matmul import add_columns, rows_of
from coterie_kernels.schedule import locate


@triton.jit
def backward_kernel(
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
    CHUNKS: tl.constexpr = triton.next_power_of_2((HIDDEN + UNITS - 1) // UNITS) if FUSED else 1
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
        matrix_row, is_unit = matrix_rows(0, HIDDEN, GATED, CHUNKS * UNITS)
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
    grad_ptr,
    x_ptr,
    up_ptr,
    down_ptr,
    up_bias_ptr,
    hidden_ptr,
    grad_hidden_ptr,
    scaled_ptr,
    token,
    row,
    is_row,
    expert,
    weight,
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
        return beside(left, right), left_sum + right_sum
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
            gate, up = hidden_chunk(
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
            store_hidden(grad_hidden_ptr, grad_gate, grad_up, row, is_row, unit, HIDDEN, GATED, UNITS)
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
def multiply_mlp_columns(
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
