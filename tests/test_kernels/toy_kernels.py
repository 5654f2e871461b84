"""What the proof chain is tried on: two kernels that are right, and others each wrong in one way."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from coterie_kernels.proof.catalog import Entry, Example


@triton.jit
def add(x_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size)
    y = tl.load(y_ptr + at, mask=at < size)
    tl.store(out_ptr + at, x + y, mask=at < size)


@triton.jit
def add_without_mask(x_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    y = tl.load(y_ptr + at, mask=at < size)
    tl.store(out_ptr + at, x + y)


@triton.jit
def add_twice(x_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """Each program's last element is the next one's first, which makes another sum of it."""
    at = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size)
    y = tl.load(y_ptr + at, mask=at < size)
    tl.store(out_ptr + at, x + y + tl.program_id(0), mask=at < size)


@triton.jit
def add_running(x_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """Adds what the program before it wrote."""
    program = tl.program_id(0)
    at = program * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size)
    y = tl.load(y_ptr + at, mask=at < size)
    if program > 0:
        x += tl.load(out_ptr + program * BLOCK - 1)
    tl.store(out_ptr + at, x + y, mask=at < size)


@triton.jit
def add_but_last(x_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size)
    y = tl.load(y_ptr + at, mask=at < size)
    tl.store(out_ptr + at, x + y, mask=at < size - 1)


@triton.jit
def add_masked_lanes(x_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """Every output gets a sum to which masked lanes belong."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size)
    y = tl.load(y_ptr + at, mask=at < size)
    tl.store(out_ptr + at, y + tl.sum(x, 0), mask=at < size)


@triton.jit
def add_and_reload(x_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """Reads, from another lane, what it has just stored."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size)
    y = tl.load(y_ptr + at, mask=at < size)
    tl.store(out_ptr + at, x, mask=at < size)
    x = tl.load(out_ptr + at, mask=at < size)
    tl.store(out_ptr + at, x + y, mask=at < size)


@triton.jit
def add_and_wait(x_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size)
    y = tl.load(y_ptr + at, mask=at < size)
    tl.store(out_ptr + at, x, mask=at < size)
    tl.debug_barrier()
    x = tl.load(out_ptr + at, mask=at < size)
    tl.store(out_ptr + at, x + y, mask=at < size)


@triton.jit
def add_atomically(x_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size)
    y = tl.load(y_ptr + at, mask=at < size)
    tl.store(out_ptr + at, x, mask=at < size)
    tl.atomic_add(out_ptr + at, y, mask=at < size)


@triton.jit
def add_in_half_the_places(x_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """Two lanes of one store share a place."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size)
    y = tl.load(y_ptr + at, mask=at < size)
    tl.store(out_ptr + at, x + y, mask=at < size)
    tl.store(out_ptr + at // 2 * 2, x + y, mask=at < size)


@triton.jit
def gathered_matmul(
    x_ptr,
    weight_ptr,
    rows_ptr,
    out_ptr,
    num_rows,
    DIM: tl.constexpr,
    OUTER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out [N, O] = x[rows] [N, D] · weight [O, D]ᵀ"""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    source = tl.load(rows_ptr + row, mask=row < num_rows, other=0)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, DIM, DEPTH):
        k = start + tl.arange(0, DEPTH)
        is_x = (row < num_rows)[:, None] & (k < DIM)[None, :]
        is_weight = (column < OUTER)[None, :] & (k < DIM)[:, None]
        x = tl.load(x_ptr + source[:, None] * DIM + k[None, :], mask=is_x, other=0.0)
        weight = tl.load(weight_ptr + column[None, :] * DIM + k[:, None], mask=is_weight, other=0.0)
        total = tl.dot(x, weight, total)
    is_out = (row < num_rows)[:, None] & (column < OUTER)[None, :]
    tl.store(out_ptr + row[:, None] * OUTER + column[None, :], total.to(out_ptr.dtype.element_ty), mask=is_out)


def launch_add(kernel, size: int = 37, block: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(x)
    kernel[(triton.cdiv(size, block),)](x, y, out, size, BLOCK=block, num_warps=1)
    return [out]


def launch_matmul(
    rows: int, dim: int, outer: int, dtype: torch.dtype, *, tile: tuple[int, int, int], warps: int = 4, stages: int = 2
) -> list[Tensor]:
    """tile: rows, columns, depth."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * rows, dim, generator=generator).to(dtype)
    weight = torch.randn(outer, dim, generator=generator).to(dtype)
    source = torch.randint(2 * rows, (rows,), generator=generator)
    out = torch.empty(rows, outer, dtype=dtype)
    sizes = dict(zip(("ROWS", "COLUMNS", "DEPTH"), tile, strict=True))
    grid = (triton.cdiv(rows, tile[0]), triton.cdiv(outer, tile[1]))
    gathered_matmul[grid](
        x, weight, source, out, rows, DIM=dim, OUTER=outer, **sizes, num_warps=warps, num_stages=stages
    )
    return [out]


def _small() -> Iterator[Example]:
    yield Example("add", lambda: launch_add(add))
    yield Example("matmul", lambda: launch_matmul(21, 19, 33, torch.bfloat16, tile=(16, 16, 16)))


def _matrix(target: str, dtype: torch.dtype) -> Iterator[Example]:
    yield Example("add", lambda: launch_add(add, dtype=dtype))
    yield Example("16 rows", lambda: launch_matmul(64, 64, 64, dtype, tile=(16, 32, 32)))
    yield Example("64 rows", lambda: launch_matmul(64, 64, 64, dtype, tile=(64, 64, 32)))


CATALOG = (Entry("toys", _small, _matrix, ("gathered_matmul",)),)
