"""Measures tiles on the GPU at hand, and keeps the fastest of each class of shapes that a layer meets."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from coterie_kernels import expert_mlp
from coterie_kernels.target import target_of
from coterie_kernels.tiles import TILES, Table, column_class, mlp_class

# Relative error past which a candidate's result is another one; sums in another order err by far less.
_SAME = 2e-2


@dataclass(frozen=True)
class Layer:
    """What the tiles are for; how many tokens it will see is not asked: tiles are chosen by rows per expert."""

    dim: int
    hidden_dim: int
    num_experts: int
    top_k: int
    dtype: torch.dtype = torch.bfloat16
    activation: expert_mlp.Activation = expert_mlp.Activation("silu", True)  # noqa: RUF009 (frozen)


@dataclass(frozen=True)
class Choice:
    """The fastest sizes of one class, beside the table's own; seconds of the launches that the kernel is part of."""

    kernel: str
    key: int | tuple[int, int]
    before: tuple[int, ...]
    after: tuple[int, ...]
    seconds_before: float
    seconds_after: float

    @property
    def gain(self) -> float:
        return self.seconds_before / self.seconds_after


def tune(
    layer: Layer,
    device: torch.device,
    *,
    measure: Callable[[Callable[[], object]], float] | None = None,
    progress: Callable[[Iterable], Iterable] = lambda tasks: tasks,
) -> tuple[Table, list[Choice]]:
    """Measures every class that `layer` can meet, one after the other; takes minutes.

    Args:
        measure: seconds of a function; the median of `triton.testing.do_bench` if None.
        progress: wraps the list of classes, as tqdm does.

    Returns:
        The table of what was chosen, for `use_tiles` and `write_tiles`, and how it compares.
    """
    measure = measure or (lambda run: triton.testing.do_bench(run, quantiles=[0.5]) / 1e3)
    target = target_of(torch.empty(0, device=device))
    choices = [_choose(target, *task, layer, device, measure) for task in progress(list(_tasks(target, layer)))]
    table: Table = {target: {}}
    for choice in choices:
        table[target].setdefault(choice.kernel, {})[choice.key] = choice.after
    return table, choices


def _tasks(target: str, layer: Layer) -> Iterator[tuple[str, int | tuple[int, int], str, int]]:
    """(kernel, class, what runs it, rows per expert)."""
    for kind in ("forward", "backward", "recompute"):
        kernel, width = mlp_class(target, layer.dtype, layer.hidden_dim, kind)
        for key in TILES[target][kernel]:
            if width is None or key[0] == width:
                yield kernel, key, kind, 4 * (key if width is None else key[1])
    prefix = "float32 " if layer.dtype == torch.float32 else ""
    if mlp_class(target, layer.dtype, layer.hidden_dim, "forward")[1] is None:
        for rows in TILES[target][f"{prefix}multiply_rows"]:
            yield f"{prefix}multiply_rows", rows, "forward", 4 * rows
    key = column_class(target, layer.dtype, min(layer.dim, layer.hidden_dim))
    yield f"{prefix}multiply_columns", key, "backward", 256


def _choose(target, kernel, key, kind, rows_per_expert, layer, device, measure) -> Choice:
    run = _runner(layer, device, kind, rows_per_expert)
    before = TILES[target][kernel][key]
    truth = run()
    timed = {before: measure(run)}
    for sizes in _neighbours(before):
        with _entry(target, kernel, key, sizes):
            try:
                result = run()
                if _is_same(result, truth):
                    timed[sizes] = measure(run)
            except TritonError:
                continue  # too much shared memory, or no program at all: not for this GPU
    after = min(timed, key=timed.get)
    return Choice(kernel, key, before, after, timed[before], timed[after])


def _neighbours(sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Other sizes: at most one of the tile's numbers halved or doubled, with 4 or 8 warps and 1 to 4 stages."""
    *numbers, _, _ = sizes
    tiles = {tuple(numbers)}
    for i, number in enumerate(numbers):
        tiles |= {(*numbers[:i], other, *numbers[i + 1 :]) for other in (max(16, number // 2), min(256, 2 * number))}
    for tile, warps, stages in product(sorted(tiles), (4, 8), (1, 2, 3, 4)):
        if (*tile, warps, stages) != sizes:
            yield (*tile, warps, stages)


@contextmanager
def _entry(target: str, kernel: str, key: int | tuple[int, int], sizes: tuple[int, ...]) -> Iterator[None]:
    classes = TILES[target][kernel]
    before = classes[key]
    classes[key] = sizes
    try:
        yield
    finally:
        classes[key] = before


def _runner(layer: Layer, device: torch.device, kind: str, rows_per_expert: int) -> Callable[[], list[Tensor | None]]:
    """A function that launches forward, or backward alone, of a balanced load."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device, generator=generator) * scale).to(layer.dtype)

    experts, dim, hidden = layer.num_experts, layer.dim, layer.hidden_dim
    tokens = max(1, rows_per_expert * experts // layer.top_k)
    ids = torch.rand(tokens, experts, device=device, generator=generator).topk(layer.top_k).indices
    weights = torch.rand(tokens, layer.top_k, device=device, generator=generator)
    x, grad = randn(tokens, dim), randn(tokens, dim)
    up = randn(experts, (2 if layer.activation.gated else 1) * hidden, dim, scale=dim**-0.5)
    down = randn(experts, dim, hidden, scale=hidden**-0.5)

    def forward() -> tuple[Tensor, ...]:
        return expert_mlp.forward(x, ids, weights, up, down, None, None, None, layer.activation, kind != "recompute")

    if kind == "forward":
        return lambda: [forward()[0]]
    kept = forward()[1:]
    needs = [True] * 4 + [False] * 2
    return lambda: list(expert_mlp.backward(grad, x, weights, up, down, None, None, *kept, layer.activation, needs))


def _is_same(got: list[Tensor | None], truth: list[Tensor | None]) -> bool:
    for a, b in zip(got, truth, strict=True):
        if a is not None and not (a.float() - b.float()).norm() <= _SAME * b.float().norm():  # NaN is not
            return False
    return True
