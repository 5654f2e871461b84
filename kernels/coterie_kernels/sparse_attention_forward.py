"""`sparse_attention` forward: one program takes a tile of queries, with all heads that share its keys."""

import triton
import triton.language as tl

from coterie_kernels.sparse_attention_scores import (
    LOG2E,
    attend,
    is_near,
    key_rows,
    load_ids,
    load_rows,
    near_tile,
    near_tiles,
    rows_of,
    selected_tile,
    span_of,
    store_rows,
)


@triton.jit(do_not_specialize=["num_rows", "length", "num_keys", "window", "sinks", "selected", "splits"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    spans_ptr,
    key_rows_ptr,
    ids_ptr,
    sink_logits_ptr,
    o_before_ptr,
    lse_before_ptr,
    o_ptr,
    lse_ptr,
    num_rows,
    length,
    num_keys,
    window,
    sinks,
    block_size,
    selected,
    splits,
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
    """o and log Z over windows and sinks (NEAR), then selected blocks (ids_ptr), for which a tile is one query's heads.

    It goes on from another launch's o and log Z (o_before_ptr, lse_before_ptr), or begins with the sink logits. With
    several splits each has a share of the tiles of keys, and a result of its own: [splits, B · L · H, V].
    """
    tiles = tl.cdiv(length * HEADS, STEP)
    split, tile = tl.program_id(0) % splits, tl.program_id(0) // splits
    unit, tile = tile // tiles, tiles - 1 - tile % tiles  # the longest first
    batch, group = (unit // GROUPS).to(tl.int64), (unit % GROUPS).to(tl.int64)
    query, is_row, row = rows_of(tile, batch, group, length, GROUPS, HEADS, STEP, ROWS)
    start, stop = span_of(spans_ptr, batch, query, is_row, length, num_keys, CAUSAL)
    width, column = tl.arange(0, WIDTH), tl.arange(0, COLUMNS)
    q = load_rows(q_ptr, row, start < stop, width, P, P)
    k_ptr += batch * k_batch + group * k_group
    v_ptr += batch * v_batch + group * v_group

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    o = tl.zeros([ROWS, COLUMNS], tl.float32)
    if lse_before_ptr is not None:
        largest = tl.load(lse_before_ptr + row, mask=is_row, other=float("-inf")) * LOG2E
        o = load_rows(o_before_ptr, row, is_row, column, V, V)
    elif sink_logits_ptr is not None:
        largest = tl.load(sink_logits_ptr + row % (GROUPS * HEADS), mask=stop >= 0, other=float("-inf"))
        largest = tl.where(split == 0, largest.to(tl.float32) * LOG2E, float("-inf"))
    total = tl.where(largest > float("-inf"), 1.0, 0.0)

    near, first_sink, sinks_end, sink_tiles, first, end, window_tiles = near_tiles(
        start, stop, window, sinks, num_keys, KEYS
    )
    count = sink_tiles + window_tiles if NEAR else 0
    every = count
    if ids_ptr is not None:
        every += selected * tl.cdiv(block_size, KEYS)
    share = tl.cdiv(every, splits)
    begin = split * share
    if NEAR:
        for number in range(begin, tl.minimum(begin + share, count)):
            key, is_key = near_tile(number, first_sink, sinks_end, sink_tiles, first, end, KEYS)
            place = key_rows(key_rows_ptr, batch, key, is_key, num_keys)
            k = load_rows(k_ptr, place, is_key, width, k_token, P)
            v = load_rows(v_ptr, place, is_key, column, v_token, V)
            visible = is_near(key[None, :], start[:, None], stop[:, None], near[:, None], sinks) & is_key[None, :]
            largest, total, o = attend(q, k, v, visible, largest, total, o, scale, softcap, PRECISION)
    if ids_ptr is not None:
        ids = load_ids(ids_ptr, batch, tile, group, length, selected, GROUPS, SELECTED)
        start, near = tl.max(start, 0), tl.max(near, 0)  # of the one query
        for number in range(tl.maximum(begin, count) - count, tl.minimum(begin + share, every) - count):
            key, is_key = selected_tile(number, ids, start, near, sinks, block_size, num_keys, KEYS, SELECTED)
            place = key_rows(key_rows_ptr, batch, key, is_key, num_keys)
            k = load_rows(k_ptr, place, is_key, width, k_token, P)
            v = load_rows(v_ptr, place, is_key, column, v_token, V)
            largest, total, o = attend(q, k, v, is_key[None, :], largest, total, o, scale, softcap, PRECISION)

    row += split.to(tl.int64) * num_rows
    sees = total > 0
    total = tl.where(sees, total, 1.0)
    lse = tl.where(sees, (largest + tl.log2(total)) / LOG2E, float("-inf"))
    tl.store(lse_ptr + row, lse, mask=is_row)
    store_rows(o_ptr, o / total[:, None], row, is_row, column, V, V)


@triton.jit(do_not_specialize=["num_rows", "splits"])
def combine_kernel(
    parts_ptr,
    lses_ptr,
    o_ptr,
    lse_ptr,
    num_rows,
    splits,
    V: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """o and log Z of a row from those of its splits."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    split = tl.arange(0, SPLITS)
    lses = tl.load(lses_ptr + split * num_rows + row, mask=split < splits, other=float("-inf"))
    largest = tl.max(lses, 0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp(lses - largest), 0)
    o = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, splits, 16):
        some = first + tl.arange(0, 16)
        place, is_split = some * num_rows + row, some < splits
        shares = tl.exp(tl.load(lses_ptr + place, mask=is_split, other=float("-inf")) - largest)
        o += tl.sum(load_rows(parts_ptr, place, is_split, column, V, V) * shares[:, None], 0)
    o /= tl.where(total > 0, total, 1.0)
    tl.store(o_ptr + row * V + column, o.to(o_ptr.dtype.element_ty), mask=column < V)
    tl.store(lse_ptr + row, tl.where(total > 0, tl.log(total) + largest, float("-inf")))
