"""Contenders trained on the same batches, taking turns step by step.

On a shared machine two runs one after the other measure the machine. Here every contender takes one step, then every
contender the next, each on its own clock, so that whatever slows the machine down slows all of them. What they reached
is compared at equal tokens (what a mechanism learns from its data) and at equal seconds (what it learns from its time).
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from coterie.training.config import TrainConfig
from coterie.training.data import Batches
from coterie.training.log import Record, read_log
from coterie.training.trainer import CHECKPOINT, Trainer, describe


@dataclass
class Contender:
    """One trained model and its records.

    Attributes:
        name: as given to `compare`.
        model: the trained model, or None when the records were read from a folder.
        history: the log's records: one before training, then one per step.
    """

    name: str
    model: nn.Module | None
    history: list[Record]

    @property
    def tokens(self) -> np.ndarray:
        """Tokens trained on after each step, [steps]."""
        return self._series("ce", "tokens")

    @property
    def seconds(self) -> np.ndarray:
        """Seconds trained after each step, [steps]."""
        return self._series("ce", "seconds")

    @property
    def train_bpb(self) -> np.ndarray:
        """Bits per byte of each step's batch, before the step, [steps]."""
        return self._series("ce", "ce") / math.log(2)

    @property
    def valid_tokens(self) -> np.ndarray:
        """Tokens trained on at each evaluation, the first before training, [evaluations]."""
        return self._series("valid_bpb", "tokens")

    @property
    def valid_seconds(self) -> np.ndarray:
        """Seconds trained at each evaluation, [evaluations]."""
        return self._series("valid_bpb", "seconds")

    @property
    def valid_bpb(self) -> np.ndarray:
        """Validation bits per byte at each evaluation, [evaluations]."""
        return self._series("valid_bpb", "valid_bpb")

    @property
    def position_edges(self) -> np.ndarray | None:
        """Edges of the bins of `position_bpb`, [bins + 1], or None in a log that has none."""
        edges = self._last("position_edges")
        return None if edges is None else np.array(edges)

    @property
    def position_bpb(self) -> np.ndarray | None:
        """Bits per byte of the last evaluation by position in the context, [bins], or None in a log that has none."""
        bpb = self._last("position_bpb")
        return None if bpb is None else np.array(bpb)

    @property
    def expert_load(self) -> np.ndarray | None:
        """Each expert's share of its layer's routed slots at each evaluation, [evaluations, layers, E], or None."""
        load = self._series("expert_load", "expert_load")
        return load if len(load) else None

    @property
    def tokens_per_second(self) -> float:
        """Median over all steps."""
        return float(np.median(self._series("tokens_per_second", "tokens_per_second")))

    @property
    def load_entropy(self) -> float | None:
        """Of the last evaluation: 1 balanced, 0 one expert for all; None without MoE layers."""
        return self._last("valid_load_entropy")

    @property
    def dead_experts(self) -> int | None:
        """Experts without any token in the last evaluation; None without MoE layers."""
        return self._last("dead_experts")

    def _series(self, having: str, name: str) -> np.ndarray:
        return np.array([record[name] for record in self.history if having in record], dtype=np.float64)

    def _last(self, name: str) -> Any:
        return next((record[name] for record in reversed(self.history) if name in record), None)


@dataclass
class Comparison:
    """What `compare` found; curves in the contenders, figures here."""

    contenders: dict[str, Contender]
    config: TrainConfig

    @property
    def equal_tokens(self) -> int:
        """The number of tokens that every contender was trained on: the smallest, should one be behind."""
        return int(min(contender.tokens[-1] for contender in self.contenders.values()))

    @property
    def equal_seconds(self) -> float:
        """The seconds that every contender was trained for: the total of the quickest."""
        return float(min(contender.seconds[-1] for contender in self.contenders.values()))

    def bpb_at_tokens(self, name: str, tokens: float | None = None) -> float:
        """Validation bits per byte of a contender after `tokens` (None: `equal_tokens`)."""
        contender = self.contenders[name]
        tokens = self.equal_tokens if tokens is None else tokens
        return float(np.interp(tokens, contender.valid_tokens, contender.valid_bpb))

    def bpb_at_seconds(self, name: str, seconds: float | None = None) -> float:
        """Validation bits per byte of a contender after `seconds` (None: `equal_seconds`).

        Interpolated between evaluations. The slower contender is read before its learning rate has come down, which
        understates what it would reach with a schedule made for that time.
        """
        contender = self.contenders[name]
        seconds = self.equal_seconds if seconds is None else seconds
        return float(np.interp(seconds, contender.valid_seconds, contender.valid_bpb))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The figures of every contender, JSON-able."""
        return {
            name: {
                "valid_bpb_equal_tokens": self.bpb_at_tokens(name),
                "valid_bpb_equal_seconds": self.bpb_at_seconds(name),
                "tokens": int(contender.tokens[-1]),
                "seconds": float(contender.seconds[-1]),
                "tokens_per_second": contender.tokens_per_second,
                "load_entropy": contender.load_entropy,
                "dead_experts": contender.dead_experts,
                "position_edges": contender._last("position_edges"),
                "position_bpb": contender._last("position_bpb"),
            }
            for name, contender in self.contenders.items()
        }


def compare(
    models: dict[str, nn.Module],
    config: TrainConfig,
    train_corpus: np.ndarray,
    valid_corpus: np.ndarray,
    out_dir: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    device: torch.device | str | None = None,
) -> Comparison:
    """Train every model by `config` on the same batches, one step each in turn.

    Args:
        models: contenders by name; a name is also the contender's folder below `out_dir`.
        config: of every contender; what a dense model has no use for (the balance weight) does nothing there.
        train_corpus, valid_corpus: uint8 [n].
        out_dir: folder of the run folders; None keeps the records in memory.
        resume: continue from the checkpoints. They are written one after another, so one contender may be a
            checkpoint behind, or without any, after a crash: it catches up first.
        overwrite: start anew where there are runs.
        progress: show a progress bar.
        device: move the models there; None leaves them.

    Raises:
        ValueError: no models, or a name that is no folder's.
        FileExistsError, FileNotFoundError, ValueError: as `Trainer` does.
    """
    for name in models:
        check_name(name)
    if not models:
        raise ValueError("models: got none to compare")
    if resume and out_dir is None:
        raise ValueError("resume: needs an out_dir to continue from")
    folders = {name: None if out_dir is None else Path(out_dir) / name for name in models}
    saved = {name for name, folder in folders.items() if resume and (folder / CHECKPOINT).exists()}
    if resume and not saved:
        raise FileNotFoundError(f"no checkpoint to resume below {out_dir}")
    trainers = {
        name: Trainer(
            model,
            config,
            Batches(train_corpus, config.batch_size, config.length, seed=config.seed),
            valid_corpus,
            folders[name],
            resume=name in saved,
            overwrite=overwrite or (resume and name not in saved),
            device=device,
        )
        for name, model in models.items()
    }
    _take_turns(trainers, progress)
    contenders = {name: Contender(name, trainer.model, trainer.history) for name, trainer in trainers.items()}
    return Comparison(contenders, config)


def load_comparison(out_dir: str | Path) -> Comparison:
    """The comparison that was written below `out_dir`, from its logs alone: by name, `Contender.model` None.

    Raises:
        FileNotFoundError: no logs below `out_dir`.
        ValueError: the contenders were not trained by the same configuration, or one has taken no step.
    """
    folders = sorted(path.parent for path in Path(out_dir).glob("*/log.jsonl"))
    if not folders:
        raise FileNotFoundError(f"no runs to compare below {out_dir}")
    configs = [TrainConfig.from_dict(json.loads((folder / "train.json").read_text("utf-8"))) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        if config != configs[0]:
            raise ValueError(f"{folder} and {folders[0]} were not trained by the same configuration")
    contenders = {folder.name: Contender(folder.name, None, read_log(folder / "log.jsonl")) for folder in folders}
    for name, contender in contenders.items():
        if not len(contender.tokens):
            raise ValueError(f"{Path(out_dir) / name} has taken no step yet")
    return Comparison(contenders, configs[0])


def _take_turns(trainers: dict[str, Trainer], progress: bool) -> None:
    from tqdm import tqdm

    steps = [trainer.config.steps for trainer in trainers.values()]
    done = [trainer.current_step for trainer in trainers.values()]
    with tqdm(total=sum(steps), initial=sum(done), unit="step", disable=not progress) as bar:
        said = {}
        for step in range(min(done), max(steps)):
            for name, trainer in trainers.items():
                if trainer.current_step == step:  # one that is ahead waits
                    said[name] = f"{name}: {describe(trainer.step())}"
                    bar.set_postfix_str(" | ".join(said.values()), refresh=False)
                    bar.update()
    for trainer in trainers.values():
        trainer.close()


def check_name(name: str) -> None:
    """Raises ValueError unless a contender of that name can have a folder of that name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"models: got the name {name!r}, which names a folder: letters, digits, '.', '_' and '-'")
