"""How fast a matrix state forgets: the decays of the linear attentions, as the logs that `delta_rule` takes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coterie.modules._init import init_normal
from coterie.modules._wide import wide
from coterie.ops.linear_attention import retention_decay


class SoftplusDecay(nn.Module):
    """g = −exp(A_log) · softplus(proj(x) + dt_bias): a rate A per head, times a step dt that the token chooses.

    Mamba-2's (arXiv:2405.21060) and the gated delta rule's (arXiv:2412.06464) with one step a head; KDA's
    (arXiv:2510.26692) with one a channel, whose projection is of low rank. As Mamba-2 begins: A uniform in 1..16, and
    dt_bias such that the steps at proj(x) = 0 are log-uniform in 0.001..0.1.

    Args:
        dim: D.
        num_heads: H.
        channels: P, one decay each; None: one a head.
        rank: of the projection; None: it is one matrix.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        channels: int | None = None,
        rank: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place = {"device": device, "dtype": dtype}
        width = num_heads * (channels or 1)
        self.channels = channels
        self.proj = _projection(dim, width, rank, bias=False, **place)
        self.A_log = nn.Parameter(torch.empty(num_heads, **place))
        self.dt_bias = nn.Parameter(torch.empty(width, **place))

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Weights normal(0, std), A_log and dt_bias as said above."""
        _reset_projection(self.proj, std)
        if self.A_log.device.type != "meta":
            self.A_log.uniform_(1, 16).log_()
            steps = torch.empty_like(self.dt_bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            self.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus undone

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, D] → g and dt, [B, L, H] or [B, L, H, P] in float32 or better."""
        dt = F.softplus(wide(self.proj(x)) + wide(self.dt_bias))
        rate = wide(self.A_log).exp()
        if self.channels is not None:
            dt, rate = dt.unflatten(-1, (-1, self.channels)), rate.unsqueeze(-1)
        return -rate * dt, dt


class SigmoidDecay(nn.Module):
    """g = log σ(proj(x)) / 16 per channel, of a projection of rank 16: GLA's (arXiv:2312.06635).

    Args:
        dim: D.
        num_heads: H.
        channels: P.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        channels: int,
        rank: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.proj = _projection(dim, num_heads * channels, rank, bias=True, device=device, dtype=dtype)

    def reset_parameters(self, std: float = 0.02) -> None:
        """Weights normal(0, std), biases 0: a state halves in 16 tokens."""
        _reset_projection(self.proj, std)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[B, L, D] → g [B, L, H, P] in float32 or better."""
        return F.logsigmoid(wide(self.proj(x))).unflatten(-1, (-1, self.channels)) / 16, None


class ConstantDecay(nn.Module):
    """g = log(1 − 2^(−5−h)) of head h: RetNet's (arXiv:2307.08621).

    Args:
        num_heads: H.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def reset_parameters(self, std: float = 0.02) -> None:
        """There are none."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[B, L, D] → g [B, L, H] in float32 or better."""
        g = retention_decay(self.num_heads, device=x.device).to(torch.promote_types(x.dtype, torch.float32))
        return g.expand(*x.shape[:-1], -1), None


def _projection(dim: int, width: int, rank: int | None, *, bias: bool, **place) -> nn.Module:
    if rank is None:
        return nn.Linear(dim, width, bias=bias, **place)
    return nn.Sequential(nn.Linear(dim, rank, bias=False, **place), nn.Linear(rank, width, bias=bias, **place))


def _reset_projection(projection: nn.Module, std: float) -> None:
    for linear in projection if isinstance(projection, nn.Sequential) else (projection,):
        init_normal(linear.weight, std)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
