"""What the kernels of `sparse_attention` share: which keys a query sees, and what it makes of them.

The R heads of queries that share a head of keys are rows side by side: row i · R + r is head r of query i. A query sees
keys of its span, start..stop-1: those from `near` on, its window; the first ones, its sinks; and selected blocks, which
count from the start. A row that is not there, or is padding, has the span −1..−1 and sees nothing. Scores are in
units of log 2.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def rows_of(
    tile, batch, group, length, GROUPS: tl.constexpr, HEADS: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr
):
    """(query, whether it is there, row of [B · L · H]) of the tile's STEP rows, and of padding up to ROWS; [ROWS]."""
    lane = tl.arange(0, ROWS)
    row = tile * STEP + lane
    is_row = (lane < STEP) & (row < length * HEADS)
    query = row // HEADS
    return query, is_row, (batch * length + query) * (GROUPS * HEADS) + group * HEADS + row % HEADS


@triton.jit
def span_of(spans_ptr, batch, query, is_row, length, num_keys, CAUSAL: tl.constexpr):
    """(start, stop) of each query; spans_ptr: [B, L, 2], or None where each row of the batch is one sequence."""
    if spans_ptr is None:
        stop = query + (num_keys - length + 1) if CAUSAL else num_keys
        return tl.where(is_row, 0, -1), tl.where(is_row, stop, -1)
    else:
        place = spans_ptr + (batch * length + query) * 2
        return tl.load(place, mask=is_row, other=-1), tl.load(place + 1, mask=is_row, other=-1)


@triton.jit
def near_tiles(start, stop, window, sinks, num_keys, KEYS: tl.constexpr):
    """Keys from the first that a row's window reaches to past the last, and sinks before those.

    Returns: near [rows]; the first sink, past the last, how many tiles they are; and the same of the windows.
    """
    sees = start < stop
    near = tl.maximum(stop - window, start)
    first = tl.min(tl.where(sees, near, num_keys), 0)
    end = tl.max(tl.where(sees, stop, 0), 0)
    first_sink = first
    sinks_end = first
    if sinks is not None:
        first_sink = tl.min(tl.where(sees, start, num_keys), 0)
        sinks_end = tl.maximum(tl.minimum(first_sink + sinks, first), first_sink)
    sink_tiles = tl.cdiv(sinks_end - first_sink, KEYS)
    return near, first_sink, sinks_end, sink_tiles, first, end, tl.cdiv(tl.maximum(end - first, 0), KEYS)


@triton.jit
def near_tile(number, first_sink, sinks_end, sink_tiles, first, end, KEYS: tl.constexpr):
    """(key, whether it is there) [KEYS] of a tile, sinks first."""
    is_sinks = number < sink_tiles
    key = tl.where(is_sinks, first_sink + number * KEYS, first + (number - sink_tiles) * KEYS) + tl.arange(0, KEYS)
    return key, key < tl.where(is_sinks, sinks_end, end)


@triton.jit
def is_near(key, start, stop, near, sinks):
    """Whether a key is in a query's window or among its sinks."""
    if sinks is None:
        return (key >= near) & (key < stop)
    else:
        return (key >= start) & (key < stop) & ((key >= near) | (key < start + sinks))


@triton.jit
def load_ids(ids_ptr, batch, query, group, length, selected, GROUPS: tl.constexpr, SELECTED: tl.constexpr):
    """The blocks that a query selected, [SELECTED], with anything behind the first `selected`."""
    number = tl.arange(0, SELECTED)
    place = ids_ptr + ((batch * length + query) * GROUPS + group) * selected + number
    return tl.load(place, mask=number < selected, other=-1)


@triton.jit
def selected_tile(number, ids, start, near, sinks, block_size, num_keys, KEYS: tl.constexpr, SELECTED: tl.constexpr):
    """(key, whether it is seen for being in the block alone) [KEYS]; tiles of a block follow each other."""
    tiles = tl.cdiv(block_size, KEYS)
    which = tl.arange(0, SELECTED)
    own = tl.sum(tl.where(which == number // tiles, ids, 0), 0)
    repeated = tl.sum(((which < number // tiles) & (ids == own)).to(tl.int32), 0)
    is_block = (own >= 0) & (own < tl.cdiv(num_keys, block_size)) & (repeated == 0)
    first = start + tl.where(is_block, own, 0).to(tl.int32) * block_size
    # Of what is no block there is no key, not even where a padding row has its start before the first.
    end = tl.where(is_block, tl.minimum(first + block_size, near), first)
    key = first + (number % tiles) * KEYS + tl.arange(0, KEYS)
    if sinks is None:
        return key, key < end
    else:
        return key, (key < end) & (key >= start + sinks)


@triton.jit
def key_rows(key_rows_ptr, batch, key, is_key, num_keys):
    """Where keys are; key_rows_ptr: [B, Lk], or None where each is in its place."""
    if key_rows_ptr is None:
        return key.to(tl.int64)
    else:
        return tl.load(key_rows_ptr + batch * num_keys + key, mask=is_key, other=0).to(tl.int64)


@triton.jit
def load_rows(ptr, row, is_row, column, stride, WIDTH: tl.constexpr):
    """[rows, columns]; 0 where there is none."""
    mask = is_row[:, None] & (column < WIDTH)[None, :]
    return tl.load(ptr + row[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, rows, row, is_row, column, stride, WIDTH: tl.constexpr):
    mask = is_row[:, None] & (column < WIDTH)[None, :]
    tl.store(ptr + row[:, None] * stride + column[None, :], rows.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def scores_and_slopes(left, right, scale, softcap, PRECISION: tl.constexpr):
    """left rightᵀ as scores, and their slopes: 1 without a softcap."""
    scores = tl.dot(left, tl.trans(right), input_precision=PRECISION)
    if softcap is None:
        return scores * (scale * LOG2E), 1.0
    else:
        capped = tanh(scores * (scale / softcap))
        return capped * (softcap * LOG2E), 1.0 - capped * capped


@triton.jit
def tanh(x):
    """By its series where the quotient would cancel."""
    small = tl.exp(-2.0 * tl.abs(x))
    quotient = (1.0 - small) / (1.0 + small)
    square = x * x
    series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    return tl.where(tl.abs(x) < 0.25, x * series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def attend(q, k, v, visible, largest, total, o, scale, softcap, PRECISION: tl.constexpr):
    """The softmax goes on: the largest score, Σ 2^(score − largest), and that of v."""
    scores, _ = scores_and_slopes(q, k, scale, softcap, PRECISION)
    scores = tl.where(visible, scores, float("-inf"))
    now = tl.maximum(largest, tl.max(scores, 1))
    base = tl.where(now == float("-inf"), 0.0, now)
    weights = tl.exp2(scores - base[:, None])
    kept = tl.exp2(largest - base)
    o = tl.dot(weights.to(v.dtype), v, o * kept[:, None], input_precision=PRECISION)
    return now, total * kept + tl.sum(weights, 1), o


@triton.jit
def weights_and_gradients(q, k, grad, v, visible, lse, delta, scale, softcap, PRECISION: tl.constexpr):
    """exp(score − lse), and the gradient to scores, the slopes included; the same with keys and queries changed."""
    scores, slopes = scores_and_slopes(q, k, scale, softcap, PRECISION)
    weights = tl.where(visible, tl.exp2(scores - lse), 0.0)
    to_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    return weights, weights * (to_weights - delta) * slopes


@triton.jit
def load_lse(lse_ptr, row, is_row):
    """log Z in units of log 2; 0 where it is −∞."""
    lse = tl.load(lse_ptr + row, mask=is_row, other=0.0)
    return tl.where(lse == float("-inf"), 0.0, lse * LOG2E)
