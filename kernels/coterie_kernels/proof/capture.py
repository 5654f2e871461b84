"""Records what launchers would launch, instead of launching it: neither a GPU nor the interpreter is needed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import JITFunction
from triton.runtime.jit import create_function_from_signature

GPUS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Pointer:
    """All that Triton's JIT asks of a tensor."""

    dtype: torch.dtype
    is_aligned: bool
    num_bytes: int

    def data_ptr(self) -> int:
        return 0 if self.is_aligned else 1

    def ptr_range(self) -> int:
        return self.num_bytes


@dataclass(frozen=True)
class Launch:
    """One kernel[grid](*arguments, **settings); tensors are Pointers, so that it can go to another process.

    Attributes:
        settings: constexprs, and options such as num_warps.
    """

    module: str
    name: str
    grid: tuple[int, ...]
    arguments: tuple
    settings: dict = field(hash=False)

    @property
    def kernel(self) -> JITFunction:
        kernel = getattr(import_module(self.module), self.name)
        while not isinstance(kernel, JITFunction):  # what heuristics and the like wrap
            kernel = kernel.fn
        return kernel

    @property
    def values(self) -> dict:
        """name → value of every parameter."""
        return self._bound("sm_90")[0]

    @property
    def options(self) -> dict:
        """name → value of every setting that is no parameter, such as num_warps."""
        return self._bound("sm_90")[2]

    def key(self, target: str) -> str:
        """Equal for launches that run the same code."""
        _, specialization, options = self._bound(target)
        return f"{target} {self.module}.{self.name} {specialization} {sorted(options.items())}"

    def source(self, target: str) -> ASTSource:
        """What the JIT would compile for these arguments: which types, divisible by 16, equal to 1, below 2 GiB."""
        backend = make_backend(GPUS[target])
        _, signature, constants, attributes = self.kernel._pack_args(backend, self.settings, *self._bound(target))
        return ASTSource(self.kernel, signature, constants, attributes)

    def _bound(self, target: str) -> tuple[dict, list, dict]:
        return _binder(self.kernel, target)(*self.arguments, **self.settings)


@cache
def _binder(kernel: JITFunction, target: str):
    """(*arguments, **settings) → values, (type, specialization) of each, and options."""
    return create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUS[target]))


@contextmanager
def capture() -> Iterator[list[Launch]]:
    """Inside, kernels called with tensors on a CPU run nothing; the list fills with their launches."""
    launches = []

    def record(kernel, *arguments, grid, warmup, **settings):
        arguments = tuple(_pointer(value) if isinstance(value, torch.Tensor) else value for value in arguments)
        settings = {k: _pointer(value) if isinstance(value, torch.Tensor) else value for k, value in settings.items()}
        launch = Launch(kernel.__module__, kernel.__name__, (), arguments, settings)
        launches.append(replace(launch, grid=tuple(grid(launch.values) if callable(grid) else grid)))

    with patch.object(JITFunction, "run", record):
        yield launches


def _pointer(tensor: torch.Tensor) -> Pointer:
    return Pointer(tensor.dtype, tensor.data_ptr() % 16 == 0, tensor.untyped_storage().nbytes())
