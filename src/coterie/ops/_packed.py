"""Matrices in oneDNN's own layout, for inference on a CPU.

oneDNN multiplies by blocks. A row-major matrix it copies into them at every call, which for a few rows takes longer
than the product; a matrix that lies in blocks is read once, at the memory's speed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from coterie.ops._autocast import autocast_dtype
from coterie.ops._layout import Chunk, lay_out
from coterie.ops._products import float32_by_onednn, multiplies_natively


def packable_dtypes() -> tuple[torch.dtype, ...]:
    """In which dtypes packed products are the faster ones here: where oneDNN has the CPU's instructions for them."""
    faster = {torch.bfloat16: multiplies_natively(torch.bfloat16), torch.float32: float32_by_onednn()}
    return tuple(dtype for dtype, yes in faster.items() if yes)


class PackedMatrix:
    """A matrix [B, A], to be multiplied as x @ matrixᵀ. Nothing changes it, so copies of a model share it."""

    def __init__(self, matrix: Tensor) -> None:
        self.shape, self.dtype, self.requires_grad = matrix.shape, matrix.dtype, matrix.requires_grad
        self._blocks = torch.ops.mkldnn._reorder_linear_weight(matrix.detach(), None)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[.., A] → [.., B], in the matrix's dtype, which is x's."""
        _refuse_compiling()
        return torch.ops.mkldnn._linear_pointwise.default(x, self._blocks, bias, "none", [], "")

    def dense(self) -> Tensor:
        """The matrix that was packed, bit for bit; a copy."""
        return self._blocks.to_dense()

    def __deepcopy__(self, memo: dict) -> "PackedMatrix":
        return self

    def __reduce__(self) -> tuple:
        return PackedMatrix, (self.dense().requires_grad_(self.requires_grad),)


class PackedRows:
    """Rows of a packed matrix, as a packed matrix of its own would be."""

    def __init__(self, whole: PackedMatrix, start: int, stop: int, requires_grad: bool) -> None:
        self.whole, self._rows, self.requires_grad = whole, slice(start, stop), requires_grad
        self.shape, self.dtype = torch.Size((stop - start, whole.shape[1])), whole.dtype

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self.whole.multiply(x)[..., self._rows]
        return y if bias is None else y + bias

    def dense(self) -> Tensor:
        return self.whole.dense()[self._rows].clone()


class PackedStack:
    """A stack of matrices [E, B, A], each packed by itself; given as [E, A, B] if `transposed`."""

    def __init__(self, stacked: Tensor, transposed: bool = False) -> None:
        self._transposed = transposed
        self.matrices = [PackedMatrix(matrix.mT if transposed else matrix) for matrix in stacked.detach()]
        self.shape = torch.Size((len(stacked), *self.matrices[0].shape))
        self.dtype, self.requires_grad = stacked.dtype, stacked.requires_grad

    def __len__(self) -> int:
        return len(self.matrices)

    def dense(self) -> Tensor:
        """The stack as it was given, bit for bit; a copy."""
        num_experts, *sizes = self.shape
        stacked = torch.empty(num_experts, *(sizes[::-1] if self._transposed else sizes), dtype=self.dtype)
        for place, matrix in zip(stacked, self.matrices, strict=True):
            place.copy_(matrix.dense().mT if self._transposed else matrix.dense())
        return stacked

    def multiply_each(self, rows: Sequence[Tensor], experts: list[int]) -> Tensor:
        """rows[n] [1, A] @ stack[experts[n]]ᵀ, [N, B]; anything where there is no such expert."""
        last = len(self.matrices) - 1
        pairs = zip(rows, experts, strict=True)
        return torch.cat([self.matrices[min(expert, last)].multiply(row) for row, expert in pairs])

    def multiply_chunk(self, chunk: Chunk, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """The chunk's rows [n, A] → [n, B], each tile by its expert's matrix."""
        pairs = zip(chunk.tiles, chunk.cut(rows), strict=True)
        return torch.cat([self.matrices[tile.first_expert].multiply(tile_rows) for tile, tile_rows in pairs], out=out)


def packed_grouped_matmul(
    x: Tensor, stack: PackedStack, counts: Tensor, *, rows: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """As `coterie.ops.grouped_matmul`: x's rows, or those named, sorted by expert → [N, B]; no gradients."""
    x = check_packed_input(x, stack.dtype)
    if rows is not None:
        x = x.index_select(0, rows)
    layout = lay_out(counts, x.dtype, stack.shape[1:], side_by_side=False)
    y = x.new_zeros(len(x), stack.shape[1])  # rows of no expert are zero
    for chunk in layout.chunks:
        product = stack.multiply_chunk(chunk, layout.laid_out_rows(chunk, x))
        if bias is not None:
            chunk.add_bias(product, bias)
        y[chunk.first_row : chunk.last_row] = layout.real_rows(chunk, product)
    return y


def packed_linear(x: Tensor, matrix: PackedMatrix, bias: Tensor | None = None) -> Tensor:
    """x [.., A] @ matrixᵀ + bias → [.., B]."""
    x = check_packed_input(x, matrix.dtype)
    if x.shape[-1] != matrix.shape[1]:
        raise ValueError(f"x must have {matrix.shape[1]} channels, got {tuple(x.shape)}")
    return matrix.multiply(x, bias)


def check_packed_input(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the packed weights' dtype, as autocast may want it; raises where there is no product with it."""
    _refuse_compiling()
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(
            "packed weights carry no gradients: call the model under torch.no_grad(), or coterie.unpack(model) to train"
        )
    if x.device.type != "cpu":
        raise ValueError(f"packed weights are on the CPU, got x on {x.device}: coterie.unpack(model) first")
    if x.dtype != dtype and autocast_dtype("cpu") == dtype:
        x = x.to(dtype)
    if x.dtype != dtype:
        raise TypeError(f"x must have the packed weights' dtype, {dtype}, outside autocast; got {x.dtype}")
    return x


def _refuse_compiling() -> None:
    """torch.compile leaves out what raises, and runs it as it is; fullgraph=True says why it cannot."""
    if torch.compiler.is_compiling():
        raise RuntimeError("packed weights cannot be compiled: coterie.unpack(model) first")
