"""Sorted rows laid out for a CPU: pieces of one expert's rows, or all rows of a few experts that have few."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.ops._rows import accumulator_dtype, matmul_dtype, row_multiple

# Rows of one expert taken at a time: enough for the BLAS' full speed, few enough for the cache.
_TILE_ROWS = 1024
# Experts with few rows are taken together: enough of them for every core, few enough that their matrices, converted,
# stay in cache; while their rows stay there too (so many numbers), and padding them to equal heights wastes little.
_GROUP_EXPERTS = 4
_GROUP_NUMBERS = 2**18
_GROUP_WASTE = 1.5


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows of one expert, or all rows of `num_experts` neighbours, each padded to the same height."""

    first_expert: int
    num_experts: int
    start: int  # laid-out rows [start, stop)
    stop: int
    first_row: int  # the sorted rows behind them [first_row, last_row)
    last_row: int
    dtype: torch.dtype  # to multiply in
    is_first: bool  # of its expert's tiles
    is_last: bool

    def matrices(self, stacked: Tensor) -> Tensor:
        """This tile's part of a stack [E, A, B]: [A, B] for one expert, else [num_experts, A, B]."""
        if self.num_experts == 1:
            matrices = stacked[self.first_expert]
        else:
            matrices = stacked[self.first_expert : self.first_expert + self.num_experts]
        return matrices if matrices.dtype == self.dtype else matrices.to(self.dtype)

    def batch(self, rows: Tensor) -> Tensor:
        """This tile's rows [n, A] as `matrices` multiplies them: [n, A], or [num_experts, n / num_experts, A]."""
        return rows if self.num_experts == 1 else rows.unflatten(0, (self.num_experts, -1))

    def multiply(self, rows: Tensor, matrices: Tensor, out: Tensor | None = None) -> Tensor:
        """[n, A] × `matrices` → [n, B]."""
        if self.num_experts == 1:
            return torch.mm(rows, matrices, out=out)
        if out is None:
            return torch.bmm(self.batch(rows), matrices).flatten(0, 1)
        torch.bmm(self.batch(rows), matrices, out=self.batch(out))
        return out


@dataclass(frozen=True, slots=True)
class Layout:
    """N sorted rows as P laid-out rows: the same, or with padding rows that repeat their expert's last.

    What a padding row computes stays where it was, because its weight is 0.
    """

    tiles: list[Tile]
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

    def real_rows(self, tile: Tile, rows: Tensor) -> Tensor:
        """A tile's rows [n, ..] without padding: [last_row - first_row, ..]."""
        if tile.last_row - tile.first_row == tile.stop - tile.start:
            return rows
        return rows.index_select(0, self.position[tile.first_row : tile.last_row] - tile.start)


def lay_out(counts: Tensor, dtype: torch.dtype, width: int) -> Layout:
    """Groups neighbouring experts with few rows, cuts those with many, pads to what the matmul likes.

    `width` is a row's, the widest there is.
    """
    native = matmul_dtype(dtype)
    multiple, group = row_multiple(native), max(_GROUP_EXPERTS, torch.get_num_threads())
    heights, tiles = counts.tolist(), []
    expert = start = first_row = 0
    while expert < len(heights):
        rows = tallest = heights[expert]
        if not rows:
            expert += 1
            continue
        end = expert + 1
        while end < min(len(heights), expert + group) and (more := heights[end]):
            padded = max(tallest, more) * (end + 1 - expert)
            if padded > min(_GROUP_NUMBERS // width, _GROUP_WASTE * (rows + more) + 4 * (end - expert)):
                break
            rows, tallest, end = rows + more, max(tallest, more), end + 1
        height = -(-tallest // multiple) * multiple
        heights[expert:end] = [height] * (end - expert)
        # A single row multiplies at memory speed in any dtype: converting the weights would cost more.
        work = dtype if tallest == 1 and dtype == torch.bfloat16 else native
        pieces = -(-rows // _TILE_ROWS) if end == expert + 1 else 1
        stop = start + height * (end - expert)
        for piece in range(pieces):  # of equal size: a short last one would waste the BLAS' blocking
            cuts = [start + (stop - start) * i // pieces for i in (piece, piece + 1)]
            cut_rows = [min(first_row + cut - start, first_row + rows) for cut in cuts] if end == expert + 1 else None
            cut_rows = cut_rows or [first_row, first_row + rows]
            tiles.append(Tile(expert, end - expert, *cuts, *cut_rows, work, piece == 0, piece == pieces - 1))
        expert, start, first_row = end, stop, first_row + rows
    if start == first_row:
        return Layout(tiles, start, None, None)
    return Layout(tiles, start, *_padding(counts, torch.tensor(heights), start, first_row))


def _padding(counts: Tensor, heights: Tensor, num_laid_out: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """`Layout.source` and `Layout.position`."""
    starts, first_rows = heights.cumsum(0) - heights, counts.cumsum(0) - counts
    expert = torch.repeat_interleave(heights, output_size=num_laid_out)
    row = torch.minimum(torch.arange(num_laid_out) - starts[expert], counts[expert] - 1)
    shift = torch.repeat_interleave(starts - first_rows, counts, output_size=num_rows)
    return first_rows[expert] + row, torch.arange(num_rows) + shift


class WeightGradient:
    """A gradient [E, A, B], written one tile at a time; zero for experts without rows."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, counts: Tensor) -> None:
        self.gradient = torch.empty(shape, dtype=dtype)
        for expert in (counts == 0).nonzero().flatten().tolist():
            self.gradient[expert].zero_()
        self._sum: Tensor | None = None

    def add(self, tile: Tile, a: Tensor, b: Tensor) -> None:
        """aᵀ b for each expert of the tile; a [n, A], b [n, B], zero in padding rows of one of them."""
        out = self.gradient[tile.first_expert : tile.first_expert + tile.num_experts]
        if tile.num_experts == 1:
            out = out[0]
        a, b = tile.batch(a).mT, tile.batch(b)
        if tile.is_first and tile.is_last:
            if out.dtype == a.dtype:
                torch.matmul(a, b, out=out)
            else:
                out.copy_(torch.matmul(a, b))
            return
        # Several tiles of one expert are summed in float32 at least, and rounded once.
        if tile.is_first:
            self._sum = torch.zeros(out.shape, dtype=accumulator_dtype(out.dtype))
        if self._sum.dtype == a.dtype:
            self._sum.addmm_(a, b)
        else:
            self._sum += torch.mm(a, b)
        if tile.is_last:
            out.copy_(self._sum)
