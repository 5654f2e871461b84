"""Where the kernels of `sparse_attention` find things, made on the device by torch: no host waits, nothing is copied.

Positions count over tokens alone. So keys have an order in which each row's padding comes first, and packed sequences
are runs of that order; queries stay where they are, and each has a span of it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Of packed or padded rows.

    Attributes:
        spans: [B, L, 2] int32, the keys from, and up to but without, that a query can see; −1, −1 for padding. None:
            each row is one sequence.
        key_rows: [B, Lk] int32, where the keys are in memory; None: in their order.
        bounds: [B or 1, number of sequences + 1] int64, of the keys; padding is the first sequence.
        start, stop: [B or 1, L] int64, the spans, which never fall, not for padding either.
    """

    spans: Tensor | None
    key_rows: Tensor | None
    bounds: Tensor
    start: Tensor
    stop: Tensor


@dataclass(frozen=True)
class Entries:
    """Queries that selected a block, by the first key of the block.

    Attributes:
        keys: [B · L · G · S], unit · stride + first key, ascending; what counts for nothing comes last.
        order: which of block_ids each is; those of one block are in the order of the queries.
        stride: between units, b · G + g.
    """

    keys: Tensor
    order: Tensor
    stride: int


def find_sequences(
    length: int, num_keys: int, causal: bool, cu_seqlens: Tensor | None, token_mask: Tensor | None
) -> Sequences | None:
    """None: each row of the batch is one sequence.

    Args:
        cu_seqlens: [number of sequences + 1] int64; values that it must not have give wrong results, no stray access.
        token_mask: [B, Lk] bool.
    """
    if token_mask is None and cu_seqlens is None:
        return None
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.clamp(0, num_keys).cummax(0).values.unsqueeze(0)
    if token_mask is None:
        own, key_rows = torch.arange(num_keys, device=cu_seqlens.device).unsqueeze(0), None
        bounds = cu_seqlens
    else:
        counts, first = token_mask.cumsum(1), num_keys - token_mask.sum(1, keepdim=True)
        own = first + counts - 1  # padding's is that of the token before it
        key_rows = token_mask.to(torch.uint8).argsort(dim=1, stable=True).int()
        if cu_seqlens is None:
            bounds = torch.cat((first, torch.full_like(first, num_keys)), 1)
        else:
            bounds = first + F.pad(counts, (1, 0)).gather(1, cu_seqlens)
    bounds = F.pad(bounds, (1, 0))
    is_query = None
    if causal or cu_seqlens is not None:
        own = own[:, num_keys - length :].contiguous()
        sequence = torch.searchsorted(bounds, own, right=True).clamp(2, bounds.shape[1] - 1)
        start = bounds.gather(1, sequence - 1)
        stop = own + 1 if causal else bounds.gather(1, sequence)
        if token_mask is not None:
            is_query = token_mask[:, num_keys - length :]
    else:
        start, stop = (t.expand(-1, length).contiguous() for t in bounds[:, 1:].split(1, 1))
    spans = torch.stack((start, stop), -1).int()
    if is_query is not None:
        spans = spans.masked_fill(~is_query.unsqueeze(-1), -1)
    return Sequences(spans, key_rows, bounds, start, stop)


def whole_rows(length: int, num_keys: int, causal: bool, device: torch.device) -> Sequences:
    """Each row of the batch is one sequence."""
    start = torch.zeros(1, length, dtype=torch.int64, device=device)
    stop = torch.arange(num_keys - length + 1, num_keys + 1, device=device).unsqueeze(0) if causal else start + num_keys
    return Sequences(None, None, torch.arange(0, num_keys + 1, num_keys, device=device).unsqueeze(0), start, stop)


def find_tiles(sequences: Sequences, num_keys: int, step: int, window: int, sinks: int) -> Tensor:
    """[B or 1, 5, tiles] int64: a tile's keys, from and up to but without; so the queries that have one of them in
    their windows or among their sinks; its sequence's first key. A tile is at most `step` keys of one sequence; there
    are as many as there could be."""
    bounds = sequences.bounds
    counts = (bounds.diff(dim=1) + step - 1) // step
    ends = counts.cumsum(1)
    tile = torch.arange(num_keys // step + counts.shape[1], device=bounds.device).expand(len(bounds), -1).contiguous()
    sequence = torch.searchsorted(ends, tile, right=True)
    is_tile, sequence = sequence < counts.shape[1], sequence.clamp(max=counts.shape[1] - 1)
    begin, end = bounds.gather(1, sequence), bounds.gather(1, sequence + 1)
    first = begin + (tile - (ends - counts).gather(1, sequence)) * step
    first = torch.where(is_tile, first, num_keys)
    last = torch.where(is_tile, torch.minimum(first + step, end), num_keys)
    first_query = torch.searchsorted(sequences.stop, first, right=True)
    last_query = first_query
    if window:
        near = torch.maximum(sequences.stop - window, sequences.start)
        last_query = torch.maximum(first_query, torch.searchsorted(near, last))
    if sinks:
        every = torch.maximum(first_query, torch.searchsorted(sequences.start, last))
        last_query = torch.where(first < begin + sinks, every, last_query)
    return torch.stack((first, last, first_query, last_query, begin), 1)


def find_entries(block_ids: Tensor, sequences: Sequences, num_keys: int, window: int, size: int) -> Entries:
    """The inverse of block_ids [B, L, G, S]."""
    batch, _, groups, _ = block_ids.shape
    start, stop = (t[..., None, None] for t in (sequences.start, sequences.stop))
    is_block = (block_ids >= 0) & (block_ids < -(-num_keys // size))
    first = block_ids.masked_fill(~is_block, 0) * size + start
    counts = is_block & (first < torch.maximum(stop - window, start))  # the rest is in the window, or later
    stride = num_keys + size
    unit = torch.arange(batch * groups, device=block_ids.device).view(batch, 1, groups, 1)
    keys = torch.where(counts, unit * stride + first, batch * groups * stride)
    keys, order = keys.to(_fitting(batch * groups * stride)).flatten().sort(stable=True)
    return Entries(keys, order, stride)


def work_table(
    tiles: Tensor, entries: Entries | None, batch: int, groups: int, size: int, share: int, most: int
) -> Tensor:
    """[B, G, tiles, 8] int32: keys and queries of `find_tiles`; the entries, from and up to but without, whose blocks
    reach into the tile; where its parts begin, and how many there are.

    Args:
        share: of queries and entries: a tile with more of them has several parts, but `most` at most; in all there are
            no more of those than tiles + `most`.
    """
    first, last, first_query, last_query, begin = tiles.unsqueeze(1).expand(batch, groups, -1, -1).unbind(2)
    columns = [first, last, first_query, last_query]
    count = last_query - first_query
    if entries is None:
        columns += [torch.zeros_like(first)] * 2
    else:
        unit = torch.arange(batch * groups, device=tiles.device).view(batch, groups, 1) * entries.stride
        reach = torch.stack((torch.maximum(first - size + 1, begin), last)) + unit
        reach = torch.where(first < last, reach, reach[1])
        found = torch.searchsorted(entries.keys, reach.to(entries.keys.dtype))
        columns += [*found]
        count = count + found[1] - found[0]
    parts = ((count + share - 1) // share).clamp(1, most)
    several = torch.where(parts > 1, parts, 0)
    end = several.flatten().cumsum(0).view(several.shape)
    parts = torch.where(end <= several.numel() + most, parts, 1)
    return torch.stack((*columns, end - several, parts), -1).int()


def _fitting(largest: int) -> torch.dtype:
    return torch.int32 if largest < 2**31 else torch.int64
