"""`sparse_attention` backward, keys: a tile of them goes over the queries that see one of them. Nobody else writes its
gradients; what many queries see, such as sinks, has several programs, whose parts are then summed in their order."""

import triton
import triton.language as tl

from coterie_kernels.sparse_attention_scores import (
    is_near,
    key_rows,
    load_lse,
    load_rows,
    span_of,
    store_rows,
    weights_and_gradients,
)


@triton.jit(do_not_specialize=["length", "num_keys", "num_tiles", "window", "sinks", "selected", "stride"])
def key_gradients_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    spans_ptr,
    key_rows_ptr,
    lse_ptr,
    delta_ptr,
    work_ptr,
    entries_ptr,
    order_ptr,
    grad_k_ptr,
    grad_v_ptr,
    k_parts_ptr,
    v_parts_ptr,
    length,
    num_keys,
    num_tiles,
    window,
    sinks,
    block_size,
    selected,
    stride,
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
    PARTS: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of a tile of keys: over the run of queries whose windows reach it, or that have it for sinks, and over
    the entries of queries that selected a block of it.

    work_ptr: as `work_table` has it; None where there are windows alone and each row of the batch is one sequence.
    entries_ptr, order_ptr: of `Entries`; None without ids. PARTS: so many programs at most share a tile.
    """
    work, part = (tl.program_id(0) // PARTS).to(tl.int64), tl.program_id(0) % PARTS
    unit, tile = work // num_tiles, (work % num_tiles).to(tl.int32)
    batch, group = unit // GROUPS, unit % GROUPS
    if work_ptr is None:
        first, first_query, last_query, parts = tile * STEP, 0, length, 1
        end = tl.minimum(first + STEP, num_keys)
        if CAUSAL:
            first_query = tl.maximum(first - (num_keys - length), 0)
            last_query = tl.minimum(end - 1 - (num_keys - length) + window, length)
    else:
        work_ptr += work * 8
        first, end = tl.load(work_ptr), tl.load(work_ptr + 1)
        first_query, last_query = tl.load(work_ptr + 2), tl.load(work_ptr + 3)
        first_entry, last_entry = tl.load(work_ptr + 4), tl.load(work_ptr + 5)
        parts = tl.load(work_ptr + 7)
    if part >= parts:
        return
    begin_entry, end_entry = 0, 0
    if work_ptr is not None:
        queries = last_query - first_query
        share = tl.cdiv(queries + last_entry - first_entry, parts)
        begin_entry = first_entry + tl.maximum(part * share - queries, 0)
        end_entry = tl.minimum(first_entry + tl.maximum((part + 1) * share - queries, 0), last_entry)
        last_query = tl.minimum(first_query + (part + 1) * share, last_query)
        first_query = tl.minimum(first_query + part * share, last_query)
    key = first + tl.arange(0, KEYS)
    is_key = key < end
    place = key_rows(key_rows_ptr, batch, key, is_key, num_keys)
    width, column = tl.arange(0, WIDTH), tl.arange(0, COLUMNS)
    k = load_rows(k_ptr + batch * k_batch + group * k_group, place, is_key, width, k_token, P)
    v = load_rows(v_ptr + batch * v_batch + group * v_group, place, is_key, column, v_token, V)
    grad_k = tl.zeros([KEYS, WIDTH], tl.float32)
    grad_v = tl.zeros([KEYS, COLUMNS], tl.float32)

    lane = tl.arange(0, ROWS)
    if NEAR:
        for begin in range(first_query * HEADS, last_query * HEADS, ROWS):
            query = (begin + lane) // HEADS
            start, stop = span_of(spans_ptr, batch, query, query < last_query, length, num_keys, CAUSAL)
            near = tl.maximum(stop - window, start)
            visible = is_near(key[:, None], start[None, :], stop[None, :], near[None, :], sinks) & is_key[:, None]
            row = (batch * length + query) * (GROUPS * HEADS) + group * HEADS + (begin + lane) % HEADS
            grad_k, grad_v = _add_rows(
                grad_ptr, q_ptr, lse_ptr, delta_ptr, row, start < stop, visible, k, v, grad_k, grad_v, width, column,
                scale, softcap, P, V, PRECISION,
            )  # fmt: skip
    if entries_ptr is not None:
        for begin in range(0, (end_entry - begin_entry) * HEADS, ROWS):
            entry = begin_entry + (begin + lane) // HEADS
            is_entry = entry < end_entry
            block = tl.load(entries_ptr + entry, mask=is_entry, other=-1)
            slot = tl.load(order_ptr + entry, mask=is_entry, other=0) // selected
            # What is repeated is next to itself.
            earlier = is_entry & (entry > first_entry)
            other = tl.load(order_ptr + entry - 1, mask=earlier, other=-1) // selected != slot
            other = other | (tl.load(entries_ptr + entry - 1, mask=earlier, other=-1) != block)
            is_entry = is_entry & other
            query = slot // GROUPS % length
            start, stop = span_of(spans_ptr, batch, query, is_entry, length, num_keys, CAUSAL)
            block = (block - unit * stride).to(tl.int32)  # its first key
            block_end = tl.minimum(block + block_size, tl.maximum(stop - window, start))
            if sinks is not None:
                block = tl.maximum(block, start + sinks)
            visible = (key[:, None] >= block[None, :]) & (key[:, None] < block_end[None, :])
            visible = visible & is_key[:, None] & is_entry[None, :]
            row = (batch * length + query) * (GROUPS * HEADS) + group * HEADS + (begin + lane) % HEADS
            grad_k, grad_v = _add_rows(
                grad_ptr, q_ptr, lse_ptr, delta_ptr, row, start < stop, visible, k, v, grad_k, grad_v, width, column,
                scale, softcap, P, V, PRECISION,
            )  # fmt: skip
    grad_k *= scale
    if parts == 1:
        place += batch * num_keys
        store_rows(grad_k_ptr + group * P, grad_k, place, is_key, width, GROUPS * P, P)
        store_rows(grad_v_ptr + group * V, grad_v, place, is_key, column, GROUPS * V, V)
    elif PARTS > 1:
        slot = (tl.load(work_ptr + 6) + part).to(tl.int64) * KEYS + tl.arange(0, KEYS)
        store_rows(k_parts_ptr, grad_k, slot, is_key, width, P, P)
        store_rows(v_parts_ptr, grad_v, slot, is_key, column, V, V)


@triton.jit(do_not_specialize=["num_keys", "num_tiles"])
def sum_parts_kernel(
    parts_ptr,
    key_rows_ptr,
    work_ptr,
    grads_ptr,
    num_keys,
    num_tiles,
    GROUPS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dk or dv of a tile that has several parts, [.., WIDTH]."""
    work = tl.program_id(0).to(tl.int64)
    batch, group = work // num_tiles // GROUPS, work // num_tiles % GROUPS
    work_ptr += work * 8
    slot, parts = tl.load(work_ptr + 6).to(tl.int64), tl.load(work_ptr + 7)
    if parts == 1:
        return
    lane, column = tl.arange(0, KEYS), tl.arange(0, COLUMNS)
    key = tl.load(work_ptr) + lane
    is_key = key < tl.load(work_ptr + 1)
    grads = tl.zeros([KEYS, COLUMNS], tl.float32)
    for part in range(parts):
        grads += load_rows(parts_ptr, (slot + part) * KEYS + lane, is_key, column, WIDTH, WIDTH)
    place = batch * num_keys + key_rows(key_rows_ptr, batch, key, is_key, num_keys)
    store_rows(grads_ptr + group * WIDTH, grads, place, is_key, column, GROUPS * WIDTH, WIDTH)


@triton.jit
def _add_rows(
    grad_ptr,
    q_ptr,
    lse_ptr,
    delta_ptr,
    row,
    is_row,
    visible,
    k,
    v,
    grad_k,
    grad_v,
    width,
    column,
    scale,
    softcap,
    P: tl.constexpr,
    V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk / scale and dv with what comes from some rows of queries; visible: [keys, rows]."""
    q = load_rows(q_ptr, row, is_row, width, P, P)
    grad = load_rows(grad_ptr, row, is_row, column, V, V)
    lse = load_lse(lse_ptr, row, is_row)
    delta = tl.load(delta_ptr + row, mask=is_row, other=0.0)
    weights, grads = weights_and_gradients(
        k, q, v, grad, visible, lse[None, :], delta[None, :], scale, softcap, PRECISION
    )
    grad_v = tl.dot(weights.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
    grad_k = tl.dot(grads.to(q.dtype), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v
