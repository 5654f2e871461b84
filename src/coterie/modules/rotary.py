"""Rotary position embedding (Su et al., arXiv:2104.09864).

Pair i of a head's channels is turned by the angle position · theta^(-2i/P). It is channels i and i + P/2, as in Hugging
Face's llama, or, interleaved, the neighbours 2i and 2i + 1, as in the paper and in DeepSeek's checkpoints.
"""

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """The cosines and sines of all pairs at given positions: made once in a forward, used by every layer.

    It has no buffers, so a model built on the meta device has nothing here to fill in, and no longest length.

    Args:
        head_dim: P, even; of a partial rotation, the channels of a head that turn.
        theta: the base; the slowest pair turns once in about 2π·theta positions.
    """

    def __init__(self, head_dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim must be even and positive for rotary embedding, got {head_dim}")
        if theta <= 0:
            raise ValueError(f"theta must be positive, got {theta}")
        self.head_dim = head_dim
        self.theta = theta

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [.., L], integers → (cos, sin), each [.., L, P/2] float32."""
        # float32 whatever the model's dtype: bf16 cannot tell positions apart above 256.
        channels = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float32)
        frequencies = 1.0 / self.theta ** (channels / self.head_dim)
        angles = positions.unsqueeze(-1).float() * frequencies
        return angles.cos(), angles.sin()

    def extra_repr(self) -> str:
        return f"{self.head_dim}, theta={self.theta}"


def apply_rotary(x: Tensor, rotary: tuple[Tensor, Tensor], interleaved: bool = False) -> Tensor:
    """Turn every pair of every head: [B, L, H, P] → the same, in x's dtype, worked out in float32 or better.

    Args:
        x: [B, L, H, P].
        rotary: (cos, sin), each [L, R/2] or, with positions of each sequence's own, [B, L, R/2]; R ≤ P is the rotary
            width, and channels from R on are left as they are.
        interleaved: a pair is two neighbouring channels.
    """
    cos, sin = (part.unsqueeze(-2) for part in rotary)  # [.., L, 1, R/2]
    half = cos.shape[-1]
    pairs, rest = x.split((2 * half, x.shape[-1] - 2 * half), dim=-1)
    shape, axis = ((half, 2), -1) if interleaved else ((2, half), -2)
    first, second = pairs.unflatten(-1, shape).unbind(axis)
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), axis).flatten(-2).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
