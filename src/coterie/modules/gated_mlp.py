"""The dense feed-forward."""

from torch import Tensor, nn

from coterie.modules._init import init_normal
from coterie.ops.activations import activation_is_gated, apply_activation


class GatedMLP(nn.Module):
    """y = activation(x @ gate_up_projᵀ) @ down_projᵀ, with gate and up in one matrix.

    It is the expert of a `MoE`: `MoE(num_experts=1, top_k=1)` computes the same.

    Args:
        dim: D.
        hidden_dim: F.
        activation: "swiglu" and the like, or one without a gate ("relu2"); see `coterie.ops.activations`.
        bias: biases on both layers.

    Shapes: x [..., D] → [..., D].
    """

    def __init__(
        self, dim: int, hidden_dim: int, *, activation: str = "swiglu", bias: bool = False, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.activation = activation
        width = 2 * hidden_dim if activation_is_gated(activation) else hidden_dim
        self.gate_up_proj = nn.Linear(dim, width, bias=bias, device=device, dtype=dtype)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, down_std: float | None = None) -> None:
        """Normal weights of deviation `std` (`down_std` for down_proj), zero biases."""
        init_normal(self.gate_up_proj.weight, std)
        init_normal(self.down_proj.weight, std if down_std is None else down_std)
        for layer in (self.gate_up_proj, self.down_proj):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(apply_activation(self.gate_up_proj(x), self.activation))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
