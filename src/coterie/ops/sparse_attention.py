"""Attention over what a query is to see: the last few keys, the first few, and blocks of keys chosen for it.

o_i = Σ_j w_ij v_j / Z_i, w_ij = exp(scale · q_i · k_j), Z_i = Σ_j w_ij + exp(sink_h), over the keys j that are causal
and in the window, among the sinks, or in a block that i selected; each counts once. Full, sliding-window and
StreamingLLM attention (arXiv:2309.17453), MoBA (arXiv:2502.13189), NSA (arXiv:2502.11089) and DSA differ in who
selects.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.ops import _sparse_attention_tiles as tiles
from coterie.ops import _sparse_attention_triton
from coterie.ops._arguments import check_cu_seqlens, check_tensor, choose_impl, read_cu_seqlens
from coterie.ops._autocast import no_autocast

_FEW_QUERIES = 4  # up to so many, what they see is gathered
_FEW_KEYS = 256  # up to so many, all scores are formed at once: tiles would be too many and too small


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    sinks: int = 0,
    block_ids: Tensor | None = None,
    block_size: int = 64,
    sink_logits: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    token_mask: Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ, over what each query sees) v; every head of keys serves H/G heads of queries in turn.

    Positions count from 0 in each sequence, over tokens alone: padding has none. The last query stands at the last key.

    Args:
        q: [B, L, H, P].
        k: [B, Lk, G, P]; G divides H. Lk ≥ L where it is causal.
        v: [B, Lk, G, V].
        window: how many keys up to its own a query sees. None: all, or without any where there are block_ids.
        sinks: how many of a sequence's first keys are seen beside the window and the blocks.
        block_ids: [B, L, G, S] int64, blocks that a query's group of heads sees; or [B, ⌈L / block_size⌉, G, S], shared
            by the queries of a block. Block b is the keys at b · block_size and after, as far as they are causal. What
            is repeated, negative or beyond the keys counts for nothing.
        block_size: of blocks.
        sink_logits: [H], one more score for every head, of a key without a value (gpt-oss).
        causal: whether later keys are hidden. False: cross attention, without a window.
        scale: None: P^-0.5.
        softcap: c, scores become c · tanh(score / c) (Gemma 2).
        cu_seqlens: [number of sequences + 1] int64, the bounds of sequences packed into L = Lk; B must be 1. "triton"
            does not check their values, so that no accelerator is waited for.
        token_mask: [B, Lk] bool; False is padding, whatever it contains: seen by nobody, and 0 as a query's output.
            But for "triton" an accelerator is waited for with it and more than a few queries, as with block_ids, and
            it cannot be traced into one graph then.
        return_lse: whether log Z is wanted, to merge outputs over sets of keys without a common one: `merge_by_lse`.
        impl: "reference" (all scores at once, any dtype, twice differentiable) | "torch" (time and memory grow with
            what is seen, not with L · Lk) | "triton" (the same in kernels, float16, bfloat16 and float32, P and V up to
            256). None: triton on a GPU, else torch.

    Returns:
        o [B, L, H, V] in v's dtype; with return_lse also log Z [B, L, H], float32 (float64 for float64). A query that
        sees nothing has 0 and, without a sink logit, −∞. Gradients to q, k, v and sink_logits, from both.

    Raises:
        ValueError: a shape or a setting is wrong.
        TypeError: a dtype is.
    """
    check_tensor("q", q, (None, None, None, None), "[B, L, H, P]")
    impl = choose_impl(impl, q)
    _check(q, k, v, window, sinks, block_ids, block_size, sink_logits, causal, softcap, cu_seqlens, token_mask)
    length, width = q.shape[1], q.shape[3]
    if block_ids is not None and block_ids.shape[1] != length:
        block_ids = block_ids.repeat_interleave(block_size, 1)[:, :length]
    block_size = min(block_size, max(k.shape[1], 1))  # as well as a larger one
    if window is None:
        window = 0 if block_ids is not None else k.shape[1]
    seen = tiles.Seen(window, sinks, block_size, causal, width**-0.5 if scale is None else float(scale), softcap)
    if impl == "triton":
        o, lse = _sparse_attention_triton.attend(q, k, v, block_ids, sink_logits, seen, cu_seqlens, token_mask)
        return (o, lse) if return_lse else o
    with no_autocast(q.device.type):
        if cu_seqlens is None and (impl == "reference" or k.shape[1] <= _FEW_KEYS):
            o, lse = _dense(q, k, v, block_ids, sink_logits, seen, token_mask)
        elif 0 < length <= _FEW_QUERIES and k.shape[1] and cu_seqlens is None:
            o, lse = _few(q, k, v, block_ids, sink_logits, seen, token_mask, return_lse)
        else:
            attend = _dense if impl == "reference" else tiles.attend
            o, lse = _many(attend, q, k, v, block_ids, sink_logits, seen, cu_seqlens, token_mask)
    return (o, lse) if return_lse else o


def merge_by_lse(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over all keys from that over disjoint sets of them.

    Args:
        parts: (o [B, L, H, V], log Z [B, L, H]) each; at most one of them with sink logits.

    Returns:
        The same of all keys: o = Σ o · exp(log Z − log Σ Z).
    """
    lse = torch.stack([part for _, part in parts])
    largest = lse.detach().amax(0)
    largest = largest.masked_fill(largest == -torch.inf, 0)
    shares = (lse - largest).exp()  # of e^largest
    total = shares.sum(0)
    sees = total > 0
    total = total.masked_fill(~sees, 1)  # of nothing: no NaN in a gradient
    merged = sum(o * share.unsqueeze(-1) for (o, _), share in zip(parts, shares / total, strict=True))
    return merged.to(parts[0][0].dtype), (total.log() + largest).masked_fill(~sees, -torch.inf)


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _many(
    attend: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_ids: Tensor | None,
    sink_logits: Tensor | None,
    seen: tiles.Seen,
    cu_seqlens: Tensor | None,
    token_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Sequence by sequence, where a row is not one."""
    if token_mask is None and cu_seqlens is None:
        return attend(q, k, v, block_ids, sink_logits, seen)
    batch, length, heads, _ = q.shape
    sequences, parts = _sequences(batch, length, k.shape[1], seen.causal, cu_seqlens, token_mask), []
    for row, queries, keys in sequences:
        own_q, own_k, own_v = (t[row, at].unsqueeze(0) for t, at in ((q, queries), (k, keys), (v, keys)))
        ids = None if block_ids is None else block_ids[row, queries].unsqueeze(0)
        parts.append(attend(own_q, own_k, own_v, ids, sink_logits, seen))
    nothing = v.new_zeros(batch * length, heads, v.shape[3]), _nothing(batch * length, heads, q)
    if not parts:
        return tuple(t.unflatten(0, (batch, length)) for t in nothing)
    place = torch.cat([row * length + queries for row, queries, _ in sequences])
    return tuple(
        t.index_copy(0, place, torch.cat(part, 1)[0]).unflatten(0, (batch, length))
        for t, part in zip(nothing, zip(*parts, strict=True), strict=True)
    )


def _nothing(rows: int, heads: int, q: Tensor) -> Tensor:
    """log Z of what sees nothing."""
    return torch.full((rows, heads), -torch.inf, dtype=_wide(q), device=q.device)


def _sequences(
    batch: int, length: int, num_keys: int, causal: bool, cu_seqlens: Tensor | None, token_mask: Tensor | None
) -> list[tuple[int, Tensor, Tensor]]:
    """(row of the batch, its queries, its keys) of each sequence."""
    bounds, found = [(0, num_keys)] if cu_seqlens is None else read_cu_seqlens(cu_seqlens, length), []
    device = cu_seqlens.device if token_mask is None else token_mask.device
    for row in range(batch):
        for start, stop in bounds:
            if token_mask is None:
                keys = torch.arange(start, stop, device=device)
            else:
                keys = token_mask[row, start:stop].nonzero().squeeze(-1) + start
            first_query = num_keys - length
            if causal or cu_seqlens is not None:
                queries = keys[keys >= first_query] - first_query
            else:
                queries = torch.arange(length, device=device)
            found.append((row, queries, keys))
    return found


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_ids: Tensor | None,
    sink_logits: Tensor | None,
    seen: tiles.Seen,
    token_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As it stands above."""
    dtype = _wide(q)
    batch, length = q.shape[:2]
    num_keys, groups = k.shape[1:3]
    key = torch.arange(num_keys, device=q.device).unsqueeze(0)  # its position [B or 1, Lk]
    if token_mask is not None:
        key = token_mask.cumsum(1) - 1
        # What padding contains must not matter, be it NaN.
        k, v = (t.masked_fill(~token_mask[:, :, None, None], 0) for t in (k, v))
        if seen.causal:
            q = q.masked_fill(~token_mask[:, num_keys - length :, None, None], 0)
    query = key[:, num_keys - length :, None] if seen.causal else None  # [B or 1, L, 1]
    key = key.unsqueeze(1)
    grouped = q.to(dtype).unflatten(2, (groups, -1))
    scores = torch.einsum("blgrp,bkgp->bgrlk", grouped, k.to(dtype)) * seen.scale
    if seen.softcap is not None:
        scores = seen.softcap * (scores / seen.softcap).tanh()
    in_window = key > query - seen.window if seen.causal else key.expand(-1, length, -1) < seen.window
    visible = (in_window | (key < seen.sinks)).unsqueeze(1).expand(batch, groups, -1, -1)
    if block_ids is not None:
        blocks = -(-num_keys // seen.block_size)
        ids = torch.where((block_ids < 0) | (block_ids >= blocks), blocks, block_ids).transpose(1, 2)
        selected = torch.zeros(batch, groups, length, blocks + 1, dtype=torch.bool, device=q.device)
        selected = selected.scatter(3, ids, True)[..., :blocks]
        block = (key.clamp(min=0) // seen.block_size).unsqueeze(1)
        visible = visible | selected.gather(3, block.expand(batch, groups, length, -1))
    if seen.causal:
        visible = visible & (key <= query).unsqueeze(1)
    if token_mask is not None:
        visible = visible & token_mask[:, None, None, :]
        if seen.causal:
            visible = visible & token_mask[:, None, num_keys - length :, None]
    scores = scores.masked_fill(~visible.unsqueeze(2), -torch.inf).flatten(2, 3).flatten(0, 1)
    values = v.to(dtype).transpose(1, 2).flatten(0, 1)
    o, lse = _weighted([scores], [values], _sinks(sink_logits, batch, groups, length, dtype))
    o, lse = (t.view(batch, q.shape[2], length, *t.shape[2:]).transpose(1, 2) for t in (o, lse))
    if token_mask is not None and seen.causal:
        o, lse = _without_padding(o, lse, token_mask[:, num_keys - length :])
    return o.to(v.dtype), lse


def _weighted(
    scores: list[Tensor], values: list[Tensor], sink: Tensor | None, with_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """scores [U, rows, n] and values [U, n, V] of every part of the keys, sink [U, rows] → o [U, rows, V], log Z.

    Without log Z every row must see something.
    """
    sizes = [part.shape[-1] for part in scores]
    if sink is not None:
        scores = [*scores, sink.unsqueeze(-1)]
        sizes.append(1)
    scores, lse = torch.cat(scores, -1), None
    if with_lse:
        lse = scores.logsumexp(-1, keepdim=True)
        weights = (scores - lse.masked_fill(lse == -torch.inf, 0)).exp()
        lse = lse.squeeze(-1)
    else:
        weights = scores.softmax(-1)
    first, *others = (part @ rows for part, rows in zip(weights.split(sizes, -1), values, strict=False))
    return sum(others, start=first), lse


def _sinks(sink_logits: Tensor | None, batch: int, groups: int, length: int, dtype: torch.dtype) -> Tensor | None:
    """[H] → [B · G, R · L]."""
    if sink_logits is None:
        return None
    sinks = sink_logits.to(dtype).view(1, groups, -1, 1).expand(batch, -1, -1, length)
    return sinks.flatten(2).flatten(0, 1)


def _without_padding(o: Tensor, lse: Tensor, is_token: Tensor) -> tuple[Tensor, Tensor]:
    """0 and −∞ at queries [B, L] that are padding, whose sink may have been seen."""
    return o.masked_fill(~is_token[..., None, None], 0), lse.masked_fill(~is_token.unsqueeze(-1), -torch.inf)


def _few(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_ids: Tensor | None,
    sink_logits: Tensor | None,
    seen: tiles.Seen,
    token_mask: Tensor | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Query by query over the keys that it sees, which are gathered: decoding. log Z if it is wanted, or needed."""
    length, num_keys = q.shape[1], k.shape[1]
    slots = is_token = None
    if token_mask is None:
        stops = [num_keys - length + i + 1 if seen.causal else num_keys for i in range(length)]
    elif block_ids is None:  # what a window sees is what its cache holds, more or less
        return _dense(q, k, v, None, sink_logits, seen, token_mask)
    else:
        position = token_mask.cumsum(1) - 1
        stops = [(position[:, num_keys - length + i] if seen.causal else position[:, -1]) + 1 for i in range(length)]
        is_token = token_mask[:, num_keys - length :] if seen.causal else token_mask.any(1, keepdim=True)
        q = q.masked_fill(~is_token[..., None, None], 0)
        places = torch.where(token_mask, position, num_keys)
        slots = torch.arange(num_keys, device=q.device).expand_as(places)
        slots = torch.zeros_like(places[:, :1]).expand(-1, num_keys + 1).scatter(1, places, slots)[:, :num_keys]
    with_lse = with_lse or token_mask is not None or seen.window == 0  # where nothing may be seen
    outputs = [
        _one(q[:, i], k, v, None if block_ids is None else block_ids[:, i], sink_logits, seen, stop, slots, with_lse)
        for i, stop in enumerate(stops)
    ]
    join = partial(torch.stack, dim=1) if length > 1 else lambda each: each[0].unsqueeze(1)
    o, lse = (None if each[0] is None else join(each) for each in zip(*outputs, strict=True))
    if is_token is not None and seen.causal:
        o, lse = _without_padding(o, lse, is_token)
    return o.to(v.dtype), lse


def _one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_ids: Tensor | None,
    sink_logits: Tensor | None,
    seen: tiles.Seen,
    stop: int | Tensor,
    slots: Tensor | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """One query [B, H, P] over keys before the position `stop` (or [B] of them, with the `slots` [B, Lk] of positions):
    o [B, H, V] and log Z [B, H]."""
    dtype, batch, groups = _wide(q), k.shape[0], k.shape[2]
    scores, values = [], []
    query = (q.to(dtype) * seen.scale).reshape(batch * groups, q.shape[1] // groups, q.shape[2])

    def see(keys: Tensor | slice, hidden: Tensor | None) -> None:
        rows, own = (t.flatten(0, 1).to(dtype) for t in _rows((k, v), keys, slots))
        if hidden is not None:
            hidden = hidden.expand(batch, groups, -1).flatten(0, 1)
        if slots is not None:  # a place without a token may contain anything
            rows, own = (t.masked_fill(hidden.unsqueeze(-1), 0) for t in (rows, own))
        part = torch.bmm(query, rows.mT)
        if seen.softcap is not None:
            part = seen.softcap * (part / seen.softcap).tanh()
        scores.append(part if hidden is None else part.masked_fill_(hidden.unsqueeze(1), -torch.inf))
        values.append(own)

    if slots is None:
        first = max(stop - seen.window, 0)  # of the window
        see(slice(first, stop), None)
        if seen.sinks and first:
            see(slice(min(seen.sinks, first)), None)
    else:
        stop, first = stop.view(-1, 1, 1), (stop - seen.window).clamp(min=0).view(-1, 1, 1)
        window, sinks = (torch.arange(min(n, k.shape[1]), device=q.device) for n in (seen.window, seen.sinks))
        window, sinks = first + window, sinks.expand_as(first + sinks)
        see(window, window >= stop)
        see(sinks, sinks >= first)
    if block_ids is not None:
        see(*_selected_keys(block_ids, seen, first, k.shape[1]))
    o, lse = _weighted(scores, values, _sinks(sink_logits, batch, groups, 1, dtype), with_lse)
    return o.view(*q.shape[:2], o.shape[2]), lse if lse is None else lse.view(q.shape[:2])


def _selected_keys(block_ids: Tensor, seen: tiles.Seen, end: int | Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """Of blocks [B, G, S], both [B, G, S · block size]: keys, a block that would end behind the last moved back, and
    which of these are not of it, not before `end`, sinks, or seen already."""
    size = seen.block_size
    ids = F.pad(block_ids.clamp(-1, -(-num_keys // size)).sort(-1).values, (1, 0), value=-1)
    repeated = ids[..., 1:] == ids[..., :-1]  # or −1, as is before the first
    begin = (ids[..., 1:] * size).masked_fill(repeated, num_keys)
    keys = begin.clamp(max=num_keys - size).unsqueeze(-1) + torch.arange(size, device=ids.device)
    hidden = keys >= (end.unsqueeze(-1) if isinstance(end, Tensor) else end)
    if seen.sinks or isinstance(end, Tensor) or end > num_keys - size:  # else what was moved is not before `end`
        hidden = hidden | (keys < begin.clamp(min=seen.sinks).unsqueeze(-1))
    return keys.flatten(2), hidden.flatten(2)


def _rows(tensors: Sequence[Tensor], keys: Tensor | slice, slots: Tensor | None) -> list[Tensor]:
    """Of each [B, Lk, G, P] the keys at positions [B, G or 1, n], which are in these slots [B, Lk]: [B, G, n, P]."""
    if isinstance(keys, slice):
        return [t[:, keys].transpose(1, 2) for t in tensors]
    batch, _, groups, _ = tensors[0].shape
    row = torch.arange(batch, device=keys.device).view(-1, 1, 1) if batch > 1 else 0
    group = torch.arange(groups, device=keys.device).view(-1, 1)
    if slots is not None:
        keys = slots[row, keys.clamp(max=slots.shape[1] - 1)]
    traced, found, places = torch.compiler.is_compiling() or torch.jit.is_tracing(), [], {}
    for t in tensors:
        width, (*strides, within) = t.shape[3], t.stride()
        apart = traced or within != 1 or any(stride % width for stride in strides) or not t.numel()
        if apart or (torch.is_grad_enabled() and t.requires_grad):
            found.append(t[row, keys, group])
            continue
        # Rows of a table, in whatever order they lie: nothing copies them faster. An exported program would hold on to
        # that order.
        strides = tuple(stride // width for stride in strides)
        if strides not in places:
            place = (keys if strides[1] == 1 else keys * strides[1]) + group * strides[2]
            places[strides] = place if batch == 1 else place + row * strides[0]
        place = places[strides]
        count = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, strides, strict=False))
        table = t.as_strided((count, width), (width, 1))
        found.append(table.index_select(0, place.flatten()).view(*place.shape, width))
    return found


def _check(q, k, v, window, sinks, block_ids, block_size, sink_logits, causal, softcap, cu_seqlens, token_mask) -> None:
    batch, length, heads, width = q.shape
    check_tensor("k", k, (batch, None, None, width), "[B, Lk, G, P]", dtype=q.dtype)
    num_keys, groups = k.shape[1:3]
    check_tensor("v", v, (batch, num_keys, groups, None), "[B, Lk, G, V]", dtype=q.dtype)
    if min(heads, groups, width, v.shape[3]) < 1 or heads % groups:
        raise ValueError(f"k must have heads that divide q's {heads}, and no width may be 0, got {tuple(k.shape)}")
    if window is not None and (window < 0 or not causal):
        raise ValueError(f"window must be None or at least 0, and None where causal=False, got {window}")
    for name, value, least in (("sinks", sinks, 0), ("block_size", block_size, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be above 0, got {softcap}")
    if causal and num_keys < length:
        raise ValueError(f"k must have at least the {length} positions of q where it is causal, got {num_keys}")
    if block_ids is not None:
        check_tensor("block_ids", block_ids, (batch, None, groups, None), "[B, L, G, S]", dtype=torch.int64)
        shared = -(-length // block_size)
        if block_ids.shape[1] not in (length, shared):
            raise ValueError(
                f"block_ids must be for all {length} queries or for their {shared} blocks of {block_size}, "
                f"got {tuple(block_ids.shape)}"
            )
    if sink_logits is not None:
        check_tensor("sink_logits", sink_logits, (heads,), "[H]")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch)
        if num_keys != length:
            raise ValueError(f"cu_seqlens needs as many keys as queries, got {num_keys} and {length}")
    if token_mask is not None:
        check_tensor("token_mask", token_mask, (batch, num_keys), "[B, Lk]", dtype=torch.bool)
