"""`delta_rule` forward: one program takes a few columns of one state through its sequence, chunk after chunk."""

import triton
import triton.language as tl

from coterie_kernels.delta_rule_chunks import (
    add_dot,
    decay_between,
    decay_since_start,
    decay_until_end,
    dot_finely,
    dot_solved,
    load_rows,
    load_state,
    load_triangle,
    segment_bounds,
    store_rows,
    store_state,
)


@triton.jit(do_not_specialize=["length", "segment"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    erase_ptr,
    beta_ptr,
    ends_ptr,
    total_ptr,
    channels_ptr,
    m_ptr,
    solved_ptr,
    before_ptr,
    o_ptr,
    after_ptr,
    length,
    segment,
    scale,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    ERASE_HEADS: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """R = Z − Ẽ S, Δ = T R, O = Q̃ S + M Δ, S ← exp(G_C) S + K̂ᵀ Δ, with S [P, COLUMNS] in registers.

    A decay per head is a factor of rows: it goes to the float32 side of each product, and 16-bit operands stay as they
    were read. With one per channel (channels_ptr, its G) Q̃, K̂ and Ẽ come as q, k and erase, M as m, and no total_ptr.

    With a `segment`, a program has that part of a sequence. Without outputs (o_ptr) the states alone are found. Without
    a first state (before_ptr) it is 0, or, where nothing is written (v_ptr) either, an identity.
    """
    ERASES: tl.constexpr = solved_ptr is not None
    TILES: tl.constexpr = tl.cdiv(V, COLUMNS)
    state = (tl.program_id(0) // TILES).to(tl.int64)
    sequence, head = state // HEADS, state % HEADS
    width, column = tl.arange(0, WIDTH), (tl.program_id(0) % TILES) * COLUMNS + tl.arange(0, COLUMNS)
    start, stop, first_slot = segment_bounds(ends_ptr, sequence, length, segment, CHUNK)
    if before_ptr is not None:
        values = load_state(before_ptr, state, width, column, P, V)
    else:
        values = tl.zeros([WIDTH, COLUMNS], tl.float32)
        if v_ptr is None:
            values = tl.where(width[:, None] == column[None, :], 1.0, values)
    for chunk in range(tl.cdiv(stop - start, CHUNK)):
        token = start + chunk * CHUNK + tl.arange(0, CHUNK)
        is_token = token < stop
        place = (first_slot + chunk) * HEADS + head
        k = load_rows(k_ptr, token, is_token, head // (HEADS // KEY_HEADS), width, KEY_HEADS, P)
        narrow = values.to(k.dtype)
        delta = chunk_edits(
            k, v_ptr, erase_ptr, beta_ptr, total_ptr, solved_ptr, narrow, token, is_token, head, place, width, column,
            HEADS, ERASE_HEADS, P, V, CHUNK, PARTS, PRECISION,
        )  # fmt: skip
        if o_ptr is not None:
            q = load_rows(q_ptr, token, is_token, head // (HEADS // KEY_HEADS), width, KEY_HEADS, P)
            if m_ptr is None:
                m = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                m = m * decay_between(total_ptr, place, 0, 0, CHUNK, CHUNK, CHUNK, PARTS)
            else:
                m = load_triangle(m_ptr, place, CHUNK).to(tl.float32)
            o = tl.dot(q, narrow, input_precision=PRECISION)
            if total_ptr is not None:
                o = o * decay_since_start(total_ptr, place, CHUNK, PARTS)[:, None]
            if ERASES:
                o = (o + dot_finely(m, delta, k.dtype, PRECISION)) * scale
            else:
                o = tl.dot(m.to(k.dtype), delta.to(k.dtype), o, input_precision=PRECISION) * scale
            store_rows(o_ptr, o, token, is_token, head, column, HEADS, V)
        values = advance(values, k, delta, total_ptr, channels_ptr, place, width, P, CHUNK, PARTS, ERASES, PRECISION)
    store_state(after_ptr, values, state, width, column, P, V)


@triton.jit
def chunk_edits(
    k,
    v_ptr,
    erase_ptr,
    beta_ptr,
    total_ptr,
    solved_ptr,
    state,
    token,
    is_token,
    head,
    place,
    width,
    column,
    HEADS: tl.constexpr,
    ERASE_HEADS: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Δ [C, COLUMNS] float32: what the chunk writes, given the state before it."""
    if v_ptr is None:
        v = tl.zeros([CHUNK, column.shape[0]], tl.float32)
    else:
        v = load_rows(v_ptr, token, is_token, head, column, HEADS, V).to(tl.float32)
    if solved_ptr is None:
        return v
    else:
        if erase_ptr is None:
            erase = k
        else:
            erase = load_rows(erase_ptr, token, is_token, head // (HEADS // ERASE_HEADS), width, ERASE_HEADS, P)
            erase = erase.to(k.dtype)
        held = tl.dot(erase, state, input_precision=PRECISION)
        if total_ptr is not None:
            held = held * decay_since_start(total_ptr, place, CHUNK, PARTS)[:, None]
        change = v - held
        if beta_ptr is not None:
            change = change * load_beta(beta_ptr, token, is_token, head, HEADS)[:, None]
        return dot_solved(load_triangle(solved_ptr, place, CHUNK), change, k.dtype, PRECISION)


@triton.jit
def advance(
    state,
    k,
    delta,
    total_ptr,
    channels_ptr,
    place,
    width,
    P: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    ERASES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state [P, COLUMNS] after a chunk, from that before."""
    if total_ptr is not None:
        until_end, whole = decay_until_end(total_ptr, place, CHUNK, PARTS)
        delta = delta * until_end[:, None]
        state = state * whole
    if channels_ptr is not None:
        state = state * load_whole(channels_ptr, place, width, P, CHUNK, PARTS)[:, None]
    return add_dot(tl.trans(k), delta, state, ERASES, PRECISION)


@triton.jit
def load_whole(channels_ptr, place, width, P: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr):
    """exp G_C of each channel."""
    last = channels_ptr + place * (PARTS * CHUNK * P) + (CHUNK - 1) * P + width
    total = tl.load(last, mask=width < P, other=0.0)
    if PARTS == 2:
        total += tl.load(last + CHUNK * P, mask=width < P, other=0.0)
    return tl.exp(total)


@triton.jit
def load_beta(beta_ptr, token, is_token, head, HEADS: tl.constexpr):
    return tl.load(beta_ptr + token * HEADS + head, mask=is_token, other=0.0).to(tl.float32)
