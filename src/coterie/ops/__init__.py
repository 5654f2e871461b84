"""The mathematics: each op's reference, its fast torch version, and the choice between them. Autograd lives here."""

from coterie.ops.activations import activation_is_gated, apply_activation
from coterie.ops.balance import balance_loss, selection_bias_update, z_loss
from coterie.ops.expert_mlp import expert_mlp
from coterie.ops.grouped_matmul import grouped_matmul
from coterie.ops.routing import Routing, route_topk

__all__ = [
    "Routing",
    "activation_is_gated",
    "apply_activation",
    "balance_loss",
    "expert_mlp",
    "grouped_matmul",
    "route_topk",
    "selection_bias_update",
    "z_loss",
]
