"""Measures tiles on the GPU at hand, and keeps the fastest of each class of shapes that a model's layers meet.

What kinds of layers there are, files beside this one say: `tune_experts`, `tune_delta_rule`, `tune_attention`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from coterie_kernels.target import target_of
from coterie_kernels.tiles import TILES, Table

# Relative error past which a candidate's result is another one; sums in another order err by far less.
_SAME = 2e-2

Key = int | tuple[int, int]
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """One class of a kernel, and what has to run to launch it.

    Attributes:
        kernel, key: of the table.
        kind: "forward", "backward", or another one of the layer's.
        rows_per_expert: of the load; 0 where there are no experts.
    """

    kernel: str
    key: Key
    kind: str
    rows_per_expert: int = 0


class Layer(ABC):
    """What tiles are for. Equal layers are equal: of a model's many each has to be measured once."""

    @abstractmethod
    def tasks(self, target: str) -> Iterable[Task]:
        """Every class that the layer can meet; what others are measured with comes before them.

        Raises:
            ValueError: it is wider than any class.
        """

    @abstractmethod
    def runner(self, task: Task, device: torch.device) -> Callable[[], list[Tensor | None]]:
        """A function that launches what the task says, on random numbers, and returns all that was computed."""

    def candidates(self, kernel: str, sizes: Sizes) -> Iterable[Sizes]:
        """Other sizes than those of the table that are worth a try, and right."""
        return neighbours(sizes)


@dataclass(frozen=True)
class Choice:
    """The fastest sizes of one class, beside the table's own; seconds of the launches that the kernel is part of."""

    kernel: str
    key: Key
    before: Sizes
    after: Sizes
    seconds_before: float
    seconds_after: float

    @property
    def gain(self) -> float:
        return self.seconds_before / self.seconds_after


def tune(
    layers: Iterable[Layer],
    device: torch.device,
    *,
    measure: Callable[[Callable[[], object]], float] | None = None,
    progress: Callable[[Iterable], Iterable] = lambda tasks: tasks,
) -> tuple[Table, list[Choice]]:
    """Measures every class that `layers` can meet, one after the other; takes minutes.

    A class that several of them meet is measured with the first. What was chosen holds for those measured after it, and
    no longer.

    Args:
        measure: seconds of a function; the median of `triton.testing.do_bench` if None.
        progress: wraps the list of classes, as tqdm does.

    Returns:
        The table of what was chosen, for `use_tiles` and `write_tiles`, and how it compares.

    Raises:
        ValueError: a layer is wider than any class.
    """
    measure = measure or (lambda run: triton.testing.do_bench(run, quantiles=[0.5]) / 1e3)
    target = target_of(torch.empty(0, device=device))
    tasks: dict[tuple[str, Key], tuple[Layer, Task]] = {}
    for layer in layers:
        for task in layer.tasks(target):
            tasks.setdefault((task.kernel, task.key), (layer, task))
    choices, table = [], {target: {}}
    with ExitStack() as chosen:
        for layer, task in progress(list(tasks.values())):
            choice = _choose(target, layer, task, device, measure)
            choices.append(choice)
            table[target].setdefault(choice.kernel, {})[choice.key] = choice.after
            chosen.enter_context(_entry(target, choice.kernel, choice.key, choice.after))
    return table, choices


def neighbours(sizes: Sizes) -> Iterator[Sizes]:
    """Other sizes: at most one of the tile's numbers halved or doubled, with 4 or 8 warps and 1 to 4 stages.

    Tiles of fewer than 4 warps are small: with 1, 2 or 4.
    """
    *numbers, own_warps, _ = sizes
    tiles = {tuple(numbers)}
    for i, number in enumerate(numbers):
        tiles |= {(*numbers[:i], other, *numbers[i + 1 :]) for other in (max(16, number // 2), min(256, 2 * number))}
    for tile, warps, stages in product(sorted(tiles), (4, 8) if own_warps >= 4 else (1, 2, 4), (1, 2, 3, 4)):
        if (*tile, warps, stages) != sizes:
            yield (*tile, warps, stages)


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normally distributed numbers, on the generator's device."""
    return (torch.randn(*shape, device=generator.device, generator=generator) * scale).to(dtype)


def _choose(
    target: str, layer: Layer, task: Task, device: torch.device, measure: Callable[[Callable[[], object]], float]
) -> Choice:
    run = layer.runner(task, device)
    before = TILES[target][task.kernel][task.key]
    truth = run()
    timed = {before: measure(run)}
    for sizes in layer.candidates(task.kernel, before):
        with _entry(target, task.kernel, task.key, sizes):
            try:
                result = run()
                if _is_same(result, truth):
                    timed[sizes] = measure(run)
            except TritonError:
                continue  # too much shared memory, or no program at all: not for this GPU
    after = min(timed, key=timed.get)
    return Choice(task.kernel, task.key, before, after, timed[before], timed[after])


@contextmanager
def _entry(target: str, kernel: str, key: Key, sizes: Sizes) -> Iterator[None]:
    classes = TILES[target][kernel]
    before = classes[key]
    classes[key] = sizes
    try:
        yield
    finally:
        classes[key] = before


def _is_same(got: list[Tensor | None], truth: list[Tensor | None]) -> bool:
    for a, b in zip(got, truth, strict=True):
        if a is not None and not (a.float() - b.float()).norm() <= _SAME * b.float().norm():  # NaN is not
            return False
    return True
