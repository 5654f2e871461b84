"""Sums over laid-out rows on a CPU: each token's, for outputs, and each expert's, for the gradients of its weights."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.ops._layout import Chunk, Layout, Tile
from coterie.ops._products import multiply, multiply_batch
from coterie.ops._rows import accumulator_dtype


class TokenSum:
    """y[t] = Σ_k weights[t, k] · the row of slot (t, k), [T, D]; in float32 at least, rounded once, in a fixed order.

    Two ways: 16-bit rows are kept, all of them, and summed at the end in one pass; wider ones, of which that would
    be much memory, are added chunk by chunk, which takes a little longer.

    Args:
        like: [T, D], for the shape and the dtype.
        layout: of the rows.
        order: [T·K], the slot of each sorted row.
        top_k: K.
        weights: [T, K]; None: every row counts once, but for padding rows, which must be zero.
    """

    def __init__(self, like: Tensor, layout: Layout, order: Tensor, top_k: int, weights: Tensor | None = None) -> None:
        self._layout, self._order, self._top_k, self._weights = layout, order, top_k, weights
        self._keeps = like.element_size() < 4
        if self._keeps:
            self._rows = like.new_empty(layout.num_rows + 1, like.shape[1])
            self._rows[-1].zero_()  # what unused slots have
        else:
            self._sum = torch.zeros_like(like, memory_format=torch.contiguous_format)
            self._token = layout.spread(order // top_k)
            if weights is not None:
                self._scale = layout.spread_zero(weights.reshape(-1, 1)[order]).to(like.dtype)

    def room(self, chunk: Chunk) -> Tensor | None:
        """Where the chunk's rows may be written right away."""
        return self._rows[chunk.rows] if self._keeps else None

    def add(self, chunk: Chunk, rows: Tensor) -> None:
        """The chunk's rows [n, D]: `room`, filled, or others, which are scaled in place."""
        if self._keeps:
            return
        if self._weights is not None:
            rows.mul_(self._scale[chunk.rows])
        self._sum.index_add_(0, self._token[chunk.rows], rows)

    def result(self) -> Tensor:
        if not self._keeps:
            return self._sum
        slots = self._row_of_slots().view(-1, self._top_k)
        if self._weights is None:
            return F.embedding_bag(slots, self._rows, mode="sum")
        # The sum takes weights in the rows' dtype: two of those hold twice the bits.
        weights = self._weights.masked_fill(slots == self._layout.num_rows, 0.0)
        limit = torch.finfo(self._rows.dtype).max
        high = weights.clamp(-limit, limit).to(self._rows.dtype)
        weights = torch.cat((high, (weights - high).to(high.dtype)), 1)
        return F.embedding_bag(torch.cat((slots, slots), 1), self._rows, mode="sum", per_sample_weights=weights)

    def _row_of_slots(self) -> Tensor:
        """[T·K]: each slot's laid-out row; the last one for unused slots."""
        position = self._layout.position
        if position is None:
            position = torch.arange(self._layout.num_rows)
        rows = torch.full_like(self._order, self._layout.num_rows)
        rows[self._order[: len(position)]] = position
        return rows


class WeightGradient:
    """A gradient [E, A, B], written one chunk at a time; zero for experts without rows."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, counts: Tensor) -> None:
        self.gradient = torch.empty(shape, dtype=dtype)
        for expert in (counts == 0).nonzero().flatten().tolist():
            self.gradient[expert].zero_()
        self._sum: Tensor | None = None

    def add(self, chunk: Chunk, a: Tensor, b: Tensor) -> None:
        """aᵀ b for each expert of the chunk; a [n, A], b [n, B], zero in padding rows of one of them."""
        experts = chunk.experts
        gradient = self.gradient[experts]
        pieces = not all(tile.is_first and tile.is_last for tile in chunk.tiles)
        # Products of another dtype are converted in one call, but for sums, which are not rounded on the way.
        out = gradient if pieces or gradient.dtype == a.dtype else torch.zeros(gradient.shape, dtype=a.dtype)
        for tile, tile_a, tile_b in zip(chunk.tiles, chunk.cut(a), chunk.cut(b), strict=True):
            self._add(tile, tile.batch(tile_a).mT, tile.batch(tile_b), tile.of(out, experts.start))
        if out is not gradient:
            gradient.copy_(out)

    def _add(self, tile: Tile, a: Tensor, b: Tensor, out: Tensor) -> None:
        product = multiply if tile.num_experts == 1 else multiply_batch
        if tile.is_first and tile.is_last:
            product(a, b, out)
            return
        # Several tiles of one expert are summed in float32 at least, and rounded once.
        if tile.is_first:
            self._sum = torch.zeros(out.shape, dtype=accumulator_dtype(out.dtype))
        self._sum += product(a, b)
        if tile.is_last:
            out.copy_(self._sum)


def add_bias_gradient(total: Tensor, chunk: Chunk, rows: Tensor) -> None:
    """total [E, B] += the sums of the chunk's rows [n, B]."""
    for tile, tile_rows in zip(chunk.tiles, chunk.cut(rows), strict=True):
        sums = tile_rows.unflatten(0, (tile.num_experts, -1)).sum(1, dtype=total.dtype)
        total[tile.first_expert : tile.first_expert + tile.num_experts] += sums
