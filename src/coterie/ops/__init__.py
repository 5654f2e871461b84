"""The mathematics: each op's reference, its fast torch version, and the choice between them. Autograd lives here."""

from coterie.ops.activations import activation_is_gated, apply_activation
from coterie.ops.balance import balance_loss, selection_bias_update, z_loss
from coterie.ops.block_selection import Selection, add_to_blocks, indexer_loss, select_blocks, selected_mass
from coterie.ops.delta_rule import delta_rule
from coterie.ops.expert_mlp import expert_mlp
from coterie.ops.grouped_matmul import grouped_matmul
from coterie.ops.linear_attention import (
    delta_product,
    gated_delta_rule,
    gated_linear_attention,
    linear_attention,
    retention,
    ssd,
)
from coterie.ops.routing import Routing, route_topk
from coterie.ops.short_conv import short_conv
from coterie.ops.sparse_attention import merge_by_lse, sparse_attention

__all__ = [
    "Routing",
    "Selection",
    "activation_is_gated",
    "add_to_blocks",
    "apply_activation",
    "balance_loss",
    "delta_product",
    "delta_rule",
    "expert_mlp",
    "gated_delta_rule",
    "gated_linear_attention",
    "grouped_matmul",
    "indexer_loss",
    "linear_attention",
    "merge_by_lse",
    "retention",
    "route_topk",
    "select_blocks",
    "selected_mass",
    "selection_bias_update",
    "short_conv",
    "sparse_attention",
    "ssd",
    "z_loss",
]
