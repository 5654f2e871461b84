"""`delta_rule` backward, the part that takes chunks in turn: gradients to the states, and the states again."""

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
from coterie_kernels.delta_rule_forward import advance, chunk_edits, load_beta, load_whole


@triton.jit(do_not_specialize=["length", "segment"])
def backward_kernel(
    grad_ptr,
    grad_after_ptr,
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
    grad_z_ptr,
    grad_states_ptr,
    grad_before_ptr,
    delta_ptr,
    states_ptr,
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
    """From the last chunk to the first dZ and dS, then from the first to the last Δ and S.

    dΔ = Mᵀ dO + K̂ dS', dZ = dR = Tᵀ dΔ, dS = Q̃ᵀ dO + exp(G_C) dS' − Ẽᵀ dR. Neither S nor Δ is needed for them, so that
    both directions are one launch. Written: grad_z [N, H, V]; the gradients to the states after, and the states before,
    each chunk [slots, H, P, V]; delta [N, H, V], if anything is erased (else it is v); the gradient to the first state.

    With a `segment`, a program has that part of a sequence. Without grad_after_ptr nothing after it has a gradient, and
    the gradient to the first state alone is found.
    """
    ERASES: tl.constexpr = solved_ptr is not None
    TILES: tl.constexpr = tl.cdiv(V, COLUMNS)
    state = (tl.program_id(0) // TILES).to(tl.int64)
    sequence, head = state // HEADS, state % HEADS
    width, column = tl.arange(0, WIDTH), (tl.program_id(0) % TILES) * COLUMNS + tl.arange(0, COLUMNS)
    start, stop, first_slot = segment_bounds(ends_ptr, sequence, length, segment, CHUNK)
    chunks = tl.cdiv(stop - start, CHUNK)
    key_head = head // (HEADS // KEY_HEADS)

    if grad_after_ptr is None:
        grad_state = tl.zeros([WIDTH, COLUMNS], tl.float32)
    else:
        grad_state = load_state(grad_after_ptr, state, width, column, P, V).to(tl.float32)
    for step in range(chunks):
        chunk = chunks - 1 - step
        token = start + chunk * CHUNK + tl.arange(0, CHUNK)
        is_token = token < stop
        place = (first_slot + chunk) * HEADS + head
        if grad_states_ptr is not None:
            store_state(grad_states_ptr, grad_state, place, width, column, P, V)
        q = load_rows(q_ptr, token, is_token, key_head, width, KEY_HEADS, P)
        k = load_rows(k_ptr, token, is_token, key_head, width, KEY_HEADS, P)
        grad = load_rows(grad_ptr, token, is_token, head, column, HEADS, V)
        written = tl.dot(k, grad_state.to(k.dtype), input_precision=PRECISION)
        read = grad.to(tl.float32) * scale
        if total_ptr is not None:
            until_end, whole = decay_until_end(total_ptr, place, CHUNK, PARTS)
            since_start = decay_since_start(total_ptr, place, CHUNK, PARTS)
            written = written * until_end[:, None]
            read = read * since_start[:, None]
            grad_state = grad_state * whole
        if channels_ptr is not None:
            grad_state = grad_state * load_whole(channels_ptr, place, width, P, CHUNK, PARTS)[:, None]
        if m_ptr is None:
            m = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # transposed, as it is wanted
            m = m * decay_between(total_ptr, place, 0, 0, CHUNK, CHUNK, CHUNK, PARTS, TRANSPOSED=True)
        else:
            m = load_triangle(m_ptr, place, CHUNK, TRANSPOSED=True).to(tl.float32)
        grad_state = add_dot(tl.trans(q), read, grad_state, ERASES, PRECISION)
        if not ERASES:
            grad_z = tl.dot(m.to(k.dtype), grad, input_precision=PRECISION) * scale + written
        else:
            grad_z = dot_finely(m, grad.to(tl.float32), k.dtype, PRECISION) * scale + written
            grad_z = dot_solved(load_triangle(solved_ptr, place, CHUNK, TRANSPOSED=True), grad_z, k.dtype, PRECISION)
            held = -grad_z
            if total_ptr is not None:
                held = held * since_start[:, None]
            if beta_ptr is not None:
                held = held * load_beta(beta_ptr, token, is_token, head, HEADS)[:, None]
            if erase_ptr is None:
                erase = k
            else:
                erase = load_rows(erase_ptr, token, is_token, head // (HEADS // ERASE_HEADS), width, ERASE_HEADS, P)
                erase = erase.to(k.dtype)
            grad_state = add_dot(tl.trans(erase), held, grad_state, ERASES, PRECISION)
        if grad_z_ptr is not None:
            store_rows(grad_z_ptr, grad_z, token, is_token, head, column, HEADS, V)
    store_state(grad_before_ptr, grad_state, state, width, column, P, V)
    if states_ptr is not None:
        values = load_state(before_ptr, state, width, column, P, V)
        for chunk in range(chunks):
            token = start + chunk * CHUNK + tl.arange(0, CHUNK)
            is_token = token < stop
            place = (first_slot + chunk) * HEADS + head
            narrow = values.to(k_ptr.dtype.element_ty)
            store_state(states_ptr, narrow, place, width, column, P, V)
            k = load_rows(k_ptr, token, is_token, key_head, width, KEY_HEADS, P)
            delta = chunk_edits(
                k, v_ptr, erase_ptr, beta_ptr, total_ptr, solved_ptr, narrow, token, is_token, head, place, width,
                column, HEADS, ERASE_HEADS, P, V, CHUNK, PARTS, PRECISION,
            )  # fmt: skip
            if delta_ptr is not None:
                store_rows(delta_ptr, delta, token, is_token, head, column, HEADS, V)
            values = advance(
                values, k, delta, total_ptr, channels_ptr, place, width, P, CHUNK, PARTS, ERASES, PRECISION
            )
