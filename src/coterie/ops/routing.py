"""Routing: which experts see which token, and with what weight. A value, passed on and never stored."""

from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.ops import _routing_triton
from coterie.ops._arguments import check_choice, check_tensor, choose_impl

# Scores that a CPU sorts in the time of a few calls.
_FEW_SCORES = 2048


@dataclass(frozen=True)
class Routing:
    """Y[t] = Σ_k weights[t, k] · expert_{expert_ids[t, k]}(x[t])

    Attributes:
        expert_ids: [T, K] int64. The value `num_experts` marks an unused slot, which costs nothing downstream.
        weights: [T, K] float32, differentiable, 0 in unused slots.
        logits: [T, E] float32, the router's output before any score; 0 for padding.
        num_experts: E.
        token_mask: [T] bool; False is padding: routed nowhere, and in no loss, count or bias.
        score: how logits become scores, "softmax" or "sigmoid"; the balance loss needs it.
    """

    expert_ids: Tensor
    weights: Tensor
    logits: Tensor
    num_experts: int
    token_mask: Tensor | None = None
    score: str = "softmax"

    @property
    def top_k(self) -> int:
        return self.expert_ids.shape[-1]

    def counts(self) -> Tensor:
        """Tokens routed to each expert, [E] int64. No host synchronisation."""
        slots = self.expert_ids.flatten()
        counts = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=slots.device)
        return counts.scatter_add(0, slots, torch.ones_like(slots))[: self.num_experts]

    def scores(self) -> Tensor:
        """Every expert's share of every token, [T, E] float32, each row summing to one."""
        if self.score == "softmax":
            return self.logits.softmax(-1)
        scores = self.logits.sigmoid()
        return scores / (scores.sum(-1, keepdim=True) + 1e-20)


def route_topk(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    order: str = "before",
    normalize: bool = False,
    scale: float = 1.0,
    selection_bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    token_mask: Tensor | None = None,
    impl: str | None = None,
) -> Routing:
    """Chooses `top_k` experts for every token. Arithmetic is float32 (float64 for float64 logits).

    1. scores: softmax or sigmoid of the logits (order="before"), or the logits themselves (order="after").
    2. selection: scores + selection_bias, restricted to the `top_groups` best of `num_groups` groups of experts.
    3. the `top_k` best of each token; ties go to the lower expert id.
    4. weights: the chosen scores, without the bias; with order="after" softmax or sigmoid over the chosen alone.
    5. weights / their sum if `normalize`, then × `scale`.

    Real routers are settings of it (S = softmax, σ = sigmoid; the rest as the defaults):

    | family | settings |
    |---|---|
    | mixtral, qwen3_moe, olmoe with norm_topk_prob | normalize=True |
    | olmoe, qwen2_moe | normalize=False |
    | deepseek_v2 | scale, num_groups, top_groups, group_score="max" |
    | deepseek_v3, glm4_moe | score="sigmoid", normalize=True, scale, selection_bias, groups with "top2_sum" |
    | gpt_oss, granitemoe | order="after" |
    | ernie4_5_moe | normalize=True, selection_bias (added to the probabilities) |
    | llama4 | score="sigmoid", order="after" |

    Args:
        logits: [T, E].
        top_k: K, in 1..E.
        score: "softmax" | "sigmoid".
        order: "before" | "after": whether the score is taken over all experts and then the best are chosen, or
            the best logits are chosen and the score is taken over those.
        selection_bias: [E], added to the scores for the choice only (DeepSeek-V3, arXiv:2412.19437, eq. 16).
        num_groups: experts are split into this many consecutive groups; 1 = no groups.
        top_groups: how many groups a token may use.
        group_score: "max" (DeepSeek-V2) | "top2_sum" (DeepSeek-V3): what a group is worth.
        token_mask: [T] bool; False routes the token nowhere.
        impl: "reference" (stable sort) | "torch" (top-k over order-preserving integer keys) | "triton" (one launch
            forward, one backward; float16, bfloat16 and float32 logits).

    Returns:
        A `Routing`; its weights carry the exact gradient to `logits`.

    Raises:
        ValueError: a shape or a setting is wrong; the message names it, what came and what is accepted.
        TypeError: token_mask is not bool, or logits have a dtype that impl="triton" does not take.
    """
    check_tensor("logits", logits, (None, None), "[T, E]")
    impl = choose_impl(impl, logits)
    num_tokens, num_experts = logits.shape
    check_choice("score", score, ("softmax", "sigmoid"))
    check_choice("order", order, ("before", "after"))
    check_choice("group_score", group_score, ("max", "top2_sum"))
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be in 1..{num_experts} (the number of experts), got {top_k}")
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups must divide the number of experts, {num_experts}, got {num_groups}")
    if not 1 <= top_groups <= num_groups:
        raise ValueError(f"top_groups must be in 1..{num_groups} (num_groups), got {top_groups}")
    if top_groups * (num_experts // num_groups) < top_k:
        raise ValueError(f"top_k must fit in {top_groups} group(s) of {num_experts // num_groups} experts, got {top_k}")
    if group_score == "top2_sum" and 1 < num_groups == num_experts:
        raise ValueError(f"group_score 'top2_sum' needs two experts a group, got {num_groups} groups of one")
    if selection_bias is not None:
        check_tensor("selection_bias", selection_bias, (num_experts,), "[E]")
    if token_mask is not None:
        check_tensor("token_mask", token_mask, (num_tokens,), "[T]")
        if token_mask.dtype != torch.bool:
            raise TypeError(f"token_mask must be bool (False = padding), got {token_mask.dtype}")

    if logits.dtype != torch.float64:
        logits = logits.float()
    if token_mask is not None:  # first of all: NaN in padding would survive its gradient of 0
        logits = logits.masked_fill(~token_mask.unsqueeze(1), 0.0)
    if impl == "triton":
        weights, expert_ids = _routing_triton.route(
            logits,
            selection_bias,
            token_mask,
            top_k,
            score,
            order,
            normalize,
            scale,
            num_groups,
            top_groups,
            group_score,
        )
        return Routing(expert_ids, weights, logits, num_experts, token_mask, score)
    score_fn = _softmax if score == "softmax" else torch.sigmoid
    scores = score_fn(logits) if order == "before" else logits

    with torch.no_grad():
        selection = scores.detach()
        if selection_bias is not None:
            selection = selection + selection_bias
        if top_groups < num_groups:
            selection = _restrict_to_groups(selection, num_groups, top_groups, group_score)
        by_sort = impl == "reference" or _is_small(selection)
        expert_ids = (_topk_sort if by_sort else _topk_keys)(selection, top_k)  # [T, K]

    weights = scores.gather(1, expert_ids)
    if order == "after":
        weights = score_fn(weights)
    if normalize:
        # The addend is below half a unit in the last place of any sum that is not zero itself.
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    if scale != 1.0:
        weights = weights * scale
    if token_mask is not None:
        keep = token_mask.unsqueeze(1)
        expert_ids = expert_ids.masked_fill(~keep, num_experts)
        weights = weights.masked_fill(~keep, 0.0)
    return Routing(expert_ids, weights, logits, num_experts, token_mask, score)


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def _restrict_to_groups(selection: Tensor, num_groups: int, top_groups: int, group_score: str) -> Tensor:
    grouped = selection.unflatten(1, (num_groups, -1))  # [T, groups, experts of a group]
    worth = grouped.amax(-1) if group_score == "max" else grouped.topk(2, dim=-1).values.sum(-1)
    best = _topk_sort(worth, top_groups)
    allowed = torch.zeros_like(worth, dtype=torch.bool).scatter(1, best, True)
    return grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(1)


def _is_small(selection: Tensor) -> bool:
    """Whether sorting all of it takes less time than the calls that make keys of it do."""
    few = selection.device.type == "cpu" and not torch.compiler.is_compiling()
    return few and selection.numel() <= _FEW_SCORES


def _topk_sort(selection: Tensor, top_k: int) -> Tensor:
    return selection.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def _topk_keys(selection: Tensor, top_k: int) -> Tensor:
    """`torch.topk` breaks ties as it likes; over keys that no two experts share, it cannot.

    A float32's bits order like an integer once the negative ones are flipped; the low half of the key holds the
    expert, the lower id the larger.
    """
    if selection.dtype == torch.float64 or torch.compiler.is_exporting():  # ONNX has no bits of a float
        return _topk_sort(selection, top_k)
    bits = (selection + 0.0).view(torch.int32)  # + 0.0: no negative zero
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    num_experts = selection.shape[1]
    tie_break = torch.arange(num_experts - 1, -1, -1, device=selection.device)
    keys = (bits.to(torch.int64) << 32) | tie_break
    return keys.topk(top_k, dim=-1).indices
