"""Routed rows in the order the experts take them, and what the hardware likes to multiply."""

from functools import cache

import torch
from torch import Tensor


def check_ids(lowest: int, highest: int, num_experts: int) -> None:
    if lowest < 0 or highest > num_experts:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"expert_ids must be in 0..{num_experts} ({num_experts} = unused slot), got {wrong}")


def sort_rows(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sorts the T·K slots by expert, then token, then slot; unused slots come last.

    Args:
        expert_ids: [T, K] int64 in 0..E, where E marks an unused slot.

    Returns:
        order [T·K] int64: order[n] is the slot t·K + k of sorted row n; counts [E] int64: rows of each expert.
    """
    slots = expert_ids.flatten()
    if slots.device.type == "cpu" and slots.numel():  # elsewhere one would have to wait for the answer
        check_ids(*(limit.item() for limit in slots.aminmax()), num_experts)
    order = slots.argsort(stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=slots.device)
    counts = counts.scatter_add(0, slots, torch.ones_like(slots))
    return order, counts[:num_experts]


@cache
def multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether this CPU has matmul instructions for `dtype`.

    Without them (AVX2 laptops) a bfloat16 product runs several times slower than the same in float32.
    """
    if dtype in (torch.float32, torch.float64):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def matmul_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a CPU should multiply tensors of `dtype`: itself where native, else float32."""
    return dtype if multiplies_natively(dtype) else torch.float32


def row_multiple(dtype: torch.dtype) -> int:
    """oneDNN builds a primitive for every row count it meets, except in float32, which goes to the BLAS.

    Padding the rows of an expert to a multiple keeps the primitives few enough for its cache.
    """
    return 1 if dtype in (torch.float32, torch.float64) else 32


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what sums over rows are kept: float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32
