"""Building blocks for compact sparse transformers: plain PyTorch modules over three primitives."""

from coterie.ops import (
    Routing,
    balance_loss,
    expert_mlp,
    grouped_matmul,
    route_topk,
    selection_bias_update,
    z_loss,
)

__version__ = "0.1.0"

__all__ = [
    "Routing",
    "balance_loss",
    "expert_mlp",
    "grouped_matmul",
    "route_topk",
    "selection_bias_update",
    "z_loss",
]
