"""How evenly the experts are used: figures of a routing's load, and a meter that adds them up over steps.

Everything stays on the device of the routing until `ExpertLoad.shares` or a caller's `.tolist()` asks for numbers, so
measuring costs a training step no host synchronisation.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from coterie.ops.routing import Routing


def load_entropy(counts: Tensor) -> Tensor:
    """Entropy of the expert load over its maximum, Σ_e −p_e log p_e / log E with p = counts / Σ counts.

    Args:
        counts: [..., E], tokens (or shares) per expert, not negative.

    Returns:
        [...] float32 in [0, 1]: 1 = every expert carries the same, 0 = one carries all. NaN where all counts are
        zero (nothing was routed, so there is no load to speak of); 1 where E = 1.
    """
    num_experts = _num_experts(counts)
    shares = counts.double() / counts.sum(-1, keepdim=True)
    if num_experts == 1:
        return shares.squeeze(-1).float()  # 1, or NaN for an empty load
    entropy = torch.special.entr(shares).sum(-1) / math.log(num_experts)
    return entropy.clamp(0.0, 1.0).float()


def dead_experts(counts: Tensor, threshold: float = 0.0) -> Tensor:
    """How many experts carry no more than `threshold` × the fair share, 1 / E of the load.

    Args:
        counts: [..., E], tokens (or shares) per expert.
        threshold: 0 counts the experts that no token reached; 0.1 also those that hardly any did.

    Returns:
        [...] int64.
    """
    num_experts = _num_experts(counts)
    fair = counts.double().sum(-1, keepdim=True) / num_experts
    return (counts <= threshold * fair).sum(-1)


def load_imbalance(counts: Tensor) -> Tensor:
    """Load of the busiest expert over the fair share, [..., E] -> [...] float32 in [1, E]; NaN without any load."""
    num_experts = _num_experts(counts)
    return (counts.amax(-1).double() * num_experts / counts.sum(-1)).float()


def _num_experts(counts: Tensor) -> int:
    if counts.ndim == 0 or counts.shape[-1] == 0:
        raise ValueError(f"counts: got shape {list(counts.shape)}, must be [..., E] with at least one expert")
    return counts.shape[-1]


class ExpertLoad:
    """Adds up the expert load of every MoE layer over steps, on the device, until it is asked.

        load = ExpertLoad()
        for batch in batches:
            output = model(batch)
            load.update(output.routings)
        print(load_entropy(load.counts), dead_experts(load.counts))

    All layers have the same number of experts. Padding tokens are not counted: their slots are unused slots.
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    def update(self, routings: Sequence[Routing]) -> None:
        """Add one forward pass: one routing per MoE layer, in order.

        Raises:
            ValueError: `routings` is empty, or layers or experts are not as many as before.
        """
        if not routings:
            raise ValueError("routings: got none, must be one per MoE layer (a dense model has no load)")
        sizes = {routing.num_experts for routing in routings}
        if len(sizes) > 1:
            raise ValueError(f"routings: got layers of {sorted(sizes)} experts, must be the same number in all")
        with torch.no_grad():
            counts = torch.stack([routing.counts() for routing in routings])
            if self._counts is None:
                self._counts = counts
            elif self._counts.shape != counts.shape:
                raise ValueError(
                    f"routings: got [layers, E] = {list(counts.shape)}, before it was {list(self._counts.shape)}"
                )
            else:
                self._counts = self._counts + counts

    def reset(self) -> None:
        """Forget everything counted so far."""
        self._counts = None

    @property
    def counts(self) -> Tensor:
        """[layers, E] int64, on the device of the routings.

        Raises:
            RuntimeError: nothing was counted yet.
        """
        if self._counts is None:
            raise RuntimeError("no load yet: call update(routings) first")
        return self._counts

    @property
    def shares(self) -> list[list[float]]:
        """Each layer's load as shares that sum to one, as plain numbers. Waits for the device."""
        counts = self.counts.double().cpu()
        return (counts / counts.sum(-1, keepdim=True)).tolist()
