"""Norms of vectors: RMSNorm (Zhang and Sennrich, arXiv:1910.07467), and length 1."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coterie.modules._wide import wide

# Numbers for which calls cost more than arithmetic.
_FEW = 4096


class RMSNorm(nn.Module):
    """y = weight · x / sqrt(mean(x²) + eps), over the last dimension; with `zero_centered` y = (1 + weight) · x / ..

    The arithmetic is float32 at least, whatever the dtypes of `x` and of the weight; y has x's dtype. As in Hugging
    Face's llama, but for weight and x of different dtypes (bf16 activations over float32 weights): there the product
    with the weight is float32 too, and rounded once.

    Args:
        dim: the size of the last dimension.
        eps: keeps a row of zeros finite.
        zero_centered: the weight is the difference from 1, so that weight decay draws to 1 (gemma, qwen3_next).
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        *,
        zero_centered: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.zero_centered = zero_centered
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, or 0 where it is zero-centered."""
        nn.init.constant_(self.weight, 0.0 if self.zero_centered else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """[.., dim] → [.., dim]."""
        weight = 1 + wide(self.weight) if self.zero_centered else self.weight
        if x.dtype == weight.dtype:
            if x.device.type == "cpu" and x.numel() <= _FEW and not torch.compiler.is_compiling():
                # Beside -x its mean is 0, and its variance the mean of its squares: one kernel, where rms_norm is ten.
                both, weight = torch.cat((x, -x), dim=-1), torch.cat((weight, weight))
                return F.layer_norm(both, (2 * self.dim,), weight, None, self.eps)[..., : self.dim]
            return F.rms_norm(x, (self.dim,), weight, self.eps)  # accumulates half types in float32
        dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
        return F.rms_norm(x.to(dtype), (self.dim,), weight.to(dtype), self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}" + (", zero_centered=True" if self.zero_centered else "")


def unit_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(Σ x² + eps) over the last dimension, [.., P] → [.., P] in x's dtype, worked out in float32 or better."""
    y = wide(x)
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
