"""Building blocks for compact sparse transformers: plain PyTorch modules over three primitives.

`coterie.ops` holds the mathematics, `coterie.modules` the layers, `coterie.models` whole transformers;
`coterie.training` and `coterie.report` are imported by whoever needs them.
"""

from coterie.models import (
    PRESETS,
    KVCache,
    Transformer,
    TransformerConfig,
    TransformerOutput,
    attention_twin,
    dense_twin,
    generate,
    preset,
)
from coterie.modules import (
    Attention,
    CrossAttention,
    Experts,
    GatedMLP,
    LatentAttention,
    LinearAttention,
    MoE,
    RMSNorm,
    RotaryEmbedding,
    SparseAttention,
    TopKRouter,
    pack_for_inference,
    unpack,
)
from coterie.ops import (
    Routing,
    balance_loss,
    delta_rule,
    expert_mlp,
    grouped_matmul,
    route_topk,
    selection_bias_update,
    sparse_attention,
    z_loss,
)

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Attention",
    "CrossAttention",
    "Experts",
    "GatedMLP",
    "KVCache",
    "LatentAttention",
    "LinearAttention",
    "MoE",
    "RMSNorm",
    "RotaryEmbedding",
    "Routing",
    "SparseAttention",
    "TopKRouter",
    "Transformer",
    "TransformerConfig",
    "TransformerOutput",
    "attention_twin",
    "balance_loss",
    "delta_rule",
    "dense_twin",
    "expert_mlp",
    "generate",
    "grouped_matmul",
    "pack_for_inference",
    "preset",
    "route_topk",
    "selection_bias_update",
    "sparse_attention",
    "unpack",
    "z_loss",
]
