"""Which rows of which expert a program takes, found on the device: no host waits for the counts."""

import triton
import triton.language as tl


def num_tiles(num_rows: int, num_experts: int, rows: int) -> int:
    """How many programs are enough for any counts, when a program takes at most `rows` rows of one expert.

    Every expert has at most one tile that is not full, and so have the rows of none, which count as one more.
    """
    return min(num_rows, num_rows // rows + num_experts + 1)


@triton.jit
def locate(counts_ptr, tile, num_rows, num_experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """(expert, first sorted row, number of rows) of a tile; expert is E for rows of none, number 0 past the last tile.

    counts_ptr: [E] integers, rows of each expert. EXPERTS: a power of two above E.
    """
    expert = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + expert, mask=expert < num_experts, other=0).to(tl.int32)
    counts = tl.where(expert == num_experts, num_rows - tl.sum(counts, 0), counts)
    tiles = (counts + ROWS - 1) // ROWS
    own = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    own = tl.minimum(own, num_experts)
    first_tile = tl.sum(tl.where(expert < own, tiles, 0), 0)
    first_row = tl.sum(tl.where(expert < own, counts, 0), 0)
    count = tl.sum(tl.where(expert == own, counts, 0), 0)
    skipped = (tile - first_tile) * ROWS
    return own, first_row + skipped, tl.maximum(tl.minimum(count - skipped, ROWS), 0)
