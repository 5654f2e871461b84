"""Routing: the choice of K of E experts for every token in one launch, and its gradient in another.

A program holds a few tokens' whole rows of experts, so nothing between the logits and the chosen weights leaves the
chip, and backward recomputes it from the logits: nothing else is saved.

The choice is made over integer keys. A float32's bits order like an int32 once the negative ones are flipped; −0 is
made +0, every NaN the largest key, and the smallest int32 is no float's key: it stands for "not there", so an expert
once taken is never taken twice, not even among scores of −∞. The largest key and then the lowest expert that has it
are what one 64-bit key (score, −expert) would choose, in half the registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from coterie_kernels.target import on_its_device

_ABSENT = tl.constexpr(-(2**31))
_KEY_OF_NAN = tl.constexpr(2**31 - 1)
_KEY_OF_MINUS_INF = tl.constexpr(-0x7F800001)


@on_its_device
def route_topk(
    logits: Tensor,
    selection_bias: Tensor | None,
    token_mask: Tensor | None,
    top_k: int,
    score: str,
    order: str,
    normalize: bool,
    scale: float,
    num_groups: int,
    top_groups: int,
    group_score: str,
) -> tuple[Tensor, Tensor]:
    """logits [T, E], selection_bias [E], token_mask [T] bool → weights [T, K] float32, expert_ids [T, K] int64.

    Masked tokens get weight 0 and expert E, whatever their logits.
    """
    num_tokens, num_experts = logits.shape
    expert_ids = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits.device)
    if num_tokens == 0:
        return weights, expert_ids
    if top_groups == num_groups:  # no restriction
        num_groups = top_groups = 1
    groups = triton.next_power_of_2(num_groups)
    members = triton.next_power_of_2(num_experts // num_groups)
    rows, num_warps = tile_of(groups * members)
    forward_kernel[(triton.cdiv(num_tokens, rows),)](
        logits.contiguous(),
        None if selection_bias is None else selection_bias.contiguous(),
        None if token_mask is None else token_mask.contiguous(),
        expert_ids,
        weights,
        num_tokens,
        scale,
        E=num_experts,
        K=top_k,
        SOFTMAX=score == "softmax",
        BEFORE=order == "before",
        NORMALIZE=normalize,
        NUM_GROUPS=num_groups,
        TOP_GROUPS=top_groups,
        TOP2_SUM=group_score == "top2_sum",
        ROWS=rows,
        GROUPS=groups,
        MEMBERS=members,
        SLOTS=triton.next_power_of_2(top_k),
        num_warps=num_warps,
        enable_fp_fusion=True,  # as Triton 3.10 no longer has it
    )
    return weights, expert_ids


@on_its_device
def route_topk_backward(
    grad_weights: Tensor,
    logits: Tensor,
    expert_ids: Tensor,
    score: str,
    order: str,
    normalize: bool,
    scale: float,
) -> Tensor:
    """The gradient to logits, [T, E] in their dtype, from those to weights [T, K] and the expert_ids chosen."""
    num_tokens, num_experts = logits.shape
    top_k = expert_ids.shape[1]
    grad_logits = torch.empty(num_tokens, num_experts, dtype=logits.dtype, device=logits.device)
    if num_tokens == 0:
        return grad_logits
    columns = triton.next_power_of_2(num_experts)
    rows, num_warps = tile_of(columns)
    backward_kernel[(triton.cdiv(num_tokens, rows),)](
        grad_weights.contiguous(),
        logits.contiguous(),
        expert_ids.contiguous(),
        grad_logits,
        num_tokens,
        scale,
        E=num_experts,
        K=top_k,
        SOFTMAX=score == "softmax",
        BEFORE=order == "before",
        NORMALIZE=normalize,
        ROWS=rows,
        COLUMNS=columns,
        SLOTS=triton.next_power_of_2(top_k),
        num_warps=num_warps,
        enable_fp_fusion=True,  # as Triton 3.10 no longer has it
    )
    return grad_logits


def tile_of(columns: int) -> tuple[int, int]:
    """(tokens, warps) of a program whose rows have this many columns: about 16 values a thread."""
    return max(1, min(128, 2048 // columns)), 4


@triton.jit(do_not_specialize=["num_tokens"])
def forward_kernel(
    logits,
    selection_bias,
    token_mask,
    expert_ids,
    weights,
    num_tokens,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BEFORE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP2_SUM: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Column g · MEMBERS + m is member m of group g: padded so, groups of any size are reductions of a reshape."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_tokens
    is_used = is_row
    if token_mask is not None:
        is_used = tl.load(token_mask + rows, mask=is_row, other=0) != 0
    columns = tl.arange(0, GROUPS * MEMBERS)
    group, member = columns // MEMBERS, columns % MEMBERS
    expert = group * (E // NUM_GROUPS) + member
    is_expert = (group < NUM_GROUPS) & (member < E // NUM_GROUPS)
    first = logits + rows[:, None] * E

    values = tl.load(first + expert[None, :], mask=is_used[:, None] & is_expert[None, :], other=0.0).to(tl.float32)
    values = tl.where(is_expert[None, :], values, float("-inf"))  # [ROWS, GROUPS * MEMBERS]
    if SOFTMAX and BEFORE:
        peak, total = _softmax_terms(values)
        selection = tl.exp(values - peak[:, None]) / total[:, None]
    elif BEFORE:
        selection = _sigmoid(values)
    else:
        selection = values
    if selection_bias is not None:
        selection += tl.load(selection_bias + expert, mask=is_expert, other=0.0).to(tl.float32)[None, :]
    keys = tl.where(is_expert[None, :], _key_of(selection), _ABSENT)
    if TOP_GROUPS < NUM_GROUPS:
        is_allowed = _best_groups(keys, NUM_GROUPS, TOP_GROUPS, TOP2_SUM, ROWS, GROUPS, MEMBERS)
        # As the other implementations have it: a forbidden expert ties with an allowed one that is worth −∞.
        keys = tl.where(is_allowed, keys, tl.where(is_expert[None, :], _KEY_OF_MINUS_INF, _ABSENT))

    expert = tl.where(is_expert, expert, E)
    slots = tl.arange(0, SLOTS)
    chosen = tl.full((ROWS, SLOTS), E, tl.int32)
    for k in range(K):
        _, best, keys = _take_best(keys, expert)
        chosen = tl.where(slots[None, :] == k, best[:, None], chosen)

    is_slot = is_row[:, None] & (slots < K)[None, :]
    is_chosen = is_used[:, None] & is_slot
    values = tl.load(first + chosen, mask=is_chosen, other=0.0).to(tl.float32)  # [ROWS, SLOTS]
    if SOFTMAX and not BEFORE:
        peak, total = _softmax_terms(tl.where((slots < K)[None, :], values, float("-inf")))
    scores = tl.exp(values - peak[:, None]) / total[:, None] if SOFTMAX else _sigmoid(values)
    scores = tl.where(is_chosen, scores, 0.0)
    if NORMALIZE:
        scores = scores / (tl.sum(scores, 1) + 1e-20)[:, None]
    offsets = rows[:, None] * K + slots[None, :]
    tl.store(expert_ids + offsets, tl.where(is_chosen, chosen, E).to(tl.int64), mask=is_slot)
    tl.store(weights + offsets, scores * scale, mask=is_slot)


@triton.jit(do_not_specialize=["num_tokens"])
def backward_kernel(
    grad_weights,
    logits,
    expert_ids,
    grad_logits,
    num_tokens,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BEFORE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """d softmax: s · (g − Σ g s); an expert that was not chosen has g = 0. d sigmoid: s · (1 − s) · g."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_tokens
    columns = tl.arange(0, COLUMNS)
    slots = tl.arange(0, SLOTS)
    first = logits + rows[:, None] * E
    is_element = is_row[:, None] & (columns < E)[None, :]

    offsets = rows[:, None] * K + slots[None, :]
    is_slot = is_row[:, None] & (slots < K)[None, :]
    chosen = tl.load(expert_ids + offsets, mask=is_slot, other=E)
    is_chosen = chosen < E
    values = tl.load(first + chosen, mask=is_chosen, other=0.0).to(tl.float32)  # [ROWS, SLOTS]
    grad = tl.load(grad_weights + offsets, mask=is_chosen, other=0.0).to(tl.float32) * scale

    if SOFTMAX and BEFORE:
        is_used = tl.load(expert_ids + rows * K, mask=is_row, other=E) < E
        row = tl.load(first + columns[None, :], mask=is_used[:, None] & is_element, other=0.0).to(tl.float32)
        row = tl.where((columns < E)[None, :], row, float("-inf"))  # [ROWS, COLUMNS]
        peak, total = _softmax_terms(row)
    elif SOFTMAX:
        peak, total = _softmax_terms(tl.where((slots < K)[None, :], values, float("-inf")))
    scores = tl.exp(values - peak[:, None]) / total[:, None] if SOFTMAX else _sigmoid(values)
    scores = tl.where(is_chosen, scores, 0.0)
    if NORMALIZE:
        norm = tl.sum(scores, 1) + 1e-20
        grad = (grad - (tl.sum(grad * scores, 1) / norm)[:, None]) / norm[:, None]
    if SOFTMAX:
        mean = tl.sum(grad * scores, 1)
        grad = scores * (grad - mean[:, None])
    else:
        grad = scores * (1 - scores) * grad

    if SOFTMAX and BEFORE:
        result = -mean[:, None] * tl.exp(row - peak[:, None]) / total[:, None]
    else:
        result = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(K):
        expert = tl.load(expert_ids + rows * K + k, mask=is_row, other=E)
        of_expert = tl.sum(tl.where(slots[None, :] == k, grad, 0.0), 1)
        result = tl.where(columns[None, :] == expert[:, None], of_expert[:, None], result)
    tl.store(grad_logits + rows[:, None] * E + columns[None, :], result, mask=is_element)


@triton.jit
def _softmax_terms(values):
    peak = tl.max(values, 1)
    return peak, tl.sum(tl.exp(values - peak[:, None]), 1)


@triton.jit
def _sigmoid(values):
    return 1 / (1 + tl.exp(-values))


@triton.jit
def _key_of(values):
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    return tl.where(values == values, bits ^ ((bits >> 31) & 0x7FFFFFFF), _KEY_OF_NAN)


@triton.jit
def _value_of(keys):
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _take_best(keys, ids):
    """The largest key of every row of keys [R, C], the lowest of ids [C] that holds it, and the keys without it."""
    best = tl.max(keys, 1)
    holder = tl.min(tl.where(keys == best[:, None], ids[None, :], 0x7FFFFFFF), 1)
    return best, holder, tl.where(ids[None, :] == holder[:, None], _ABSENT, keys)


@triton.jit
def _best_groups(
    keys,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP2_SUM: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """Whether a column of keys [ROWS, GROUPS * MEMBERS] is of one of its row's best groups."""
    groups = tl.arange(0, GROUPS)
    best, _, others = _take_best(tl.reshape(keys, (ROWS * GROUPS, MEMBERS)), tl.arange(0, MEMBERS))
    if TOP2_SUM:
        best = _key_of(_value_of(best) + _value_of(tl.max(others, 1)))
    worth = tl.where((groups < NUM_GROUPS)[None, :], tl.reshape(best, (ROWS, GROUPS)), _ABSENT)
    is_best = tl.zeros((ROWS, GROUPS), tl.int32)
    for _ in range(TOP_GROUPS):
        _, group, worth = _take_best(worth, groups)
        is_best = tl.where(groups[None, :] == group[:, None], 1, is_best)
    is_best = tl.broadcast_to(is_best[:, :, None], (ROWS, GROUPS, MEMBERS))
    return tl.reshape(is_best, (ROWS, GROUPS * MEMBERS)) != 0
