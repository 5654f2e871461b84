"""The mixture of experts: router, experts and what every token shares."""

import torch
from torch import Tensor, nn

from coterie.modules._init import init_normal
from coterie.modules._padding import without_padding
from coterie.modules.experts import Experts
from coterie.modules.gated_mlp import GatedMLP
from coterie.modules.router import TopKRouter
from coterie.ops.routing import Routing


class MoE(nn.Module):
    """A drop-in for a transformer's feed-forward: y, routing = moe(x).

    1. The router chooses K of the E experts for every token, with weights.
    2. The experts compute those tokens, and no others.
    3. The shared expert, if there is one, computes every token; its own sigmoid gate may scale it.
    4. The sum is returned together with the routing, from which `balance_loss`, `z_loss`, `Routing.counts` and
       telemetry are computed. Nothing is stored in the module.

    Args:
        dim: D.
        hidden_dim: F, the hidden width of one expert.
        num_experts: E.
        top_k: K.
        activation: "swiglu" and the like; see `coterie.ops.activations`.
        bias: biases in the experts.
        shared_hidden_dim: hidden width of the shared expert; 0 = none.
        shared_gate: scale the shared expert by σ(x @ wᵀ) per token (qwen2_moe).
        router: a module (x [..., D], token_mask) → Routing; a `TopKRouter` that renormalises by default.
        recompute: keep less for backward; see `expert_mlp`.
        impl: which implementation of `expert_mlp`, and of `route_topk` in the router that is built; None chooses.

    Shapes: x [..., D], token_mask [...] bool (False = padding, whatever it contains, NaN included: y is 0 there)
    → y [..., D], Routing over T = the product of the leading sizes.

    Raises:
        ValueError: a setting is out of range, or token_mask is of another shape than x without D.
        TypeError: token_mask is not bool, or x has another dtype than the weights, outside autocast.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        shared_hidden_dim: int = 0,
        shared_gate: bool = False,
        router: nn.Module | None = None,
        recompute: bool = False,
        impl: str | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if shared_gate and not shared_hidden_dim:
            raise ValueError("shared_gate needs a shared expert: give shared_hidden_dim > 0")
        place = {"device": device, "dtype": dtype}
        self.router = TopKRouter(dim, num_experts, top_k, impl=impl, **place) if router is None else router
        self.experts = Experts(
            num_experts, dim, hidden_dim, activation=activation, bias=bias, recompute=recompute, impl=impl, **place
        )
        self.shared_expert = (
            GatedMLP(dim, shared_hidden_dim, activation=activation, **place) if shared_hidden_dim else None
        )
        self.shared_gate = nn.Linear(dim, 1, bias=False, **place) if shared_gate else None
        if self.shared_gate is not None:
            init_normal(self.shared_gate.weight, 0.02)

    def reset_parameters(self, std: float = 0.02, down_std: float | None = None) -> None:
        """Normal weights of deviation `std` (`down_std` for every down_proj), zero biases."""
        self.router.reset_parameters(std)
        self.experts.reset_parameters(std, down_std)
        if self.shared_expert is not None:
            self.shared_expert.reset_parameters(std, down_std)
        if self.shared_gate is not None:
            init_normal(self.shared_gate.weight, std)

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, Routing]:
        if token_mask is not None:
            x = without_padding(x, token_mask)
        routing = self.router(x, token_mask)
        shared = None
        if self.shared_expert is not None:
            shared = self.shared_expert(x)
            if self.shared_gate is not None:
                shared = shared * torch.sigmoid(self.shared_gate(x))
            shared = shared.reshape(-1, x.shape[-1])
        return self.experts(x.reshape(-1, x.shape[-1]), routing, shared).view_as(x), routing
