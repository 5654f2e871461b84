"""What a GPU would not forgive, found while Triton's interpreter runs a kernel.

Its memory is a model of a GPU's: an element belongs to one argument, was written by someone or by no one, and programs
of a launch run in any order, so none may depend on what another does.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from coterie_kernels.proof.interpreter import Access, Launch, Observer, kernel_line, watched

_FRESH = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


@dataclass
class Finding:
    """A rule that was broken; the first time that it was so at that line, and how many elements in all.

    Attributes:
        rule: which one.
        where: file:line.
        argument: of the kernel; "result 2" of what was returned.
        element: its place in the argument's memory, counted in elements from the first.
    """

    rule: str
    kernel: str
    where: str
    argument: str
    program: int
    element: int
    count: int = 1

    def __str__(self) -> str:
        at = f"{self.argument}[{self.element}]" + (f" and {self.count - 1} more" if self.count > 1 else "")
        return f"{self.kernel} ({self.where}), program {self.program}: {self.rule}: {at}"


class Sanitizer:
    """What was found so far, in order."""

    def __init__(self, findings: dict[tuple, Finding], memory: "_Memory"):
        self._findings, self._memory = findings, memory

    @property
    def findings(self) -> list[Finding]:
        return list(self._findings.values())

    def check_results(self, results: Sequence[Tensor | None]) -> None:
        """Whether every element of what launchers returned was written."""
        for number, result in enumerate(results):
            if result is not None:
                self._memory.read_by_torch(result, "an element that no one has written", "", f"result {number}")


@contextmanager
def sanitize() -> Iterator[Sanitizer]:
    """Checks every launch inside this block. The rules, of each element that an active lane asks for:

    - it lies in the tensor that its pointer was made of (and is left alone if it does not);
    - what is read was written: by a launch, by torch, or before the block began. Memory of `torch.empty` was not,
      whatever its dtype; torch's own operations are held to that too, but for those inside a custom op;
    - no other program of the launch stores to it, and none stores to it that others load;
    - a store has no two values for it;
    - a program that loads what it stored has a barrier in between, for its threads may differ;
    - atomics are of integers: floating-point sums would depend on the order.

    Lanes that a load masks out without naming a value hold NaN or the largest integer, so that results show it if one
    is used.

    Raises:
        RuntimeError: as `watched` does.
    """
    findings: dict[tuple, Finding] = {}
    memory = _Memory(findings)
    with watched(memory) as is_launching, _TorchMemory(memory, is_launching):
        yield Sanitizer(findings, memory)


class _Memory(Observer):
    """Who wrote what: by storage and byte."""

    poisons_masked_lanes = True

    def __init__(self, findings: dict[tuple, Finding]):
        self._findings = findings
        self._storages = {}  # held, so that no address is used again
        self._unwritten: dict[int, Tensor] = {}  # storage → [bytes] bool
        self._inside: dict[int, np.ndarray] = {}  # id of a region → [bytes] bool: which are elements of the tensor
        self._tables: dict[int, dict[str, np.ndarray]] = {}  # of the launch: storage → what → [bytes]
        self._phase = 0  # grows with each barrier

    def fresh(self, tensor: Tensor) -> None:
        """Nothing of it is written."""
        storage = tensor.untyped_storage()
        if storage.nbytes():
            self._storages[storage.data_ptr()] = storage
            self._unwritten[storage.data_ptr()] = torch.ones(storage.nbytes(), dtype=torch.bool)

    def written_by_torch(self, tensor: Tensor) -> None:
        unwritten = self._unwritten.get(tensor.untyped_storage().data_ptr())
        if unwritten is not None and tensor.numel():
            _bytes_of(unwritten, tensor).fill_(False)

    def read_by_torch(self, tensor: Tensor, rule: str, who: str, argument: str) -> None:
        unwritten = self._unwritten.get(tensor.untyped_storage().data_ptr())
        if unwritten is None or not tensor.numel():
            return
        lacking = _bytes_of(unwritten, tensor).any(-1).flatten().nonzero().flatten()
        if len(lacking):
            finding = Finding(rule, who or "returned", "torch", argument, 0, int(lacking[0]), len(lacking))
            self._findings.setdefault((rule, who, argument), finding)

    def begin(self, launch: Launch) -> None:
        self._tables.clear()
        self._inside.clear()
        for region in launch.regions:
            inside = torch.zeros(region.num_bytes, dtype=torch.bool)
            if region.num_bytes:
                _bytes_of(inside, region.tensor, 0).fill_(True)
            self._inside[id(region)] = inside.numpy()
            storage = region.tensor.untyped_storage()
            size = storage.nbytes()
            self._storages[storage.data_ptr()] = storage
            self._unwritten.setdefault(storage.data_ptr(), torch.zeros(size, dtype=torch.bool))
            self._tables[storage.data_ptr()] = {
                name: np.zeros(size, np.int32) for name in ("stored_by", "stored_in", "loaded_by")
            }

    def barrier(self) -> None:
        self._phase += 1

    def access(self, access: Access) -> np.ndarray:
        report = _Reporter(self._findings, access)
        region = access.region
        if region is None:
            report("a pointer that was made of no argument", np.ones(access.offsets.shape, bool))
            return np.zeros(access.offsets.shape, bool)
        inside = self._inside[id(region)]
        allowed = (access.offsets >= 0) & (access.offsets + access.num_bytes <= inside.size)
        places = access.offsets[:, None] + np.arange(access.num_bytes)  # [lanes, bytes]
        allowed[allowed] = inside[places[allowed]].all(1)
        report("outside of its tensor", ~allowed)
        storage = region.tensor.untyped_storage().data_ptr()
        places = places[allowed] + (region.start - storage)
        me = access.program + 1
        table, unwritten = self._tables[storage], self._unwritten[storage].numpy()
        stored_by = table["stored_by"][places]
        others_stored = ((stored_by != 0) & (stored_by != me)).any(1)
        if access.kind == "atomic":
            report("an atomic on floating-point numbers", allowed & access.is_float)
            unwritten[places] = False
            return allowed
        if access.kind == "load":
            report("an element that no one has written", allowed, unwritten[places].any(1))
            report("loads what another program stores", allowed, others_stored)
            just_stored = (stored_by == me) & (table["stored_in"][places] == self._phase + 1)
            report("loads what it stored, with no barrier in between", allowed, just_stored.any(1))
            loaded_by = table["loaded_by"][places]
            table["loaded_by"][places] = np.where((loaded_by == 0) | (loaded_by == me), me, -1)
            return allowed
        report("two programs store to it", allowed, others_stored)
        loaded_by = table["loaded_by"][places]
        report("stores what another program loads", allowed, ((loaded_by != 0) & (loaded_by != me)).any(1))
        report("two values for it in one store", allowed, _ambiguous(places[:, 0], access.values[allowed]))
        table["stored_by"][places] = me
        table["stored_in"][places] = self._phase + 1
        unwritten[places] = False
        return allowed


class _TorchMemory(TorchDispatchMode):
    """Tells `_Memory` which tensors torch makes without writing them, and which it writes and reads."""

    def __init__(self, memory: _Memory, is_launching):
        super().__init__()
        self._memory, self._is_launching = memory, is_launching

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if self._is_launching() or name == "set_":  # the interpreter's own handling of arguments
            return func(*args, **kwargs)
        is_view = any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
        written = []
        for schema, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, Tensor) and value.device.type == "cpu":
                if schema.alias_info and schema.alias_info.is_write:
                    written.append(value)
                elif not is_view and name not in _FRESH:
                    self._memory.read_by_torch(value, "torch reads what no one has written", name, schema.name)
        result = func(*args, **kwargs)
        if name in _FRESH and result.device.type == "cpu":
            self._memory.fresh(result)
        for tensor in [*written, *(value for value in [kwargs.get("out")] if isinstance(value, Tensor))]:
            self._memory.written_by_torch(tensor)
        return result


class _Reporter:
    """Adds to findings; one of each rule, line and argument."""

    def __init__(self, findings: dict[tuple, Finding], access: Access):
        self._findings, self._access = findings, access

    def __call__(self, rule: str, lanes: np.ndarray, among: np.ndarray | None = None) -> None:
        """lanes: which break the rule, or, given `among`, which of them it speaks of."""
        if among is not None:
            lanes = lanes.copy()
            lanes[lanes] = among
        if not lanes.any():
            return
        access, where = self._access, kernel_line()
        name = access.region.name if access.region else "?"
        key = (rule, access.launch.kernel, where, name)
        if key in self._findings:
            self._findings[key].count += int(lanes.sum())
            return
        element = int(access.offsets[lanes][0] // access.num_bytes)
        self._findings[key] = Finding(
            rule, access.launch.kernel, where, name, access.program, element, int(lanes.sum())
        )


def _ambiguous(places: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[lanes] bool: another lane of the store has the same place and other bits."""
    _, first, group = np.unique(places, return_index=True, return_inverse=True)
    if len(first) == len(places):
        return np.zeros(places.shape, bool)
    same = values == values[first][group]
    return ~(same | (values != values))  # two NaN are one value


def _bytes_of(flags: Tensor, tensor: Tensor, first: int | None = None) -> Tensor:
    """The flags [bytes] of a storage as a view [*tensor.shape, bytes of an element]; first: of the tensor's in them."""
    size = tensor.element_size()
    first = tensor.storage_offset() * size if first is None else first
    strides = (*(stride * size for stride in tensor.stride()), 1)
    return torch.as_strided(flags, (*tensor.shape, size), strides, first)
