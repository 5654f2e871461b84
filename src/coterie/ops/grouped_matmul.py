"""y[n] = x[rows[n]] @ weight[e(n)]ᵀ + bias[e(n)]: one matmul per expert over rows sorted by expert."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.ops._arguments import check_sizes, check_tensor, choose_impl
from coterie.ops._autocast import autocast_dtype
from coterie.ops._layout import lay_out
from coterie.ops._products import matmul_dtype
from coterie.ops._rows import accumulator_dtype, bias_rows
from coterie.ops._sums import WeightGradient


def grouped_matmul(
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Multiplies the first counts[0] rows by weight[0]ᵀ, the next counts[1] by weight[1]ᵀ, and so on.

    Args:
        x: [N, D], sorted by expert; or [T, D] with `rows`.
        weight: [E, O, D], in x's dtype.
        counts: [E] int64, rows of each expert; their sum is at most N. Rows past it (unused slots) give 0.
        rows: [N] int64, which row of x each output row takes; the gathered rows are not kept for backward.
        bias: [E, O], in x's dtype.
        impl: "reference" | "torch" | "triton" (GPUs; float16, bfloat16 and float32). None: triton on a GPU that it runs
            on, else torch.

    Returns:
        [N, O] in x's dtype, under autocast too. Gradients to x, weight and bias; an expert without rows has gradient 0.

    Raises:
        ValueError: a shape is wrong; on a CPU also: counts are negative or sum to more than N, rows has an index that x
            does not (elsewhere one would have to wait for the answer).
        TypeError: a dtype is wrong.
    """
    check_tensor("x", x, (None, None), "[N, D]")
    check_tensor("weight", weight, (None, None, x.shape[1]), "[E, O, D]", dtype=x.dtype)
    check_tensor("counts", counts, (weight.shape[0],), "[E]", dtype=torch.int64)
    check_sizes("weight", weight.shape, "E, O, D")
    if rows is not None:
        check_tensor("rows", rows, (None,), "[N]", dtype=torch.int64)
    if bias is not None:
        check_tensor("bias", bias, tuple(weight.shape[:2]), "[E, O]", dtype=x.dtype)
    impl = choose_impl(impl, x)
    device = x.device.type
    with torch.autocast(device, enabled=False) if autocast_dtype(device) else nullcontext():
        if impl == "reference":
            return _reference(x, weight, counts, rows, bias)
        return _op(x, weight, counts, rows, bias, impl)


def _check_values(x: Tensor, counts: Tensor, rows: Tensor | None) -> None:
    """What only the numbers themselves can tell; not asked of an accelerator, which one would have to wait for."""
    if x.device.type != "cpu":
        return
    num_rows = x.shape[0] if rows is None else rows.shape[0]
    if counts.min() < 0 or counts.sum() > num_rows:
        raise ValueError(f"counts must be at least 0 and sum to at most N = {num_rows}, got {counts.tolist()}")
    if rows is not None and num_rows:
        lowest, highest = (limit.item() for limit in rows.aminmax())
        if lowest < 0 or highest >= x.shape[0]:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"rows must be in 0..{x.shape[0] - 1}, rows of x, got {wrong}")


def _reference(x: Tensor, weight: Tensor, counts: Tensor, rows: Tensor | None, bias: Tensor | None) -> Tensor:
    _check_values(x, counts, rows)
    x = x if rows is None else x[rows]
    pieces, start = [], 0
    for expert, count in enumerate(counts.tolist()):
        y = x[start : start + count] @ weight[expert].t()
        pieces.append(y if bias is None else y + bias[expert])
        start += count
    pieces.append(x.new_zeros(x.shape[0] - start, weight.shape[1]))
    return torch.cat(pieces)


def multiply_rows(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """[N, D] × [E, O, D] → [N, O]; rows past the counts give 0. The data gradient is this with weightᵀ."""
    if x.device.type != "cpu":
        return _multiply_rows_device(x, weight, counts)
    layout = lay_out(counts, x.dtype, weight.shape[1:])
    laid_out, work = layout.spread(x), matmul_dtype(x.dtype)
    y = x.new_empty(laid_out.shape[0], weight.shape[1])
    for chunk in layout.chunks:
        chunk.multiply(laid_out[chunk.rows].to(work), weight.mT, y[chunk.rows])
    if layout.position is not None:
        y = y.index_select(0, layout.position)
    return F.pad(y, (0, 0, 0, len(x) - len(y))) if len(y) < len(x) else y


def multiply_columns(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    """[N, O], [N, D] → [E, O, D]: the weight gradient, aᵀ b over each expert's rows; 0 where there are none."""
    if a.device.type != "cpu":
        return _multiply_columns_device(a, b, counts)
    layout = lay_out(counts, a.dtype, (a.shape[1], b.shape[1]))
    a, b, work = layout.spread_zero(a), layout.spread(b), matmul_dtype(a.dtype)
    total = WeightGradient((counts.shape[0], a.shape[1], b.shape[1]), a.dtype, counts)
    for chunk in layout.chunks:
        total.add(chunk, *(rows[chunk.rows].to(work) for rows in (a, b)))
    return total.gradient


def sum_rows(rows: Tensor, counts: Tensor) -> Tensor:
    """[N, O] → [E, O]: the bias gradient; 0 for an expert without rows."""
    if rows.device.type != "cpu":
        return _sum_rows_device(rows, counts)
    heights = counts.tolist()
    # Sums, not a product with ones: torch adds in pairs, the BLAS one after the other.
    return torch.stack([piece.sum(0) for piece in rows[: sum(heights)].split(heights)])


def expert_of_rows(counts: Tensor, num_rows: int) -> Tensor:
    """[N] int64: the expert of each sorted row, E past the last; no host synchronisation."""
    return torch.searchsorted(counts.cumsum(0), torch.arange(num_rows, device=counts.device), right=True)


def _multiply_rows_device(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    y = _grouped_mm(_aligned(x), _aligned(weight.to(x.dtype)).transpose(1, 2), counts)
    used = torch.arange(x.shape[0], device=x.device) < counts.sum()
    return torch.where(used[:, None], y, 0)  # grouped_mm leaves rows past the last expert as they were


def _multiply_columns_device(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    return _grouped_mm(_aligned(a).t(), _aligned(b), counts)


def _sum_rows_device(rows: Tensor, counts: Tensor) -> Tensor:
    return _multiply_columns_device(rows, rows.new_ones(rows.shape[0], 1), counts).squeeze(2)


def _grouped_mm(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    ends = counts.cumsum(0).to(torch.int32)
    grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm  # the public name is torch 2.10's
    return grouped_mm(a, b, offs=ends)


def _aligned(t: Tensor) -> Tensor:
    """The same values, with rows on the 16-byte boundaries that grouped_mm requires."""
    if t.stride(-1) != 1 and t.stride(-2) == 1:
        return _aligned(t.transpose(-1, -2)).transpose(-1, -2)
    step = 16 // t.element_size()
    width = t.shape[-1]
    if t.stride(-1) == 1 and all(stride % step == 0 for stride in t.stride()[:-1]) and t.stride(-2) >= width:
        return t
    return F.pad(t, (0, -width % step)).contiguous()[..., :width]


@torch.library.custom_op("coterie::grouped_matmul", mutates_args=())
def _op(x: Tensor, weight: Tensor, counts: Tensor, rows: Tensor | None, bias: Tensor | None, impl: str) -> Tensor:
    _check_values(x, counts, rows)
    if impl == "triton":
        from coterie_kernels.grouped_matmul import multiply_rows as multiply

        tensors = (t if t is None else t.contiguous() for t in (rows, bias))
        rows, bias = tensors
        return multiply(x.contiguous(), weight.contiguous(), counts.contiguous(), rows=rows, bias=bias)
    y = multiply_rows(x if rows is None else x.index_select(0, rows), weight, counts)
    if bias is not None:
        y += bias_rows(bias, expert_of_rows(counts, y.shape[0]))
    return y


@_op.register_fake
def _(x, weight, counts, rows, bias, impl):
    return x.new_empty((x if rows is None else rows).shape[0], weight.shape[1])


@torch.library.custom_op("coterie::grouped_matmul_backward", mutates_args=())
def _op_backward(
    grad: Tensor, x: Tensor, weight: Tensor, counts: Tensor, rows: Tensor | None, needs: list[bool], impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(grad.device.type, enabled=False):
        gradients = _gradients_triton if impl == "triton" else _gradients
        return gradients(grad.contiguous(), x, weight, counts, rows, *needs)


def _gradients_triton(grad, x, weight, counts, rows, needs_x, needs_weight, needs_bias):
    from coterie_kernels import combine
    from coterie_kernels import grouped_matmul as kernels

    grad_x, grad_weight, grad_bias = (None for _ in range(3))
    counts = counts.contiguous()
    if needs_x:
        grad_x = kernels.multiply_rows(grad, weight.contiguous(), counts, transposed=True)
        if rows is not None:
            grad_x = combine.combine_ragged(grad_x, rows, x.shape[0])
    if needs_weight or needs_bias:
        rows = rows if rows is None else rows.contiguous()
        grad_weight, grad_bias = kernels.multiply_columns(
            grad, x.contiguous(), counts, rows=rows, weight=needs_weight, bias=needs_bias
        )
    return tuple(grad.new_empty(0) if t is None else t for t in (grad_x, grad_weight, grad_bias))


def _gradients(grad, x, weight, counts, rows, needs_x, needs_weight, needs_bias):
    grad_x, grad_weight, grad_bias = (grad.new_empty(0) for _ in range(3))  # outputs of a custom op may not alias
    if needs_x:
        grad_x = multiply_rows(grad, weight.transpose(1, 2), counts)
        if rows is not None:
            total = torch.zeros(x.shape, dtype=accumulator_dtype(x.dtype), device=x.device)
            grad_x = total.index_add_(0, rows, grad_x.to(total.dtype)).to(x.dtype)
    if needs_weight:
        grad_weight = multiply_columns(grad, x if rows is None else x.index_select(0, rows), counts)
    if needs_bias:
        grad_bias = sum_rows(grad, counts)
    return grad_x, grad_weight, grad_bias


@_op_backward.register_fake
def _(grad, x, weight, counts, rows, needs, impl):
    shapes = (x.shape, weight.shape, weight.shape[:2])
    return tuple(grad.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))


def _setup_context(ctx, inputs, output):
    x, weight, counts, rows, _, ctx.impl = inputs
    ctx.save_for_backward(x, weight, counts, rows)


def _backward(ctx, grad):
    x, weight, counts, rows = ctx.saved_tensors
    needs_x, needs_weight, _, _, needs_bias, _ = ctx.needs_input_grad
    grads = _op_backward(grad, x, weight, counts, rows, [needs_x, needs_weight, needs_bias], ctx.impl)
    grad_x, grad_weight, grad_bias = (
        grad if need else None for grad, need in zip(grads, (needs_x, needs_weight, needs_bias), strict=True)
    )
    return grad_x, grad_weight, None, None, grad_bias, None


_op.register_autograd(_backward, setup_context=_setup_context)
