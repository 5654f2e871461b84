import pytest
import torch

from coterie.models import Transformer, TransformerConfig
from coterie.models.config import MIXERS


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def small_config() -> TransformerConfig:
    """Two layers of every mixer there is, at widths that differ from one another."""
    return TransformerConfig(
        vocab_size=50,
        dim=24,
        num_layers=10,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mixers=tuple(name for name in MIXERS for _ in range(2)),
        attention_window=5,
        attention_sink_logits=True,
        sparse_window=3,
        sparse_sinks=1,
        sparse_block_size=2,
        sparse_num_blocks=3,
        sparse_share=2,
        kv_rank=6,
        query_rank=7,
        value_dim=5,
        linear_num_heads=6,
        linear_num_key_heads=3,
        linear_head_dim=9,
        linear_value_dim=5,
        linear_conv=3,
        rotary_dim=4,
        rotary_interleaved=True,
        feed_forwards=("mlp", "moe"),
        hidden_dim=20,
        num_experts=6,
        top_k=2,
        expert_hidden_dim=10,
        shared_hidden_dim=12,
        shared_gate=True,
        selection_bias=True,
        qk_norm="head",
        qkv_bias=True,
        output_bias=True,
        max_length=64,
        init_std=0.2,
    )


@pytest.fixture
def small_model(small_config) -> Transformer:
    torch.manual_seed(0)
    return Transformer(small_config)
