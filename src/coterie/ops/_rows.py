"""Routed rows in the order the experts take them."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def check_slots(slots: Tensor, num_experts: int) -> None:
    """Raises for ids that no expert has; on an accelerator one would have to wait for the answer, so not there."""
    # Nor in a compiled graph, which asking would break.
    if slots.device.type == "cpu" and slots.numel() and not torch.compiler.is_compiling():
        check_ids(*(limit.item() for limit in slots.aminmax()), num_experts)


def check_ids(lowest: int, highest: int, num_experts: int) -> None:
    if lowest < 0 or highest > num_experts:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"expert_ids must be in 0..{num_experts} ({num_experts} = unused slot), got {wrong}")


def sort_rows(expert_ids: Tensor, num_experts: int, *, radix: bool = False) -> tuple[Tensor, Tensor]:
    """Sorts the T·K slots by expert, then token, then slot; unused slots come last.

    Args:
        expert_ids: [T, K] int64 in 0..E, where E marks an unused slot.
        radix: let numpy sort plain CPU tensors as 16-bit integers, many times faster than torch compares.

    Returns:
        order [T·K] int64: order[n] is the slot t·K + k of sorted row n; counts [E] int64: rows of each expert.
    """
    slots = expert_ids.flatten()
    check_slots(slots, num_experts)
    if radix and num_experts < 2**15:
        order = torch.from_numpy(slots.numpy().astype(np.int16).argsort(kind="stable"))
    else:
        order = slots.argsort(stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=slots.device)
    counts = counts.scatter_add(0, slots, torch.ones_like(slots))
    return order, counts[:num_experts]


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what sums over rows are kept: float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bias_rows(bias: Tensor, experts: Tensor | list[int]) -> Tensor:
    """bias [E, B] of each row's expert, [N, B]; 0 for rows of none, whose expert is E."""
    return F.pad(bias, (0, 0, 0, 1))[experts]


def sum_slots(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """y[t] = Σ_k weights[t, k] · the sorted row of slot (t, k): a gather and a sum in a fixed order."""
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel(), device=order.device)
    slots = rows.index_select(0, position).view(*weights.shape, rows.shape[1])  # [T, K, D]
    total = accumulator_dtype(rows.dtype)
    return (slots.to(total) * weights.unsqueeze(2).to(total)).sum(1).to(rows.dtype)
