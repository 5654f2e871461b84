"""`sparse_attention` tile by tile in plain torch: a few keys, and all the queries that see them.

A tile is a run of keys beside either a run of queries, for all heads at once (the window, and the sinks), or those
queries of one head of keys that selected the block. So keys are read once and never gathered. A first sweep finds the
largest score of each query, which a bound on the scores mostly makes needless; the second sums exp(score) and
exp(score) · v. Backward goes through the tiles once more. Kept are the arguments, the output and log Z.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_SCORES = 2**20  # of a tile, at most
_KEYS = 128  # of a tile of the window
_SAFE = 40.0  # exp of scores within ± this is exact enough, and sums do not overflow


@dataclass(frozen=True)
class Seen:
    """What a query sees; see `sparse_attention`. window: 0 for none, at least the number of keys for all."""

    window: int
    sinks: int
    block_size: int
    causal: bool
    scale: float
    softcap: float | None


@dataclass(frozen=True)
class Tile:
    """Keys first..stop-1, and queries: of all units, or rows [n] of one unit.

    Attributes:
        unit: None: all.
        rows: a run, or indices that grow.
        hidden: [(some of the rows, bool [units or 1, n of those, keys])], which scores do not count.
    """

    unit: int | None
    rows: slice | Tensor
    keys: slice
    hidden: list[tuple[slice, Tensor]]


class Plan:
    """The tiles of queries [U, L, R, P] and U · keys [U, Lk, P]; block_ids: [U, L, S], or None."""

    def __init__(self, q: Tensor, k: Tensor, block_ids: Tensor | None, seen: Seen) -> None:
        (units, self.length, heads, _), self.num_keys = q.shape, k.shape[1]
        self.seen, self.block_ids, self.device = seen, block_ids, q.device
        self.before = self.num_keys - self.length  # the first query's position
        self.rows_of_all = max(_SCORES // (units * heads * _KEYS), 16)
        self.rows_of_one = max(_SCORES // (heads * seen.block_size), 16)

    def __iter__(self) -> Iterator[Tile]:
        yield from self._window()
        if self.seen.window < self.num_keys:
            yield from self._sinks()
            yield from self._blocks()

    def _window(self) -> Iterator[Tile]:
        window = self.seen.window
        if not window:
            return
        for first in range(0, self.num_keys, _KEYS):
            keys = slice(first, min(first + _KEYS, self.num_keys))
            if not self.seen.causal:
                yield from (Tile(None, rows, keys, []) for rows in self._runs(0, self.length))
                continue
            start, stop = max(first - self.before, 0), min(keys.stop - 1 + window - self.before, self.length)
            for rows in self._runs(start, stop):
                yield Tile(None, rows, keys, self._edges(rows, keys))

    def _edges(self, rows: slice, keys: slice) -> list[tuple[slice, Tensor]]:
        """Of a run of queries: those for which some keys come later, or are out of the window."""
        hidden = []
        key = torch.arange(keys.start, keys.stop, device=self.device)
        for start, stop in (
            (rows.start, keys.stop - 1 - self.before),
            (keys.start + self.seen.window - self.before, rows.stop),
        ):
            start, stop = max(start, rows.start), min(stop, rows.stop)
            if start < stop:
                query = torch.arange(start, stop, device=self.device).unsqueeze(-1) + self.before
                mask = (key > query) | (key <= query - self.seen.window)
                hidden.append((slice(start - rows.start, stop - rows.start), mask.unsqueeze(0)))
        return hidden

    def _sinks(self) -> Iterator[Tile]:
        """Keys that are sinks and in no window or selected block; queries from the first that has left one behind."""
        sinks = min(self.seen.sinks, self.num_keys)
        start = max(self.seen.window - self.before, 0) if self.seen.causal else 0
        for first in range(0, sinks, self.seen.block_size):
            keys = slice(first, min(first + self.seen.block_size, sinks))
            key = torch.arange(keys.start, keys.stop, device=self.device)
            for rows in self._runs(max(start, first - self.before) if self.seen.causal else 0, self.length):
                hidden = []
                if self.block_ids is not None:
                    chosen = (self.block_ids[:, rows] == first // self.seen.block_size).any(-1)
                    hidden.append((slice(0, rows.stop - rows.start), chosen.unsqueeze(-1).expand(-1, -1, len(key))))
                if self.seen.causal:
                    stop = min(keys.stop - 1 + self.seen.window - self.before, rows.stop)
                    if stop > rows.start:
                        query = torch.arange(rows.start, stop, device=self.device).unsqueeze(-1) + self.before
                        mask = key > query - self.seen.window
                        hidden.append((slice(0, stop - rows.start), mask.unsqueeze(0)))
                yield Tile(None, rows, keys, hidden)

    def _blocks(self) -> Iterator[Tile]:
        if self.block_ids is None:
            return
        size = self.seen.block_size
        for unit, block, rows, partly in self._selected:
            keys = slice(block * size, min((block + 1) * size, self.num_keys))
            for start in range(0, len(rows), self.rows_of_one):
                some, hidden = rows[start : start + self.rows_of_one], []
                if start < partly:
                    here = slice(0, min(partly - start, len(some)))
                    last = some[here].unsqueeze(-1) + (self.before - self.seen.window)
                    key = torch.arange(keys.start, keys.stop, device=self.device)
                    hidden.append((here, (key > last).unsqueeze(0)))
                yield Tile(unit, some, keys, hidden)

    @cached_property
    def _selected(self) -> list[tuple[int, int, Tensor, int]]:
        """(unit, block, the queries that selected it and see something of it beyond their window, how many of them, the
        first ones, do not see all of it)."""
        size, blocks = self.seen.block_size, -(-self.num_keys // self.seen.block_size)
        ids = self.block_ids.sort(-1).values
        units, length, _ = ids.shape
        if self.seen.causal:
            last = torch.arange(length, device=self.device) + (self.before - self.seen.window)
        else:
            last = torch.full((length,), self.num_keys - 1, device=self.device)
        counts = (ids >= 0) & (ids < blocks) & (ids * size <= last.unsqueeze(-1))
        counts[..., 1:] &= ids[..., 1:] != ids[..., :-1]
        group = ids + torch.arange(units, device=self.device).view(-1, 1, 1) * blocks
        rows = torch.arange(length, device=self.device).view(1, -1, 1).expand_as(ids)[counts]
        group = group[counts]
        order = group.argsort(stable=True)
        rows, group = rows[order], group[order]
        ends = (group % blocks + 1) * size - 1
        partly = last[rows] < ends.clamp(max=self.num_keys - 1)
        sizes = group.bincount(minlength=units * blocks)
        partly = group[partly].bincount(minlength=units * blocks)
        found = sizes.nonzero().squeeze(-1)
        parts = rows.split(sizes[found].tolist())
        return [
            (which // blocks, which % blocks, part, some)
            for which, part, some in zip(found.tolist(), parts, partly[found].tolist(), strict=True)
        ]

    def _runs(self, start: int, stop: int) -> Iterator[slice]:
        for first in range(start, stop, self.rows_of_all):
            yield slice(first, min(first + self.rows_of_all, stop))


class _Sweep:
    """Tiles of one call, and what is done with each.

    q [U, L, R, P], multiplied by the scale; k [U, Lk, P]; v [U, Lk, V].
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, block_ids: Tensor | None, seen: Seen) -> None:
        groups = k.shape[2]
        dtype = torch.promote_types(q.dtype, torch.float32)
        self.seen, self.groups = seen, groups
        self.q = self.by_unit(q.to(dtype)) * seen.scale
        self.k, self.v = (t.to(dtype).transpose(1, 2).flatten(0, 1).contiguous() for t in (k, v))
        if block_ids is not None:
            block_ids = block_ids.transpose(1, 2).flatten(0, 1)
        self.plan = Plan(self.q, self.k, block_ids, seen)

    def by_unit(self, t: Tensor) -> Tensor:
        """[B, L, H, ..] → [U, L, R, ..], contiguous."""
        return t.unflatten(2, (self.groups, -1)).transpose(1, 2).flatten(0, 1).contiguous()

    def by_head(self, t: Tensor, like: Tensor) -> Tensor:
        """[U, L, R, ..] → [B, L, H, ..] in the dtype of `like`."""
        return t.unflatten(0, (-1, self.groups)).transpose(1, 2).flatten(2, 3).to(like.dtype).contiguous()

    def scores(self, tile: Tile) -> Tensor:
        """[units of the tile, n · R, keys], −∞ where hidden."""
        rows = take(self.q, tile)
        scores = torch.bmm(rows.flatten(1, 2), keys_of(self.k, tile).mT)
        if self.seen.softcap is not None:
            scores.div_(self.seen.softcap).tanh_().mul_(self.seen.softcap)
        by_row = scores.unflatten(1, rows.shape[1:3])
        for some, hidden in tile.hidden:
            by_row[:, some].masked_fill_(hidden.unsqueeze(2), -torch.inf)
        return scores

    def largest(self, sink_logits: Tensor | None) -> Tensor | None:
        """Of each query's scores [U, L, R], what exp needs taken off; None: nothing."""
        bound = self.seen.softcap
        if bound is None:
            bound = self.q.norm(dim=-1).amax() * self.k.norm(dim=-1).amax() if self.k.numel() and self.q.numel() else 0
        if bound <= _SAFE and (sink_logits is None or sink_logits.abs().max() <= _SAFE):
            return None
        largest = self.q.new_full(self.q.shape[:3], -torch.inf)
        if sink_logits is not None:
            largest.copy_(self.sinks(sink_logits))
        for tile in self.plan:
            found = self.scores(tile).amax(-1)
            rows = take(largest, tile)
            put(largest, tile, torch.maximum(rows, found.view_as(rows)))
        return largest.masked_fill_(largest == -torch.inf, 0)

    def sinks(self, sink_logits: Tensor) -> Tensor:
        """[H] → [U, 1, R]."""
        by_group = sink_logits.to(self.q.dtype).view(self.groups, 1, -1)
        return by_group.repeat(len(self.q) // self.groups, 1, 1)


def take(t: Tensor, tile: Tile) -> Tensor:
    """The tile's queries of [U, L, ..]: [units, n, ..], a view if they are a run."""
    if tile.unit is None:
        return t[:, tile.rows]
    return t[tile.unit].index_select(0, tile.rows).unsqueeze(0)


def put(t: Tensor, tile: Tile, rows: Tensor) -> None:
    """What `take` gave, changed, back to its place."""
    if tile.unit is None:
        t[:, tile.rows] = rows
    else:
        t[tile.unit].index_copy_(0, tile.rows, rows[0])


def keys_of(t: Tensor, tile: Tile) -> Tensor:
    """The tile's keys of [U, Lk, ..]: a view [units, n, ..]."""
    return t[:, tile.keys] if tile.unit is None else t[tile.unit : tile.unit + 1, tile.keys]


def attend(
    q: Tensor, k: Tensor, v: Tensor, block_ids: Tensor | None, sink_logits: Tensor | None, seen: Seen
) -> tuple[Tensor, Tensor]:
    """o [B, L, H, V] and log Z [B, L, H]; arguments as `sparse_attention`'s, with an id list for every query."""
    return _forward_op(
        q, k, v, block_ids, sink_logits, seen.window, seen.sinks, seen.block_size, seen.causal, seen.scale, seen.softcap
    )


@torch.library.custom_op("coterie::sparse_attention", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_ids: Tensor | None,
    sink_logits: Tensor | None,
    window: int,
    sinks: int,
    block_size: int,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    sweep = _Sweep(q, k, v, block_ids, Seen(window, sinks, block_size, causal, scale, softcap))
    largest = sweep.largest(sink_logits)
    o = sweep.q.new_zeros(*sweep.q.shape[:3], v.shape[3])
    total = sweep.q.new_zeros(sweep.q.shape[:3])
    if sink_logits is not None:
        sink = sweep.sinks(sink_logits)
        total += (sink if largest is None else sink - largest).exp_()
    for tile in sweep.plan:
        weights = sweep.scores(tile)
        if largest is not None:
            weights.sub_(take(largest, tile).flatten(1, 2).unsqueeze(-1))
        weights.exp_()
        rows = take(total, tile)
        put(total, tile, rows + weights.sum(-1).view_as(rows))
        rows = take(o, tile)
        rows.flatten(1, 2).baddbmm_(weights, keys_of(sweep.v, tile))
        if tile.unit is not None:
            put(o, tile, rows)
    o.div_(total.unsqueeze(-1).masked_fill(total.unsqueeze(-1) == 0, 1))
    lse = total.log_() if largest is None else total.log_().add_(largest)
    return sweep.by_head(o, v), sweep.by_head(lse, lse)


@torch.library.custom_op("coterie::sparse_attention_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_ids: Tensor | None,
    sink_logits: Tensor | None,
    o: Tensor,
    lse: Tensor,
    window: int,
    sinks: int,
    block_size: int,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to q, k, v and sink_logits (empty for None)."""
    sweep = _Sweep(q, k, v, block_ids, Seen(window, sinks, block_size, causal, scale, softcap))
    dtype = sweep.q.dtype
    grad = grad.to(dtype)
    delta = sweep.by_unit((grad * o.to(dtype)).sum(-1) - grad_lse)  # what every score's gradient has taken off
    grad, lse = sweep.by_unit(grad), sweep.by_unit(lse)
    lse = lse.masked_fill(lse == -torch.inf, 0)
    grad_q, grad_k, grad_v = (torch.zeros_like(t) for t in (sweep.q, sweep.k, sweep.v))
    for tile in sweep.plan:
        weights = sweep.scores(tile)
        slope = None if softcap is None else (weights / softcap).square_().neg_().add_(1).nan_to_num_(0, 0, 0)
        weights.sub_(take(lse, tile).flatten(1, 2).unsqueeze(-1)).exp_()
        rows, grads = (take(t, tile).flatten(1, 2) for t in (sweep.q, grad))
        keys_of(grad_v, tile).baddbmm_(weights.mT, grads)
        to_scores = torch.bmm(grads, keys_of(sweep.v, tile).mT)
        to_scores.sub_(take(delta, tile).flatten(1, 2).unsqueeze(-1)).mul_(weights)
        if slope is not None:
            to_scores.mul_(slope)
        keys_of(grad_k, tile).baddbmm_(to_scores.mT, rows)
        own = take(grad_q, tile)
        own.flatten(1, 2).baddbmm_(to_scores, keys_of(sweep.k, tile))
        if tile.unit is not None:
            put(grad_q, tile, own)
    grad_sinks = q.new_empty(0)
    if sink_logits is not None:
        shares = (sweep.sinks(sink_logits) - lse).exp_().mul_(delta).sum(1)  # [U, R]
        grad_sinks = shares.view(-1, len(sink_logits)).sum(0).neg_().to(sink_logits.dtype)
    grad_k, grad_v = (
        t.unflatten(0, (-1, sweep.groups)).transpose(1, 2).to(like.dtype).contiguous()
        for t, like in ((grad_k, k), (grad_v, v))
    )
    return sweep.by_head(grad_q.mul_(scale), q), grad_k, grad_v, grad_sinks


@_forward_op.register_fake
def _(q, k, v, block_ids, sink_logits, *settings):
    return v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(
        q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32)
    )


@_backward_op.register_fake
def _(grad, grad_lse, q, k, v, block_ids, sink_logits, *rest):
    return tuple(q.new_empty(0) if t is None else t.new_empty(t.shape) for t in (q, k, v, sink_logits))


def _setup_context(ctx, inputs, output):
    tensors, ctx.settings = inputs[:5], inputs[5:]
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad, grad_lse):
    *_, o, lse = tensors = ctx.saved_tensors
    grad = torch.zeros_like(o) if grad is None else grad
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    grad_q, grad_k, grad_v, grad_sinks = _backward_op(grad, grad_lse, *tensors, *ctx.settings)
    return grad_q, grad_k, grad_v, None, None if tensors[4] is None else grad_sinks, *[None] * len(ctx.settings)


_forward_op.register_autograd(_backward, setup_context=_setup_context)
