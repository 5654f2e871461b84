import json
import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from coterie.models import Transformer, TransformerConfig
from coterie.modules import Attention, LatentAttention, LinearAttention

DENSE = {
    "vocab_size": 50,
    "dim": 32,
    "num_layers": 6,
    "num_heads": 4,
    "feed_forwards": ("mlp",),
    "hidden_dim": 64,
}
SPARSE = {
    **DENSE,
    "feed_forwards": ("moe",),
    "num_experts": 8,
    "top_k": 2,
    "expert_hidden_dim": 16,
}
LATENT = {"mixers": ("latent_attention",), "kv_rank": 6, "rotary_dim": 4}


def test_json_round_trip(small_config):
    text = json.dumps(small_config.to_dict())
    again = TransformerConfig.from_dict(json.loads(text))
    assert again == small_config
    assert hash(again) == hash(small_config)
    assert isinstance(again.feed_forwards, tuple)


def test_left_out_fields_take_their_defaults():
    assert TransformerConfig.from_dict(SPARSE) == TransformerConfig(**SPARSE)


def test_patterns_are_repeated_up_the_layers():
    config = TransformerConfig(**{**SPARSE, "feed_forwards": ("mlp", "moe", "moe")})
    assert config.layer_feed_forwards == ("mlp", "moe", "moe") * 2
    assert config.layer_mixers == ("attention",) * 6
    config = TransformerConfig(**{**SPARSE, **LATENT, "mixers": ("attention", "latent_attention"), "num_kv_heads": 2})
    model = Transformer(config, device="meta")
    assert [type(layer.mixer) for layer in model.layers] == [Attention, LatentAttention] * 3
    config = TransformerConfig(**{**SPARSE, "mixers": ("linear_attention", "linear_attention", "attention")})
    model = Transformer(config, device="meta")
    assert [type(layer.mixer) for layer in model.layers] == [LinearAttention, LinearAttention, Attention] * 2


def test_linear_attention_has_the_configs_settings():
    config = TransformerConfig(
        **DENSE,
        mixers=("linear_attention",),
        linear_rule="delta_product",
        linear_num_heads=6,
        linear_num_key_heads=3,
        linear_head_dim=10,
        linear_value_dim=5,
        linear_conv=2,
        linear_num_edits=3,
        linear_negative_eigenvalues=True,
        norm_eps=1e-3,
    )
    mixer = Transformer(config, device="meta").layers[5].mixer
    assert (mixer.rule, mixer.num_heads, mixer.num_key_heads) == ("delta_product", 6, 3)
    assert (mixer.head_dim, mixer.value_dim, mixer.num_edits) == (10, 5, 3)
    assert mixer.conv_weight.shape == (3 * 10 + 3 * (3 * 10 + 6 * 5), 1, 2)
    assert mixer.allow_negative_eigenvalues
    assert mixer.norm.eps == 1e-3
    plain = TransformerConfig(**{**DENSE, "head_dim": 10}, mixers=("linear_attention",), linear_conv=0)
    mixer = Transformer(plain, device="meta").layers[0].mixer
    assert (mixer.rule, mixer.num_heads, mixer.num_key_heads) == ("gated_delta", 4, 4)
    assert (mixer.head_dim, mixer.value_dim, mixer.conv_weight) == (10, 10, None)


def test_zero_centered_norms_are_all_but_linear_attentions_output():
    config = TransformerConfig(
        **{**DENSE, "num_layers": 2}, mixers=("linear_attention", "attention"), qk_norm="head", norm_zero_centered=True
    )
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == (name == "layers.0.mixer.norm.weight")).all(), name
    twin = Transformer(replace(config, norm_zero_centered=False))
    state = model.state_dict()
    for name in state:
        if "norm" in name and name != "layers.0.mixer.norm.weight":
            state[name] = state[name] + 1
    twin.load_state_dict(state)
    ids = torch.randint(50, (2, 9))
    torch.testing.assert_close(twin(ids).logits, model(ids).logits)


def test_whole_numbers_do_for_floats_and_the_config_is_frozen():
    config = TransformerConfig(**{**DENSE, "rope_theta": 10000})
    assert config.rope_theta == 10000.0
    assert isinstance(config.rope_theta, float)
    with pytest.raises(FrozenInstanceError):
        config.dim = 3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"vocab_size": 0}, ValueError, "vocab_size must be positive, got 0"),
        ({"num_layers": -1}, ValueError, "num_layers must be positive"),
        ({"num_layers": True}, TypeError, "num_layers must be int, got True"),
        ({"dim": "32"}, TypeError, "dim must be int, got '32'"),
        ({"head_dim": 8.0}, TypeError, r"head_dim must be int \| None, got 8.0"),
        ({"selection_bias": 1}, TypeError, "selection_bias must be bool, got 1"),
        ({"feed_forwards": "moe"}, TypeError, "feed_forwards must be a sequence of str, got 'moe'"),
        ({"feed_forwards": (1,)}, TypeError, "an entry of feed_forwards must be str, got 1"),
        ({"feed_forwards": ("dense",)}, ValueError, "feed_forwards must be of 'mlp', 'moe', got 'dense'"),
        ({"feed_forwards": ()}, ValueError, "feed_forwards .* got 0"),
        ({"mixers": ("attention",) * 4}, ValueError, "mixers .* divide num_layers = 6, got 4"),
        (
            {"mixers": ("mamba",)},
            ValueError,
            "mixers must be of 'attention', 'window_attention', 'sparse_attention', 'latent_attention', .* got 'mamba'",
        ),
        ({**LATENT, "kv_rank": 0}, ValueError, "kv_rank must be positive, got 0"),
        ({"kv_rank": -1}, ValueError, "kv_rank must not be negative, got -1"),
        ({**LATENT, "query_rank": 0}, ValueError, "query_rank must be positive, got 0"),
        ({**LATENT, "value_dim": 0}, ValueError, "value_dim must be positive, got 0"),
        ({**LATENT, "rotary_dim": None}, ValueError, "rotary_dim .* less than head_dim = 8 .* got None"),
        ({**LATENT, "rotary_dim": 8}, ValueError, "rotary_dim .* less than head_dim = 8 .* got 8"),
        ({**LATENT, "rotary_dim": 3}, ValueError, "rotary_dim must be even .* got 3"),
        ({**LATENT, "num_kv_heads": 2}, ValueError, "num_kv_heads must be None or num_heads = 4 .* got 2"),
        ({**LATENT, "qk_norm": "head"}, ValueError, "qk_norm must be None .* got 'head'"),
        ({"linear_rule": "mamba"}, ValueError, "linear_rule must be one of 'linear', 'retention', .* got 'mamba'"),
        ({"linear_num_heads": 0}, ValueError, "linear_num_heads must be positive, got 0"),
        ({"linear_num_key_heads": 3}, ValueError, "linear_num_key_heads must divide the 4 heads .* got 3"),
        ({"linear_num_heads": 6, "linear_num_key_heads": 4}, ValueError, "divide the 6 heads .* got 4"),
        ({"linear_head_dim": 0}, ValueError, "linear_head_dim must be positive, got 0"),
        ({"linear_value_dim": -2}, ValueError, "linear_value_dim must be positive, got -2"),
        ({"linear_conv": -1}, ValueError, "linear_conv must not be negative, got -1"),
        ({"linear_num_edits": 2}, ValueError, "linear_num_edits must be None unless .* 'delta_product', got 2"),
        (
            {"linear_rule": "gla", "linear_negative_eigenvalues": True},
            ValueError,
            "linear_negative_eigenvalues needs a linear_rule that erases, 'delta', .* got 'gla'",
        ),
        ({"mixers": ("linear_attention",), "num_kv_heads": 2}, ValueError, "num_kv_heads must be None .* got 2"),
        ({"attention_window": 3}, ValueError, "attention_window must be given with the mixer 'window_attention'"),
        ({"mixers": ("window_attention",)}, ValueError, "and only then, got None with"),
        (
            {"mixers": ("window_attention",), "attention_window": 0},
            ValueError,
            "attention_window must be positive, got 0",
        ),
        ({**LATENT, "attention_output_gate": True}, ValueError, "attention_output_gate must be False .* got True"),
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads must divide num_heads = 4, got 3"),
        ({"num_heads": 5}, ValueError, "num_heads must divide dim = 32"),
        ({"head_dim": 7}, ValueError, "head_dim must be even .* got 7"),
        ({"feed_forwards": ("mlp",), "hidden_dim": 0}, ValueError, "hidden_dim must be positive"),
        ({"num_experts": 0}, ValueError, "num_experts must be positive"),
        ({"top_k": 9}, ValueError, r"top_k must be in 1..8 \(num_experts\), got 9"),
        ({"expert_hidden_dim": 0}, ValueError, "expert_hidden_dim must be positive"),
        ({"shared_hidden_dim": -4}, ValueError, "shared_hidden_dim must not be negative, got -4"),
        ({"shared_gate": True}, ValueError, "shared_gate needs a shared expert"),
        ({"router_score": "tanh"}, ValueError, "router_score must be one of 'softmax', 'sigmoid', got 'tanh'"),
        ({"router_groups": 3}, ValueError, "router_groups must divide num_experts = 8, got 3"),
        ({"router_groups": 4, "router_top_groups": 5}, ValueError, "router_top_groups must be in 1..4"),
        ({"router_groups": 8, "top_k": 2}, ValueError, "top_k must fit in the 1 experts"),
        ({"activation": "swish"}, ValueError, "activation must be one of .*'swish'"),
        ({"init_std": -0.1}, ValueError, "init_std must not be negative"),
        ({"rope_theta": 0.0}, ValueError, "rope_theta must be positive, got 0.0"),
        ({"rope_theta": math.nan}, ValueError, "rope_theta must be finite, got nan"),
        ({"rotary_scaling": "stretch"}, ValueError, "rotary_scaling must be one of linear, llama3, got 'stretch'"),
        ({"rotary_scaling": "linear"}, ValueError, r"rotary_scaling 'linear' takes \['factor'\], got \[\]"),
        ({"rotary_scaling": "linear(factor=0.0)"}, ValueError, "rotary_scaling's factor must be positive, got 0.0"),
        ({"rotary_scaling": "linear(4)"}, ValueError, r"must read like 'linear\(factor=4.0\)': parameters need names"),
        ({"norm_eps": math.nan}, ValueError, "norm_eps must be finite, got nan"),
        ({"norm_eps": math.inf}, ValueError, "norm_eps must be finite, got inf"),
        ({"router_scale": -math.inf}, ValueError, "router_scale must be finite, got -inf"),
        ({"init_std": 10**400}, ValueError, r"init_std must be within ±2\*\*63, got 1000"),
        ({"max_length": 2**63}, ValueError, r"max_length must be within ±2\*\*63, got 9223372036854775808"),
        (
            {"router_groups": 8, "router_top_groups": 2, "router_group_score": "top2_sum"},
            ValueError,
            "router_group_score 'top2_sum' needs two experts a group, got router_groups = 8 of num_experts = 8",
        ),
    ],
)
def test_a_wrong_field_is_named_with_what_is_accepted(change, error, message):
    with pytest.raises(error, match=message):
        TransformerConfig(**{**SPARSE, **change})


def test_what_the_config_accepts_of_groups_the_model_does():
    """One group of one expert is no choice among groups: it needs no score."""
    groups = [(1, 1, 1), (1, 8, 2), (4, 8, 2), (8, 8, 2)]
    for num_groups, num_experts, top_k in groups:
        for score in ("max", "top2_sum"):
            fields = {
                "num_experts": num_experts,
                "top_k": top_k,
                "router_groups": num_groups,
                "router_top_groups": min(num_groups, 2),
                "router_group_score": score,
            }
            if score == "top2_sum" and num_groups == 8:
                with pytest.raises(ValueError, match="top2_sum"):
                    TransformerConfig(**{**SPARSE, **fields})
            else:
                Transformer(TransformerConfig(**{**SPARSE, **fields}), device="meta")


def test_what_a_file_says_for_transformers_is_passed_over():
    besides = {"model_type": "coterie", "architectures": ["CoterieForCausalLM"]}
    assert TransformerConfig.from_dict({**SPARSE, **besides}) == TransformerConfig(**SPARSE)
    theirs = {**besides, "transformers_version": "5.0.0", "use_cache": True, "dtype": "float32"}
    assert TransformerConfig.from_dict({**SPARSE, **theirs}) == TransformerConfig(**SPARSE)
    with pytest.raises(ValueError, match="no field 'use_cache'"):
        TransformerConfig.from_dict({**SPARSE, **besides, "use_cache": True})
    with pytest.raises(ValueError, match="model_type must be 'coterie', got 'llama'"):
        TransformerConfig.from_dict({**SPARSE, "model_type": "llama"})


def test_unknown_and_missing_fields_are_named():
    with pytest.raises(ValueError, match="no field 'num_expert'; did you mean 'num_experts'"):
        TransformerConfig.from_dict({**SPARSE, "num_expert": 4})
    with pytest.raises(ValueError, match="missing: num_layers"):
        TransformerConfig.from_dict({name: value for name, value in SPARSE.items() if name != "num_layers"})
    with pytest.raises(TypeError, match="JSON object"):
        TransformerConfig.from_dict([1, 2])


def test_replace_checks_again():
    with pytest.raises(ValueError, match="top_k"):
        replace(TransformerConfig(**SPARSE), top_k=100)
