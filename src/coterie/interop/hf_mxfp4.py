"""The experts of gpt_oss as they are published: MXFP4, four bits a number and a power of 2 for every 32 of them.

A matrix NAME, [E, B, A] in transformers, is NAME_blocks [E, A, B/32, 16] uint8, two numbers a byte, the first in its
lower half, and NAME_scales [E, A, B/32] uint8, the power plus 127. Every number of four bits is one of 16 (OCP
Microscaling Formats 1.0, E2M1): a sign, and 0, 0.5, 1, 1.5, 2, 3, 4 or 6. bfloat16 holds all products exactly, and
those past its largest number are infinite.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from coterie.interop.hf_places import Header

_BLOCKS, _SCALES = "_blocks", "_scales"
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantize(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks [E, A, B/32, 16] and scales [E, A, B/32], both uint8 → [E, B, A] bfloat16; a view of [E, A, B]."""
    numbers = torch.tensor((*_POSITIVE, *(-number for number in _POSITIVE)))
    byte = torch.arange(256)
    pairs = torch.stack((numbers[byte % 16], numbers[byte // 16]), 1)  # [256, 2]
    matrices = torch.empty(*blocks.shape[:2], 32 * blocks.shape[2], dtype=torch.bfloat16)
    for matrix, codes, powers in zip(matrices, blocks, scales, strict=True):  # one expert: the rest needs no room
        products = torch.ldexp(pairs[codes.int()].flatten(-2), powers.int().unsqueeze(-1) - 127)  # [A, B/32, 32]
        matrix.copy_(products.flatten(1))
    return matrices.mT


def dequantized_headers(headers: Mapping[str, Header]) -> dict[str, Header]:
    """The headers with each matrix for its blocks and scales.

    Raises:
        ValueError: blocks without scales, scales without blocks, either of another dtype or shape, or beside the
            matrix itself; named.
    """
    result = {}
    for name, header in headers.items():
        stem = _stem(name)
        if stem is None:
            result[name] = header
            continue
        for part in (_BLOCKS, _SCALES):
            if stem + part not in headers:
                raise ValueError(f"{name} has no {stem + part} beside it")
        (blocks, scales), dtypes = zip(headers[stem + _BLOCKS], headers[stem + _SCALES], strict=True)
        if dtypes != (torch.uint8, torch.uint8) or len(blocks) != 4 or blocks != (*scales, 16):
            raise ValueError(
                f"{stem}{_BLOCKS} and {_SCALES} must be [E, A, B/32, 16] and [E, A, B/32] of uint8, "
                f"got {list(blocks)} and {list(scales)} of {dtypes[0]} and {dtypes[1]}"
            )
        if stem in headers:
            raise ValueError(f"{stem} is there twice, once as {stem}{_BLOCKS}")
        result[stem] = Header((blocks[0], 32 * blocks[2], blocks[1]), torch.bfloat16)
    return result


def dequantized_weights(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The weights with each matrix for its blocks and scales, as soon as both have come."""
    waiting: dict[str, Tensor] = {}
    for name, weight in weights:
        stem = _stem(name)
        if stem is None:
            yield name, weight
            continue
        waiting[name] = weight
        if stem + _BLOCKS in waiting and stem + _SCALES in waiting:
            yield stem, dequantize(waiting.pop(stem + _BLOCKS), waiting.pop(stem + _SCALES))


def _stem(name: str) -> str | None:
    """The matrix's name of what is its blocks or scales; else None."""
    return next((name.removesuffix(part) for part in (_BLOCKS, _SCALES) if name.endswith(part)), None)
