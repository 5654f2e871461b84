"""`sparse_attention` backward, queries: a tile of them goes once more over the keys that it sees."""

import triton
import triton.language as tl

from coterie_kernels.sparse_attention_scores import (
    is_near,
    key_rows,
    load_ids,
    load_lse,
    load_rows,
    near_tile,
    near_tiles,
    rows_of,
    selected_tile,
    span_of,
    store_rows,
    weights_and_gradients,
)


@triton.jit(do_not_specialize=["length", "num_keys", "window", "sinks", "selected"])
def query_gradients_kernel(
    grad_ptr,
    grad_lse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    spans_ptr,
    key_rows_ptr,
    ids_ptr,
    o_ptr,
    lse_ptr,
    before_ptr,
    delta_ptr,
    grad_q_ptr,
    length,
    num_keys,
    window,
    sinks,
    block_size,
    selected,
    scale,
    softcap,
    k_batch,
    k_token,
    k_group,
    v_batch,
    v_token,
    v_group,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    CAUSAL: tl.constexpr,
    NEAR: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SELECTED: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq and δ = ⟨o, do⟩ − dlog Z, by the tiles of `forward_kernel`; or more of dq after another launch, δ being there.

    before_ptr: dq so far, float32.
    """
    tiles = tl.cdiv(length * HEADS, STEP)
    unit, tile = tl.program_id(0) // tiles, tiles - 1 - tl.program_id(0) % tiles
    batch, group = (unit // GROUPS).to(tl.int64), (unit % GROUPS).to(tl.int64)
    query, is_row, row = rows_of(tile, batch, group, length, GROUPS, HEADS, STEP, ROWS)
    start, stop = span_of(spans_ptr, batch, query, is_row, length, num_keys, CAUSAL)
    width, column = tl.arange(0, WIDTH), tl.arange(0, COLUMNS)
    q = load_rows(q_ptr, row, start < stop, width, P, P)
    grad = load_rows(grad_ptr, row, is_row, column, V, V)
    k_ptr += batch * k_batch + group * k_group
    v_ptr += batch * v_batch + group * v_group
    if before_ptr is None:
        o = load_rows(o_ptr, row, is_row, column, V, V)
        delta = tl.sum(o.to(tl.float32) * grad.to(tl.float32), 1)
        delta -= tl.load(grad_lse_ptr + row, mask=is_row, other=0.0)
        lse = tl.load(lse_ptr + row, mask=is_row, other=float("-inf"))
        delta = tl.where(lse == float("-inf"), 0.0, delta)  # where nothing is seen a gradient to log Z may be NaN
        tl.store(delta_ptr + row, delta, mask=is_row)
    else:
        delta = tl.load(delta_ptr + row, mask=is_row, other=0.0)
    lse = load_lse(lse_ptr, row, is_row)

    grad_q = tl.zeros([ROWS, WIDTH], tl.float32)
    near, first_sink, sinks_end, sink_tiles, first, end, window_tiles = near_tiles(
        start, stop, window, sinks, num_keys, KEYS
    )
    if NEAR:
        for number in range(sink_tiles + window_tiles):
            key, is_key = near_tile(number, first_sink, sinks_end, sink_tiles, first, end, KEYS)
            place = key_rows(key_rows_ptr, batch, key, is_key, num_keys)
            k = load_rows(k_ptr, place, is_key, width, k_token, P)
            v = load_rows(v_ptr, place, is_key, column, v_token, V)
            visible = is_near(key[None, :], start[:, None], stop[:, None], near[:, None], sinks) & is_key[None, :]
            _, grads = weights_and_gradients(
                q, k, grad, v, visible, lse[:, None], delta[:, None], scale, softcap, PRECISION
            )
            grad_q = tl.dot(grads.to(k.dtype), k, grad_q, input_precision=PRECISION)
    if ids_ptr is not None:
        ids = load_ids(ids_ptr, batch, tile, group, length, selected, GROUPS, SELECTED)
        start, near = tl.max(start, 0), tl.max(near, 0)  # of the one query
        for number in range(selected * tl.cdiv(block_size, KEYS)):
            key, is_key = selected_tile(number, ids, start, near, sinks, block_size, num_keys, KEYS, SELECTED)
            place = key_rows(key_rows_ptr, batch, key, is_key, num_keys)
            k = load_rows(k_ptr, place, is_key, width, k_token, P)
            v = load_rows(v_ptr, place, is_key, column, v_token, V)
            _, grads = weights_and_gradients(
                q, k, grad, v, is_key[None, :], lse[:, None], delta[:, None], scale, softcap, PRECISION
            )
            grad_q = tl.dot(grads.to(k.dtype), k, grad_q, input_precision=PRECISION)
    grad_q *= scale
    if before_ptr is not None:
        grad_q += load_rows(before_ptr, row, is_row, width, P, P)
    store_rows(grad_q_ptr, grad_q, row, is_row, width, P, P)
