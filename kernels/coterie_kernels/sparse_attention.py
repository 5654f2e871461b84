"""Softmax over a window, the first keys and selected blocks, for queries whose heads share heads of keys: launchers.

One launch takes tiles of queries over their windows and sinks, which are runs of keys (Dao 2023, arXiv:2307.08691); one
goes on with the selected blocks, for which a tile is the heads of one query. Few queries take all of it in one launch;
where they are few tiles, each is split by its keys, and another launch combines the parts. Backward goes the same ways
for dq; then a tile of keys goes over the run of queries whose windows reach it and over those that selected it, which
a sort has brought together: nobody else writes its dk and dv. No host waits, there are no atomics.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from coterie_kernels.sparse_attention_forward import combine_kernel, forward_kernel
from coterie_kernels.sparse_attention_index import (
    Sequences,
    find_entries,
    find_sequences,
    find_tiles,
    whole_rows,
    work_table,
)
from coterie_kernels.sparse_attention_key_gradients import key_gradients_kernel, sum_parts_kernel
from coterie_kernels.sparse_attention_mass import mass_kernel
from coterie_kernels.sparse_attention_query_gradients import query_gradients_kernel
from coterie_kernels.sparse_attention_tiles import attention_tile
from coterie_kernels.target import dot_precision, on_its_device, target_of
from coterie_kernels.tiles import TILES

_FEW_QUERIES = 4  # up to so many, windows are read query by query too, where there are blocks
_PROGRAMS = 256  # which splits are to bring about
_LEAST_TILES = 4  # of keys, of a split; for many rows, whose results take more than the keys, more
_MOST_SPLITS = 128
_LEAST_SHARE = 512  # of queries, of a program that takes a tile of keys
_MOST_PARTS = 16  # programs of such a tile


@dataclass(frozen=True)
class Seen:
    """What a query sees; see `coterie.ops.sparse_attention`. window: 0 for none, the number of keys or more for all."""

    window: int
    sinks: int
    block_size: int
    causal: bool
    scale: float
    softcap: float | None


class _Call:
    """What the launches of a call have in common.

    Attributes:
        layout: spans and places of keys, or None.
        sizes: L, Lk, window, sinks (None for none, to compile without), block size.
        numbers: scale, softcap, and the strides of k and v but for their channels.
        constants: what all kernels are specialized for.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, block_ids: Tensor | None, seen: Seen, sequences: Sequences | None
    ) -> None:
        (batch, length, heads, width), (_, num_keys, groups, _) = q.shape, k.shape
        self.q, self.k, self.v, self.seen = q, k, v, seen
        self.selected = 0 if block_ids is None else block_ids.shape[3]
        self.units, self.heads = batch * groups, heads // groups
        self.layout = (None, None) if sequences is None else (sequences.spans, sequences.key_rows)
        sinks = min(seen.sinks, num_keys) if seen.sinks and seen.window < num_keys else None
        self.sizes = length, num_keys, min(seen.window, num_keys), sinks, seen.block_size
        self.numbers = seen.scale, seen.softcap, *k.stride()[:3], *v.stride()[:3]
        self.is_near = seen.window > 0 or sinks is not None
        self.constants = {
            "GROUPS": groups,
            "HEADS": self.heads,
            "P": width,
            "V": v.shape[3],
            "CAUSAL": seen.causal,
            "WIDTH": _at_least_16(width),
            "COLUMNS": _at_least_16(v.shape[3]),
            "PRECISION": dot_precision(q),
        }

    def tile(self, kernel: str) -> dict[str, Any]:
        return attention_tile(TILES[target_of(self.q)], kernel, self.q.dtype, self.q.shape[3], self.v.shape[3])

    def queries(self, kernel: str, block_ids: Tensor | None, near: bool) -> tuple[dict[str, Any], int]:
        """Settings for "forward" or "query_gradients" by tiles of queries, with ids by query; how many there are."""
        rows = self.sizes[0] * self.heads
        if block_ids is None:
            settings = self.tile(kernel)
            step = settings["ROWS"] = min(settings["ROWS"], _at_least_16(rows))
        else:
            settings = self.one_query("selected" if kernel == "forward" else "selected_gradients")
            step = self.heads
        settings |= {"NEAR": near, "STEP": step, "SELECTED": triton.next_power_of_2(max(self.selected, 1))}
        return settings, self.units * triton.cdiv(rows, step)

    def one_query(self, kernel: str) -> dict[str, Any]:
        """Settings where a tile is the heads of one query, and parts of the blocks that it selected."""
        settings = self.tile(kernel)
        settings["KEYS"] = min(settings["KEYS"], _at_least_16(self.seen.block_size))
        return settings | {"ROWS": _at_least_16(self.heads)}

    def splits(self, programs: int, settings: dict[str, Any], block_ids: Tensor | None) -> int:
        """How many programs share a tile of queries, so that few queries of many keys make enough of them."""
        _, _, window, sinks, block_size = self.sizes
        keys, least = settings["KEYS"], max(_LEAST_TILES, settings["ROWS"] // 8)
        tiles = triton.cdiv(window, keys) + triton.cdiv(sinks or 0, keys)
        if block_ids is not None:
            tiles += self.selected * triton.cdiv(block_size, keys)
        return max(1, min(_PROGRAMS // programs, tiles // least, _MOST_SPLITS))


@on_its_device
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_ids: Tensor | None,
    sink_logits: Tensor | None,
    cu_seqlens: Tensor | None,
    token_mask: Tensor | None,
    seen: Seen,
) -> tuple[Tensor, Tensor]:
    """o [B, L, H, V] and log Z [B, L, H] float32.

    Args:
        q: [B, L, H, P], contiguous. k: [B, Lk, G, P], v: [B, Lk, G, V], their channels contiguous.
        block_ids: [B, L, G, S] int64, contiguous.
        sink_logits: [H]. cu_seqlens: [number of sequences + 1] int64. token_mask: [B, Lk] bool.
    """
    call = _Call(q, k, v, block_ids, seen, find_sequences(q.shape[1], k.shape[1], seen.causal, cu_seqlens, token_mask))
    o, lse = v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
    if not lse.numel():
        return o, lse
    before = None, None
    if block_ids is not None and q.shape[1] > _FEW_QUERIES and call.is_near:
        before = torch.empty_like(o, dtype=torch.float32), torch.empty_like(lse)
        _forward(call, None, sink_logits, (None, None), *before)
    _forward(call, block_ids, sink_logits, before, o, lse)
    return o, lse


def _forward(
    call: "_Call",
    block_ids: Tensor | None,
    sink_logits: Tensor | None,
    before: tuple[Tensor | None, Tensor | None],
    o: Tensor,
    lse: Tensor,
) -> None:
    """Windows and sinks, unless they were `before`; and blocks, if any."""
    near = call.is_near and before[0] is None
    settings, programs = call.queries("forward", block_ids, near)
    splits = call.splits(programs, settings, block_ids) if before[0] is None else 1
    num_rows = lse.numel()
    parts, lses = (o, lse) if splits == 1 else (o.new_empty(splits, *t.shape, dtype=torch.float32) for t in (o, lse))
    forward_kernel[(programs * splits,)](
        call.q,
        call.k,
        call.v,
        *call.layout,
        block_ids,
        sink_logits,
        *before,
        parts,
        lses,
        num_rows,
        *call.sizes,
        call.selected,
        splits,
        *call.numbers,
        **settings,
        **call.constants,
    )
    if splits > 1:
        combine_kernel[(num_rows,)](
            parts,
            lses,
            o,
            lse,
            num_rows,
            splits,
            V=o.shape[3],
            SPLITS=triton.next_power_of_2(splits),
            COLUMNS=triton.next_power_of_2(o.shape[3]),
            num_warps=4,
            enable_fp_fusion=True,
        )


@on_its_device
def selected_mass(
    q: Tensor, k: Tensor, lse: Tensor, block_ids: Tensor, token_mask: Tensor | None, block_size: int, scale: float
) -> Tensor:
    """[B, L, G, S] float32, what each block got of a query's attention; see `coterie.ops.selected_mass`.

    Args:
        q, k, block_ids, token_mask: as `forward` takes them.
        lse: [B, L, H] float32, contiguous.
    """
    seen = Seen(0, 0, block_size, True, scale, None)
    sequences = find_sequences(q.shape[1], k.shape[1], True, None, token_mask)
    call = _Call(q, k, k, block_ids, seen, sequences)
    mass = lse.new_empty(block_ids.shape)
    if mass.numel():
        mass_kernel[(call.units * q.shape[1],)](
            q,
            k,
            *call.layout,
            block_ids,
            lse,
            mass,
            *call.sizes[:2],
            block_size,
            call.selected,
            scale,
            *k.stride()[:3],
            SELECTED=triton.next_power_of_2(call.selected),
            **call.one_query("selected"),
            **{name: call.constants[name] for name in ("GROUPS", "HEADS", "P", "WIDTH", "PRECISION")},
        )
    return mass


@on_its_device
def backward(
    grad: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_ids: Tensor | None,
    sink_logits: Tensor | None,
    cu_seqlens: Tensor | None,
    token_mask: Tensor | None,
    o: Tensor,
    lse: Tensor,
    seen: Seen,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients to q, k, v and sink_logits, from those to o and log Z, which are contiguous."""
    sequences = find_sequences(q.shape[1], k.shape[1], seen.causal, cu_seqlens, token_mask)
    call = _Call(q, k, v, block_ids, seen, sequences)
    grad_q, delta = torch.empty_like(q), torch.empty_like(lse)
    grad_k, grad_v = (t.new_empty(t.shape) for t in (k, v))
    if lse.numel():
        before = None
        if block_ids is not None and call.is_near:
            before = torch.empty_like(q, dtype=torch.float32)
            _query_gradients(call, None, None, (grad, grad_lse, o, lse, delta), before)
        _query_gradients(call, block_ids, before, (grad, grad_lse, o, lse, delta), grad_q)
    if grad_k.numel():
        _key_gradients(call, sequences, block_ids, (grad, lse, delta), grad_k, grad_v)
    grad_sinks = None
    if sink_logits is not None:
        shares = (sink_logits.float() - lse).exp_().mul_(delta).masked_fill_(lse == -torch.inf, 0)
        grad_sinks = shares.sum((0, 1)).neg_().to(sink_logits.dtype)
    return grad_q, grad_k, grad_v, grad_sinks


def _query_gradients(
    call: "_Call", block_ids: Tensor | None, before: Tensor | None, results: tuple[Tensor, ...], grad_q: Tensor
) -> None:
    grad, grad_lse, o, lse, delta = results
    settings, programs = call.queries("query_gradients", block_ids, call.is_near and before is None)
    query_gradients_kernel[(programs,)](
        grad,
        grad_lse,
        call.q,
        call.k,
        call.v,
        *call.layout,
        block_ids,
        o,
        lse,
        before,
        delta,
        grad_q,
        *call.sizes,
        call.selected,
        *call.numbers,
        **settings,
        **call.constants,
    )


def _key_gradients(
    call: "_Call",
    sequences: Sequences | None,
    block_ids: Tensor | None,
    results: tuple[Tensor, ...],
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    grad, lse, delta = results
    seen, (length, num_keys, window, sinks, _) = call.seen, call.sizes
    settings = call.tile("key_gradients")
    step = settings["KEYS"]
    if block_ids is not None:  # tiles of whole blocks, or blocks of whole tiles
        size = seen.block_size
        step = step // size * size if size <= step else triton.cdiv(size, triton.cdiv(size, step))
    entries, work, num_tiles, parts = None, None, triton.cdiv(num_keys, step), 1
    if sequences is not None or block_ids is not None or sinks is not None:
        if sequences is None:
            sequences = whole_rows(length, num_keys, seen.causal, grad.device)
        tiles = find_tiles(sequences, num_keys, step, window, sinks or 0)
        num_tiles = tiles.shape[2]
        if block_ids is not None:
            entries = find_entries(block_ids, sequences, num_keys, window, seen.block_size)
        share = _share(step + window + call.selected * seen.block_size)
        parts = max(1, min(triton.cdiv(2 * length, share), _MOST_PARTS))
        batch, _, groups, _ = grad_k.shape
        work = work_table(tiles, entries, batch, groups, seen.block_size, share, parts)
    slots = call.units * num_tiles + parts if parts > 1 else 0
    of_parts = [grad.new_empty(slots, settings["KEYS"], t.shape[3], dtype=torch.float32) for t in (grad_k, grad_v)]
    key_gradients_kernel[(call.units * num_tiles * parts,)](
        grad,
        call.q,
        call.k,
        call.v,
        *call.layout,
        lse,
        delta,
        work,
        *((None, None) if entries is None else (entries.keys, entries.order)),
        grad_k,
        grad_v,
        *of_parts,
        length,
        num_keys,
        num_tiles,
        window,
        sinks,
        seen.block_size,
        call.selected,
        0 if entries is None else entries.stride,
        *call.numbers,
        NEAR=call.is_near,
        PARTS=parts,
        STEP=step,
        **settings,
        **call.constants,
    )
    if parts > 1:
        for own, gradient in zip(of_parts, (grad_k, grad_v), strict=True):
            sum_parts_kernel[(call.units * num_tiles,)](
                own,
                call.layout[1],
                work,
                gradient,
                num_keys,
                num_tiles,
                GROUPS=grad_k.shape[2],
                KEYS=settings["KEYS"],
                WIDTH=gradient.shape[3],
                COLUMNS=triton.next_power_of_2(gradient.shape[3]),
                num_warps=4,
                enable_fp_fusion=True,
            )


def _share(usual: int) -> int:
    """Of the queries that see a tile of keys, as many as one program takes, where usually there are that many."""
    return max(_LEAST_SHARE, 2 * usual)


def _at_least_16(size: int) -> int:
    """The power of two from `size` on, or the 16 that a product takes."""
    return max(16, triton.next_power_of_2(size))
