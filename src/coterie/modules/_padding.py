"""What padding contains must not matter, be it NaN."""

import torch
from torch import Tensor


def without_padding(x: Tensor, token_mask: Tensor) -> Tensor:
    """x [..., D] with zeros where token_mask [...] is False: a weight or a gradient of 0 would leave NaN, 0 · NaN."""
    if token_mask.dtype != torch.bool:
        raise TypeError(f"token_mask must be bool (False = padding), got {token_mask.dtype}")
    if token_mask.shape != x.shape[:-1]:
        wanted, got = tuple(x.shape[:-1]), tuple(token_mask.shape)
        raise ValueError(f"token_mask must have x's shape without D, {wanted}, got {got}")
    return x.masked_fill(~token_mask.unsqueeze(-1), 0)
