"""Sorted rows laid out for a CPU: which of them are multiplied together, and which are in the cache together."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.ops._products import batch_sizes, matmul_dtype, multiply, multiply_batch, padded_height

# Rows of one expert taken at a time: enough for the library's full speed, few enough for the cache. (And many more than
# padding adds, so that every piece of an expert has rows of its own.)
_TILE_ROWS = 1024
# What a product's call costs besides its FLOPs, in FLOPs, in float32: small products of neighbours are made side by
# side, in one call, where padding their rows to equal heights costs no more than the calls it saves. Narrower dtypes
# multiply faster, so that a call weighs more.
_CALL_WORK = 2**23
# Numbers in the rows that go through the whole op together: few enough for the cache.
_CHUNK_NUMBERS = 2**19
# And in matrices that are converted together, in one call.
_CONVERTED_NUMBERS = 2**21


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows of one expert, or all rows of `num_experts` neighbours, each padded to the same height: one product."""

    first_expert: int
    num_experts: int
    start: int  # laid-out rows [start, stop)
    stop: int
    is_first: bool = True  # of its expert's tiles
    is_last: bool = True

    def of(self, stacked: Tensor, base: int = 0) -> Tensor:
        """This tile's part of a stack of experts from `base` on, [.., ..]: [..] for one expert, else [g, ..]."""
        first = self.first_expert - base
        return stacked[first] if self.num_experts == 1 else stacked[first : first + self.num_experts]

    def batch(self, rows: Tensor) -> Tensor:
        """This tile's rows [n, A] beside `of`: [n, A], or [g, n / g, A]."""
        return rows if self.num_experts == 1 else rows.unflatten(0, (self.num_experts, -1))

    def multiply(self, rows: Tensor, matrices: Tensor, out: Tensor | None = None) -> Tensor:
        """Rows [n, A] × matrices as `of` has them → [n, B], in the rows' dtype."""
        matrices = matrices.to(rows.dtype)
        if self.num_experts == 1:
            return multiply(rows, matrices, out)
        y = multiply_batch(self.batch(rows), matrices, None if out is None else self.batch(out))
        return y.flatten(0, 1) if out is None else out


@dataclass(slots=True)
class Chunk:
    """Neighbouring tiles whose rows go through the whole op together."""

    tiles: list[Tile]
    first_row: int  # the sorted rows behind them [first_row, last_row)
    last_row: int

    @property
    def start(self) -> int:
        return self.tiles[0].start

    @property
    def rows(self) -> slice:
        """Laid-out rows."""
        return slice(self.tiles[0].start, self.tiles[-1].stop)

    @property
    def experts(self) -> slice:
        last = self.tiles[-1]
        return slice(self.tiles[0].first_expert, last.first_expert + last.num_experts)

    def cut(self, rows: Tensor) -> Sequence[Tensor]:
        """The chunk's rows [n, ..], tile by tile."""
        return rows.split([tile.stop - tile.start for tile in self.tiles])

    def multiply(self, rows: Tensor, stacked: Tensor, out: Tensor | None = None) -> Tensor:
        """[n, A] × [E, A, B] → [n, B], each tile by its experts' matrices."""
        experts = self.experts
        stacked = stacked[experts]
        if stacked.dtype != rows.dtype and stacked.numel() <= _CONVERTED_NUMBERS:
            stacked = stacked.to(rows.dtype)
        if out is None:
            if len(self.tiles) == 1:
                return self.tiles[0].multiply(rows, self.tiles[0].of(stacked, experts.start))
            out = rows.new_empty(rows.shape[0], stacked.shape[2])
        for tile, tile_rows, tile_out in zip(self.tiles, self.cut(rows), self.cut(out), strict=True):
            tile.multiply(tile_rows, tile.of(stacked, experts.start), tile_out)
        return out

    def add_bias(self, rows: Tensor, bias: Tensor) -> Tensor:
        """rows [n, B] += bias [E, B]."""
        for tile, tile_rows in zip(self.tiles, self.cut(rows), strict=True):
            own = tile.of(bias)
            tile.batch(tile_rows).add_(own if tile.num_experts == 1 else own.unsqueeze(1))
        return rows


@dataclass(frozen=True, slots=True)
class Layout:
    """N sorted rows as P laid-out rows: the same, or with padding rows that repeat their expert's last.

    What a padding row computes is never looked at, and its weight in sums is 0.
    """

    chunks: list[Chunk]
    num_rows: int  # P
    source: Tensor | None  # [P]: the sorted row behind each laid-out row; None = nothing padded
    position: Tensor | None  # [N']: the laid-out row of each sorted row that an expert takes

    def spread(self, rows: Tensor) -> Tensor:
        """[N, ..] → [P, ..], padding rows repeated."""
        return rows[: self.num_rows] if self.source is None else rows.index_select(0, self.source)

    def spread_zero(self, rows: Tensor) -> Tensor:
        """[N, ..] → [P, ..], padding rows zero."""
        if self.position is None:
            return rows[: self.num_rows]
        zeros = rows.new_zeros(self.num_rows, *rows.shape[1:])
        return zeros.index_copy_(0, self.position, rows[: len(self.position)])

    def real_rows(self, chunk: Chunk, rows: Tensor) -> Tensor:
        """A chunk's rows [n, ..] without padding: [last_row - first_row, ..]."""
        if chunk.last_row - chunk.first_row == len(rows):
            return rows
        return rows.index_select(0, self.position[chunk.first_row : chunk.last_row] - chunk.start)

    def laid_out_rows(self, chunk: Chunk, rows: Tensor) -> Tensor:
        """A chunk's part of [N, ..], padding rows repeated."""
        if self.source is None:
            return rows[chunk.first_row : chunk.last_row]
        return rows.index_select(0, self.source[chunk.rows])


def lay_out(counts: Tensor, dtype: torch.dtype, matrix: Sequence[int], *, side_by_side: bool = True) -> Layout:
    """Groups neighbouring experts with few rows, cuts those with many, pads to what the library likes.

    Args:
        counts: [E], rows of each expert.
        dtype: the rows'.
        matrix: the two sizes of an expert's matrix, the larger if it has two.
        side_by_side: whether products of neighbours may be one.
    """
    work, heights, chunks = matmul_dtype(dtype), counts.tolist(), []
    capacity = _CHUNK_NUMBERS // max(matrix)
    spare = _CALL_WORK * 4 // work.itemsize // (2 * matrix[0] * matrix[1])
    sizes = batch_sizes(dtype) if side_by_side else ()
    expert = start = row = 0
    while expert < len(heights):
        if not heights[expert]:
            expert += 1
            continue
        size, height = _group(heights, expert, sizes, work, capacity, spare)
        rows = sum(heights[expert : expert + size])
        pieces = -(-rows // _TILE_ROWS) if size == 1 else 1
        for piece in range(pieces):  # of equal size: a short last one would waste the library's blocking
            begin, end = (size * height * i // pieces for i in (piece, piece + 1))
            tile = Tile(expert, size, start + begin, start + end, piece == 0, piece == pieces - 1)
            last_row = row + min(end, rows)
            if chunks and tile.stop - chunks[-1].start <= capacity:
                chunks[-1].tiles.append(tile)
                chunks[-1].last_row = last_row
            else:
                chunks.append(Chunk([tile], row + begin, last_row))
        heights[expert : expert + size] = [height] * size
        expert, start, row = expert + size, start + size * height, row + rows
    if start == row:
        return Layout(chunks, start, None, None)
    return Layout(chunks, start, *_padding(counts, torch.tensor(heights), start, row))


def _group(
    heights: list[int], expert: int, sizes: Sequence[int], work: torch.dtype, capacity: int, spare: int
) -> tuple[int, int]:
    """How many experts from this one on to multiply side by side, and at what height."""
    for size in sizes:
        run = heights[expert : expert + size]
        if len(run) == size and all(run):
            height = padded_height(max(run), work)
            if height <= 2 * spare and size * height <= min(capacity, sum(run) + size * spare):
                return size, height
    return 1, padded_height(heights[expert], work)


def _padding(counts: Tensor, heights: Tensor, num_laid_out: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """`Layout.source` and `Layout.position`."""
    starts, first_rows = heights.cumsum(0) - heights, counts.cumsum(0) - counts
    expert = torch.repeat_interleave(heights, output_size=num_laid_out)
    row = torch.minimum(torch.arange(num_laid_out) - starts[expert], counts[expert] - 1)
    shift = torch.repeat_interleave(starts - first_rows, counts, output_size=num_rows)
    return first_rows[expert] + row, torch.arange(num_rows) + shift
