"""Everything that decides how a model is trained, as one value."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from coterie.models.config import check_fields
from coterie.ops._products import multiplies_natively

PRECISIONS = ("auto", "bf16", "float32")

# What a resumed run may change: nothing here touches the weights.
FREE_ON_RESUME = frozenset({"eval_every", "eval_batches", "checkpoint_every"})


@dataclass(frozen=True)
class TrainConfig:
    """How to train; the defaults are the demo's.

    Args:
        steps: optimizer steps.
        batch_size: sequences per optimizer step, B.
        length: tokens per sequence, L.
        lr: the highest learning rate, reached after warm-up.
        min_lr_ratio: the last step's learning rate over `lr`.
        warmup_steps: steps of linear warm-up; half a cosine follows. A shorter run is all warm-up.
        weight_decay: decoupled (AdamW), on weight matrices only: see `optimizer.decay_groups`.
        betas: of AdamW.
        clip_norm: longest gradient (2-norm over all parameters); None measures without clipping.
        accumulation: micro-batches that a batch is cut into, to save memory; divides `batch_size`.
        precision: "float32", "bf16" (autocast; weights and optimizer stay float32) or "auto": bf16 where the hardware
            multiplies it natively, float32 elsewhere.
        balance_weight: weight of the balance loss, whose minimum is 1.
        z_weight: weight of the router's z-loss.
        selection_bias_rate: step of the auxiliary-loss-free bias, updated once per optimizer step; needs a model
            whose routers have one.
        seed: of the random stream inside the model (dropout, jitter), less than 2**63; the batches have a seed of
            their own.
        eval_every: steps between evaluations; the start and the end are always evaluated.
        eval_batches: batches per evaluation, spread evenly over the validation text and always the same.
        checkpoint_every: steps between checkpoints; the end always has one.
        compile: run the model through `torch.compile`.

    Raises:
        ValueError: a field is outside its range.
        TypeError: a field is of the wrong type.
    """

    steps: int = 400
    batch_size: int = 8
    length: int = 256
    lr: float = 3e-3
    min_lr_ratio: float = 0.1
    warmup_steps: int = 20
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float | None = 1.0
    accumulation: int = 1
    precision: str = "auto"
    balance_weight: float = 0.01
    z_weight: float = 1e-3
    selection_bias_rate: float = 0.0
    seed: int = 0
    eval_every: int = 50
    eval_batches: int = 8
    checkpoint_every: int = 100
    compile: bool = False

    def __post_init__(self):
        check_fields(self)
        for name in ("steps", "batch_size", "length", "accumulation", "eval_every", "eval_batches", "checkpoint_every"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("warmup_steps", "weight_decay", "balance_weight", "z_weight", "selection_bias_rate", "seed"):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        self._check("lr", self.lr > 0, "more than 0")
        self._check("min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "0 to 1")
        self._check("betas", len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas), "two of 0 ≤ β < 1")
        self._check("clip_norm", self.clip_norm is None or self.clip_norm > 0, "None or more than 0")
        self._check(
            "accumulation", self.batch_size % self.accumulation == 0, f"a divisor of batch_size = {self.batch_size}"
        )
        self._check("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")

    def _check(self, name: str, right: bool, accepted: str) -> None:
        if not right:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, must be {accepted}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return {**dataclasses.asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "TrainConfig":
        """The inverse of `to_dict`.

        Raises:
            ValueError: an unknown field, or one outside its range.
            TypeError: a field of the wrong type, or no fields at all.
        """
        if not isinstance(fields, Mapping):
            raise TypeError(f"training must be an object of fields, got {fields!r}")
        unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown training field {unknown[0]!r}")
        return cls(**fields)


def resolve_precision(precision: str, device: torch.device | str) -> str:
    """ "bf16" or "float32": what `precision` means on `device`.

    "auto" takes bf16 only from hardware that multiplies it natively. Emulated (AVX2, AVX-512 without its bf16
    extension, CUDA before Ampere) it is several times slower than float32.
    """
    if precision != "auto":
        return precision
    device = torch.device(device)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and multiplies_natively(torch.bfloat16)
    return "bf16" if native else "float32"
