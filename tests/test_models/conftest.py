import pytest
import torch

from coterie.models import Transformer, TransformerConfig


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def small_config() -> TransformerConfig:
    """Two layers of every kind there is, at widths that differ from one another."""
    return TransformerConfig(
        vocab_size=50,
        dim=24,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mixers=("attention", "attention", "latent_attention", "latent_attention"),
        kv_rank=6,
        query_rank=7,
        value_dim=5,
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
