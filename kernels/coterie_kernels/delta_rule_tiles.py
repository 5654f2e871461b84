"""Tile sizes of `delta_rule`'s kernels, in the form of `coterie_kernels.tiles`, whose table they become a part of.

| kernel | class | sizes |
|---|---|---|
| delta_chunk | P up to | tokens of a chunk |
| delta_prepare | P up to | depth, warps, stages |
| delta_forward, delta_backward | P up to | columns of V, warps, stages |
| delta_gradients | P up to | width of P, columns of V, warps, stages |
| delta_prepare_channels, delta_channel_gradients | P up to | as of those of a decay per head; the width is all of P |

A state [P, columns] in float32 stays in a program's registers: wider tiles spill nearly everywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

_P = (16, 32, 64, 128, 256)
_KERNELS = ("chunk", "prepare", "forward", "backward", "gradients", "prepare_channels", "channel_gradients")


@dataclass(frozen=True)
class DeltaTiles:
    """Of one call; launch settings beside what a program takes."""

    chunk: int
    prepare: dict[str, int | bool]
    forward: dict[str, int | bool]
    backward: dict[str, int | bool]
    gradients: dict[str, int | bool]
    prepare_channels: dict[str, int | bool]
    channel_gradients: dict[str, int | bool]


def _half_precision(stages: int, others: Mapping[str, dict] = MappingProxyType({})) -> dict[str, dict]:
    """What most entries are, but for the given ones."""
    kernels = {
        "delta_chunk": dict.fromkeys(_P, (64,)) | {256: (16,)},
        "delta_prepare": {up_to: (min(up_to, 32), 1, 1) for up_to in _P},
        "delta_forward": dict.fromkeys(_P, (32, 4, stages)) | {256: (16, 8, stages)},
        "delta_backward": dict.fromkeys(_P, (32, 4, stages)) | {256: (16, 8, stages)},
        "delta_gradients": {up_to: (min(up_to, 32), 32, 4, stages) for up_to in _P},
        "delta_prepare_channels": dict.fromkeys(_P, (16, 4, 1)),
        "delta_channel_gradients": {up_to: (up_to, 32, 4 if up_to < 64 else 8, 1) for up_to in _P},
    }
    return {name: classes | others.get(name, {}) for name, classes in kernels.items()}


def _float32(others: Mapping[str, dict] = MappingProxyType({})) -> dict[str, dict]:
    """Chunks of 16: the rounding of what a longer chunk solves would exceed that of the recurrence."""
    kernels = {
        "delta_chunk": dict.fromkeys(_P, (16,)),
        "delta_prepare": {up_to: (min(up_to, 32), 1, 1) for up_to in _P},
        "delta_forward": dict.fromkeys(_P, (16, 4, 1)),
        "delta_backward": dict.fromkeys(_P, (16, 4, 1)),
        "delta_gradients": {up_to: (min(up_to, 32), 32, 4, 1) for up_to in _P},
        "delta_prepare_channels": dict.fromkeys(_P, (16, 4, 1)),
        "delta_channel_gradients": {up_to: (up_to, 32, 4 if up_to < 128 else 8, 1) for up_to in _P},
    }
    return {f"float32 {name}": classes | others.get(name, {}) for name, classes in kernels.items()}


# The least of what spills: three products of TF32 for one of float32, with all of a wide P at once, do not fit.
_WIDE_FLOAT32 = dict.fromkeys((128, 256), (32, 8, 1))

DELTA_RULE_TILES = {
    "sm_80": _float32(
        {
            "delta_forward": dict.fromkeys((64, 128, 256), (16, 8, 1)),
            "delta_backward": dict.fromkeys((128, 256), (16, 8, 1)),
        }
    )
    | _half_precision(
        2,
        {
            "delta_chunk": dict.fromkeys(_P, (32,)) | {256: (16,)},
            "delta_forward": {128: (16, 4, 2)},
            "delta_backward": {16: (32, 4, 1), 128: (32, 8, 2)},
        },
    ),
    "sm_90": _float32(
        {
            "delta_forward": dict.fromkeys((64, 128, 256), (32, 8, 1)),
            "delta_backward": {32: (16, 8, 1)} | _WIDE_FLOAT32,
            "delta_gradients": {128: (16, 16, 4, 1), 256: (16, 16, 4, 1)},
        }
    )
    | _half_precision(2, {"delta_forward": {256: (32, 8, 1)}, "delta_backward": {32: (16, 4, 2)}}),
    "sm_100": _float32(
        {
            "delta_forward": {64: (64, 8, 1)} | _WIDE_FLOAT32,
            "delta_backward": dict.fromkeys((16, 64), (16, 8, 1)) | _WIDE_FLOAT32,
        }
    )
    | _half_precision(
        2,
        {
            "delta_forward": {128: (32, 4, 1), 256: (32, 8, 1)},
            "delta_backward": {32: (32, 8, 2), 128: (32, 4, 1)},
            "delta_channel_gradients": {128: (128, 16, 8, 1)},
        },
    ),
    "gfx942": _float32({"delta_channel_gradients": {up_to: (up_to, 32, 4, 1) for up_to in (128, 256)}})
    | _half_precision(
        1,
        {
            "delta_chunk": {256: (32,)},
            "delta_forward": {256: (16, 4, 1)},
            "delta_backward": {256: (16, 4, 1)},
            "delta_channel_gradients": {up_to: (up_to, 32, 4, 1) for up_to in (64, 128, 256)},
        },
    ),
}


def delta_rule_class(kernels: Mapping[str, dict], dtype: torch.dtype, key_width: int) -> int:
    """Up to which P the class of such keys goes, in a target's table.

    Raises:
        ValueError: keys are wider than any class.
    """
    classes = kernels[("float32 " if dtype == torch.float32 else "") + "delta_chunk"]
    if key_width > max(classes):
        raise ValueError(f"keys may have {max(classes)} channels at most, got {key_width}")
    return min(up_to for up_to in classes if up_to >= key_width)


def delta_rule_tiles(kernels: dict[str, dict], dtype: torch.dtype, key_width: int, value_width: int) -> DeltaTiles:
    """From a target's table.

    Raises:
        ValueError: keys are wider than any class.
    """
    prefix = "float32 " if dtype == torch.float32 else ""
    width = delta_rule_class(kernels, dtype, key_width)
    sizes = {kernel: kernels[f"{prefix}delta_{kernel}"][width] for kernel in _KERNELS}
    (chunk,) = sizes.pop("chunk")
    settings = {kernel: {"CHUNK": chunk} | _settings(kernel, of_kernel) for kernel, of_kernel in sizes.items()}
    for kernel in ("forward", "backward"):
        settings[kernel]["WIDTH"] = width
    for kernel in ("forward", "backward", "gradients", "channel_gradients"):
        settings[kernel]["COLUMNS"] = _at_most(settings[kernel]["COLUMNS"], value_width)
    return DeltaTiles(chunk, **settings)


def _at_most(columns: int, value_width: int) -> int:
    """No wider than V, but at least the 16 that a product takes."""
    while columns > 16 and columns // 2 >= value_width:
        columns //= 2
    return columns


def _settings(kernel: str, sizes: tuple[int, ...]) -> dict[str, int | bool]:
    """enable_fp_fusion: as Triton from 3.10 on no longer has it by itself."""
    names = {"prepare": ("DEPTH",), "forward": ("COLUMNS",), "backward": ("COLUMNS",)}
    names["prepare_channels"] = names["prepare"]
    *own, warps, stages = sizes
    own = dict(zip(names.get(kernel, ("WIDTH", "COLUMNS")), own, strict=True))
    return own | {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
