"""`delta_rule` with a decay for each channel of the keys: what chunks need that does not depend on the state.

exp(G_i − G_j) is no factor of rows and columns there, and exp(−G_j) alone would overflow. Between blocks of 16 rows it
is taken apart at the first row of the later one, so that neither factor is above 1; within a block it is formed for
every pair. The scan then meets no decay but exp G_C: it is given Q̃ = q exp G, Ẽ = e exp G, K̂ = k exp(G_C − G) and M.
"""

import triton
import triton.language as tl

from coterie_kernels.delta_rule_chunks import BLOCK, LEAST_DECAY, load_rows, slot_tokens, store_rows
from coterie_kernels.delta_rule_forward import load_beta
from coterie_kernels.delta_rule_prepare import invert_block, lower_triangle, store_block, store_total


@triton.jit(do_not_specialize=["length", "num_sequences"])
def prepare_channels_kernel(
    q_ptr,
    k_ptr,
    g_ptr,
    erase_ptr,
    beta_ptr,
    ends_ptr,
    total_ptr,
    since_q_ptr,
    until_k_ptr,
    since_erase_ptr,
    m_ptr,
    solved_ptr,
    length,
    num_sequences,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    ERASE_HEADS: tl.constexpr,
    P: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of one chunk and head: G [C, P], Q̃, K̂ and, if something is erased, Ẽ and T (with beta, Ẽ is of k alone); M."""
    slot, head = tl.program_id(0).to(tl.int64) // HEADS, tl.program_id(0) % HEADS
    first, stop = slot_tokens(ends_ptr, slot, length, num_sequences, CHUNK)
    if first >= stop:
        return
    place, row = slot * HEADS + head, tl.arange(0, CHUNK)
    token = first + row
    is_token = token < stop
    for start in range(0, P, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        g = load_rows(g_ptr, token, is_token, head, depth, HEADS, P).to(tl.float32)
        spot = total_ptr + place * (PARTS * CHUNK * P) + row[:, None] * P + depth[None, :]
        store_total(spot, tl.maximum(g, LEAST_DECAY), CHUNK * P, (depth < P)[None, :], PARTS)
    tl.debug_barrier()  # rows of it are read again as others' threads need them
    for start in range(0, P, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        high, low = load_channel_total(total_ptr, place, row, depth, P, CHUNK, PARTS)
        last_high, last_low = load_channel_total(total_ptr, place, row * 0 + CHUNK - 1, depth, P, CHUNK, PARTS)
        since_start = tl.exp(high + low)
        q = load_rows(q_ptr, token, is_token, head // (HEADS // KEY_HEADS), depth, KEY_HEADS, P).to(tl.float32)
        k = load_rows(k_ptr, token, is_token, head // (HEADS // KEY_HEADS), depth, KEY_HEADS, P).to(tl.float32)
        until_end = tl.exp((last_high - high) + (last_low - low))
        store_rows(since_q_ptr, q * since_start, token, is_token, head, depth, HEADS, P)
        store_rows(until_k_ptr, k * until_end, token, is_token, head, depth, HEADS, P)
        if solved_ptr is not None:
            if erase_ptr is None:
                erase = k
            else:
                erase = load_rows(erase_ptr, token, is_token, head // (HEADS // ERASE_HEADS), depth, ERASE_HEADS, P)
                erase = erase.to(tl.float32)
            store_rows(since_erase_ptr, erase * since_start, token, is_token, head, depth, HEADS, P)
    left_ptr, LEFT_HEADS = k_ptr if erase_ptr is None else erase_ptr, KEY_HEADS if erase_ptr is None else ERASE_HEADS
    _solve(
        q_ptr, left_ptr, k_ptr, beta_ptr, total_ptr, m_ptr, solved_ptr, first, stop, place, head, 0, CHUNK,
        HEADS, LEFT_HEADS, KEY_HEADS, P, CHUNK, PARTS, DEPTH, PRECISION,
    )  # fmt: skip


@triton.jit
def load_channel_total(total_ptr, place, row, width, P: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr):
    """The cumulative log decays [rows, channels] of a chunk, in two numbers as in `load_total`."""
    ptr = total_ptr + place * (PARTS * CHUNK * P) + row[:, None] * P + width[None, :]
    is_channel = (width < P)[None, :]
    high = tl.load(ptr, mask=is_channel, other=0.0)
    if PARTS == 1:
        return high, high * 0
    else:
        return high, tl.load(ptr + CHUNK * P, mask=is_channel, other=0.0)


@triton.jit
def _solve(
    q_ptr,
    erase_ptr,
    k_ptr,
    beta_ptr,
    total_ptr,
    m_ptr,
    solved_ptr,
    first,
    stop,
    place,
    head,
    ROW: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    ERASE_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    P: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Stores M's diagonal block from ROW on and, if something is erased, T's, as `_invert` of a decay per head."""
    if SIZE == BLOCK:
        m, a = _within_block(
            q_ptr, erase_ptr, k_ptr, total_ptr, solved_ptr, first, stop, place, head, ROW,
            HEADS, ERASE_HEADS, KEY_HEADS, P, CHUNK, PARTS, DEPTH,
        )  # fmt: skip
        store_block(m_ptr, m, place, ROW, ROW, CHUNK)
        if solved_ptr is not None:
            a = _times_beta(a, beta_ptr, first + ROW, stop, head, HEADS)
            i = tl.arange(0, SIZE)
            inverse = invert_block(tl.where(i[:, None] > i[None, :], a, 0.0))
            store_block(solved_ptr, inverse, place, ROW, ROW, CHUNK)
            return inverse
        else:
            return m
    else:
        HALF: tl.constexpr = SIZE // 2
        upper = _solve(
            q_ptr, erase_ptr, k_ptr, beta_ptr, total_ptr, m_ptr, solved_ptr, first, stop, place, head, ROW, HALF,
            HEADS, ERASE_HEADS, KEY_HEADS, P, CHUNK, PARTS, DEPTH, PRECISION,
        )  # fmt: skip
        lower = _solve(
            q_ptr, erase_ptr, k_ptr, beta_ptr, total_ptr, m_ptr, solved_ptr, first, stop, place, head, ROW + HALF, HALF,
            HEADS, ERASE_HEADS, KEY_HEADS, P, CHUNK, PARTS, DEPTH, PRECISION,
        )  # fmt: skip
        m, a = _between_blocks(
            q_ptr, erase_ptr, k_ptr, total_ptr, solved_ptr, first, stop, place, head, ROW + HALF, ROW, HALF,
            HEADS, ERASE_HEADS, KEY_HEADS, P, CHUNK, PARTS, DEPTH, PRECISION,
        )  # fmt: skip
        store_block(m_ptr, m, place, ROW + HALF, ROW, CHUNK)
        if solved_ptr is not None:
            a = _times_beta(a, beta_ptr, first + ROW + HALF, stop, head, HEADS)
            corner = -tl.dot(tl.dot(lower, a, input_precision=PRECISION), upper, input_precision=PRECISION)
            store_block(solved_ptr, corner, place, ROW + HALF, ROW, CHUNK)
            return lower_triangle(upper, corner, lower)
        else:
            return m


@triton.jit
def _times_beta(rows, beta_ptr, first, stop, head, HEADS: tl.constexpr):
    if beta_ptr is None:
        return rows
    else:
        token = first + tl.arange(0, rows.shape[0])
        return rows * load_beta(beta_ptr, token, token < stop, head, HEADS)[:, None]


@triton.jit
def _within_block(
    q_ptr,
    erase_ptr,
    k_ptr,
    total_ptr,
    solved_ptr,
    first,
    stop,
    place,
    head,
    ROW: tl.constexpr,
    HEADS: tl.constexpr,
    ERASE_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    P: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Σ_p left_ip k_jp exp(G_ip − G_jp) [16, 16], left being q and erase, of rows and columns from ROW on.

    0 where i < j; a column at a time.
    """
    row, one = ROW + tl.arange(0, BLOCK), tl.arange(0, 1)
    token = first + row
    is_token = token < stop
    m = tl.zeros([BLOCK, BLOCK], tl.float32)
    a = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, P, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        q = load_rows(q_ptr, token, is_token, head // (HEADS // KEY_HEADS), depth, KEY_HEADS, P).to(tl.float32)
        if solved_ptr is not None:
            erase_head = head // (HEADS // ERASE_HEADS)
            erase = load_rows(erase_ptr, token, is_token, erase_head, depth, ERASE_HEADS, P).to(tl.float32)
        high, low = load_channel_total(total_ptr, place, row, depth, P, CHUNK, PARTS)
        for j in range(BLOCK):
            column = first + ROW + j + one
            k = load_rows(k_ptr, column, column < stop, head // (HEADS // KEY_HEADS), depth, KEY_HEADS, P)
            high_j, low_j = load_channel_total(total_ptr, place, ROW + j + one, depth, P, CHUNK, PARTS)
            between = tl.where(row[:, None] >= ROW + j, (high - high_j) + (low - low_j), float("-inf"))
            k = k.to(tl.float32) * tl.exp(between)
            is_column = tl.arange(0, BLOCK)[None, :] == j
            m = tl.where(is_column, m + tl.sum(q * k, 1)[:, None], m)
            if solved_ptr is not None:
                a = tl.where(is_column, a + tl.sum(erase * k, 1)[:, None], a)
    return m, a


@triton.jit
def _between_blocks(
    q_ptr,
    erase_ptr,
    k_ptr,
    total_ptr,
    solved_ptr,
    first,
    stop,
    place,
    head,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    ERASE_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    P: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The same [SIZE, SIZE] of rows from ROW on and columns from COLUMN on, all of them before.

    Operands are float32, whatever the inputs are: 16 bits would have to round after the decay.
    """
    row, column = ROW + tl.arange(0, SIZE), COLUMN + tl.arange(0, SIZE)
    token, earlier = first + row, first + column
    is_token = token < stop
    m = tl.zeros([SIZE, SIZE], tl.float32)
    a = tl.zeros([SIZE, SIZE], tl.float32)
    for start in range(0, P, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        high_0, low_0 = load_channel_total(total_ptr, place, row * 0 + ROW, depth, P, CHUNK, PARTS)
        high_j, low_j = load_channel_total(total_ptr, place, column, depth, P, CHUNK, PARTS)
        k = load_rows(k_ptr, earlier, earlier < stop, head // (HEADS // KEY_HEADS), depth, KEY_HEADS, P).to(tl.float32)
        k = tl.trans(k * tl.exp((high_0 - high_j) + (low_0 - low_j)))
        high, low = load_channel_total(total_ptr, place, row, depth, P, CHUNK, PARTS)
        since_first = tl.exp((high - high_0) + (low - low_0))
        q = load_rows(q_ptr, token, is_token, head // (HEADS // KEY_HEADS), depth, KEY_HEADS, P).to(tl.float32)
        m = tl.dot(q * since_first, k, m, input_precision=PRECISION)
        if solved_ptr is not None:
            erase_head = head // (HEADS // ERASE_HEADS)
            erase = load_rows(erase_ptr, token, is_token, erase_head, depth, ERASE_HEADS, P).to(tl.float32)
            a = tl.dot(erase * since_first, k, a, input_precision=PRECISION)
    return m, a
