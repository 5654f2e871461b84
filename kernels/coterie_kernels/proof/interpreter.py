"""Triton's interpreter, watched: who loads and stores what, which products it forms, and in what order programs run.

An address needs 48 bits of a pointer's 64. The rest say of which argument of the launch a pointer was made: whatever
arithmetic a kernel does with it, each access is known to belong to that argument, and is checked against it alone. The
number is taken off before memory is touched.
"""

import inspect
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import triton
from torch import Tensor
from triton.runtime import interpreter

_ADDRESS_BITS = 48
_ADDRESS = np.uint64((1 << _ADDRESS_BITS) - 1)
_NOT_A_KERNEL = (str(Path(triton.__file__).parent), str(Path(__file__).parent))


@dataclass(frozen=True)
class Region:
    """A tensor argument, from its first to past its last element."""

    name: str
    tensor: Tensor

    @property
    def start(self) -> int:
        return self.tensor.data_ptr()

    @property
    def num_bytes(self) -> int:
        if not self.tensor.numel():
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.tensor.shape, self.tensor.stride(), strict=True))
        return (last + 1) * self.tensor.element_size()


@dataclass
class Launch:
    """kernel[grid](arguments), of a module; options: such as num_warps; regions: its tensors."""

    module: str
    kernel: str
    arguments: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, int, int] = (0, 0, 0)
    regions: list[Region] = field(default_factory=list)


@dataclass(frozen=True)
class Access:
    """What a program asks for at once.

    Attributes:
        kind: "load", "store" or "atomic".
        program: its number in the grid, the last axis fastest.
        region: the argument that the pointers were made of; None: of none.
        offsets: [lanes] int64, bytes from the region's start; of active lanes only.
        num_bytes: of a lane.
        values: what a store or an atomic writes, [lanes]; None of a load.
        is_float: whether the memory holds floating-point numbers.
    """

    launch: Launch
    kind: str
    program: int
    region: Region | None
    offsets: np.ndarray
    num_bytes: int
    values: np.ndarray | None
    is_float: bool


class Observer:
    """Is told what happens; each of its methods may be overridden. What it raises ends the launch."""

    # What lanes that a load masks out hold where it names no other value: None, what Triton's interpreter gives them.
    poisons_masked_lanes = False

    def begin(self, launch: Launch) -> None:
        """Before the first program."""

    def access(self, access: Access) -> np.ndarray | None:
        """[lanes] bool: which may touch memory; None: all."""

    def dot(self, flops: int) -> None:
        """2·M·N·K of one product (times its batch)."""

    def barrier(self) -> None:
        """The running program waits for all of its threads."""

    def end(self, launch: Launch) -> None:
        """After the last program, if none raised."""


@contextmanager
def watched(observer: Observer) -> Iterator[Callable[[], bool]]:
    """Every launch inside this block is told to `observer`, one at a time; gives whether a launch is going on.

    Raises:
        RuntimeError: kernels are not interpreted: TRITON_INTERPRET=1 was not set when they were defined.
    """
    _require_interpreter()
    watch = _Watch(observer)
    builder = interpreter.InterpreterBuilder
    with ExitStack() as stack:
        patch = lambda owner, name, make: stack.enter_context(_patched(owner, name, make))  # noqa: E731
        patch(interpreter.GridExecutor, "__call__", watch.call)
        patch(interpreter, "_implicit_cvt", watch.convert)
        patch(builder, "set_grid_dim", watch.set_grid_dim)
        patch(builder, "create_masked_load", watch.masked_load)
        patch(builder, "create_masked_store", watch.masked_store)
        patch(builder, "create_atomic_rmw", watch.atomic_rmw)
        patch(builder, "create_atomic_cas", watch.atomic_cas)
        patch(builder, "create_dot", watch.dot)
        patch(builder, "create_barrier", watch.barrier)
        yield lambda: watch.launch is not None


@contextmanager
def shuffled_grid(seed: int) -> Iterator[None]:
    """Every launch inside this block runs its programs in a random order of its own."""
    _require_interpreter()
    generator = np.random.default_rng(seed)
    order = np.arange(0)

    def set_grid_dim(original):
        def patched(builder, *grid):
            nonlocal order
            order = generator.permutation(math.prod(grid))
            original(builder, *grid)

        return patched

    def set_grid_idx(original):
        def patched(builder, *index):
            number = order[np.ravel_multi_index(index, builder.grid_dim)]
            original(builder, *map(int, np.unravel_index(number, builder.grid_dim)))

        return patched

    builder = interpreter.InterpreterBuilder
    with _patched(builder, "set_grid_dim", set_grid_dim), _patched(builder, "set_grid_idx", set_grid_idx):
        yield


def kernel_line() -> str:
    """file:line of the kernel that is running."""
    frame = sys._getframe(1)
    while frame and frame.f_code.co_filename.startswith(_NOT_A_KERNEL):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "?"


class _Watch:
    """Between the interpreter and an observer. Each method makes a patch of what it gets."""

    def __init__(self, observer: Observer):
        self._observer = observer
        self.launch: Launch | None = None

    def call(self, original):
        def patched(executor, *args, **kwargs):
            names = inspect.signature(executor.fn).parameters
            named = {name: value for name, value in kwargs.items() if name in names}
            options = {name: value for name, value in kwargs.items() if name not in names}
            arguments = inspect.getcallargs(executor.fn, *args, **named)
            self.launch = Launch(executor.fn.__module__, executor.fn.__name__, arguments, options)
            try:
                original(executor, *args, **kwargs)
                self._observer.end(self.launch)
            finally:
                self.launch = None

        return patched

    def convert(self, original):
        def patched(value):
            converted = original(value)
            if hasattr(value, "data_ptr") and self.launch:
                tensor = getattr(value, "base", value)  # reinterpreted tensors wrap the real one
                self.launch.regions.append(Region(self._name_of(tensor), tensor))
                converted.handle.data |= np.uint64(len(self.launch.regions) << _ADDRESS_BITS)
            return converted

        return patched

    def _name_of(self, tensor: Tensor) -> str:
        """The interpreter makes tensors of its own out of the arguments: the same memory is the same one."""
        for name, value in self.launch.arguments.items():
            value = getattr(value, "base", value)
            if isinstance(value, Tensor) and (value.data_ptr(), value.shape) == (tensor.data_ptr(), tensor.shape):
                return name
        return "?"

    def set_grid_dim(self, original):
        def patched(builder, *grid):
            original(builder, *grid)
            self.launch.grid = grid
            self._observer.begin(self.launch)

        return patched

    def masked_load(self, original):
        def patched(builder, pointers, mask, other, *rest):
            pointers, mask = self._visit(builder, "load", pointers, mask)
            if other is None and self._observer.poisons_masked_lanes:
                other = _poison(pointers)
            return original(builder, pointers, mask, other, *rest)

        return patched

    def masked_store(self, original):
        def patched(builder, pointers, value, mask, *rest):
            pointers, mask = self._visit(builder, "store", pointers, mask, value)
            return original(builder, pointers, value, mask, *rest)

        return patched

    def atomic_rmw(self, original):
        def patched(builder, operation, pointers, value, mask, *rest):
            pointers, mask = self._visit(builder, "atomic", pointers, mask, value)
            return original(builder, operation, pointers, value, mask, *rest)

        return patched

    def atomic_cas(self, original):
        def patched(builder, pointers, expected, value, *rest):
            everywhere = interpreter.TensorHandle(np.ones(pointers.data.shape, bool), triton.language.int1)
            pointers, mask = self._visit(builder, "atomic", pointers, everywhere, value)
            if not mask.data.all():
                raise IndexError(f"{kernel_line()}: an atomic outside of its tensor")
            return original(builder, pointers, expected, value, *rest)

        return patched

    def dot(self, original):
        def patched(builder, a, b, *rest):
            self._observer.dot(2 * a.data.size * b.data.shape[-1])
            return original(builder, a, b, *rest)

        return patched

    def barrier(self, original):
        def patched(builder):
            self._observer.barrier()
            return original(builder)

        return patched

    def _visit(self, builder, kind: str, pointers, mask, value=None):
        """Tells the observer; returns real pointers and the mask of who may go on."""
        lanes = np.broadcast_to(mask.data, pointers.data.shape)
        active = pointers.data[lanes]
        element = pointers.get_element_ty()
        if active.size:
            tags = active >> np.uint64(_ADDRESS_BITS)
            program = int(np.ravel_multi_index(builder.grid_idx, builder.grid_dim))
            allowed = np.ones(active.shape, bool)
            for tag in [int(tags[0])] if (tags == tags[0]).all() else np.unique(tags).tolist():
                here = tags == tag
                region = self.launch.regions[tag - 1] if 0 < tag <= len(self.launch.regions) else None
                origin = np.uint64((tag << _ADDRESS_BITS) + (region.start if region else 0))
                written = None if value is None else np.broadcast_to(value.data, lanes.shape)[lanes][here]
                access = Access(
                    self.launch,
                    kind,
                    program,
                    region,
                    (active[here] - origin).view(np.int64),
                    max(element.primitive_bitwidth // 8, 1),
                    written,
                    element.is_floating(),
                )
                answer = self._observer.access(access)
                if answer is not None:
                    allowed[here] = answer
            if not allowed.all():
                lanes = lanes.copy()
                lanes[lanes] = allowed
                mask = interpreter.TensorHandle(lanes, mask.dtype)
        return interpreter.TensorHandle(pointers.data & _ADDRESS, pointers.dtype), mask


def _poison(pointers):
    """NaN, or the largest integer."""
    element = pointers.get_element_ty()
    dtype = interpreter._get_np_dtype(element)
    if element.is_floating() and dtype.kind == "f":
        value = np.nan
    elif element.is_floating():  # bits: exponent and mantissa all ones is NaN in every format
        value = np.iinfo(dtype).max >> 1
    else:
        value = True if dtype.kind == "b" else np.iinfo(dtype).max
    return interpreter.TensorHandle(np.full(pointers.data.shape, value, dtype), element)


@contextmanager
def _patched(owner: Any, name: str, make) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def _require_interpreter() -> None:
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("kernels are interpreted only where TRITON_INTERPRET=1 is set before they are imported")
