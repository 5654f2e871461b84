"""Static tile sizes: for each target and class of shapes, how much a program takes. Nothing is tuned while running."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """rows × columns of the result, summed over `depth` at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


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


def row_tile(target: str, dtype: torch.dtype, outer: int, rows_per_expert: float) -> Tile:
    return Tile(64, 64, 32, 4, 2)


def column_tile(target: str, dtype: torch.dtype, outer: int, inner: int) -> Tile:
    return Tile(64, 64, 32, 4, 2)


def mlp_tile(target: str, dtype: torch.dtype, hidden_dim: int, rows_per_expert: float, *, backward: bool) -> MlpTile:
    return MlpTile(64, 64, 32, 64, 8, 2, hidden_dim <= 256)
