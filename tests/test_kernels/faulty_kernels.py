"""Kernels with one fault each, that `python -m coterie_kernels.proof compile` must find; none is ever run."""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl

from coterie_kernels.proof.catalog import Entry, Example


@triton.jit
def spills(x_ptr, NUM: tl.constexpr):
    """A thread must hold 512 numbers until their sum is known."""
    place = x_ptr + tl.arange(0, NUM)
    x = tl.load(place)
    tl.store(place, x / tl.sum(x, 0))


@triton.jit
def multiplies(
    x_ptr,
    y_ptr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x [ROWS, INNER] times its own first COLUMNS rows."""
    row, column, depth = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :], tl.arange(0, DEPTH)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, INNER, DEPTH):
        left = tl.load(x_ptr + row * INNER + (first + depth)[None, :])
        right = tl.load(x_ptr + column * INNER + (first + depth)[:, None])
        total = tl.dot(left, right, total, input_precision=PRECISION)
    tl.store(y_ptr + row * COLUMNS + column, total)


@triton.jit
def multiplies_one_by_one(x_ptr, y_ptr, SIZE: tl.constexpr):
    """The product of x [SIZE, SIZE] with its transpose, as a sum of products."""
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for depth in range(SIZE):
        total += tl.load(x_ptr + row * SIZE + depth) * tl.load(x_ptr + column * SIZE + depth)
    tl.store(y_ptr + row * SIZE + column, total)


@triton.jit
def does_not_compile(x_ptr):
    tl.store(x_ptr + tl.arange(0, 48), 0)


def _multiply(dtype: torch.dtype, rows: int, columns: int, depth: int, precision: str, **options) -> None:
    x, y = torch.empty(rows, 1024, dtype=dtype), torch.empty(rows, columns)
    multiplies[(1,)](x, y, 1024, rows, columns, depth, precision, **options)


RUNS = {
    "spills": lambda: spills[(1,)](torch.empty(16384), 16384, num_warps=1),
    "shared_memory": lambda: _multiply(torch.bfloat16, 128, 256, 128, "tf32", num_warps=8, num_stages=4),
    "no_tensor_cores": lambda: _multiply(torch.float32, 64, 64, 16, "ieee"),
    "no_dot": lambda: multiplies_one_by_one[(1,)](torch.empty(64, 64), torch.empty(64, 64), 64),
    "no_launch": lambda: None,
    "does_not_compile": lambda: does_not_compile[(1,)](torch.empty(48)),
    "tensor_memory": lambda: _multiply(torch.bfloat16, 256, 512, 32, "tf32", num_warps=8, num_stages=2),
}


def _entry(name: str, run: Callable[[], None], *multiplies: str) -> Entry:
    def matrix(target: str, dtype: torch.dtype) -> Iterator[Example]:
        if dtype == torch.float32:
            yield Example(name, lambda: run() or ())

    return Entry(name, lambda: iter(()), matrix, multiplies)


CATALOG = (
    _entry("spills", lambda: spills[(1,)](torch.empty(16384), 16384, num_warps=1)),
    _entry("shared_memory", lambda: _multiply(torch.bfloat16, 128, 256, 128, "tf32", num_warps=8, num_stages=4)),
    _entry("tensor_memory", lambda: _multiply(torch.bfloat16, 256, 512, 32, "tf32", num_warps=8, num_stages=2)),
    _entry("no_tensor_cores", lambda: _multiply(torch.float32, 64, 64, 16, "ieee"), "multiplies"),
    _entry(
        "no_dot",
        lambda: multiplies_one_by_one[(1,)](torch.empty(64, 64), torch.empty(64, 64), 64),
        "multiplies_one_by_one",
    ),
    _entry("no_launch", lambda: None, "multiplies"),
    _entry("does_not_compile", lambda: does_not_compile[(1,)](torch.empty(48))),
)
