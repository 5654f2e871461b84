"""Rotary position embedding (Su et al., arXiv:2104.09864).

Pair i of a head's channels is turned by the angle position · theta^(-2i/P). It is channels i and i + P/2, as in Hugging
Face's llama, or, interleaved, the neighbours 2i and 2i + 1, as in the paper and in DeepSeek's checkpoints.
"""

import math

import torch
from torch import Tensor, nn

from coterie.ops._spec import parse_spec

# Ways to stretch a trained model's positions, with the parameters they need and those that may be left out.
ROTARY_SCALINGS = {
    "linear": ({"factor"}, set()),
    "ntk": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"beta_fast", "beta_slow", "truncate", "attention_factor"},
    ),
}


class RotaryEmbedding(nn.Module):
    """The cosines and sines of all pairs at given positions: made once in a forward, used by every layer.

    It has no buffers, so a model built on the meta device has nothing here to fill in, and no longest length.

    Args:
        head_dim: P, even; of a partial rotation, the channels of a head that turn.
        theta: the base; the slowest pair turns once in about 2π·theta positions.
        scaling: how the angles of a model that was trained on shorter texts are slowed down. None: not at all.
            "linear(factor=4.0)": all alike (arXiv:2306.15595).
            "ntk(factor=4.0)": theta · factor^(P/(P-2)) for theta, so the fastest pair not at all and the slowest by the
            factor.
            "llama3(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)":
            pairs that turn slowly alone (llama 3.1).
            "yarn(factor=32.0, original_max_position_embeddings=4096)": those too, and all cosines and sines times
            attention_factor (arXiv:2309.00071, as transformers has it). Optional: beta_fast=32.0, beta_slow=1.0, the
            turns over the original length from which on a pair is left alone and below which it is slowed down by the
            whole factor; truncate=True, the pairs where those lie are rounded outwards (gpt_oss has False);
            attention_factor=0.1·ln(factor)+1.

    Raises:
        ValueError: a width, a base or a scaling that there is not; it is named.
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
        if self._scaling is not None and self._scaling[0] == "yarn" and theta <= 1:
            raise ValueError(f"theta must be greater than 1 for the rotary scaling 'yarn', got {theta}")

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [.., L], integers → (cos, sin), each [.., L, P/2] float32."""
        # float32 whatever the model's dtype: bf16 cannot tell positions apart above 256.
        channels = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float32)
        frequencies = 1.0 / self.theta ** (channels / self.head_dim)
        factor = 1.0
        if self._scaling is not None:
            frequencies = self._scaled(frequencies, channels, *self._scaling)
            factor = _attention_factor(*self._scaling)
        angles = positions.unsqueeze(-1).float() * frequencies
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if factor == 1 else (cos * factor, sin * factor)

    def _scaled(self, frequencies: Tensor, channels: Tensor, name: str, parameters: dict[str, float]) -> Tensor:
        """[P/2] slowed down; channels [P/2] are 0, 2, .. P-2."""
        if name == "ntk":
            return frequencies / parameters["factor"] ** (channels / max(self.head_dim - 2, 1))
        slow = frequencies / parameters["factor"]
        if name == "linear":
            return slow
        kept = self._kept_by_yarn(channels / 2, **parameters) if name == "yarn" else _kept(frequencies, **parameters)
        return (1 - kept) * slow + kept * frequencies

    def _kept_by_yarn(
        self,
        pairs: Tensor,
        original_max_position_embeddings: float,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        truncate: float = 1.0,
        **_: float,
    ) -> Tensor:
        """[P/2]: 1 for pairs that turn fast enough to be left alone, 0 for slow ones, a line over pairs between."""
        # Where a pair would stand that turns so often over the original length.
        low, high = (
            self.head_dim
            * math.log(original_max_position_embeddings / (turns * 2 * math.pi))
            / (2 * math.log(self.theta))
            for turns in (beta_fast, beta_slow)
        )
        if truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        return 1 - ((pairs - low) / (high - low or 0.001)).clamp(0, 1)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, theta={self.theta}, scaling={self.scaling!r}"


def parse_rotary_scaling(text: str) -> tuple[str, dict[str, float]]:
    """Name and parameters of a `RotaryEmbedding`'s scaling; ValueError says what there is."""
    name, parameters = parse_spec(text, "rotary_scaling", "linear(factor=4.0)")
    if name not in ROTARY_SCALINGS:
        raise ValueError(f"rotary_scaling must be one of {', '.join(ROTARY_SCALINGS)}, got {text!r}")
    needed, optional = ROTARY_SCALINGS[name]
    if not needed <= parameters.keys() <= needed | optional:
        besides = f" and may have {sorted(optional)}" if optional else ""
        raise ValueError(f"rotary_scaling {name!r} takes {sorted(needed)}{besides}, got {sorted(parameters)}")
    for parameter, value in parameters.items():
        if parameter == "truncate":
            if value not in (0, 1):
                raise ValueError(f"rotary_scaling's truncate must be True or False, got {value}")
        elif not 0 < value < math.inf:
            raise ValueError(f"rotary_scaling's {parameter} must be positive, got {value}")
    if name == "llama3" and not parameters["low_freq_factor"] < parameters["high_freq_factor"]:
        raise ValueError(f"rotary_scaling's low_freq_factor must be less than its high_freq_factor, got {text!r}")
    if name == "yarn" and not parameters.get("beta_slow", 1.0) < parameters.get("beta_fast", 32.0):
        raise ValueError(f"rotary_scaling's beta_slow must be less than its beta_fast, got {text!r}")
    return name, parameters


def _kept(
    frequencies: Tensor,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
    **_: float,
) -> Tensor:
    """[P/2]: 0 below low_freq_factor turns over the length trained on, 1 above high_freq_factor, between between."""
    turns = original_max_position_embeddings * frequencies / (2 * math.pi)
    return ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)


def _attention_factor(name: str, parameters: dict[str, float]) -> float:
    """Of cosines and sines, so that its square is of the scores."""
    if name != "yarn":
        return 1.0
    return parameters.get("attention_factor", 0.1 * math.log(max(parameters["factor"], 1)) + 1)


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
