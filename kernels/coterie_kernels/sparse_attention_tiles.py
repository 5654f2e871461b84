"""Tile sizes of `sparse_attention`'s kernels, in the form of `coterie_kernels.tiles`, whose table they are part of.

| kernel | class | sizes |
|---|---|---|
| attention_forward, attention_query_gradients | the greater of P and V up to | rows, keys, warps, stages |
| attention_selected, attention_selected_gradients: one query's heads are the rows | same | keys, warps, stages |
| attention_key_gradients | same | keys, rows, warps, stages |
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch

_WIDTHS = (32, 64, 128, 256)
_NAMES = {
    "forward": ("ROWS", "KEYS"),
    "selected": ("KEYS",),
    "query_gradients": ("ROWS", "KEYS"),
    "selected_gradients": ("KEYS",),
    "key_gradients": ("KEYS", "ROWS"),
}


def _half_precision(stages: int, others: Mapping[str, dict] = MappingProxyType({})) -> dict[str, dict]:
    """What most entries are, but for the given ones."""
    kernels = {
        "attention_forward": dict.fromkeys(_WIDTHS, (64, 64, 4, stages)) | {256: (64, 32, 8, stages)},
        "attention_selected": dict.fromkeys(_WIDTHS, (64, 4, stages)) | {256: (32, 4, stages)},
        "attention_query_gradients": dict.fromkeys(_WIDTHS, (64, 64, 4, stages))
        | {128: (64, 32, 8, stages), 256: (64, 32, 8, 1)},
        "attention_selected_gradients": dict.fromkeys(_WIDTHS, (64, 4, stages)) | {256: (32, 4, 1)},
        "attention_key_gradients": {
            32: (64, 32, 4, stages),
            64: (64, 32, 8, stages),
            128: (64, 16, 8, stages),
            256: (32, 32, 8, 1),
        },
    }
    return {name: classes | others.get(name, {}) for name, classes in kernels.items()}


def _float32(others: Mapping[str, dict] = MappingProxyType({})) -> dict[str, dict]:
    kernels = {
        "attention_forward": dict.fromkeys(_WIDTHS, (32, 16, 4, 1)) | {128: (32, 32, 4, 1), 256: (16, 16, 8, 1)},
        "attention_selected": dict.fromkeys(_WIDTHS, (32, 4, 1)) | {256: (16, 8, 1)},
        "attention_query_gradients": dict.fromkeys(_WIDTHS, (32, 16, 4, 1))
        | {128: (16, 16, 4, 1), 256: (16, 16, 8, 1)},
        "attention_selected_gradients": dict.fromkeys(_WIDTHS, (32, 4, 1)) | {256: (16, 8, 1)},
        "attention_key_gradients": dict.fromkeys(_WIDTHS, (32, 16, 4, 1)) | dict.fromkeys((128, 256), (16, 16, 8, 1)),
    }
    return {f"float32 {name}": classes | others.get(name, {}) for name, classes in kernels.items()}


SPARSE_ATTENTION_TILES = {
    "sm_80": _float32()
    | _half_precision(
        2, {"attention_query_gradients": {64: (64, 32, 4, 2)}, "attention_key_gradients": {128: (64, 32, 8, 2)}}
    ),
    "sm_90": _float32() | _half_precision(2),
    "sm_100": _float32() | _half_precision(2),
    "gfx942": _float32() | _half_precision(1, {"attention_key_gradients": {64: (64, 32, 4, 1), 128: (64, 16, 4, 1)}}),
}


def attention_class(classes: Iterable[int], width: int) -> int:
    """Up to which width the class of such keys and values goes, of those of a kernel.

    Raises:
        ValueError: they are wider than any class.
    """
    if width > max(classes):
        raise ValueError(f"keys and values may have {max(classes)} channels at most, got {width}")
    return min(up_to for up_to in classes if up_to >= width)


def attention_tile(
    kernels: Mapping[str, dict], kernel: str, dtype: torch.dtype, key_width: int, value_width: int
) -> dict[str, int | bool]:
    """Launch settings of "forward", "selected", "query_gradients", .. from a target's table.

    Raises:
        ValueError: keys or values are wider than any class.
    """
    classes = kernels[("float32 " if dtype == torch.float32 else "") + f"attention_{kernel}"]
    *sizes, warps, stages = classes[attention_class(classes, max(key_width, value_width))]
    # enable_fp_fusion: as Triton from 3.10 on no longer has it by itself.
    settings = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return dict(zip(_NAMES[kernel], sizes, strict=True)) | settings
