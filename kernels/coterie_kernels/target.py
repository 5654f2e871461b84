"""For which hardware a launch chooses its tiles."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps

import torch
import triton
from torch import Tensor

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
_INTERPRETED = triton.knobs.runtime.interpret  # kernels ask when they are defined, so no later change counts
_aim: ContextVar[str] = ContextVar("aim", default="sm_90")


def target_of(tensor: Tensor) -> str:
    """The nearest of TARGETS to the tensor's device; on a CPU, where the interpreter runs, what `aiming_at` set."""
    return _aim.get() if tensor.device.type == "cpu" else _target_of_device(tensor.device.index)


@contextmanager
def aiming_at(target: str) -> Iterator[None]:
    """Launches on CPU tensors choose tiles as for `target` inside this block."""
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    token = _aim.set(target)
    try:
        yield
    finally:
        _aim.reset(token)


def takes(tensor: Tensor) -> bool:
    """Whether kernels can run on this tensor's device: a GPU, or a CPU under TRITON_INTERPRET=1."""
    if tensor.device.type == "cpu":
        return _INTERPRETED
    if tensor.device.type != "cuda":
        return False
    # Asked while torch.compile traces, which takes the properties of a device for constants.
    return torch.version.hip is not None or torch.cuda.get_device_properties(tensor.device).major >= 8


@cache
def _target_of_device(index: int) -> str:
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = _capability(index)
    # Consumers' Blackwell, 12.0, has neither the tensor memory nor the shared memory of 10.0.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def dot_precision(tensor: Tensor) -> str:
    """How `tl.dot` multiplies float32: exactly, but for TF32 where torch was asked for it; other dtypes ignore it.

    Three TF32 products make one float32 product on NVIDIA's tensor cores; AMD's multiply float32 as it is.
    """
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee" if target_of(tensor) == "gfx942" else "tf32x3"


def on_its_device(launcher: Callable) -> Callable:
    """The launcher, on the device of its first tensor: Triton itself would take the current one."""

    @wraps(launcher)
    def launch(tensor: Tensor, *args, **settings):
        with torch.cuda.device_of(tensor):
            return launcher(tensor, *args, **settings)

    return launch
