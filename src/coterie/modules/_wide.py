"""Arithmetic that half types are too coarse for."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32, or as it is if it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
