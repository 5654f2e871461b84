"""What launches cost, counted while Triton's interpreter runs them: a fact about the program, not a time.

Requested: bytes of all active lanes, again each time that they are asked for; caches may serve most of them. Distinct:
the 32-byte sectors that a launch touches at all, which device memory moves at least once in that launch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coterie_kernels.proof.interpreter import Access, Launch, Observer, watched

SECTOR = 32  # bytes that device memory moves at least


@dataclass(frozen=True)
class Cost:
    """Of one launch or of several.

    Attributes:
        requested_load, requested_store: bytes of active lanes; atomics count as both.
        distinct_load, distinct_store: bytes of the sectors touched, once per launch.
        flops: of products executed, padding included.
    """

    launches: int = 0
    programs: int = 0
    requested_load: int = 0
    requested_store: int = 0
    distinct_load: int = 0
    distinct_store: int = 0
    flops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    @property
    def requested(self) -> int:
        return self.requested_load + self.requested_store

    @property
    def distinct(self) -> int:
        return self.distinct_load + self.distinct_store


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor when it is gone; num_bytes: of its storage."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    is_aligned: bool
    num_bytes: int

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorInfo":
        aligned, storage = tensor.data_ptr() % 16 == 0, tensor.untyped_storage()
        return cls(tensor.dtype, tuple(tensor.shape), aligned, storage.nbytes())


@dataclass(frozen=True)
class Counted:
    """A launch and its cost; options: such as num_warps. Tensors among the arguments are TensorInfo."""

    module: str
    kernel: str
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    options: dict[str, Any]
    cost: Cost


@dataclass
class Record:
    """Launches in the order in which they ran."""

    launches: list[Counted] = field(default_factory=list)

    @property
    def total(self) -> Cost:
        return sum((launch.cost for launch in self.launches), Cost())

    def by_kernel(self) -> dict[str, Cost]:
        """Of each kernel, in the order of their first launches."""
        costs: dict[str, Cost] = {}
        for launch in self.launches:
            costs[launch.kernel] = costs.get(launch.kernel, Cost()) + launch.cost
        return costs


@contextmanager
def record() -> Iterator[Record]:
    """Counts every launch inside this block; the record is complete when it ends.

    Raises:
        RuntimeError: as `watched` does.
        IndexError: an access lies outside of all of the launch's tensors: `sanitize` tells where.
    """
    counter = _Counter()
    with watched(counter):
        yield counter.record


class _Counter(Observer):
    def __init__(self):
        self.record = Record()
        self._requested = {"load": 0, "store": 0}
        self._flops = 0
        self._touched: dict[int, dict[str, np.ndarray]] = {}  # storage → kind → [sectors] bool

    def begin(self, launch: Launch) -> None:
        self._requested = {"load": 0, "store": 0}
        self._flops = 0
        self._touched.clear()

    def access(self, access: Access) -> None:
        if access.region is None:
            raise IndexError(f"{access.launch.kernel}: a pointer that was made of no argument")
        storage = access.region.tensor.untyped_storage()
        first = storage.data_ptr() // SECTOR
        if storage.data_ptr() not in self._touched:
            sectors = (storage.data_ptr() + storage.nbytes() - 1) // SECTOR - first + 1
            self._touched[storage.data_ptr()] = {kind: np.zeros(sectors, bool) for kind in self._requested}
        at = (access.offsets + (access.region.start - first * SECTOR)) // SECTOR
        if at.min() < 0:
            raise IndexError(f"{access.launch.kernel}: an access before the start of {access.region.name}")
        for kind in self._requested if access.kind == "atomic" else (access.kind,):
            self._requested[kind] += access.offsets.size * access.num_bytes
            self._touched[storage.data_ptr()][kind][at] = True

    def dot(self, flops: int) -> None:
        self._flops += flops

    def end(self, launch: Launch) -> None:
        distinct = {
            kind: SECTOR * sum(int(touched[kind].sum()) for touched in self._touched.values())
            for kind in self._requested
        }
        cost = Cost(
            1,
            int(np.prod(launch.grid)),
            self._requested["load"],
            self._requested["store"],
            distinct["load"],
            distinct["store"],
            self._flops,
        )
        arguments = {
            name: TensorInfo.of(value) if isinstance(value, Tensor) else value
            for name, value in launch.arguments.items()
        }
        counted = Counted(launch.module, launch.kernel, launch.grid, arguments, launch.options, cost)
        self.record.launches.append(counted)
