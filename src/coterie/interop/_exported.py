"""What every export shares: optional packages, a place to write that is not yet the final one, and comparison."""

import copy
import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from coterie.models.transformer import Transformer


class VerificationError(FloatingPointError):
    """What was written does not compute what the model computes; it was not left under its name."""


def optional(name: str, extra: str = "export") -> ModuleType:
    """The module of an optional package; ImportError says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is needed: pip install 'coterie[{extra}]' ({error})") from error


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """A folder beside `path`, on the same disk, for files that are renamed once they are verified; then removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def checked_file(path: str | os.PathLike) -> Path:
    """`path`, where a file can be put."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"path must be a file, got the folder {path}")
    return path


def sample_ids(model: Transformer, batch_size: int, length: int) -> Tensor:
    """[B, L] tokens, the same every time, all over the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch_size, length), generator=generator)


@torch.no_grad()
def logits_of(model: Transformer, input_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, L] → [B, L, vocab] float32 on the CPU, computed in `dtype`; a model of another one is copied."""
    if model.embedding.weight.dtype != dtype:
        model = copy.deepcopy(model).to(dtype)
    return model(input_ids.to(model.embedding.weight.device)).logits.float().cpu()


def position_errors(got: Tensor, wanted: Tensor) -> Tensor:
    """‖got − wanted‖ / ‖wanted‖ of every position's logits; NaN anywhere counts as infinitely wrong."""
    errors = (got.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-20)
    return errors.nan_to_num(nan=float("inf"))
