"""The parameters of LoRA: an adapter's factors, and the module that holds all adapters of one layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coterie.ops._arguments import check_choice
from coterie.ops.lora import Factors, lora_expert_mlp, lora_linear


@dataclass(frozen=True)
class LoRASettings:
    """What makes an adapter, but for its numbers; `add_lora` says what the fields mean."""

    rank: int = 8
    alpha: float = 16.0
    shared: str = "none"
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank must be an integer of at least 1, got {self.rank!r}")
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be finite, got {self.alpha}")
        check_choice("shared", self.shared, ("none", "a", "b", "both"))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, got {self.dropout}")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LowRank(nn.Module):
    """The factors of a stack of matrices [E, O, I] (of a single one: E = 1): a [E or 1, R, I], b [E or 1, O, R]."""

    def __init__(self, shape: Sequence[int], settings: LoRASettings, *, device=None, dtype=None) -> None:
        super().__init__()
        (num_experts, outputs, inputs), rank, place = shape, settings.rank, {"device": device, "dtype": dtype}
        a_experts, b_experts = (1 if settings.shared in (letter, "both") else num_experts for letter in "ab")
        self.a = nn.Parameter(torch.empty(a_experts, rank, inputs, **place))
        self.b = nn.Parameter(torch.empty(b_experts, outputs, rank, **place))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """a uniform, as the weights of a linear layer are by default; b zero, so that the update starts at nothing."""
        bound = self.a.shape[2] ** -0.5
        nn.init.uniform_(self.a, -bound, bound)
        nn.init.zeros_(self.b)


class Adapter(nn.ModuleDict):
    """An adapter's `LowRank` for each matrix of one module that it updates, by the matrix's name."""

    def __init__(self, settings: LoRASettings) -> None:
        super().__init__()
        self.settings = settings

    def extra_repr(self) -> str:
        return f"rank={self.settings.rank}, alpha={self.settings.alpha}, shared={self.settings.shared!r}"


class LoRA(nn.Module):
    """The adapters of one module, and which of them apply.

    Attributes:
        matrices: names of the module's matrices, in the order of their use.
        adapters: by name.
        active: names of those that apply; adapter_ids index them.
        adapter_ids: [G] or None, all tokens taking the one that is active; see `set_adapter`.
        merged: name of the one that is in the weights now, or None.
    """

    def __init__(self, matrices: Sequence[str]) -> None:
        super().__init__()
        self.matrices = tuple(matrices)
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.register_buffer("adapter_ids", None, persistent=False)
        self.merged: str | None = None
        self.hook = None  # on the module, removed with the last adapter

    @property
    def applies(self) -> bool:
        """Whether there is something to add to what the weights compute."""
        return bool(self.active) and self.merged is None

    def choose(self, names: Sequence[str], adapter_ids: Tensor | None) -> None:
        """`set_adapter` for this module, which need not have all of these adapters."""
        self.active = tuple(name for name in names if name in self.adapters)
        self.adapter_ids = None
        if adapter_ids is not None and self.active:
            own = [self.active.index(name) if name in self.active else -1 for name in names]
            device = next(self.parameters()).device
            self.adapter_ids = torch.tensor([*own, -1], device=device)[adapter_ids.to(device)]  # [-1] is the last

    def _chosen(self) -> dict[str, Any]:
        settings = [self.adapters[name].settings for name in self.active]
        dropout = settings[0].dropout if self.training else 0.0
        return {"scales": [s.scale for s in settings], "adapter_ids": self.adapter_ids, "dropout": dropout}

    def _factors(self, matrix: str) -> Factors | None:
        """Of the active adapters side by side, a [M, E or 1, R, I] and b [M, E or 1, O, R]; None if none has any."""
        found = [dict(self.adapters[name].items()).get(matrix) for name in self.active]
        if not any(found):
            return None
        a, b = ([None if each is None else getattr(each, letter) for each in found] for letter in "ab")
        return _side_by_side(a, 1), _side_by_side(b, 2)


def _side_by_side(factors: Sequence[Tensor | None], rank_dim: int) -> Tensor:
    """One tensor; missing factors, and those of a lower rank than others, are filled up with zeros."""
    first, *others = (factor for factor in factors if factor is not None)
    if len(factors) == 1:
        return first[None]
    experts = max(factor.shape[0] for factor in (first, *others))
    rank = max(factor.shape[rank_dim] for factor in (first, *others))
    filled = []
    for factor in factors:
        factor = first.narrow(rank_dim, 0, 0) if factor is None else factor
        missing = rank - factor.shape[rank_dim]
        filled.append(F.pad(factor, (0, missing) if rank_dim == 2 else (0, 0, 0, missing)).expand(experts, -1, -1))
    return torch.stack(filled)


class ExpertsLoRA(LoRA):
    """Of experts: coterie's, or those of a transformers model."""

    def forward(self, x: Tensor, expert_ids: Tensor, weights: Tensor, up: Tensor, down: Tensor, **settings) -> Tensor:
        """`lora_expert_mlp` with the adapters that apply: [T, D]."""
        factors = [self._factors(matrix) for matrix in self.matrices]
        return lora_expert_mlp(x, expert_ids, weights, up, down, *factors, **self._chosen(), **settings)


class LinearLoRA(LoRA):
    """Of an `nn.Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """What to add to the layer's output."""
        return lora_linear(x, self._factors("weight"), **self._chosen())
