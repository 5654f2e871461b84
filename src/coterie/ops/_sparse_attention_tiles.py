"""`sparse_attention` tile by tile in plain torch: a few keys, and all the queries that see them.

A tile is a run of keys of one head beside a run of queries (the window, and the sinks), or beside those queries that
selected the block. So keys are read once and never gathered. A first sweep finds the largest score of each query, which
a bound on the scores mostly makes needless; the second sums exp(score) and exp(score) · v. Backward goes through the
tiles once more. Kept are the arguments, the output and log Z.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.ops._autocast import no_autocast
from coterie.ops._products import by_onednn, multiply

_SCORES = 2**20  # of a tile, at most
_ROWS_MULTIPLE = 128  # rows of a tile of selected queries, with padding, where oneDNN multiplies
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
    """Keys first..stop-1 of a unit, and queries of it.

    Attributes:
        unit: a head of keys of a sequence.
        rows: a run of queries, or indices that grow; behind those, if there are more than `count`, any: padding.
        count: of queries.
        keys: a run.
        hidden: (some of the queries, bool [those, keys]): scores that do not count.
    """

    unit: int
    rows: slice | Tensor
    count: int
    keys: slice
    hidden: list[tuple[slice, Tensor]]


class Plan:
    """The tiles of queries [U, L, R, P] and keys [U, Lk, P] of U = B · G units; block_ids: [U, L, S], or None."""

    def __init__(self, q: Tensor, k: Tensor, block_ids: Tensor | None, seen: Seen) -> None:
        (self.units, self.length, self.heads, _), self.num_keys = q.shape, k.shape[1]
        self.seen, self.block_ids, self.device = seen, block_ids, q.device
        self.before = self.num_keys - self.length  # the first query's position
        # Of oneDNN's programs there are to be few, one for each number of rows.
        self.multiple = max(_ROWS_MULTIPLE // self.heads, 1) if by_onednn(q.dtype) and q.device.type == "cpu" else 1
        self.edges: dict[tuple[int, int, int], Tensor] = {}

    def __iter__(self) -> Iterator[Tile]:
        yield from self._window()
        if self.seen.window < self.num_keys:
            yield from self._sinks()
            yield from self._blocks()

    def _window(self) -> Iterator[Tile]:
        for first in range(0, self.num_keys if self.seen.window else 0, _KEYS):
            keys, start, stop = slice(first, min(first + _KEYS, self.num_keys)), 0, self.length
            if self.seen.causal:
                start = max(first - self.before, 0)
                stop = min(keys.stop - 1 + self.seen.window - self.before, self.length)
            for rows in self._runs(start, stop, _KEYS):
                hidden = self._outside(rows, keys) if self.seen.causal else []
                for unit in range(self.units):
                    yield Tile(unit, rows, rows.stop - rows.start, keys, hidden)

    def _outside(self, rows: slice, keys: slice) -> list[tuple[slice, Tensor]]:
        """The first of a run of queries, for which keys come later, and the last, for which keys are out of reach."""
        later = slice(rows.start, min(keys.stop - 1 - self.before, rows.stop))
        gone = slice(max(keys.start + self.seen.window - self.before, rows.start), rows.stop)
        return [
            (slice(some.start - rows.start, some.stop - rows.start), self._edge(some, keys))
            for some in (later, gone)
            if some.start < some.stop
        ]

    def _edge(self, rows: slice, keys: slice) -> Tensor:
        """Whether a key is later than a query or out of its window, [queries, keys]: the same for most tiles."""
        shift = rows.start + self.before - keys.start
        sizes = rows.stop - rows.start, keys.stop - keys.start
        if (shift, *sizes) not in self.edges:
            query, key = (torch.arange(size, device=self.device) for size in sizes)
            query = query.unsqueeze(-1) + shift
            self.edges[shift, *sizes] = (key > query) | (key <= query - self.seen.window)
        return self.edges[shift, *sizes]

    def _sinks(self) -> Iterator[Tile]:
        """Keys that are sinks and in no window or selected block; queries from the first that has left one behind."""
        size, sinks = self.seen.block_size, min(self.seen.sinks, self.num_keys)
        for first in range(0, sinks, size):
            keys, start = slice(first, min(first + size, sinks)), 0
            key = torch.arange(keys.start, keys.stop, device=self.device)
            if self.seen.causal:
                start = max(first + self.seen.window - self.before, 0)
            for rows in self._runs(start, self.length, size):
                near = []
                stop = min(keys.stop - 1 + self.seen.window - self.before, rows.stop)
                if self.seen.causal and stop > rows.start:
                    last = torch.arange(rows.start, stop, device=self.device) + (self.before - self.seen.window)
                    near = [(slice(0, stop - rows.start), key > last.unsqueeze(-1))]
                for unit in range(self.units):
                    hidden = near
                    if self.block_ids is not None:
                        chosen = (self.block_ids[unit, rows] == first // size).any(-1, keepdim=True)
                        hidden = [*near, (slice(0, len(chosen)), chosen.expand(-1, len(key)))]
                    yield Tile(unit, rows, rows.stop - rows.start, keys, hidden)

    def _blocks(self) -> Iterator[Tile]:
        if self.block_ids is None:
            return
        size = self.seen.block_size
        for unit, block, rows, partly in self._selected:
            keys = slice(block * size, min((block + 1) * size, self.num_keys))
            key = torch.arange(keys.start, keys.stop, device=self.device)
            for run in self._runs(0, len(rows), size):
                some, hidden = rows[run], []
                if run.start < partly:
                    here = slice(0, min(partly, run.stop) - run.start)
                    last = some[here].unsqueeze(-1) + (self.before - self.seen.window)
                    hidden = [(here, key > last)]
                padding = -len(some) % self.multiple
                yield Tile(unit, F.pad(some, (0, padding)) if padding else some, len(some), keys, hidden)

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
        group, order = group[counts].sort(stable=True)
        rows = rows[order]
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

    def _runs(self, start: int, stop: int, keys: int) -> Iterator[slice]:
        """Queries start..stop-1, so many at a time that their scores with so many keys are not too many."""
        step = max(_SCORES // (self.heads * keys), 1)
        for first in range(start, stop, step):
            yield slice(first, min(first + step, stop))


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
        self.multiply = multiply if q.device.type == "cpu" else torch.mm

    def by_unit(self, t: Tensor) -> Tensor:
        """[B, L, H, ..] → [U, L, R, ..], contiguous."""
        return t.unflatten(2, (self.groups, -1)).transpose(1, 2).flatten(0, 1).contiguous()

    def by_head(self, t: Tensor, like: Tensor) -> Tensor:
        """[U, L, R, ..] → [B, L, H, ..] in the dtype of `like`."""
        return t.unflatten(0, (-1, self.groups)).transpose(1, 2).flatten(2, 3).to(like.dtype).contiguous()

    def scores(self, tile: Tile) -> Tensor:
        """[queries · R, keys], −∞ where hidden."""
        scores = self.multiply(take(self.q, tile), self.k[tile.unit, tile.keys].mT)
        if self.seen.softcap is not None:
            scores.div_(self.seen.softcap).tanh_().mul_(self.seen.softcap)
        by_query = scores.unflatten(0, (-1, self.q.shape[2]))
        for some, hidden in tile.hidden:
            by_query[some].masked_fill_(hidden.unsqueeze(1), -torch.inf)
        by_query[tile.count :] = -torch.inf
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
            put(largest, tile, torch.maximum(take(largest, tile), self.scores(tile).amax(-1)))
        return largest.masked_fill_(largest == -torch.inf, 0)

    def sinks(self, sink_logits: Tensor) -> Tensor:
        """[H] → [U, 1, R]."""
        by_group = sink_logits.to(self.q.dtype).view(self.groups, 1, -1)
        return by_group.repeat(len(self.q) // self.groups, 1, 1)


def take(t: Tensor, tile: Tile) -> Tensor:
    """The tile's rows of [U, L, R, ..]: [queries · R, ..], a view if they are a run."""
    own = t[tile.unit]
    return (own[tile.rows] if isinstance(tile.rows, slice) else own.index_select(0, tile.rows)).flatten(0, 1)


def put(t: Tensor, tile: Tile, rows: Tensor) -> None:
    """What `take` gave, changed, back to its place, without the padding."""
    rows = rows.unflatten(0, (-1, t.shape[2]))
    if isinstance(tile.rows, slice):
        t[tile.unit, tile.rows] = rows
    else:
        t[tile.unit].index_copy_(0, tile.rows[: tile.count], rows[: tile.count])


def add(t: Tensor, tile: Tile, rows: Tensor) -> None:
    """Adds to the tile's rows."""
    own = take(t, tile).add_(rows)
    if not isinstance(tile.rows, slice):
        put(t, tile, own)


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
    with no_autocast(q.device.type):
        return _forward(q, k, v, block_ids, sink_logits, Seen(window, sinks, block_size, causal, scale, softcap))


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
    seen = Seen(window, sinks, block_size, causal, scale, softcap)
    with no_autocast(q.device.type):
        return _gradients(grad, grad_lse, q, k, v, block_ids, sink_logits, o, lse, seen)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, block_ids: Tensor | None, sink_logits: Tensor | None, seen: Seen
) -> tuple[Tensor, Tensor]:
    sweep = _Sweep(q, k, v, block_ids, seen)
    largest = sweep.largest(sink_logits)
    o = sweep.q.new_zeros(*sweep.q.shape[:3], v.shape[3])
    total = sweep.q.new_zeros(sweep.q.shape[:3])
    if sink_logits is not None:
        sink = sweep.sinks(sink_logits)
        total += (sink if largest is None else sink - largest).exp_()
    for tile in sweep.plan:
        weights = sweep.scores(tile)
        if largest is not None:
            weights.sub_(take(largest, tile).unsqueeze(-1))
        weights.exp_()
        add(total, tile, weights.sum(-1))
        add(o, tile, sweep.multiply(weights, sweep.v[tile.unit, tile.keys]))
    o.div_(total.unsqueeze(-1).masked_fill(total.unsqueeze(-1) == 0, 1))
    lse = total.log_() if largest is None else total.log_().add_(largest)
    return sweep.by_head(o, v), sweep.by_head(lse, lse)


def _gradients(
    grad: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_ids: Tensor | None,
    sink_logits: Tensor | None,
    o: Tensor,
    lse: Tensor,
    seen: Seen,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sweep = _Sweep(q, k, v, block_ids, seen)
    dtype = sweep.q.dtype
    grad = grad.to(dtype)
    grad_lse = grad_lse.masked_fill(lse == -torch.inf, 0)  # where nothing is seen, NaN as it may be
    delta = sweep.by_unit((grad * o.to(dtype)).sum(-1) - grad_lse)  # what every score's gradient has taken off
    grad, lse = sweep.by_unit(grad), sweep.by_unit(lse)
    lse = lse.masked_fill(lse == -torch.inf, 0)
    grad_q, grad_k, grad_v = (torch.zeros_like(t) for t in (sweep.q, sweep.k, sweep.v))
    for tile in sweep.plan:
        weights = sweep.scores(tile)
        slope = None if seen.softcap is None else (weights / seen.softcap).square_().neg_().add_(1).nan_to_num_(0, 0, 0)
        weights.sub_(take(lse, tile).unsqueeze(-1)).exp_()
        grads, keys = take(grad, tile), (tile.unit, tile.keys)
        grad_v[keys].addmm_(weights.mT, grads)
        to_scores = sweep.multiply(grads, sweep.v[keys].mT).sub_(take(delta, tile).unsqueeze(-1)).mul_(weights)
        if slope is not None:
            to_scores.mul_(slope)
        grad_k[keys].addmm_(to_scores.mT, take(sweep.q, tile))
        add(grad_q, tile, sweep.multiply(to_scores, sweep.k[keys]))
    grad_sinks = q.new_empty(0)
    if sink_logits is not None:
        shares = (sweep.sinks(sink_logits) - lse).exp_().mul_(delta).sum(1)  # [U, R]
        grad_sinks = shares.view(-1, len(sink_logits)).sum(0).neg_().to(sink_logits.dtype)
    grad_k, grad_v = (
        t.unflatten(0, (-1, sweep.groups)).transpose(1, 2).to(like.dtype).contiguous()
        for t, like in ((grad_k, k), (grad_v, v))
    )
    return sweep.by_head(grad_q.mul_(seen.scale), q), grad_k, grad_v, grad_sinks


def selected_mass(q: Tensor, k: Tensor, lse: Tensor, block_ids: Tensor, seen: Seen) -> Tensor:
    """[B, L, G, S]; see `coterie.ops.selected_mass`."""
    sweep = _Sweep(q, k, k[..., :0], block_ids, seen)
    lse, ids = sweep.by_unit(lse), sweep.plan.block_ids
    mass = lse.new_zeros(ids.shape)
    for tile in sweep.plan:
        weights = sweep.scores(tile).sub_(take(lse, tile).unsqueeze(-1)).exp_()
        rows = tile.rows[: tile.count]
        own = weights.sum(-1).unflatten(0, (-1, sweep.q.shape[2])).sum(-1)[: tile.count]
        slot = (ids[tile.unit].index_select(0, rows) == tile.keys.start // seen.block_size).byte().argmax(-1)
        mass[tile.unit].index_put_((rows, slot), own)
    return mass.unflatten(0, (-1, sweep.groups)).transpose(1, 2).contiguous()


@_forward_op.register_fake
def _(q, k, v, block_ids, sink_logits, *settings):
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return v.new_empty(*q.shape[:3], v.shape[3]), lse


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
