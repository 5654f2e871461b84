"""Checks shared by the ops: a wrong argument is named, with what came and what is accepted."""

import importlib.util
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Not a cached function: torch.compile traces a constant, but warns of caches and cannot search for packages.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


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


def check_cu_seqlens(cu_seqlens: object, batch: int) -> None:
    """Raises unless it can be the bounds of packed sequences; their values are not looked at."""
    check_tensor("cu_seqlens", cu_seqlens, (None,), "[number of sequences + 1]", dtype=torch.int64)
    if batch != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens needs B = 1 and a sequence at least, got B = {batch}, {len(cu_seqlens)} bounds")


def read_cu_seqlens(cu_seqlens: Tensor, length: int) -> list[tuple[int, int]]:
    """Where each sequence begins and ends; ValueError unless they fill the length. Waits for an accelerator."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != length or any(a > b for a, b in pairwise(ends)):
        raise ValueError(f"cu_seqlens must go from 0 to L = {length} and never down, got {ends}")
    return list(pairwise(ends))


def choose_impl(impl: str | None, tensor: Tensor, accepted: Sequence[str] = ("reference", "torch", "triton")) -> str:
    """The implementation to run on this tensor. None means the fastest there is for its device and dtype.

    Raises:
        ValueError: impl is not among the accepted, or is "triton" on a device that it does not run on.
        TypeError: impl is "triton" and the tensor's dtype none that it computes in.
        ImportError: impl is "triton", which is not installed.
    """
    if impl is None:
        return "triton" if "triton" in accepted and tensor.is_cuda and _takes(tensor) else "torch"
    check_choice("impl", impl, accepted)
    if impl == "triton":
        _check_triton(tensor)
    return impl


def _takes(tensor: Tensor) -> bool:
    if tensor.dtype not in TRITON_DTYPES or not _HAS_TRITON:
        return False
    from coterie_kernels.target import takes

    return takes(tensor)


def _check_triton(tensor: Tensor) -> None:
    if tensor.dtype not in TRITON_DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in TRITON_DTYPES)
        raise TypeError(f"impl='triton' computes in {accepted}, got {tensor.dtype}")
    if not _HAS_TRITON:
        raise ImportError("impl='triton' needs the package triton, which is not installed; impl='torch' does without")
    if not _takes(tensor):
        raise ValueError(
            "impl='triton' runs on a GPU (NVIDIA from compute capability 8.0, or AMD), or on a CPU under "
            f"TRITON_INTERPRET=1; got a tensor on {tensor.device}"
        )
