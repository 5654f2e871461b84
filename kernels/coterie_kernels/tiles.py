"""Static tile sizes: for each target and class of shapes, how much a program takes. Nothing is tuned while running.

An entry must compile without a spilled byte for its target and fit its shared memory (sm_80's the 99 KiB of 8.6, 8.9
and 12.0 too): `python -m coterie_kernels.proof compile` finds those that do not. Which are fastest only a GPU can tell:
`coterie tune` measures there and writes a table of this form, for `use_tiles`.

A table maps target → kernel → class → sizes:

| kernel | class | sizes |
|---|---|---|
| fused_forward, fused_backward, fused_recompute | (F up to, rows) | depth, columns, warps, stages |
| forward, backward, recompute: one launch a matrix | rows | units, depth, warps, stages |
| multiply_rows | rows | columns, depth, warps, stages |
| multiply_columns | the smaller side up to | rows, columns, depth, warps, stages |

rows: of one expert that a program takes; units: of the hidden layer at a time; depth: what a sum runs over at a time;
columns: of the result. "recompute" is backward that forms H again. 32-bit kernels have "float32 " before their name.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from coterie_kernels.delta_rule_tiles import DELTA_RULE_TILES
from coterie_kernels.sparse_attention_tiles import SPARSE_ATTENTION_TILES

Table = dict[str, dict[str, dict]]


@dataclass(frozen=True)
class Tile:
    """rows × columns of the result, summed over `depth` at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def settings(self) -> dict[str, int | bool]:
        """Of a launch."""
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "DEPTH": self.depth,
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": True,  # as Triton from 3.10 on no longer has it by itself
        }


@dataclass(frozen=True)
class MlpTile:
    """rows of one expert; `units` of its hidden layer at a time, summed over `depth`; `columns` of its output.

    fused: one program goes through all hidden units and on to the output.
    """

    rows: int
    units: int
    depth: int
    columns: int
    warps: int
    stages: int
    fused: bool


_KINDS = ("forward", "backward", "recompute")
_ANY = 1 << 30


def _half_precision(stages: int, fused: Mapping, others: Mapping) -> dict[str, dict]:
    """What most entries are, but for the given ones; None: there is no such entry."""
    usual, wide, row = (64, 64, 4, stages), (64, 64, 8, stages), (128, 64, 4, stages)
    heights = (16, 32, 64)
    kernels = {
        "multiply_rows": dict.fromkeys(heights, row) | {128: (128, 64, 8, stages)},
        "multiply_columns": {64: (64, 64, 64, 4, stages), _ANY: (128, 128, 64, 8, stages)},
    }
    for kind in _KINDS:
        kernels[kind] = dict.fromkeys(heights, usual) | {128: wide}
        classes = {(width, rows): wide if rows == 64 else usual for width in (32, 64, 128, 256) for rows in heights}
        kernels[f"fused_{kind}"] = _but(classes, fused.get(kind, {}))
    return {name: _but(classes, others.get(name, {})) for name, classes in kernels.items()}


def _float32(stages: int, others: Mapping = MappingProxyType({})) -> dict[str, dict]:
    heights = (16, 32, 64)
    kernels = {kind: dict.fromkeys(heights, (32, 32, 4, stages)) for kind in _KINDS}
    kernels["multiply_rows"] = dict.fromkeys(heights, (64, 32, 4, stages))
    kernels["multiply_columns"] = {_ANY: (64, 64, 32, 4, stages)}
    return {f"float32 {name}": _but(classes, others.get(name, {})) for name, classes in kernels.items()}


def _but(classes: dict, others: Mapping) -> dict:
    return {key: sizes for key, sizes in (classes | others).items() if sizes}


# NVIDIA pipelines three stages deep where shared memory and registers allow it, AMD's 64 KiB two.
TILES: Table = {
    "sm_80": _float32(3, {"multiply_rows": {64: (32, 32, 4, 3)}})
    | _half_precision(
        3,
        {
            "forward": {(128, 16): (64, 64, 4, 2), (256, 64): None},
            "backward": {
                (128, 64): (64, 32, 8, 2),
                (256, 16): (64, 64, 4, 2),
                (256, 32): (64, 64, 8, 1),
                (256, 64): None,
            },
            "recompute": {
                (128, 16): (64, 64, 8, 3),
                (128, 32): (64, 32, 8, 2),
                (128, 64): (32, 64, 8, 2),
                (256, 16): (32, 64, 8, 2),
                (256, 32): (32, 64, 8, 1),
                (256, 64): None,
            },
        },
        {
            "backward": {64: (64, 64, 8, 3), 128: (64, 32, 8, 3)},
            "recompute": {64: (64, 64, 8, 3), 128: None},
            "multiply_rows": {64: (64, 64, 8, 3), 128: (64, 64, 8, 3)},
            "multiply_columns": {_ANY: (128, 128, 32, 8, 3)},
        },
    ),
    "sm_90": _float32(3)
    | _half_precision(
        3,
        _HOPPER := {
            "forward": {(256, 32): (64, 64, 8, 3), (256, 64): (32, 64, 8, 2)},
            "backward": {
                (128, 64): (64, 64, 8, 2),
                (256, 16): (64, 64, 4, 2),
                (256, 32): (64, 64, 8, 2),
                (256, 64): (64, 64, 8, 2),
            },
            "recompute": {
                (128, 16): (64, 64, 8, 3),
                (128, 32): (64, 64, 8, 3),
                (128, 64): (64, 64, 8, 2),
                (256, 16): (32, 64, 8, 2),
                (256, 32): (32, 32, 8, 1),
                (256, 64): (64, 64, 8, 2),
            },
        },
        {
            "backward": {64: (64, 64, 8, 3), 128: None},
            "recompute": {64: (64, 64, 8, 3)},
            "multiply_rows": {16: (128, 64, 8, 3), 64: (128, 64, 8, 3), 128: (64, 64, 8, 3)},
        },
    ),
    "sm_100": _float32(3)
    | _half_precision(
        3,
        _HOPPER | {"backward": _HOPPER["backward"] | {(256, 16): (64, 64, 8, 2), (256, 64): (64, 64, 8, 1)}},
        {"multiply_rows": {64: (128, 64, 8, 3)}},
    ),
    "gfx942": _float32(2)
    | _half_precision(
        2,
        {
            "forward": {(256, 64): (32, 64, 4, 2)},
            "backward": {(256, 32): (64, 64, 4, 1), (256, 64): (64, 64, 4, 2)},
            "recompute": {(128, 64): (64, 64, 4, 2), (256, 32): (64, 32, 4, 2), (256, 64): (64, 64, 4, 2)},
        },
        {},
    ),
}

for _target, _kernels in (*DELTA_RULE_TILES.items(), *SPARSE_ATTENTION_TILES.items()):
    TILES[_target] |= _kernels


def use_tiles(table: Table | str | os.PathLike) -> None:
    """Takes the entries of a table, or of the file that `coterie tune` wrote, in place of ours, in this process.

    Raises:
        ValueError: a target, kernel or class that there is not, or sizes of another number; nothing is then taken.
    """
    if not isinstance(table, Mapping):
        table = read_tiles(table)
    for target, kernel, key, sizes in _entries(table):
        where = f"tiles: {target}, {kernel}, {key}"
        ours = TILES.get(target, {}).get(kernel)
        if ours is None or type(key) is not type(next(iter(ours))):
            raise ValueError(f"{where}: there is no such target, kernel or class")
        wanted = len(next(iter(ours.values())))
        if len(sizes) != wanted or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"{where}: must be {wanted} positive integers, got {sizes}")
    for target, kernel, key, sizes in _entries(table):
        TILES[target][kernel][key] = tuple(sizes)


def read_tiles(path: str | os.PathLike) -> Table:
    """The table in a file; classes of two numbers are written "128, 64"."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        return {
            target: {
                kernel: {_key(text): tuple(sizes) for text, sizes in classes.items()}
                for kernel, classes in kernels.items()
            }
            for target, kernels in raw.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no table of tiles: {error}") from error


def write_tiles(path: str | os.PathLike, table: Table) -> None:
    """Whole or not at all: under another name first."""
    raw: dict = {}
    for target, kernel, key, sizes in _entries(table):
        text = ", ".join(map(str, key)) if isinstance(key, tuple) else str(key)
        raw.setdefault(target, {}).setdefault(kernel, {})[text] = list(sizes)
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(raw, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _entries(table: Table):
    for target, kernels in table.items():
        for kernel, classes in kernels.items():
            for key, sizes in classes.items():
                yield target, kernel, key, sizes


def _key(text: str) -> int | tuple[int, ...]:
    numbers = tuple(int(number) for number in text.split(","))
    return numbers if len(numbers) > 1 else numbers[0]


def mlp_tile(target: str, dtype: torch.dtype, hidden_dim: int, rows_per_expert: float, kind: str) -> MlpTile:
    """For "forward", "backward" or "recompute" of an MLP; rows_per_expert: N / E."""
    name, width = mlp_class(target, dtype, hidden_dim, kind)
    classes = TILES[target][name]
    if width is None:
        rows = _height(classes, rows_per_expert)
        units, depth, warps, stages = classes[rows]
        return MlpTile(rows, units, depth, 0, warps, stages, fused=False)
    rows = _height([rows for up_to, rows in classes if up_to == width], rows_per_expert)
    depth, columns, warps, stages = classes[width, rows]
    return MlpTile(rows, _units(hidden_dim), depth, columns, warps, stages, fused=True)


def mlp_class(target: str, dtype: torch.dtype, hidden_dim: int, kind: str) -> tuple[str, int | None]:
    """The kernel's name in the table, and up to which F its class goes; None: experts too wide to be fused."""
    if dtype != torch.float32:
        widths = {up_to for up_to, _ in TILES[target][f"fused_{kind}"] if up_to >= hidden_dim}
        if widths:
            return f"fused_{kind}", min(widths)
    return _named(dtype, kind), None


def row_tile(target: str, dtype: torch.dtype, rows_per_expert: float) -> Tile:
    """For one product a row."""
    classes = TILES[target][_named(dtype, "multiply_rows")]
    rows = _height(classes, rows_per_expert)
    return Tile(rows, *classes[rows])


def column_tile(target: str, dtype: torch.dtype, smaller: int) -> Tile:
    """For the gradient to matrices whose smaller side is that."""
    return Tile(*TILES[target][_named(dtype, "multiply_columns")][column_class(target, dtype, smaller)])


def column_class(target: str, dtype: torch.dtype, smaller: int) -> int:
    return min(up_to for up_to in TILES[target][_named(dtype, "multiply_columns")] if up_to >= smaller)


def _named(dtype: torch.dtype, kernel: str) -> str:
    return f"float32 {kernel}" if dtype == torch.float32 else kernel


def _height(heights, rows_per_expert: float) -> int:
    """The greatest with at most a sixth of the work on padding: an expert's last tile is half empty on average."""
    return max((rows for rows in heights if 3 * rows <= rows_per_expert), default=min(heights))


def _units(hidden_dim: int) -> int:
    """Hidden units at a time: 64, or fewer where that leaves less padding."""
    if hidden_dim <= 16:
        return 16
    return 32 if hidden_dim <= 128 and 0 < hidden_dim % 64 <= 32 else 64
