"""Every token's sum over its rows: a gather in a fixed order, so that it is the same on every run."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from coterie_kernels.target import on_its_device


@on_its_device
def combine(
    rows: Tensor, position: Tensor, num_tokens: int, top_k: int, *, weights: Tensor | None, addend: Tensor | None
) -> Tensor:
    """y[t] = Σ_k weights[t, k] · rows[position[t, k]] (+ addend[t]), summed in float32.

    Args:
        rows: [N, D].
        position: [≥ T·K] int32, the row of each slot; -1 marks a slot without one.
        weights: [T, K] contiguous; None = 1.
        addend: [T, D] contiguous.

    Returns:
        [T, D] in the rows' dtype.
    """
    dim = rows.shape[1]
    y = torch.empty(num_tokens, dim, dtype=rows.dtype, device=rows.device)
    if not num_tokens:
        return y
    columns = min(triton.next_power_of_2(dim), 256)
    tokens = max(1, 512 // columns)
    grid = (triton.cdiv(num_tokens, tokens), triton.cdiv(dim, columns))
    _combine[grid](
        rows,
        position,
        weights,
        addend,
        y,
        num_tokens,
        top_k,
        dim,
        TOKENS=tokens,
        COLUMNS=columns,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return y


@on_its_device
def combine_ragged(rows: Tensor, token: Tensor, num_tokens: int) -> Tensor:
    """y[t] = Σ of the rows n with token[n] = t, in the order of n, summed in float32.

    Args:
        rows: [N, D].
        token: [N] int64 in 0..T-1.

    Returns:
        [T, D] in the rows' dtype.
    """
    dim = rows.shape[1]
    y = torch.empty(num_tokens, dim, dtype=rows.dtype, device=rows.device)
    if not num_tokens:
        return y
    ordered, order = token.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(num_tokens + 1, device=token.device))
    columns = min(triton.next_power_of_2(dim), 256)
    _combine_ragged[(num_tokens, triton.cdiv(dim, columns))](
        rows, order, starts, y, dim, COLUMNS=columns, num_warps=1, enable_fp_fusion=True
    )
    return y


@triton.jit
def _combine_ragged(rows_ptr, order_ptr, starts_ptr, y_ptr, dim, COLUMNS: tl.constexpr):
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < dim
    total = tl.zeros([COLUMNS], tl.float32)
    for n in range(tl.load(starts_ptr + token), tl.load(starts_ptr + token + 1)):
        row = tl.load(order_ptr + n)
        total += tl.load(rows_ptr + row * dim + column, mask=is_column, other=0).to(tl.float32)
    tl.store(y_ptr + token.to(tl.int64) * dim + column, total.to(y_ptr.dtype.element_ty), mask=is_column)


@triton.jit
def _combine(
    rows_ptr,
    position_ptr,
    weights_ptr,
    addend_ptr,
    y_ptr,
    num_tokens,
    top_k,
    dim,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_token = token < num_tokens
    is_column = (column < dim)[None, :]
    place = token.to(tl.int64)[:, None] * dim + column[None, :]
    if addend_ptr is None:
        total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    else:
        total = tl.load(addend_ptr + place, mask=is_token[:, None] & is_column, other=0).to(tl.float32)
    for k in range(top_k):
        slot = token * top_k + k
        row = tl.load(position_ptr + slot, mask=is_token, other=-1)
        has_row = row >= 0
        values = tl.load(
            rows_ptr + row.to(tl.int64)[:, None] * dim + column[None, :], mask=has_row[:, None] & is_column, other=0
        ).to(tl.float32)
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + slot, mask=has_row, other=0).to(tl.float32)
            values *= weight[:, None]
        total += values
    tl.store(y_ptr + place, total.to(y_ptr.dtype.element_ty), mask=is_token[:, None] & is_column)
