"""Keeping the experts equally busy: pure functions of routings, and the selection bias' update.

Padding (token_mask False) counts nowhere.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from coterie.ops._arguments import check_tensor
from coterie.ops.routing import Routing


def balance_loss(routing: Routing | Iterable[Routing], *, num_sequences: int | None = None) -> Tensor:
    """The switch loss, E · Σ_e f_e P_e, averaged over the layers given.

    f_e is expert e's share of the routed slots (no gradient), P_e the mean of its normalised score over the tokens.
    Its scale does not depend on E, K or T: 1 when either is uniform, towards E when everything goes to one
    expert. It dips below 1 only where scores and choices disagree (a selection bias, say).

    With `num_sequences` it is the per-sequence form of DeepSeek-V3 (arXiv:2412.19437, eq. 17–20): the T tokens are
    that many sequences of equal length, one after the other; each is balanced in itself, and those with at least one
    token are averaged.

    transformers' `load_balancing_loss_func` is K times this, on the tokens of all layers pooled.
    Source: Switch Transformers, arXiv:2101.03961, eq. 4–6.

    Returns:
        A float32 scalar; 0 when there are no tokens or no routings (a dense model).

    Raises:
        ValueError: num_sequences does not divide the number of tokens.
    """
    return _mean_over_layers(routing, lambda one: _balance_loss(one, num_sequences))


def z_loss(routing: Routing | Iterable[Routing]) -> Tensor:
    """mean_t (log Σ_e exp logits[t, e])², averaged over the layers given: keeps the router's logits small.

    Its minimum is 0. Source: ST-MoE, arXiv:2202.08906, eq. 5.
    """
    return _mean_over_layers(routing, _z_loss)


def selection_bias_update(selection_bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """The bias after one optimizer step: +rate for experts below the mean load, −rate above, 0 at it.

    Args:
        selection_bias: [E] float32.
        counts: [E], `Routing.counts()` summed over the step's micro-batches (and over ranks).
        rate: the step; 1e-3 in DeepSeek-V3.

    Returns:
        A new [E] float32 tensor. Source: auxiliary-loss-free balancing, arXiv:2408.15664, algorithm 1.
    """
    check_tensor("selection_bias", selection_bias, (None,), "[E]")
    check_tensor("counts", counts, tuple(selection_bias.shape), "[E]")
    counts = counts.to(torch.float64)  # a mean of int64 counts, exactly
    return selection_bias + rate * (counts.mean() - counts).sign().to(selection_bias.dtype)


def _mean_over_layers(routing: Routing | Iterable[Routing], loss) -> Tensor:
    if isinstance(routing, Routing):
        return loss(routing)
    losses = [loss(one) for one in routing]
    return torch.stack(losses).mean() if losses else torch.zeros(())


def _balance_loss(routing: Routing, num_sequences: int | None) -> Tensor:
    num_tokens, num_experts = routing.logits.shape
    sequences = 1 if num_sequences is None else num_sequences
    if sequences < 1 or num_tokens % sequences:
        raise ValueError(f"num_sequences must divide the number of tokens, {num_tokens}, got {num_sequences}")

    scores = routing.scores()
    present = torch.ones(num_tokens, device=scores.device, dtype=scores.dtype)
    if routing.token_mask is not None:
        present = routing.token_mask.to(scores.dtype)
    chosen = torch.zeros(num_tokens, num_experts + 1, device=scores.device, dtype=scores.dtype)
    chosen = chosen.scatter_add(1, routing.expert_ids, torch.ones_like(routing.expert_ids, dtype=scores.dtype))

    chosen = chosen[:, :num_experts].view(sequences, -1, num_experts).sum(1)  # [sequences, E]
    share = chosen / chosen.sum(-1, keepdim=True).clamp(min=1)
    present = present.view(sequences, -1)
    probability = torch.einsum("sle,sl->se", scores.view(sequences, -1, num_experts), present)
    probability = probability / present.sum(1, keepdim=True).clamp(min=1)
    loss = num_experts * (share * probability).sum(-1)  # [sequences]
    return loss.sum() / present.amax(1).sum().clamp(min=1) if num_tokens else scores.sum()


def _z_loss(routing: Routing) -> Tensor:
    squares = routing.logits.logsumexp(-1).square()
    if routing.token_mask is None:
        return squares.sum() / max(squares.shape[0], 1)
    mask = routing.token_mask
    return squares.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)
