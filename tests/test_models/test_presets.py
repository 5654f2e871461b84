from dataclasses import fields, replace

import pytest

from coterie.models import PRESETS, Transformer, TransformerConfig, attention_twin, dense_twin, preset


def _parameters(config: TransformerConfig) -> tuple[int, int]:
    """All parameters, and those that one token uses; embedding included once."""
    model = Transformer(config, device="meta")
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for moe in model.moe_layers():
        experts = sum(parameter.numel() for parameter in moe.experts.parameters())
        idle += experts * (config.num_experts - config.top_k) // config.num_experts
    return total, total - idle


def _feed_forward_parameters(config: TransformerConfig) -> tuple[int, int]:
    model = Transformer(config, device="meta")
    total = sum(p.numel() for name, p in model.named_parameters() if "feed_forward." in name)
    everything, active = _parameters(config)
    return total, total - (everything - active)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("tiny", (1e6, 12e6), (0.3e6, 3e6)),
        ("nano", (30e6, 60e6), (10e6, 30e6)),
        ("mini", (0.95e9, 1.05e9), (140e6, 160e6)),
        ("tiny-hybrid", (1e6, 12e6), (0.3e6, 3e6)),
        ("mini-hybrid", (0.95e9, 1.05e9), (140e6, 180e6)),
        ("tiny-long", (12e6, 15e6), (1e6, 3e6)),
        ("mini-long", (0.95e9, 1.05e9), (140e6, 180e6)),
        ("full-long", (4.0e9, 4.2e9), (0.8e9, 0.85e9)),
    ],
)
def test_parameters(name, total, active):
    got = _parameters(preset(name))
    assert total[0] <= got[0] <= total[1]
    assert active[0] <= got[1] <= active[1]


def test_tiny_reads_bytes():
    assert PRESETS["tiny"].vocab_size == 256
    assert PRESETS["tiny"].max_length == 256


@pytest.mark.parametrize("name", ["tiny", "mini"])
def test_a_hybrid_differs_in_its_mixers_alone(name):
    hybrid = preset(f"{name}-hybrid")
    assert hybrid.mixers == ("linear_attention",) * 3 + ("attention",)
    assert replace(hybrid, mixers=("attention",)) == preset(name)


def test_an_unknown_preset_is_named_with_the_known():
    with pytest.raises(ValueError, match=r"'tiny', 'nano', .* 'tiny-long', 'mini-long', 'full-long', got 'huge'"):
        preset("huge")


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("shared", [0, 64])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_dense_twin_has_equal_feed_forwards(name, shared, activation):
    config = replace(preset(name), num_layers=8, shared_hidden_dim=shared, activation=activation)
    total, active = _feed_forward_parameters(config)
    router = config.num_layers * config.num_experts * config.dim
    # Parameters of a feed-forward are its multiplications a token: equal active FLOPs is equal active parameters.
    assert _feed_forward_parameters(dense_twin(config))[0] == active - router
    params = _feed_forward_parameters(dense_twin(config, match="params"))[0]
    assert params == total - router
    assert abs(params / total - 1) < 0.01
    everything = _parameters(dense_twin(config, match="params"))[0] / _parameters(config)[0]
    assert abs(everything - 1) < 0.01


def test_dense_twin_changes_nothing_but_the_feed_forwards(small_config):
    config = replace(small_config, feed_forwards=("moe",), shared_gate=False)
    twin = dense_twin(config)
    assert twin.feed_forwards == ("mlp",)
    assert twin.hidden_dim == 2 * 10 + 12
    assert (twin.num_experts, twin.top_k, twin.shared_hidden_dim) == (0, 0, 0)
    for field in ("dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "qk_norm", "max_length", "activation"):
        assert getattr(twin, field) == getattr(config, field)


def test_dense_twin_of_a_mixed_pattern_keeps_the_sum(small_config):
    assert dense_twin(small_config).hidden_dim == (20 + 2 * 10 + 12) // 2
    assert dense_twin(small_config, match="params").hidden_dim == (20 + 6 * 10 + 12) // 2


def test_dense_twin_refuses_what_it_cannot_match(small_config):
    with pytest.raises(ValueError, match="match must be 'active' or 'params', got 'flops'"):
        dense_twin(small_config, match="flops")
    with pytest.raises(ValueError, match="'moe' in feed_forwards"):
        dense_twin(dense_twin(small_config))


def test_attention_twin_is_the_model_written_with_attention():
    assert attention_twin(preset("tiny-hybrid")) == preset("tiny")
    assert attention_twin(preset("mini-hybrid")) == preset("mini")
    long = preset("tiny-long")
    written = {"mixers": ("attention",), "linear_num_heads": None, "linear_head_dim": None}
    assert attention_twin(long) == replace(long, **written)
    order_by_state = replace(preset("tiny-hybrid"), num_layers=8, rotary_layers=(False,))
    written = {"num_layers": 8, "rotary_layers": (True, True, True, False)}
    assert attention_twin(order_by_state) == replace(preset("tiny"), **written)


def test_attention_twin_replaces_all_but_latent_attention(small_config):
    twin = attention_twin(small_config)
    assert twin.layer_mixers == ("attention",) * 6 + ("latent_attention",) * 2 + ("attention",) * 2
    default = TransformerConfig(vocab_size=2, dim=2, num_layers=1, num_heads=1, feed_forwards=("mlp",), hidden_dim=1)
    for field in fields(TransformerConfig):
        replaced = field.name.startswith(("linear_", "sparse_")) or field.name == "attention_window"
        if field.name not in ("mixers", "rotary_layers"):
            assert getattr(twin, field.name) == getattr(default if replaced else small_config, field.name), field.name
    model, other = (Transformer(config, device="meta") for config in (small_config, twin))
    # Of two layers of a kind the second is without rotary embedding, but for those that were of linear attention.
    assert twin.layer_rotary == (True, False) * 4 + (True, True)
    for index, layer in enumerate(other.layers):
        attention = {name: p.shape for name, p in layer.mixer.named_parameters()}
        kept = 6 if index in (6, 7) else 0  # a latent layer is as it was, others are as the first, of full attention
        assert attention == {name: p.shape for name, p in model.layers[kept].mixer.named_parameters()}
        feed_forwards = [layers[index].feed_forward.named_parameters() for layers in (model.layers, other.layers)]
        assert len({tuple((name, p.shape) for name, p in parameters) for parameters in feed_forwards}) == 1


def test_attention_twin_refuses_where_there_is_nothing_to_replace(small_config):
    with pytest.raises(ValueError, match=r"in mixers to have an attention twin, got \('attention',\)"):
        attention_twin(preset("tiny"))
    with pytest.raises(ValueError, match="in mixers to have an attention twin"):
        attention_twin(attention_twin(small_config))
