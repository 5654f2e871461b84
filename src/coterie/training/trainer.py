"""The trainer: one optimizer step after another, each one logged, evaluated and saved when it is due.

Everything that decides the next step is in the checkpoint: weights and selection biases, the optimizer's moments, the
random stream, the position in the data, the step that the learning rate follows from. Batches are pure functions of
their position. So a resumed run repeats, bit for bit, the run that was never interrupted (on the same machine and
number of threads).
"""

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from coterie.models.pretrained import write_atomically
from coterie.ops import balance_loss, indexer_loss, z_loss
from coterie.training.checkpoint import load_checkpoint, save_checkpoint
from coterie.training.config import FREE_ON_RESUME, TrainConfig, resolve_precision
from coterie.training.evaluation import (
    IGNORED_TARGET,
    Evaluation,
    cross_entropy,
    evaluate,
    evaluation_windows,
    expert_shares,
    mean_load_entropy,
)
from coterie.training.log import Record, RunLog
from coterie.training.optimizer import decay_groups, make_optimizer
from coterie.training.randomness import RandomStream
from coterie.training.schedule import learning_rate

CHECKPOINT = "checkpoint.safetensors"
RUN_FILES = (CHECKPOINT, "log.jsonl", "train.json", "config.json", "model.safetensors")


class Trainer:
    """Trains a model on batches, and keeps its run folder.

    Steps of `step()`:
        1. evaluate the untrained model, before the first step only;
        2. take a batch and add up the gradients of its micro-batches;
        3. clip, set the learning rate, let AdamW step, move the selection biases;
        4. evaluate, log, write a checkpoint, where due.

    The loss is the mean cross entropy per target + `balance_weight` · balance loss + `z_weight` · z-loss. Cut into
    micro-batches, cross entropy is the same as on the whole batch, for targets are counted over the batch. The router
    losses are taken per micro-batch and averaged: the z-loss is that of the whole batch only if every micro-batch has
    equally many unmasked tokens, and the balance loss asks each micro-batch to be balanced, as is usual, which is a
    little stricter than asking it of the batch.

    Args:
        model: called as `model(inputs [B, L])`, returns a value with `logits` [B, L, V] and `routings` (one `Routing`
            per MoE layer). `moe_layers()`, `config.to_dict()` and `save_pretrained(folder)` are used where needed.
        config: how to train.
        train_batches: iterator of (inputs, targets) or (inputs, targets, token_mask), [B, L] each, with `state_dict`
            and `load_state_dict` of JSON-able values, such as `Batches`. Targets of -100 are not predicted; tokens
            whose mask is False are routed nowhere.
        valid_corpus: uint8 [n], for evaluation.
        out_dir: run folder: train.json, log.jsonl, checkpoint.safetensors, and the model by `save_pretrained`
            whenever a checkpoint is written. None keeps the records in memory only.
        resume: continue from the folder's checkpoint.
        overwrite: start anew where the folder holds a run.
        device: move the model there first; None leaves it.

    Attributes:
        history: all records, those before a resume included; log.jsonl holds the same.
        current_step, tokens, seconds: steps taken, targets predicted, seconds spent on them (evaluations,
            checkpoints and time before a resume's last checkpoint not counted).

    Raises:
        FileExistsError: `out_dir` holds a run, and neither `resume` nor `overwrite` is set.
        FileNotFoundError: `resume` is set and there is no checkpoint.
        ValueError: the checkpoint is damaged, or of another model, configuration or data.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        train_batches: Iterator,
        valid_corpus: np.ndarray,
        out_dir: str | Path | None = None,
        *,
        resume: bool = False,
        overwrite: bool = False,
        device: torch.device | str | None = None,
    ):
        evaluation_windows(valid_corpus, 1, config.length)  # a corpus too short is an error now, not in an hour
        self.model = model if device is None else model.to(device)
        self.device = next(model.parameters()).device
        self.config = config
        self.batches = train_batches
        self.valid_corpus = valid_corpus
        self.out_dir = None if out_dir is None else Path(out_dir)
        self.precision = resolve_precision(config.precision, self.device)
        self.optimizer = make_optimizer(model, config)
        self.random = RandomStream(config.seed, self.device)
        self.history: list[Record] = []
        self.current_step = 0
        self.tokens = 0
        self.seconds = 0.0
        self._forward = torch.compile(model) if config.compile else model
        with_decay, without = decay_groups(model)
        self._trained = with_decay | without
        self._biased_routers = [layer.router for layer in model.moe_layers()] if config.selection_bias_rate else []
        if config.selection_bias_rate and not all(
            getattr(router, "selection_bias", None) is not None for router in self._biased_routers
        ):
            raise ValueError("selection_bias_rate: the model's routers have no selection bias (set it to 0)")
        self._log = self._open_folder(resume, overwrite)

    def train(self, progress: bool = True) -> list[Record]:
        """Take all steps that are left, with a progress bar unless `progress` is False, and return `history`."""
        from tqdm import tqdm

        with tqdm(total=self.config.steps, initial=self.current_step, unit="step", disable=not progress) as bar:
            while self.current_step < self.config.steps:
                bar.set_postfix_str(describe(self.step()), refresh=False)
                bar.update()
        self.close()
        return self.history

    def step(self) -> Record:
        """One optimizer step and whatever is due after it; returns its record.

        Raises:
            FloatingPointError: the loss or the gradient is not finite. The last checkpoint is still the one before.
        """
        if self.current_step == 0 and not self.history:
            self._write({"step": 0, "tokens": 0, "seconds": 0.0, **self._evaluation_fields()})
        started = time.perf_counter()
        metrics, targets = self._optimize()
        elapsed = time.perf_counter() - started
        self.current_step += 1
        self.tokens += targets
        self.seconds += elapsed
        record = {
            "step": self.current_step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            **metrics,
            "tokens_per_second": targets / elapsed,
        }
        if not np.isfinite([metrics["loss"], metrics["grad_norm"]]).all():
            raise FloatingPointError(
                f"step {self.current_step}: the loss is {metrics['loss']}, the gradient's norm "
                f"{metrics['grad_norm']}; a lower lr or a longer warm-up may help"
            )
        last = self.current_step == self.config.steps
        if last or self.current_step % self.config.eval_every == 0:
            record |= self._evaluation_fields()
        self._write(record)
        if last or self.current_step % self.config.checkpoint_every == 0:
            self.save()
        return record

    def evaluate(self) -> Evaluation:
        """Bits per byte and expert load on the validation windows, always the same ones."""
        config = self.config
        return evaluate(
            self._forward,
            self.valid_corpus,
            count=config.eval_batches * config.batch_size,
            length=config.length,
            batch_size=config.batch_size // config.accumulation,
            autocast=self._autocast(),
        )

    def save(self) -> None:
        """Write the checkpoint and the model; nothing without an `out_dir`."""
        if self.out_dir is None:
            return
        tensors = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self._trained.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer/{name}/{key}"] = value
        random_tensors, random_state = self.random.state_dict()
        tensors |= {f"random/{name}": tensor for name, tensor in random_tensors.items()}
        state = {
            "step": self.current_step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "batches": self.batches.state_dict(),
            "random": random_state,
            "train_config": self.config.to_dict(),
            "model_config": self._model_config(),
        }
        self._log.sync()
        save_checkpoint(self.out_dir / CHECKPOINT, tensors, state)
        self.model.save_pretrained(self.out_dir)

    def close(self) -> None:
        """Close the log's TensorBoard file, if there is one; `train` does it by itself."""
        if self._log is not None:
            self._log.close()

    def _optimize(self) -> tuple[dict[str, float], int]:
        """One optimizer step: (metrics, targets predicted). The device is waited for once, at the end."""
        config = self.config
        self.model.train()
        with self.random.current():
            batch = next(self.batches)
            num_targets = int((batch[1] != IGNORED_TARGET).sum())
            losses, counts = [], []
            for micro in zip(*(part.to(self.device).chunk(config.accumulation) for part in batch), strict=True):
                loss, parts, routings = self._loss(*micro, num_targets=num_targets)
                loss.backward()
                losses.append(torch.stack([loss.detach(), *parts]))
                counts.append([routing.counts() for routing in routings])
        counts = [torch.stack(layer).sum(0) for layer in zip(*counts, strict=True)]

        if config.clip_norm is None:
            grad_norm = get_total_norm([p.grad for p in self._trained.values() if p.grad is not None])
        else:
            grad_norm = clip_grad_norm_(self._trained.values(), config.clip_norm)
        lr = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        for router, layer in zip(self._biased_routers, counts, strict=bool(self._biased_routers)):
            router.update_selection_bias(layer, config.selection_bias_rate)

        values = [*torch.stack(losses).sum(0), grad_norm]
        names = ["loss", "ce", "balance", "z", "grad_norm"]
        if counts:
            values.append(mean_load_entropy([expert_shares(layer) for layer in counts]))
            names.append("load_entropy")
        measured = torch.stack([value.float() for value in values]).tolist()
        return {**dict(zip(names, measured, strict=True)), "lr": lr}, num_targets

    def _loss(
        self, inputs: Tensor, targets: Tensor, token_mask: Tensor | None = None, *, num_targets: int
    ) -> tuple[Tensor, list[Tensor], tuple]:
        """A micro-batch's part of the loss, its detached terms (cross entropy, balance, z), and its routings."""
        with self._autocast():
            output = self._forward(inputs) if token_mask is None else self._forward(inputs, token_mask=token_mask)
        loss = ce = cross_entropy(output.logits, targets) / max(num_targets, 1)
        balance = z = ce.new_zeros(())
        if output.routings:
            balance = balance_loss(output.routings) / self.config.accumulation
            z = z_loss(output.routings) / self.config.accumulation
            loss = ce + self.config.balance_weight * balance + self.config.z_weight * z
        for selection in output.selections:
            if selection.scores is not None:
                loss = loss + indexer_loss(selection, token_mask) / self.config.accumulation
        return loss, [part.detach() for part in (ce, balance, z)], output.routings

    def _learning_rate(self) -> float:
        config = self.config
        return learning_rate(
            self.current_step,
            steps=config.steps,
            lr=config.lr,
            warmup_steps=config.warmup_steps,
            min_lr_ratio=config.min_lr_ratio,
        )

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def _evaluation_fields(self) -> Record:
        evaluation = self.evaluate()
        fields = {"valid_bpb": evaluation.bpb}
        if evaluation.expert_load:
            fields["valid_load_entropy"] = evaluation.load_entropy
            fields["dead_experts"] = evaluation.dead_experts
            fields["expert_load"] = evaluation.expert_load
        return fields

    def _write(self, record: Record) -> None:
        self.history.append(record)
        if self._log is not None:
            self._log.write(record)

    def _open_folder(self, resume: bool, overwrite: bool) -> RunLog | None:
        if self.out_dir is None:
            if resume:
                raise ValueError("resume: needs an out_dir to continue from")
            return None
        if resume:
            tensors, state = load_checkpoint(self.out_dir / CHECKPOINT)
            self._restore(tensors, state)
            log = RunLog(self.out_dir, self.current_step)
            self.history = log.records
            return log
        self.out_dir.mkdir(parents=True, exist_ok=True)
        here = [name for name in RUN_FILES if (self.out_dir / name).exists()]
        if here and not overwrite:
            raise FileExistsError(f"{self.out_dir} holds a run already; resume it, overwrite it, or name another")
        for path in [*(self.out_dir / name for name in here), *self.out_dir.glob("tensorboard/events.out.tfevents.*")]:
            path.unlink()
        text = json.dumps(self.config.to_dict(), indent=2) + "\n"
        write_atomically(self.out_dir / "train.json", lambda path: path.write_text(text, encoding="utf-8"))
        return RunLog(self.out_dir)

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        path = self.out_dir / CHECKPOINT
        _check_same(path, "the model's", state["model_config"], self._model_config())
        _check_same(path, "the training", state["train_config"], self.config.to_dict(), free=FREE_ON_RESUME)
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "random": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            groups[kind][rest] = tensor
        try:
            self.batches.load_state_dict(state["batches"])
            self.model.load_state_dict(groups["model"])
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is of another run: {' '.join(str(error).split())}") from error
        moments: dict[str, dict[str, Tensor]] = {}
        for name, tensor in groups["optimizer"].items():
            parameter, _, key = name.rpartition("/")
            moments.setdefault(parameter, {})[key] = tensor
        unknown = sorted(set(moments) - set(self._trained))
        if unknown:
            raise ValueError(f"{path} is of another run: {unknown[0]} is not trained here")
        # The optimizer numbers its parameters group by group, in the order of `decay_groups`.
        numbered = {index: moments[name] for index, name in enumerate(self._trained) if name in moments}
        self.optimizer.load_state_dict({"state": numbered, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.random.load_state_dict(groups["random"], state["random"])
        self.current_step = state["step"]
        self.tokens = state["tokens"]
        self.seconds = state["seconds"]

    def _model_config(self) -> dict[str, Any] | None:
        config = getattr(self.model, "config", None)
        # As JSON has it: tuples become lists.
        return None if config is None else json.loads(json.dumps(config.to_dict()))


def describe(record: Record) -> str:
    """What a progress bar says about a record."""
    text = f"loss {record['loss']:.3f}, {record['tokens_per_second']:,.0f} tokens/s"
    if "load_entropy" in record:
        text += f", load entropy {record['load_entropy']:.2f}"
    return text


def _check_same(path: Path, whose: str, saved: dict | None, own: dict | None, free: frozenset = frozenset()) -> None:
    saved, own = saved or {}, own or {}
    for name in sorted(set(saved) | set(own)):
        if name not in free and saved.get(name) != own.get(name):
            raise ValueError(
                f"{path} is of another run: {whose} {name} was {saved.get(name)!r}, is {own.get(name)!r} now"
            )
