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
        position_edges: bin i of `position_bpb` holds the positions from edge i up to edge i + 1 in their window; see
            `position_edges`.
        position_bpb: bits per byte of the bytes that were predicted at those positions. Weighted by the bins' lengths,
            their mean is `bpb`.
    """

    bpb: float
    expert_load: list[list[float]]
    load_entropy: float | None
    dead_experts: int | None
    position_edges: list[int]
    position_bpb: list[float]


def evaluation_windows(corpus: np.ndarray, count: int, length: int) -> np.ndarray:
    """Starts of `count` windows of `length` spread evenly over `corpus`, without overlap; fewer if it is short.

    Raises:
        ValueError: `corpus` is shorter than one window and its last target.
    """
    if len(corpus) <= length:
        raise ValueError(f"valid_corpus: got {len(corpus)} bytes, must be more than length = {length}")
    count = min(count, (len(corpus) - 1) // length)
    return np.arange(count) * ((len(corpus) - 1) // count)


def position_edges(length: int) -> list[int]:
    """Edges of bins of positions that double: 0, 16, 32, 64, ..., `length`.

    The last bin is the second half of a context whose length is a power of two; of any other, from a third of it to
    two thirds.
    """
    edges, edge = [0], 16
    while 3 * edge <= 2 * length:
        edges.append(edge)
        edge *= 2
    return [*edges, length]


def evaluate(
    model: nn.Module,
    corpus: np.ndarray,
    *,
    count: int,
    length: int,
    batch_size: int,
    autocast: AbstractContextManager | None = None,
) -> Evaluation:
    """Bits per byte, in all and by position, and expert load of `model` on `count` windows of `corpus`.

    Every window is read from its own start on, so the first bytes of each are predicted from little context: figures
    compare only at equal `length`. By position they say what the longer context is worth.
    """
    device = next(model.parameters()).device
    starts = evaluation_windows(corpus, count, length)
    was_training = model.training
    model.eval()
    nats, counts = torch.zeros(length, dtype=torch.float64), []  # [L], summed over windows
    with torch.no_grad(), autocast or nullcontext():
        for first in range(0, len(starts), batch_size):
            inputs, targets = windows(corpus, starts[first : first + batch_size], length)
            output = model(inputs.to(device))
            nats += cross_entropy(output.logits, targets.to(device), reduction="none").sum(0).cpu()
            counts.append([routing.counts() for routing in output.routings])
    model.train(was_training)
    load = [expert_shares(sum(layer)).tolist() for layer in zip(*counts, strict=True)]
    layers = [torch.tensor(shares, dtype=torch.float64) for shares in load]
    bpb = nats / len(starts) / math.log(2)  # [L]
    edges = position_edges(length)
    return Evaluation(
        bpb=bpb.mean().item(),
        expert_load=load,
        load_entropy=mean_load_entropy(layers).item() if load else None,
        dead_experts=sum(int((shares == 0).sum()) for shares in layers) if load else None,
        position_edges=edges,
        position_bpb=[part.mean().item() for part in bpb.split(np.diff(edges).tolist())],
    )


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
    """Sum over tokens of -log p(target) in nats, at least in float32; targets of -100 are left out.

    Args:
        logits: [..., V].
        targets: [...], int64.
        reduction: "sum", or "none" for every token's own [...], 0 where it is left out.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    loss = F.cross_entropy(wide, targets.flatten(), ignore_index=IGNORED_TARGET, reduction=reduction)
    return loss.view_as(targets) if reduction == "none" else loss


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
