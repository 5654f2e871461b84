"""The experts' weights and one call into `expert_mlp`."""

import torch
from torch import Tensor, nn

from coterie.modules._init import init_normal
from coterie.ops.activations import activation_is_gated
from coterie.ops.expert_mlp import expert_mlp
from coterie.ops.routing import Routing


class Experts(nn.Module):
    """E two-layer MLPs, each token through the ones its routing names.

    Stored as the ecosystem stores them, expert first: gate_up_proj [E, 2F, D] (gate, then up; [E, F, D] for an
    activation without a gate), down_proj [E, D, F], so real checkpoints load without copies.

    Args:
        num_experts, dim, hidden_dim: E, D, F.
        activation, recompute, impl: as in `expert_mlp`.
        bias: gate_up_bias [E, 2F] and down_bias [E, D].

    Shapes: x [T, D], routing over the same T, addend [T, D] to add to the result → [T, D]. Raises as `expert_mlp` does.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        recompute: bool = False,
        impl: str | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.activation, self.recompute, self.impl = activation, recompute, impl
        width = 2 * hidden_dim if activation_is_gated(activation) else hidden_dim

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        self.gate_up_proj, self.down_proj = parameter(width, dim), parameter(dim, hidden_dim)
        self.gate_up_bias = parameter(width) if bias else None
        self.down_bias = parameter(dim) if bias else None
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, down_std: float | None = None) -> None:
        """Normal weights of deviation `std` (`down_std` for down_proj), zero biases."""
        init_normal(self.gate_up_proj, std)
        init_normal(self.down_proj, std if down_std is None else down_std)
        for bias in (self.gate_up_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Tensor, routing: Routing, addend: Tensor | None = None) -> Tensor:
        tensors = (x, routing.expert_ids, routing.weights, self.gate_up_proj, self.down_proj)
        settings = {
            "gate_up_bias": self.gate_up_bias,
            "down_bias": self.down_bias,
            "activation": self.activation,
            "recompute": self.recompute,
            "impl": self.impl,
        }
        lora = getattr(self, "lora", None)  # `add_lora` gives it
        if lora is None or not lora.applies:
            return expert_mlp(*tensors, addend=addend, **settings)
        y = lora(*tensors, **settings)
        return y if addend is None else y + addend

    def extra_repr(self) -> str:
        num_experts, dim, hidden_dim = self.down_proj.shape
        return f"{num_experts}, dim={dim}, hidden_dim={hidden_dim}, activation={self.activation!r}"


def is_hf_experts(module: nn.Module) -> bool:
    """Whether a module is on transformers' experts interface."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "has_gate")
