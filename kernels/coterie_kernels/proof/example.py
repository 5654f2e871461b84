"""What a catalog is made of."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Example:
    """run() makes tensors, launches, and returns the results; the same to the bit every time.

    may_spill: that a kernel compiled for it spills is no fault.
    """

    label: str
    run: Callable[[], Sequence[Tensor | None]]
    may_spill: bool = False


@dataclass(frozen=True)
class Entry:
    """A mechanism's launchers.

    Attributes:
        name: of the file in `coterie_kernels`.
        small: examples that the interpreter runs in seconds: odd sizes, empty experts, every branch.
        matrix: (target, dtype) → examples that compile every entry of its tile tables.
        multiplies: the kernels that must use tensor cores where the dtype has them.
    """

    name: str
    small: Callable[[], Iterator[Example]]
    matrix: Callable[[str, torch.dtype], Iterator[Example]]
    multiplies: tuple[str, ...] = ()


def randn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
