"""How much of its attention a query gives to each block that it selected; a program takes a query and a group."""

import triton
import triton.language as tl

from coterie_kernels.sparse_attention_scores import (
    key_rows,
    load_ids,
    load_lse,
    load_rows,
    rows_of,
    scores_and_slopes,
    selected_tile,
    span_of,
)


@triton.jit(do_not_specialize=["length", "num_keys", "selected"])
def mass_kernel(
    q_ptr,
    k_ptr,
    spans_ptr,
    key_rows_ptr,
    ids_ptr,
    lse_ptr,
    mass_ptr,
    length,
    num_keys,
    block_size,
    selected,
    scale,
    k_batch,
    k_token,
    k_group,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SELECTED: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """mass [B, L, G, S] of ids [B, L, G, S], from log Z [B · L · H]."""
    unit, tile = tl.program_id(0) // length, tl.program_id(0) % length
    batch, group = (unit // GROUPS).to(tl.int64), (unit % GROUPS).to(tl.int64)
    query, is_row, row = rows_of(tile, batch, group, length, GROUPS, HEADS, HEADS, ROWS)
    start, stop = span_of(spans_ptr, batch, query, is_row, length, num_keys, True)
    start, stop = tl.max(start, 0), tl.max(stop, 0)
    width = tl.arange(0, WIDTH)
    q, lse = load_rows(q_ptr, row, is_row, width, P, P), load_lse(lse_ptr, row, is_row)
    ids = load_ids(ids_ptr, batch, tile, group, length, selected, GROUPS, SELECTED)
    k_ptr += batch * k_batch + group * k_group
    mass_ptr += ((batch * length + tile) * GROUPS + group) * selected
    tiles = tl.cdiv(block_size, KEYS)
    for slot in range(selected):
        mass = tl.zeros([KEYS], tl.float32)
        for number in range(slot * tiles, (slot + 1) * tiles):
            key, is_key = selected_tile(number, ids, start, stop, None, block_size, num_keys, KEYS, SELECTED)
            k = load_rows(k_ptr, key_rows(key_rows_ptr, batch, key, is_key, num_keys), is_key, width, k_token, P)
            scores, _ = scores_and_slopes(q, k, scale, None, PRECISION)
            mass += tl.sum(tl.where(is_row[:, None] & is_key[None, :], tl.exp2(scores - lse[:, None]), 0.0), 0)
        tl.store(mass_ptr + slot, tl.sum(mass, 0))
