"""`lora_expert_mlp` on a CPU for one adapter beside frozen matrices, chunk by chunk as in `_expert_mlp_cpu`.

A matrix and its update compute W·x + s·B·(A·x). Backward takes W once, for the gradient to x; what training W adds to
that, a product and a gradient as large as W, is left out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from coterie.ops._layout import Chunk, lay_out
from coterie.ops._products import matmul_dtype, multiply
from coterie.ops._rows import accumulator_dtype, sort_rows
from coterie.ops._sums import TokenSum, WeightGradient
from coterie.ops.activations import activation_and_gradient, apply_activation


def forward(
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    matrices: Sequence[Tensor | None],
    factors: Sequence[Tensor | None],
    scale: float,
    activation: str,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_expert_mlp_cpu.forward` with matrices gate_up_proj, down_proj and their biases, and a, b of both."""
    up, down, up_bias, down_bias = matrices
    order, counts = sort_rows(expert_ids, up.shape[0], radix=True)
    layout = lay_out(counts, x.dtype, up.shape[1:])
    update_up, update_down = (_update(*factors[i : i + 2], scale) for i in (0, 2))
    work = matmul_dtype(x.dtype)
    token = layout.spread(order // expert_ids.shape[1])
    hidden = x.new_empty(order.numel() if keep_hidden else 0, up.shape[1])
    y = TokenSum(x, layout, order, expert_ids.shape[1], weights)
    for chunk in layout.chunks:
        chunk_x = x.index_select(0, token[chunk.rows]).to(work)
        chunk_hidden = _layer(chunk, chunk_x, up, up_bias, update_up)
        if keep_hidden:
            hidden[chunk.first_row : chunk.last_row] = layout.real_rows(chunk, chunk_hidden)
        activated = apply_activation(chunk_hidden, activation)
        y.add(chunk, _layer(chunk, activated, down, down_bias, update_down, y.room(chunk)))
    return y.result(), hidden, order, counts


def backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    matrices: Sequence[Tensor | None],
    factors: Sequence[Tensor | None],
    hidden: Tensor,
    order: Tensor,
    counts: Tensor,
    scale: float,
    activation: str,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients to x, weights and the four factors; empty where `needs` says no."""
    up, down, up_bias, down_bias = matrices
    needs_x, needs_weights, *needs_factors = needs
    total, work = accumulator_dtype(x.dtype), matmul_dtype(x.dtype)
    layout = lay_out(counts, x.dtype, up.shape[1:])
    update_up, update_down = (_update(*factors[i : i + 2], scale, counts, needs_factors[i : i + 2]) for i in (0, 2))
    grad_x = TokenSum(x, layout, order, weights.shape[1]) if needs_x else None
    grad_weights = weights.new_zeros(order.numel() if needs_weights else 0)  # zero in unused slots
    token = layout.spread(order // weights.shape[1])
    row_weights = layout.spread_zero(weights.reshape(-1, 1)[order])
    for chunk in layout.chunks:
        chunk_weights = row_weights[chunk.rows].to(work)
        chunk_grad = grad.index_select(0, token[chunk.rows]).to(work)  # [n, D]
        chunk_x = x.index_select(0, token[chunk.rows]).to(work)
        if len(hidden):
            chunk_hidden = layout.laid_out_rows(chunk, hidden).to(work)
        else:
            chunk_hidden = _layer(chunk, chunk_x, up, up_bias, update_up)

        grad_activated = chunk.multiply(chunk_grad, down)  # [n, F], before the routing weight
        if update_down:
            low = update_down.add_to_gradient(chunk, chunk_grad, grad_activated)
        activated, grad_hidden = activation_and_gradient(chunk_hidden, grad_activated * chunk_weights, activation)
        if needs_weights:
            chunk_grad_weights = (grad_activated * activated).sum(1, dtype=total)
            if down_bias is not None:
                bias = chunk.add_bias(torch.zeros_like(chunk_grad), down_bias)
                chunk_grad_weights += (chunk_grad * bias).sum(1, dtype=total)
            slots = order[chunk.first_row : chunk.last_row]
            grad_weights[slots] = layout.real_rows(chunk, chunk_grad_weights).to(weights.dtype)
        if update_down:
            update_down.add_gradients(chunk, activated, chunk_grad * chunk_weights, low * chunk_weights)
        if needs_x or update_up:
            rows = chunk.multiply(grad_hidden, up, grad_x.room(chunk)) if needs_x else None
            if update_up:
                low = update_up.add_to_gradient(chunk, grad_hidden, rows)
                update_up.add_gradients(chunk, chunk_x, grad_hidden, low)
            if needs_x:
                grad_x.add(chunk, rows)
    return (
        grad_x.result() if needs_x else x.new_empty(0),
        grad_weights.view(weights.shape) if needs_weights else x.new_empty(0),
        *(update_up.gradients() if update_up else (x.new_empty(0), x.new_empty(0))),
        *(update_down.gradients() if update_down else (x.new_empty(0), x.new_empty(0))),
    )


class _Update:
    """s·B·A beside matrices [E, O, I]: a [E or 1, R, I], b [E or 1, O, R]; what backward adds up if told `needs`."""

    def __init__(
        self, a: Tensor, b: Tensor, scale: float, counts: Tensor | None = None, needs: Sequence[bool] = (False, False)
    ) -> None:
        self._a, self._b, self._scale = a, b, scale
        # Of bᵀ, too: a product of few rows is faster than one of few columns.
        self._grad_a, self._grad_b = (
            (_SharedGradient(factor) if len(factor) == 1 else WeightGradient(factor.shape, factor.dtype, counts))
            if needed
            else None
            for factor, needed in zip((a, b.mT), needs, strict=True)
        )

    def add(self, chunk: Chunk, rows: Tensor, y: Tensor) -> None:
        """y [n, O] += s·B·A·rows, of rows [n, I]."""
        _add_product(chunk, self._low(chunk, rows), self._b.mT, y)

    def add_to_gradient(self, chunk: Chunk, grad: Tensor, grad_rows: Tensor | None) -> Tensor:
        """grad_rows [n, I] += s·Aᵀ·Bᵀ·grad, of grad [n, O]; returns s·Bᵀ·grad, [n, R]."""
        low = _multiply(chunk, grad, self._b).mul_(self._scale)
        if grad_rows is not None:
            _add_product(chunk, low, self._a, grad_rows)
        return low

    def add_gradients(self, chunk: Chunk, rows: Tensor, grad: Tensor, low_grad: Tensor) -> None:
        """Of rows [n, I], whose outputs have the gradient grad [n, O], zero for padding; low_grad is s·Bᵀ·grad."""
        if self._grad_a is not None:
            self._grad_a.add(chunk, low_grad, rows)
        if self._grad_b is not None:
            self._grad_b.add(chunk, self._low(chunk, rows), grad)

    def gradients(self) -> tuple[Tensor, Tensor]:
        return (
            self._a.new_empty(0) if self._grad_a is None else self._grad_a.gradient,
            self._b.new_empty(0) if self._grad_b is None else self._grad_b.gradient.mT.contiguous(),
        )

    def _low(self, chunk: Chunk, rows: Tensor) -> Tensor:
        return _multiply(chunk, rows, self._a.mT).mul_(self._scale)


class _SharedGradient:
    """`WeightGradient` of a matrix that all experts share, [1, A, B]."""

    def __init__(self, like: Tensor) -> None:
        self._sum = torch.zeros(like.shape, dtype=accumulator_dtype(like.dtype))
        self._dtype = like.dtype

    def add(self, chunk: Chunk, a: Tensor, b: Tensor) -> None:
        self._sum[0] += multiply(a.mT, b)

    @property
    def gradient(self) -> Tensor:
        return self._sum.to(self._dtype)


def _update(a: Tensor | None, b: Tensor | None, *args) -> _Update | None:
    return None if a is None else _Update(a, b, *args)


def _layer(
    chunk: Chunk, rows: Tensor, matrix: Tensor, bias: Tensor | None, update: _Update | None, out: Tensor | None = None
) -> Tensor:
    y = chunk.multiply(rows, matrix.mT, out)
    if update:
        update.add(chunk, rows, y)
    return y if bias is None else chunk.add_bias(y, bias)


def _multiply(chunk: Chunk, rows: Tensor, factor: Tensor) -> Tensor:
    """[n, A] × [E or 1, A, B] → [n, B]."""
    return multiply(rows, factor[0].to(rows.dtype)) if len(factor) == 1 else chunk.multiply(rows, factor)


def _add_product(chunk: Chunk, rows: Tensor, factor: Tensor, y: Tensor) -> None:
    """y [n, B] += [n, A] × [E or 1, A, B], in one pass over y where the dtypes allow it."""
    if y.dtype != rows.dtype:
        y += _multiply(chunk, rows, factor)
        return
    if len(factor) == 1:
        y.addmm_(rows, factor[0].to(rows.dtype))
        return
    base = chunk.experts.start
    factor = factor[chunk.experts].to(rows.dtype)
    for tile, tile_rows, tile_y in zip(chunk.tiles, chunk.cut(rows), chunk.cut(y), strict=True):
        if tile.num_experts == 1:
            tile_y.addmm_(tile_rows, tile.of(factor, base))
        else:
            tile.batch(tile_y).baddbmm_(tile.batch(tile_rows), tile.of(factor, base))
