"""`delta_rule` backward with a decay for each channel of the keys: every chunk by itself, by blocks of 16 rows."""

import triton
import triton.language as tl

from coterie_kernels.delta_rule_channels import load_channel_total
from coterie_kernels.delta_rule_chunks import (
    BLOCK,
    LEAST_DECAY,
    load_rows,
    load_state,
    slot_tokens,
    solved_place,
    store_rows,
)
from coterie_kernels.delta_rule_forward import load_beta
from coterie_kernels.delta_rule_gradients import beta_gradient, triangle_gradients
from coterie_kernels.delta_rule_prepare import store_block


@triton.jit(do_not_specialize=["length", "num_sequences"])
def channel_gradients_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    g_ptr,
    erase_ptr,
    beta_ptr,
    ends_ptr,
    total_ptr,
    grad_z_ptr,
    delta_ptr,
    states_ptr,
    grad_states_ptr,
    grad_m_ptr,
    grad_a_ptr,
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    grad_g_ptr,
    grad_erase_ptr,
    grad_beta_ptr,
    length,
    num_sequences,
    scale,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    ERASE_HEADS: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    ERASES: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As `gradients_kernel`, but for exp(G_i − G_j), which each block of rows meets with every other one.

    grad_m, grad_a: room for dM and dA, float32, as triangles [slots, H, ..]; blocks of them are read again.
    """
    slot, head = tl.program_id(0).to(tl.int64) // HEADS, tl.program_id(0) % HEADS
    first, stop = slot_tokens(ends_ptr, slot, length, num_sequences, CHUNK)
    if first >= stop:
        return
    place, row = slot * HEADS + head, tl.arange(0, CHUNK)
    token = first + row
    grad_m, grad_a, of_v, _ = triangle_gradients(
        grad_ptr, v_ptr, beta_ptr, grad_z_ptr, delta_ptr, grad_v_ptr, token, token < stop, head,
        HEADS, V, CHUNK, ERASES, COLUMNS, PRECISION,
    )  # fmt: skip
    store_block(grad_m_ptr, tl.where(row[:, None] >= row[None, :], grad_m * scale, 0.0), place, 0, 0, CHUNK)
    if ERASES:
        store_block(grad_a_ptr, tl.where(row[:, None] > row[None, :], -grad_a, 0.0), place, 0, 0, CHUNK)
    if beta_ptr is not None:
        tl.store(grad_beta_ptr + token * HEADS + head, of_v, mask=token < stop)
    tl.debug_barrier()  # others' threads read them

    # To G_C: ⟨dS', S'⟩ of each channel, S' by what it is made of, so that it cancels what goes to the rows of k.
    width, block_row = tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    last_high, last_low = load_channel_total(
        total_ptr, place, tl.full([1], CHUNK - 1, tl.int32), width, P, CHUNK, PARTS
    )
    later = tl.zeros([WIDTH], tl.float32)
    for start in range(0, V, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        state = load_state(states_ptr, place, width, column, P, V).to(tl.float32)
        later += tl.sum(state * load_state(grad_states_ptr, place, width, column, P, V).to(tl.float32), 1)
    later *= tl.sum(tl.exp(last_high + last_low), 0)
    for block in range(CHUNK // BLOCK):
        rows = block * BLOCK + block_row
        grad_k, k = _written(
            k_ptr, total_ptr, delta_ptr, grad_states_ptr, first, stop, rows, place, head, last_high, last_low,
            HEADS, KEY_HEADS, P, V, CHUNK, PARTS, WIDTH, COLUMNS, PRECISION,
        )  # fmt: skip
        later += tl.sum(k * grad_k, 0)

    for step in range(CHUNK // BLOCK):
        block = CHUNK // BLOCK - 1 - step
        rows = block * BLOCK + block_row
        later = _block_gradients(
            grad_ptr, q_ptr, k_ptr, g_ptr, erase_ptr, beta_ptr, total_ptr, grad_z_ptr, delta_ptr, states_ptr,
            grad_states_ptr, grad_m_ptr, grad_a_ptr, grad_q_ptr, grad_k_ptr, grad_g_ptr, grad_erase_ptr, grad_beta_ptr,
            first, stop, block, rows, place, head, last_high, last_low, later, scale,
            HEADS, KEY_HEADS, ERASE_HEADS, P, V, CHUNK, PARTS, ERASES, WIDTH, COLUMNS, PRECISION,
        )  # fmt: skip


@triton.jit
def _written(
    k_ptr,
    total_ptr,
    delta_ptr,
    grad_states_ptr,
    first,
    stop,
    rows,
    place,
    head,
    last_high,
    last_low,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The part of dk [16, P] that goes through the state after the chunk, and k, float32."""
    token, width = first + rows, tl.arange(0, WIDTH)
    grad_k = tl.zeros([BLOCK, WIDTH], tl.float32)
    for start in range(0, V, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        delta = load_rows(delta_ptr, token, token < stop, head, column, HEADS, V)
        grad_state = load_state(grad_states_ptr, place, width, column, P, V)
        grad_k = tl.dot(delta, tl.trans(grad_state), grad_k, input_precision=PRECISION)
    high, low = load_channel_total(total_ptr, place, rows, width, P, CHUNK, PARTS)
    k = load_rows(k_ptr, token, token < stop, head // (HEADS // KEY_HEADS), width, KEY_HEADS, P).to(tl.float32)
    return grad_k * tl.exp((last_high - high) + (last_low - low)), k


@triton.jit
def _block_gradients(
    grad_ptr,
    q_ptr,
    k_ptr,
    g_ptr,
    erase_ptr,
    beta_ptr,
    total_ptr,
    grad_z_ptr,
    delta_ptr,
    states_ptr,
    grad_states_ptr,
    grad_m_ptr,
    grad_a_ptr,
    grad_q_ptr,
    grad_k_ptr,
    grad_g_ptr,
    grad_erase_ptr,
    grad_beta_ptr,
    first,
    stop,
    block,
    rows,
    place,
    head,
    last_high,
    last_low,
    later,
    scale,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    ERASE_HEADS: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    ERASES: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Stores the gradients to 16 rows; `later`: what goes to the G of all later rows, returned with these rows'."""
    width, block_row, one = tl.arange(0, WIDTH), tl.arange(0, BLOCK), tl.arange(0, 1)
    token = first + rows
    is_token = token < stop
    key_head, LEFT_HEADS = head // (HEADS // KEY_HEADS), KEY_HEADS if erase_ptr is None else ERASE_HEADS
    left_ptr = k_ptr if erase_ptr is None else erase_ptr
    high, low = load_channel_total(total_ptr, place, rows, width, P, CHUNK, PARTS)

    grad_q = tl.zeros([BLOCK, WIDTH], tl.float32)
    grad_erase = tl.zeros([BLOCK, WIDTH], tl.float32)
    of_delta = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        state = tl.trans(load_state(states_ptr, place, width, column, P, V))
        grad = load_rows(grad_ptr, token, is_token, head, column, HEADS, V)
        grad_q = tl.dot(grad, state, grad_q, input_precision=PRECISION)
        if ERASES:
            grad_z = load_rows(grad_z_ptr, token, is_token, head, column, HEADS, V)
            grad_erase = tl.dot(grad_z, state, grad_erase, input_precision=PRECISION)
            delta = load_rows(delta_ptr, token, is_token, head, column, HEADS, V)
            of_delta += tl.sum(grad_z.to(tl.float32) * delta.to(tl.float32), 1)
    since_start = tl.exp(high + low)
    grad_q *= scale * since_start
    grad_erase *= -since_start
    grad_k, k = _written(
        k_ptr, total_ptr, delta_ptr, grad_states_ptr, first, stop, rows, place, head, last_high, last_low,
        HEADS, KEY_HEADS, P, V, CHUNK, PARTS, WIDTH, COLUMNS, PRECISION,
    )  # fmt: skip

    # With the keys of earlier blocks, by the first row here.
    first_high, first_low = load_channel_total(total_ptr, place, block * BLOCK + one, width, P, CHUNK, PARTS)
    of_earlier = tl.zeros([BLOCK, WIDTH], tl.float32)
    erase_of_earlier = tl.zeros([BLOCK, WIDTH], tl.float32)
    for other in range(block):
        others = other * BLOCK + block_row
        high_j, low_j = load_channel_total(total_ptr, place, others, width, P, CHUNK, PARTS)
        k_j = load_rows(k_ptr, first + others, first + others < stop, key_head, width, KEY_HEADS, P).to(tl.float32)
        k_j *= tl.exp((first_high - high_j) + (first_low - low_j))
        grad_m = tl.load(solved_place(grad_m_ptr, place, rows[:, None], others[None, :], CHUNK))
        of_earlier = tl.dot(grad_m, k_j, of_earlier, input_precision=PRECISION)
        if ERASES:
            grad_a = tl.load(solved_place(grad_a_ptr, place, rows[:, None], others[None, :], CHUNK))
            erase_of_earlier = tl.dot(grad_a, k_j, erase_of_earlier, input_precision=PRECISION)
    since_first = tl.exp((high - first_high) + (low - first_low))
    grad_q += of_earlier * since_first
    grad_erase += erase_of_earlier * since_first

    # With the queries of later blocks, by the last row here.
    end_high, end_low = load_channel_total(total_ptr, place, block * BLOCK + BLOCK - 1 + one, width, P, CHUNK, PARTS)
    of_later = tl.zeros([BLOCK, WIDTH], tl.float32)
    for other in range(block + 1, CHUNK // BLOCK):
        others = other * BLOCK + block_row
        later_token = first + others
        high_i, low_i = load_channel_total(total_ptr, place, others, width, P, CHUNK, PARTS)
        since_end = tl.exp((high_i - end_high) + (low_i - end_low))
        q_i = load_rows(q_ptr, later_token, later_token < stop, key_head, width, KEY_HEADS, P).to(tl.float32)
        grad_m = tl.load(solved_place(grad_m_ptr, place, others[None, :], rows[:, None], CHUNK))
        of_later = tl.dot(grad_m, q_i * since_end, of_later, input_precision=PRECISION)
        if ERASES:
            erase_i = _load_erase(
                left_ptr, beta_ptr, later_token, later_token < stop, head, width, HEADS, LEFT_HEADS, P
            )
            grad_a = tl.load(solved_place(grad_a_ptr, place, others[None, :], rows[:, None], CHUNK))
            of_later = tl.dot(grad_a, erase_i * since_end, of_later, input_precision=PRECISION)
    grad_k += of_later * tl.exp((end_high - high) + (end_low - low))

    # Among themselves, row by row: each is once the key and once the query.
    for t in range(BLOCK):
        at = block * BLOCK + t + one
        own = first + at
        high_t, low_t = load_channel_total(total_ptr, place, at, width, P, CHUNK, PARTS)
        difference = (high - high_t) + (low - low_t)
        since_t = tl.exp(tl.where(block_row[:, None] >= t, difference, float("-inf")))
        until_t = tl.exp(tl.where(block_row[:, None] <= t, -difference, float("-inf")))
        k_t = load_rows(k_ptr, own, own < stop, key_head, width, KEY_HEADS, P).to(tl.float32) * since_t
        q_t = load_rows(q_ptr, own, own < stop, key_head, width, KEY_HEADS, P).to(tl.float32) * until_t
        grad_q += tl.load(solved_place(grad_m_ptr, place, rows[:, None], at[None, :], CHUNK)) * k_t
        grad_k += tl.load(solved_place(grad_m_ptr, place, at[None, :], rows[:, None], CHUNK)) * q_t
        if ERASES:
            erase_t = _load_erase(left_ptr, beta_ptr, own, own < stop, head, width, HEADS, LEFT_HEADS, P) * until_t
            # Once more: a masked lane that is alone keeps no `other` in the watched interpreter.
            erase_t = tl.where((own < stop)[:, None], erase_t, 0.0)
            grad_erase += tl.load(solved_place(grad_a_ptr, place, rows[:, None], at[None, :], CHUNK)) * k_t
            grad_k += tl.load(solved_place(grad_a_ptr, place, at[None, :], rows[:, None], CHUNK)) * erase_t

    q = load_rows(q_ptr, token, is_token, key_head, width, KEY_HEADS, P).to(tl.float32)
    grad_total = q * grad_q - k * grad_k
    if ERASES:
        erase = _load_erase(left_ptr, beta_ptr, token, is_token, head, width, HEADS, LEFT_HEADS, P)
        grad_total += erase * grad_erase
        if beta_ptr is not None:
            beta = load_beta(beta_ptr, token, is_token, head, HEADS)
            grad_k += grad_erase * beta[:, None]
            of_v = tl.load(grad_beta_ptr + token * HEADS + head, mask=is_token, other=0.0)
            grad_beta = beta_gradient(beta, of_v + tl.sum(grad_erase * k, 1), of_delta)
            tl.store(grad_beta_ptr + token * HEADS + head, grad_beta, mask=is_token)
        else:
            store_rows(grad_erase_ptr, grad_erase, token, is_token, head, width, HEADS, P)
    store_rows(grad_q_ptr, grad_q, token, is_token, head, width, HEADS, P)
    store_rows(grad_k_ptr, grad_k, token, is_token, head, width, HEADS, P)
    g = load_rows(g_ptr, token, is_token, head, width, HEADS, P).to(tl.float32)
    grad_g = tl.where(g < LEAST_DECAY, 0.0, tl.cumsum(grad_total, 0, reverse=True) + later[None, :])
    store_rows(grad_g_ptr, grad_g, token, is_token, head, width, HEADS, P)
    return later + tl.sum(grad_total, 0)


@triton.jit
def _load_erase(
    left_ptr, beta_ptr, token, is_token, head, width, HEADS: tl.constexpr, LEFT_HEADS: tl.constexpr, P: tl.constexpr
):
    """e in float32: erase, or beta · k."""
    rows = load_rows(left_ptr, token, is_token, head // (HEADS // LEFT_HEADS), width, LEFT_HEADS, P).to(tl.float32)
    if beta_ptr is None:
        return rows
    else:
        return rows * load_beta(beta_ptr, token, is_token, head, HEADS)[:, None]
