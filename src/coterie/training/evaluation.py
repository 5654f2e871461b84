"""How well a model predicts a text, and what its routers do meanwhile."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coterie.training.data import windows

IGNORED_TARGET = -100


@dataclass(frozen=True)
class Evaluation:
    """One pass over the validation windows.

    Attributes:
        bpb: bits per byte: mean over all predicted bytes of -log2 p(byte).
        expert_load: per MoE layer, each expert's share of the routed slots (they sum to 1).
        load_entropy: mean over layers of the entropy of those shares over its maximum log E: 1 balanced, 0 one expert;
            None without an MoE layer.
        dead_experts: experts, over all layers, that no token was routed to; None without an MoE layer.
    """

    bpb: float
    expert_load: list[list[float]]
    load_entropy: float | None
    dead_experts: int | None


def evaluation_windows(corpus: np.ndarray, count: int, length: int) -> np.ndarray:
    """Starts of `count` windows of `length` spread evenly over `corpus`, without overlap; fewer if it is short.

    Raises:
        ValueError: `corpus` is shorter than one window and its last target.
    """
    if len(corpus) <= length:
        raise ValueError(f"valid_corpus: got {len(corpus)} bytes, must be more than length = {length}")
    count = min(count, (len(corpus) - 1) // length)
    return np.arange(count) * ((len(corpus) - 1) // count)


def evaluate(
    model: nn.Module,
    corpus: np.ndarray,
    *,
    count: int,
    length: int,
    batch_size: int,
    autocast: AbstractContextManager | None = None,
) -> Evaluation:
    """Bits per byte and expert load of `model` on `count` windows of `corpus`.

    Every window is read from its own start on, so the first bytes of each are predicted from little context: figures
    compare only at equal `length`.
    """
    device = next(model.parameters()).device
    starts = evaluation_windows(corpus, count, length)
    was_training = model.training
    model.eval()
    nats, tokens, counts = 0.0, 0, []
    with torch.no_grad(), autocast or nullcontext():
        for first in range(0, len(starts), batch_size):
            inputs, targets = windows(corpus, starts[first : first + batch_size], length)
            output = model(inputs.to(device))
            nats += cross_entropy(output.logits, targets.to(device)).item()
            tokens += targets.numel()
            counts.append([routing.counts() for routing in output.routings])
    model.train(was_training)
    load = [expert_shares(sum(layer)).tolist() for layer in zip(*counts, strict=True)]
    layers = [torch.tensor(shares, dtype=torch.float64) for shares in load]
    return Evaluation(
        bpb=nats / tokens / math.log(2),
        expert_load=load,
        load_entropy=mean_load_entropy(layers).item() if load else None,
        dead_experts=sum(int((shares == 0).sum()) for shares in layers) if load else None,
    )


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of -log p(target) in nats, at least in float32; targets of -100 are left out.

    Args:
        logits: [..., V].
        targets: [...], int64.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, -2), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum")


def expert_shares(counts: Tensor) -> Tensor:
    """Shares [E] of the routed slots from `counts` [E]; all 0 where nothing was routed."""
    return counts.double() / counts.sum().clamp(min=1)


def mean_load_entropy(shares: list[Tensor]) -> Tensor:
    """Mean over layers of -Σ_e s_e log s_e / log E: 1 for equal shares [E], 0 for one expert only."""
    entropies = [
        -torch.special.xlogy(layer, layer).sum() / math.log(len(layer)) if len(layer) > 1 else layer.new_ones(())
        for layer in shares
    ]
    return torch.stack(entropies).mean()
