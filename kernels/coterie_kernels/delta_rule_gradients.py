"""`delta_rule` backward, the part that takes every chunk by itself: gradients to q, k, erase, beta and g."""

import triton
import triton.language as tl

from coterie_kernels.delta_rule_chunks import (
    LEAST_DECAY,
    decay_between,
    decay_since_start,
    decay_until_end,
    load_rows,
    load_state,
    slot_tokens,
    store_rows,
)
from coterie_kernels.delta_rule_forward import load_beta


@triton.jit(do_not_specialize=["length", "num_sequences"])
def gradients_kernel(
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
    """Of one chunk and head of v; grad_q, grad_k and grad_erase are [N, H, P], to be summed over the heads of a key.

    dM = tril(dO Δᵀ) and dA = −stril(dR Δᵀ) of all V first, then by WIDTH channels of the keys
    dq = e^G dO Sᵀ + dM k, de = −e^G dR Sᵀ + dA k, dk = e^{G_C − G} Δ dS'ᵀ + dMᵀ q + dAᵀ e, and to G
    q dq + e de − k dk, at the last row also ⟨dS', S'⟩.
    """
    slot, head = tl.program_id(0).to(tl.int64) // HEADS, tl.program_id(0) % HEADS
    first, stop = slot_tokens(ends_ptr, slot, length, num_sequences, CHUNK)
    if first >= stop:
        return
    place, row = slot * HEADS + head, tl.arange(0, CHUNK)
    token = first + row
    is_token = token < stop
    key_head = head // (HEADS // KEY_HEADS)
    dtype = k_ptr.dtype.element_ty

    grad_m, grad_a, of_v, of_delta = triangle_gradients(
        grad_ptr, v_ptr, beta_ptr, grad_z_ptr, delta_ptr, grad_v_ptr, token, is_token, head,
        HEADS, V, CHUNK, ERASES, COLUMNS, PRECISION,
    )  # fmt: skip
    if beta_ptr is not None:
        beta = load_beta(beta_ptr, token, is_token, head, HEADS)
        of_k = tl.zeros([CHUNK], tl.float32)
    between = decay_between(total_ptr, place, 0, 0, CHUNK, CHUNK, CHUNK, PARTS)
    grad_m = (grad_m * between * scale).to(dtype)
    grad_a = (-grad_a * tl.where(row[:, None] > row[None, :], between, 0.0)).to(dtype)

    if total_ptr is not None:
        since_start = decay_since_start(total_ptr, place, CHUNK, PARTS)
        until_end, whole = decay_until_end(total_ptr, place, CHUNK, PARTS)
        grad_total = tl.zeros([CHUNK], tl.float32)
        at_end = tl.zeros([CHUNK], tl.float32)
        of_state = tl.zeros([WIDTH], tl.float32)
    for start in range(0, P, WIDTH):
        width = start + tl.arange(0, WIDTH)
        grad_q = tl.zeros([CHUNK, WIDTH], tl.float32)
        grad_k = tl.zeros([CHUNK, WIDTH], tl.float32)
        grad_erase = tl.zeros([CHUNK, WIDTH], tl.float32)
        for first_column in range(0, V, COLUMNS):
            column = first_column + tl.arange(0, COLUMNS)
            state = load_state(states_ptr, place, width, column, P, V)
            grad_state = load_state(grad_states_ptr, place, width, column, P, V)
            grad = load_rows(grad_ptr, token, is_token, head, column, HEADS, V)
            delta = load_rows(delta_ptr, token, is_token, head, column, HEADS, V)
            grad_q = tl.dot(grad, tl.trans(state), grad_q, input_precision=PRECISION)
            grad_k = tl.dot(delta, tl.trans(grad_state), grad_k, input_precision=PRECISION)
            if ERASES:
                grad_z = load_rows(grad_z_ptr, token, is_token, head, column, HEADS, V)
                grad_erase = tl.dot(grad_z, tl.trans(state), grad_erase, input_precision=PRECISION)
            if total_ptr is not None:
                of_state += tl.sum(state.to(tl.float32) * grad_state.to(tl.float32), 1)
        q = load_rows(q_ptr, token, is_token, key_head, width, KEY_HEADS, P)
        k = load_rows(k_ptr, token, is_token, key_head, width, KEY_HEADS, P)
        wide_k = k.to(tl.float32)
        grad_q *= scale
        if total_ptr is not None:
            grad_q *= since_start[:, None]
            grad_k *= until_end[:, None]
            at_end += tl.sum(wide_k * grad_k, 1)
        grad_q = tl.dot(grad_m, k, grad_q, input_precision=PRECISION)
        grad_k = tl.dot(tl.trans(grad_m), q, grad_k, input_precision=PRECISION)
        if ERASES:
            # What is multiplied in both directions is rounded once: in the gradient to G the sums have to cancel.
            if erase_ptr is None:
                erase = (wide_k * beta[:, None]).to(dtype)
            else:
                erase = load_rows(erase_ptr, token, is_token, head // (HEADS // ERASE_HEADS), width, ERASE_HEADS, P)
                erase = erase.to(dtype)
            grad_erase = -grad_erase
            if total_ptr is not None:
                grad_erase *= since_start[:, None]
            grad_erase = tl.dot(grad_a, k, grad_erase, input_precision=PRECISION)
            grad_k = tl.dot(tl.trans(grad_a), erase, grad_k, input_precision=PRECISION)
        if total_ptr is not None:
            grad_total += tl.sum(q.to(tl.float32) * grad_q - wide_k * grad_k, 1)
            if ERASES:
                grad_total += tl.sum(erase.to(tl.float32) * grad_erase, 1)
        if ERASES:
            if erase_ptr is None:
                of_k += tl.sum(grad_erase * wide_k, 1)
                grad_k += grad_erase * beta[:, None]
            else:
                store_rows(grad_erase_ptr, grad_erase, token, is_token, head, width, HEADS, P)
        store_rows(grad_q_ptr, grad_q, token, is_token, head, width, HEADS, P)
        store_rows(grad_k_ptr, grad_k, token, is_token, head, width, HEADS, P)

    if beta_ptr is not None:
        grad_beta = beta_gradient(beta, of_v + of_k, of_delta)
        tl.store(grad_beta_ptr + token * HEADS + head, grad_beta.to(grad_beta_ptr.dtype.element_ty), mask=is_token)
    if total_ptr is not None:
        last = tl.sum(at_end) + whole * tl.sum(of_state)
        g = tl.load(g_ptr + token * HEADS + head, mask=is_token, other=0.0).to(tl.float32)
        grad_g = tl.where(g < LEAST_DECAY, 0.0, tl.cumsum(grad_total, 0, reverse=True) + last)
        tl.store(grad_g_ptr + token * HEADS + head, grad_g.to(grad_g_ptr.dtype.element_ty), mask=is_token)


@triton.jit
def triangle_gradients(
    grad_ptr,
    v_ptr,
    beta_ptr,
    grad_z_ptr,
    delta_ptr,
    grad_v_ptr,
    token,
    is_token,
    head,
    HEADS: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    ERASES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dO Δᵀ, dR Δᵀ, and with beta ⟨dZ, v⟩ and ⟨dZ, Δ⟩ [C]; then it stores the gradient to v."""
    grad_m = tl.zeros([CHUNK, CHUNK], tl.float32)
    grad_a = tl.zeros([CHUNK, CHUNK], tl.float32)
    of_v = tl.zeros([CHUNK], tl.float32)
    of_delta = tl.zeros([CHUNK], tl.float32)
    for start in range(0, V, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        grad = load_rows(grad_ptr, token, is_token, head, column, HEADS, V)
        delta = load_rows(delta_ptr, token, is_token, head, column, HEADS, V)
        grad_m = tl.dot(grad, tl.trans(delta), grad_m, input_precision=PRECISION)
        if ERASES:
            grad_z = load_rows(grad_z_ptr, token, is_token, head, column, HEADS, V)
            grad_a = tl.dot(grad_z, tl.trans(delta), grad_a, input_precision=PRECISION)
            if beta_ptr is not None:
                v = load_rows(v_ptr, token, is_token, head, column, HEADS, V).to(tl.float32)
                grad_z = grad_z.to(tl.float32)
                of_v += tl.sum(grad_z * v, 1)
                of_delta += tl.sum(grad_z * delta.to(tl.float32), 1)
                beta = load_beta(beta_ptr, token, is_token, head, HEADS)
                store_rows(grad_v_ptr, grad_z * beta[:, None], token, is_token, head, column, HEADS, V)
    return grad_m, grad_a, of_v, of_delta


@triton.jit
def beta_gradient(beta, of_inputs, of_delta):
    """⟨dZ, v⟩ + ⟨de, k⟩: the two nearly cancel where keys are alike.

    Δ is beta times what they are the gradients to, so that ⟨dZ, Δ⟩ / beta is the same without cancelling; but for the
    smallest beta, whose Δ has lost its bits.
    """
    is_small = tl.abs(beta) < 2**-6
    return tl.where(is_small, of_inputs, of_delta / tl.where(is_small, 1.0, beta))
