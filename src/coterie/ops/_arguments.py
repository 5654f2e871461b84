"""Checks shared by the ops: a wrong argument is named, with what came and what is accepted."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_choice(name: str, value: object, accepted: Sequence[object]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


def check_tensor(
    name: str, value: object, shape: Sequence[int | None], letters: str, dtype: torch.dtype | None = None
) -> None:
    """Raises unless `value` is a tensor of `shape`, in which None stands for any size, and of `dtype` if given.

    `letters` names the dimensions in the message, e.g. "[T, K]".
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {letters}, got {type(value).__name__}")
    if value.dim() != len(shape):
        raise ValueError(f"{name} must have shape {letters}, got {tuple(value.shape)}")
    if any(wanted is not None and got != wanted for got, wanted in zip(value.shape, shape, strict=True)):
        names = letters.strip("[]").split(", ")
        sizes = [name if size is None else str(size) for name, size in zip(names, shape, strict=True)]
        raise ValueError(f"{name} must have shape {letters} = [{', '.join(sizes)}], got {tuple(value.shape)}")
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {value.dtype}")


def check_sizes(name: str, sizes: Sequence[int], letters: str) -> None:
    """Raises unless every one of these sizes of a tensor is at least 1."""
    if min(sizes) < 1:
        raise ValueError(f"{name} must have {letters} of at least 1, got {', '.join(map(str, sizes))}")


def choose_impl(impl: str | None, accepted: Sequence[str] = ("reference", "torch")) -> str:
    """The implementation to run. None means the fastest there is for the tensor's device."""
    if impl is None:
        return "torch"
    check_choice("impl", impl, accepted)
    return impl
