"""A stable counting sort of routed slots by expert: no global sort, no atomics, nothing for the host to wait for.

Each program takes a run of slots. First it counts them by expert; then, knowing everybody's counts, it gives each of
its slots the place behind those of lower experts, of earlier programs and of its own earlier slots.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from coterie_kernels.target import on_its_device

_MAX_PROGRAMS = 128  # each reads all counts, so that more would read more than they share out
_MAX_NUMBERS = 8192  # in a block of slots × experts


@on_its_device
def sort_slots(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sorts the N = T·K slots by expert, then token, then slot; unused slots come last.

    Args:
        expert_ids: [T, K] int64; what is not in 0..E-1 marks an unused slot.

    Returns:
        places [2, N rounded up to 4] int32: the slot of each sorted row, `order`; and the row of each slot, `position`,
        -1 where unused. counts [E] int64: rows of each expert.
    """
    slots = expert_ids.contiguous()
    num_slots = slots.numel()
    # Rounded up, so that both begin on the boundaries that wide loads want.
    places = torch.empty(2, triton.cdiv(num_slots, 4) * 4, dtype=torch.int32, device=slots.device)
    counts = torch.empty(num_experts, dtype=torch.int64, device=slots.device)
    if not num_slots:
        return places, counts.zero_()
    experts = triton.next_power_of_2(num_experts)
    block = max(16, min(256, _MAX_NUMBERS // experts, triton.next_power_of_2(num_slots)))
    programs = min(triton.cdiv(num_slots, block), _MAX_PROGRAMS)
    run = triton.cdiv(triton.cdiv(num_slots, programs), block) * block
    programs = triton.cdiv(num_slots, run)
    sizes = {"BLOCK": block, "EXPERTS": experts, "num_warps": 8 if experts > 64 else 4}
    partial = torch.empty(programs if programs > 1 else 0, num_experts, dtype=torch.int32, device=slots.device)
    if programs > 1:
        _count[(programs,)](slots, partial, num_slots, num_experts, run, **sizes)
    _place[(programs,)](slots, partial, *places, counts, num_slots, num_experts, run, programs, **sizes)
    return places, counts


@triton.jit
def _count(slots_ptr, partial_ptr, num_slots, num_experts, run, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    program = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    counts = _count_run(slots_ptr, program * run, num_slots, num_experts, run, BLOCK, EXPERTS)
    tl.store(partial_ptr + program * num_experts + expert, counts, mask=expert < num_experts)


@triton.jit
def _place(
    slots_ptr,
    partial_ptr,
    order_ptr,
    position_ptr,
    counts_ptr,
    num_slots,
    num_experts,
    run,
    programs,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    program = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    before = tl.zeros([EXPERTS], tl.int32)  # slots of each expert in earlier programs
    if programs == 1:
        total = _count_run(slots_ptr, 0, num_slots, num_experts, run, BLOCK, EXPERTS)
    else:
        total = tl.zeros([EXPERTS], tl.int32)
        for first in range(0, programs, 16):
            other = first + tl.arange(0, 16)[:, None]
            is_count = (other < programs) & (expert < num_experts)[None, :]
            counts = tl.load(partial_ptr + other * num_experts + expert[None, :], mask=is_count, other=0)
            total += tl.sum(counts, 0)
            before += tl.sum(tl.where(other < program, counts, 0), 0)
    if program == 0:
        tl.store(counts_ptr + expert, total.to(tl.int64), mask=expert < num_experts)
    num_used = tl.sum(total, 0)
    used_before = tl.sum(before, 0)
    place = tl.cumsum(total, 0) - total + before  # of the next slot of each expert
    for first in range(program * run, min((program + 1) * run, num_slots), BLOCK):
        slot = first + tl.arange(0, BLOCK)
        own = tl.load(slots_ptr + slot, mask=slot < num_slots, other=-1)
        is_used = (own >= 0) & (own < num_experts)
        hit = ((own[:, None] == expert[None, :]) & is_used[:, None]).to(tl.int32)
        used = tl.cumsum(is_used.to(tl.int32), 0)
        row = tl.sum(hit * (place[None, :] + tl.cumsum(hit, 0) - 1), 1)
        row = tl.where(is_used, row, num_used + slot - used_before - used)
        tl.store(order_ptr + row, slot, mask=slot < num_slots)
        tl.store(position_ptr + slot, tl.where(is_used, row, -1), mask=slot < num_slots)
        place += tl.sum(hit, 0)
        used_before += tl.sum(is_used.to(tl.int32), 0)


@triton.jit
def _count_run(slots_ptr, start, num_slots, num_experts, run, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    """[EXPERTS] int32: how many of the run's slots each expert has."""
    expert = tl.arange(0, EXPERTS)
    counts = tl.zeros([EXPERTS], tl.int32)
    for first in range(start, min(start + run, num_slots), BLOCK):
        slot = first + tl.arange(0, BLOCK)
        own = tl.load(slots_ptr + slot, mask=slot < num_slots, other=-1)
        hit = (own[:, None] == expert[None, :]) & (expert < num_experts)[None, :]
        counts += tl.sum(hit.to(tl.int32), 0)
    return counts
