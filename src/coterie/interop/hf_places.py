"""Where every weight of a transformers checkpoint stands in a coterie model, from the tables in `hf_families`."""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from coterie.interop.hf_families import Stored
from coterie.models.config import TransformerConfig

LAYER = re.compile(r"layers\.(\d+)\.(.+)")


class Header(NamedTuple):
    """What is known of a weight before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Place(NamedTuple):
    """Where a weight of a checkpoint stands in a coterie model: `state_dict()[name][index]`.

    Where there are several names, its rows are theirs in turn, group by group; `transposed` and `in_turns` are as in
    `Stored`.
    """

    names: tuple[str, ...]
    index: tuple[int | slice, ...] = ()
    groups: int = 1
    transposed: bool = False
    in_turns: bool = False

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight; a view where it stands in one tensor, and not in turns."""
        if len(self.names) > 1:
            return torch.cat(self._grouped(tensors), 1).flatten(0, 1)
        view = self._view(tensors)
        return view.flatten(-2) if self.in_turns else view

    def fill(self, tensors: Mapping[str, Tensor], weight: Tensor) -> None:
        """Copy a weight there."""
        if len(self.names) == 1:
            view = self._view(tensors)
            view.copy_(weight.view(view.shape))
            return
        parts = self._grouped(tensors)
        rows = weight.unflatten(0, (self.groups, -1)).split([part.shape[1] for part in parts], 1)
        for part, own in zip(parts, rows, strict=True):
            part.copy_(own)

    def _view(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The part of the one tensor, in the weight's order; [.., 2] of gate and up behind where they are in turns."""
        own = tensors[self.names[0]][self.index]
        if self.transposed:
            own = own.mT
        return own.unflatten(-1, (2, -1)).mT if self.in_turns else own

    def _grouped(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return [tensors[name].unflatten(0, (self.groups, -1)) for name in self.names]


def places_of(
    tensors: Mapping[str, Tensor],
    config: TransformerConfig,
    table: Mapping[str, str | tuple[str, ...] | Stored],
    linear: Mapping[str | tuple[str, ...], str],
) -> Iterator[tuple[str, Place]]:
    """(their name, its place) of all weights that a table knows; of linear attention, the table of that name."""
    heads = config.linear_num_key_heads or config.linear_num_heads or config.num_heads
    for ours, tensor in tensors.items():
        layer, prefix, part = "", "", ours
        if match := LAYER.fullmatch(ours):
            layer, prefix, part = f"layers.{match[1]}.", f"model.layers.{match[1]}.", match[2]
        if layer and part.startswith("mixer.") and config.layer_mixers[int(match[1])] == "linear_attention":
            for names, theirs in linear.items():
                names = (names,) if isinstance(names, str) else names
                if part == names[0]:
                    yield prefix + theirs, Place(tuple(layer + name for name in names), (), heads)
            continue
        if part not in table:
            continue
        stored = table[part]
        if isinstance(stored, Stored):
            yield prefix + stored.name, Place((ours,), transposed=stored.transposed, in_turns=stored.in_turns)
            continue
        templates = (stored,) if isinstance(stored, str) else stored
        for expert in range(len(tensor)) if "{e}" in templates[0] else (None,):
            above: tuple[int, ...] = () if expert is None else (expert,)
            height = tensor.shape[len(above)] // len(templates)
            for position, template in enumerate(templates):
                rows = (slice(position * height, (position + 1) * height),) if len(templates) > 1 else ()
                yield prefix + template.replace("{e}", str(expert)), Place((ours,), above + rows)
