"""Parameters, their init, and one call into `coterie.ops` each."""

from coterie.modules.attention import Attention
from coterie.modules.cross_attention import CrossAttention
from coterie.modules.experts import Experts
from coterie.modules.gated_mlp import GatedMLP
from coterie.modules.latent_attention import LatentAttention
from coterie.modules.linear_attention import LinearAttention
from coterie.modules.lora import (
    adapter_names,
    add_lora,
    lora_parameters,
    merge_lora,
    remove_lora,
    set_adapter,
    unmerge_lora,
)
from coterie.modules.moe import MoE
from coterie.modules.norm import RMSNorm
from coterie.modules.packed import pack_for_inference, unpack
from coterie.modules.rotary import RotaryEmbedding
from coterie.modules.router import TopKRouter
from coterie.modules.sparse_attention import SparseAttention

__all__ = [
    "Attention",
    "CrossAttention",
    "Experts",
    "GatedMLP",
    "LatentAttention",
    "LinearAttention",
    "MoE",
    "RMSNorm",
    "RotaryEmbedding",
    "SparseAttention",
    "TopKRouter",
    "adapter_names",
    "add_lora",
    "lora_parameters",
    "merge_lora",
    "pack_for_inference",
    "remove_lora",
    "set_adapter",
    "unmerge_lora",
    "unpack",
]
