"""Attention over what a query is to see: the last few keys, the first few, and blocks of keys chosen for it.

o_i = Σ_j w_ij v_j / Z_i, w_ij = exp(scale · q_i · k_j), Z_i = Σ_j w_ij + exp(sink_h), over the keys j that are causal
and in the window, among the sinks, or in a block that i selected; each counts once. Full, sliding-window and
StreamingLLM attention (arXiv:2309.17453), MoBA (arXiv:2502.13189), NSA (arXiv:2502.11089) and DSA differ in who
selects.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.ops import _sparse_attention_tiles as tiles
from coterie.ops import _sparse_attention_triton
from coterie.ops._arguments import check_cu_seqlens, check_tensor, choose_impl, read_cu_seqlens
from coterie.ops._autocast import no_autocast

_FEW_QUERIES = 4  # up to so many, what they see is gathered


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
            But for "triton" an accelerator is waited for with it, as with block_ids, and it cannot be traced into one
            graph.
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
    batch, length, heads, width = q.shape
    if block_ids is not None and block_ids.shape[1] != length:
        block_ids = block_ids.repeat_interleave(block_size, 1)[:, :length]
    block_size = min(block_size, max(k.shape[1], 1))  # as well as a larger one
    if window is None:
        window = 0 if block_ids is not None else k.shape[1]
    seen = tiles.Seen(window, sinks, block_size, causal, width**-0.5 if scale is None else float(scale), softcap)
    if impl == "triton":
        o, lse = _sparse_attention_triton.attend(q, k, v, block_ids, sink_logits, seen, cu_seqlens, token_mask)
        return (o, lse) if return_lse else o
    sequences = _sequences(batch, length, k.shape[1], causal, cu_seqlens, token_mask)
    attend = _dense if impl == "reference" else _attend
    with no_autocast(q.device.type):
        if not sequences:
            o, lse = attend(q, k, v, block_ids, sink_logits, seen)
        else:
            parts = []
            for row, queries, keys in sequences:
                own_q, own_k, own_v = (t[row, at].unsqueeze(0) for t, at in ((q, queries), (k, keys), (v, keys)))
                ids = None if block_ids is None else block_ids[row, queries].unsqueeze(0)
                parts.append(attend(own_q, own_k, own_v, ids, sink_logits, seen))
            place = torch.cat([row * length + queries for row, queries, _ in sequences])
            nothing = (0.0, v.dtype, v.shape[3:]), (-torch.inf, _wide(q), ())
            o, lse = (
                torch.full((batch * length, heads, *last), fill, dtype=dtype, device=q.device)
                .index_copy(0, place, torch.cat(part, 1)[0])
                .unflatten(0, (batch, length))
                for (fill, dtype, last), part in zip(nothing, zip(*parts, strict=True), strict=True)
            )
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


def _sequences(
    batch: int, length: int, num_keys: int, causal: bool, cu_seqlens: Tensor | None, token_mask: Tensor | None
) -> list[tuple[int, Tensor, Tensor]] | None:
    """(row of the batch, its queries, its keys) of each sequence; None: every row is one."""
    if token_mask is None and cu_seqlens is None:
        return None
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
    q: Tensor, k: Tensor, v: Tensor, block_ids: Tensor | None, sink_logits: Tensor | None, seen: tiles.Seen
) -> tuple[Tensor, Tensor]:
    """As it stands above."""
    dtype = _wide(q)
    batch, length = q.shape[:2]
    num_keys, groups = k.shape[1:3]
    grouped = q.to(dtype).unflatten(2, (groups, -1))
    scores = torch.einsum("blgrp,bkgp->bgrlk", grouped, k.to(dtype)) * seen.scale
    if seen.softcap is not None:
        scores = seen.softcap * (scores / seen.softcap).tanh()
    key = torch.arange(num_keys, device=q.device)
    query = torch.arange(num_keys - length, num_keys, device=q.device).unsqueeze(-1)
    in_window = key > query - seen.window if seen.causal else key.expand(length, -1) < seen.window
    visible = (in_window | (key < seen.sinks)).expand(batch, groups, -1, -1)
    if block_ids is not None:
        blocks = -(-num_keys // seen.block_size)
        ids = torch.where((block_ids < 0) | (block_ids >= blocks), blocks, block_ids).transpose(1, 2)
        selected = torch.zeros(batch, groups, length, blocks + 1, dtype=torch.bool, device=q.device)
        selected = selected.scatter(3, ids, True)[..., :blocks]
        visible = visible | selected.repeat_interleave(seen.block_size, 3)[..., :num_keys]
    if seen.causal:
        visible = visible & (key <= query)
    scores = scores.masked_fill(~visible.unsqueeze(2), -torch.inf)
    if sink_logits is not None:
        sink = sink_logits.to(dtype).view(1, groups, -1, 1, 1).expand(batch, -1, -1, length, 1)
        scores = torch.cat((scores, sink), -1)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores[..., :num_keys] - lse.masked_fill(lse == -torch.inf, 0)).exp()
    o = torch.einsum("bgrlk,bkgv->blgrv", weights, v.to(dtype)).flatten(2, 3)
    return o.to(v.dtype), lse.squeeze(-1).flatten(1, 2).transpose(1, 2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, block_ids: Tensor | None, sink_logits: Tensor | None, seen: tiles.Seen
) -> tuple[Tensor, Tensor]:
    if 0 < q.shape[1] <= _FEW_QUERIES and k.shape[1]:
        return _gathered(q, k, v, block_ids, sink_logits, seen)
    return tiles.attend(q, k, v, block_ids, sink_logits, seen)


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, block_ids: Tensor | None, sink_logits: Tensor | None, seen: tiles.Seen
) -> tuple[Tensor, Tensor]:
    """Query by query over the keys that it sees, which are gathered: decoding."""
    (batch, length), (num_keys, groups) = q.shape[:2], k.shape[1:3]
    dtype, outputs = _wide(q), []
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    for i in range(length):
        stop = num_keys - length + i + 1 if seen.causal else num_keys
        first = max(stop - seen.window, 0)  # of the window
        parts = [(slice(first, stop), None)]
        if seen.sinks and first:
            parts.append((slice(0, min(seen.sinks, first)), None))
        if block_ids is not None:
            parts.append(_selected_keys(block_ids[:, i], seen, first))
        query = q[:, i].to(dtype).unflatten(1, (groups, -1)) * seen.scale
        keys, values = ([_rows(t, where).to(dtype) for where, _ in parts] for t in (k, v))
        scores = torch.cat([query @ rows.mT for rows in keys], -1)
        if seen.softcap is not None:
            scores = seen.softcap * (scores / seen.softcap).tanh()
        if block_ids is not None:
            hidden = F.pad(parts[-1][1], (scores.shape[-1] - parts[-1][1].shape[-1], 0))
            scores = scores.masked_fill(hidden.unsqueeze(2), -torch.inf)
        if sink_logits is not None:
            sink = sink_logits.to(dtype).view(groups, -1, 1).expand(batch, -1, -1, -1)
            scores = torch.cat((scores, sink), -1)
        lse = scores.logsumexp(-1, keepdim=True)
        weights = (scores - lse.masked_fill(lse == -torch.inf, 0)).exp()
        weights = weights.split([rows.shape[2] for rows in values] + [1] * (sink_logits is not None), -1)
        o = sum(share @ rows for share, rows in zip(weights, values, strict=False))
        outputs.append((o.flatten(1, 2), lse.flatten(1)))
    o, lse = (torch.stack(each, 1) for each in zip(*outputs, strict=True))
    return o.to(v.dtype), lse


def _selected_keys(block_ids: Tensor, seen: tiles.Seen, end: int) -> tuple[Tensor, Tensor]:
    """The keys before `end` of blocks [B, G, S], and which of them are not to be seen: both [B, G, S · block size]."""
    ids = block_ids.clamp(-1, -(-end // seen.block_size)).sort(-1).values
    repeated = F.pad(ids[..., 1:] == ids[..., :-1], (1, 0))
    keys = ids.unsqueeze(-1) * seen.block_size + torch.arange(seen.block_size, device=ids.device)
    hidden = ((keys < seen.sinks) | (keys >= end) | repeated.unsqueeze(-1)).flatten(2)
    keys = keys.flatten(2)
    return keys.clamp(0, max(end - 1, 0)), hidden | (keys < 0)


def _rows(t: Tensor, where: slice | Tensor) -> Tensor:
    """[B, G, Lk, P] → those keys, [B, G, n, P]."""
    if isinstance(where, slice):
        return t[:, :, where]
    row, group = (torch.arange(size, device=t.device) for size in t.shape[:2])
    return t[row.view(-1, 1, 1), group.view(-1, 1), where]


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
