"""Rotary position embedding (Su et al., arXiv:2104.09864).

Pair i of a head's channels is turned by the angle position · theta^(-2i/P). It is channels i and i + P/2, as in Hugging
Face's llama, or, interleaved, the neighbours 2i and 2i + 1, as in the paper and in DeepSeek's checkpoints.
"""

import math

import torch
from torch import Tensor, nn

from coterie.ops._spec import parse_spec

# Ways to stretch a trained model's positions, and their parameters.
ROTARY_SCALINGS = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


class RotaryEmbedding(nn.Module):
    """The cosines and sines of all pairs at given positions: made once in a forward, used by every layer.

    It has no buffers, so a model built on the meta device has nothing here to fill in, and no longest length.

    Args:
        head_dim: P, even; of a partial rotation, the channels of a head that turn.
        theta: the base; the slowest pair turns once in about 2π·theta positions.
        scaling: how the angles of a model that was trained on shorter texts are slowed down: "linear(factor=4.0)", all
            alike (arXiv:2306.15595), or llama 3.1's "llama3(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=8192)", pairs that turn slowly alone. None: not at all.
    """

    def __init__(self, head_dim: int, theta: float = 10000.0, scaling: str | None = None) -> None:
        super().__init__()
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim must be even and positive for rotary embedding, got {head_dim}")
        if theta <= 0:
            raise ValueError(f"theta must be positive, got {theta}")
        self.head_dim = head_dim
        self.theta = theta
        self.scaling = scaling
        self._scaling = None if scaling is None else parse_rotary_scaling(scaling)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [.., L], integers → (cos, sin), each [.., L, P/2] float32."""
        # float32 whatever the model's dtype: bf16 cannot tell positions apart above 256.
        channels = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float32)
        frequencies = 1.0 / self.theta ** (channels / self.head_dim)
        if self._scaling is not None:
            frequencies = _scaled(frequencies, *self._scaling)
        angles = positions.unsqueeze(-1).float() * frequencies
        return angles.cos(), angles.sin()

    def extra_repr(self) -> str:
        return f"{self.head_dim}, theta={self.theta}, scaling={self.scaling!r}"


def parse_rotary_scaling(text: str) -> tuple[str, dict[str, float]]:
    """Name and parameters of a `RotaryEmbedding`'s scaling; ValueError says what there is."""
    name, parameters = parse_spec(text, "rotary_scaling", "linear(factor=4.0)")
    if name not in ROTARY_SCALINGS:
        raise ValueError(f"rotary_scaling must be one of {', '.join(ROTARY_SCALINGS)}, got {text!r}")
    if parameters.keys() != ROTARY_SCALINGS[name]:
        raise ValueError(f"rotary_scaling {name!r} takes {sorted(ROTARY_SCALINGS[name])}, got {sorted(parameters)}")
    for parameter, value in parameters.items():
        if not 0 < value < math.inf:
            raise ValueError(f"rotary_scaling's {parameter} must be positive, got {value}")
    if name == "llama3" and not parameters["low_freq_factor"] < parameters["high_freq_factor"]:
        raise ValueError(f"rotary_scaling's low_freq_factor must be less than its high_freq_factor, got {text!r}")
    return name, parameters


def _scaled(frequencies: Tensor, name: str, parameters: dict[str, float]) -> Tensor:
    """[P/2] slowed down."""
    slow = frequencies / parameters["factor"]
    if name == "linear":
        return slow
    # Slow below low_freq_factor turns over the length trained on, as they are above high_freq_factor, between between.
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * slow + kept * frequencies


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
    if interleaved:
        first, second, rest = x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2], x[..., 2 * half :]
    else:
        first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    turned = (torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned
