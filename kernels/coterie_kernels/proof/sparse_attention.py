"""The examples of `sparse_attention` in the catalog."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from coterie_kernels import sparse_attention
from coterie_kernels.proof.example import DTYPES, Example, name_of, randn


def run_sparse_attention(
    sizes: tuple[int, int, int],
    heads: tuple[int, int],
    widths: tuple[int, int],
    dtype: torch.dtype,
    *,
    window: int = 0,
    sinks: int = 0,
    selected: int = 0,
    block_size: int = 16,
    causal: bool = True,
    sink_logits: bool = False,
    softcap: float | None = None,
    ends: list[int] | None = None,
    masked: bool = False,
    backward: bool = True,
) -> list[Tensor | None]:
    """Forward, what blocks got, and backward; some ids are of no block, or repeated.

    Args:
        sizes: B, L, Lk. heads: H, G. widths: P, V.
    """
    (batch, length, num_keys), (heads, groups) = sizes, heads
    q, grad = (randn(batch, length, heads, width, dtype=dtype, seed=seed) for seed, width in enumerate(widths))
    k, v = (randn(batch, num_keys, groups, width, dtype=dtype, seed=2 + seed) for seed, width in enumerate(widths))
    grad_lse = randn(batch, length, heads, dtype=torch.float32, seed=4)
    logits = randn(heads, dtype=torch.float32, seed=5) if sink_logits else None
    generator = torch.Generator().manual_seed(6)
    shape = (batch, length, groups, selected)
    ids = torch.randint(-1, num_keys // block_size + 2, shape, generator=generator) if selected else None
    mask = torch.rand(batch, num_keys, generator=generator) < 0.7 if masked else None
    tensors = q, k, v, ids, logits, None if ends is None else torch.tensor(ends), mask
    seen = sparse_attention.Seen(window, sinks, block_size, causal, widths[0] ** -0.5, softcap)
    o, lse = sparse_attention.forward(*tensors, seen)
    if not backward:
        return [o, lse]
    mass = None
    if ids is not None and causal and ends is None:
        mass = sparse_attention.selected_mass(q, k, lse, ids, mask, block_size, seen.scale)
    return [o, lse, mass, *sparse_attention.backward(grad, grad_lse, *tensors, o, lse, seen)]


def small_sparse_attention() -> Iterator[Example]:
    more = {"window": 7, "sinks": 3, "selected": 3, "block_size": 4}
    cases = {
        "full": ((1, 37, 37), (2, 1), (9, 5), {"window": 37}),
        "window, sinks, sink logits, softcap": (
            (2, 21, 37),
            (3, 1),
            (16, 20),
            {"window": 7, "sinks": 3, "sink_logits": True, "softcap": 2.0},
        ),
        "all of them": ((1, 13, 19), (4, 2), (17, 33), more | {"sink_logits": True, "softcap": 2.0}),
        "blocks alone, R = 1": ((1, 11, 11), (2, 2), (8, 8), {"selected": 2, "block_size": 5}),
        "packed": ((1, 23, 23), (2, 1), (8, 8), more | {"ends": [0, 7, 7, 8, 23]}),
        "padding": ((2, 9, 17), (2, 1), (8, 8), more | {"masked": True, "sink_logits": True}),
        "padding, blocks alone": ((2, 17, 17), (2, 1), (8, 8), {"selected": 3, "block_size": 4, "masked": True}),
        "packed and padding": ((1, 23, 23), (2, 1), (8, 8), {"window": 5, "ends": [0, 9, 23], "masked": True}),
        "packed, not causal": ((1, 23, 23), (2, 1), (8, 8), {"window": 23, "ends": [0, 9, 23], "causal": False}),
        "cross": ((1, 21, 13), (2, 1), (8, 8), {"window": 13, "causal": False}),
        "cross, blocks": ((1, 9, 13), (2, 1), (8, 8), {"selected": 2, "block_size": 4, "causal": False}),
        "decode": ((1, 2, 600), (2, 1), (8, 8), {"window": 600, "sink_logits": True}),
        "decode, blocks": ((1, 2, 80), (2, 1), (8, 8), more | {"selected": 9, "window": 40, "sink_logits": True}),
        "no keys": ((1, 6, 0), (2, 1), (8, 8), {"window": 1, "causal": False, "sink_logits": True}),
    }
    for label, (*sizes, settings) in cases.items():
        for dtype in DTYPES if label == "full" else (torch.bfloat16, torch.float32):
            name = f"{label}, {name_of(dtype)}"
            yield Example(name, lambda a=sizes, d=dtype, s=settings: run_sparse_attention(*a, d, **s))


def matrix_sparse_attention(target: str, dtype: torch.dtype) -> Iterator[Example]:
    """Every class of widths; in bfloat16 at 64 every kind, at 128 most, elsewhere what takes most registers.

    Above 128 channels a few tiles have to spill.
    """
    usual = {"window": 512, "sinks": 4, "selected": 16, "block_size": 64}
    kinds: dict[str, tuple[tuple[int, int, int], tuple[int, int], dict[str, Any]]] = {
        "full": ((1, 1024, 1024), (4, 1), {"window": 1024}),
        "all of them": ((1, 1024, 1024), (4, 1), usual | {"sink_logits": True}),
        "softcap": ((1, 1024, 1024), (4, 1), usual | {"softcap": 30.0}),
        "packed, padding": ((1, 1024, 1024), (8, 4), usual | {"ends": [0, 500, 1024], "masked": True}),
        "cross": ((1, 512, 1024), (2, 2), {"window": 1024, "causal": False}),
        "16 heads a group": ((1, 1024, 1024), (16, 1), usual),
        "decode": ((1, 1, 8192), (8, 2), {"window": 8192, "backward": False}),
        "decode, blocks": ((1, 1, 8192), (8, 2), usual | {"backward": False}),
    }
    most = ("all of them", "decode, blocks") if dtype == torch.bfloat16 else ("all of them",)
    some = "full", "softcap", "packed, padding", *most
    for width in (64,) if dtype == torch.float16 else (32, 64, 128, 256):
        chosen = {64: tuple(kinds), 128: some}.get(width, most) if dtype == torch.bfloat16 else most
        for label in chosen:
            *sizes, settings = kinds[label]
            name = f"P = V = {width}, {label}"
            run = lambda a=sizes, w=width, s=settings: run_sparse_attention(*a, (w, w), dtype, **s)  # noqa: E731
            yield Example(name, run, may_spill=width > 128)
    if dtype == torch.bfloat16:
        sizes = ((1, 1024, 1024), (4, 1), (96, 64))
        yield Example("P = 96, V = 64", lambda: run_sparse_attention(*sizes, dtype, **usual), may_spill=True)
