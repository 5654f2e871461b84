"""Schedule, configuration, precision and decay groups."""

import json
import math
from dataclasses import fields

import pytest
import torch
from torch import nn

from coterie.training import TrainConfig, decay_groups, learning_rate, make_optimizer, resolve_precision


def test_learning_rate_rises_linearly_and_falls_along_a_cosine():
    rates = [learning_rate(s, steps=12, lr=2.0, warmup_steps=4, min_lr_ratio=0.1) for s in range(12)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    cosine = [2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * i / 8)) / 2) for i in range(1, 9)]
    assert rates[4:] == pytest.approx(cosine, rel=1e-12)
    assert rates[7] == pytest.approx(1.1)  # half way down
    assert rates[-1] == pytest.approx(0.2)


def test_learning_rate_without_warm_up_and_in_a_short_run():
    assert learning_rate(0, steps=1, lr=1.0, warmup_steps=0, min_lr_ratio=0.5) == 0.5
    rates = [learning_rate(s, steps=3, lr=1.0, warmup_steps=10, min_lr_ratio=0.0) for s in range(3)]
    assert rates == pytest.approx([0.1, 0.2, 0.3])


def test_config_round_trips_through_json():
    config = TrainConfig(steps=7, betas=(0.8, 0.9), clip_norm=None, lr=1 / 3)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="unknown training field 'step'"):
        TrainConfig.from_dict({"step": 3})


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("steps", 0, "at least 1"),
        ("lr", 0.0, "more than 0"),
        ("min_lr_ratio", 1.5, "0 to 1"),
        ("betas", (0.9, 1.0), "two of"),
        ("clip_norm", 0.0, "None or more than 0"),
        ("accumulation", 3, "a divisor of batch_size = 16"),
        ("precision", "fp8", "one of auto, bf16, float32"),
        ("balance_weight", -1, "at least 0"),
    ],
)
def test_a_wrong_field_is_named(field, value, accepted):
    with pytest.raises(ValueError, match=f"^{field}: got .* must be {accepted}"):
        TrainConfig(**{"batch_size": 16, field: value})


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("steps", "x", TypeError, "steps must be int, got 'x'"),
        ("steps", 3.0, TypeError, "steps must be int, got 3.0"),
        ("compile", 1, TypeError, "compile must be bool, got 1"),
        ("clip_norm", "1", TypeError, r"clip_norm must be float \| None, got '1'"),
        ("betas", 3, TypeError, "betas must be a sequence of float, got 3"),
        ("betas", ["x", 0.9], TypeError, "an entry of betas must be float, got 'x'"),
        ("betas", [math.nan, 0.9], ValueError, "an entry of betas must be finite, got nan"),
        ("seed", 2**63, ValueError, r"seed must be within ±2\*\*63, got 9223372036854775808"),
    ],
)
def test_a_field_of_the_wrong_type_is_named(field, value, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        TrainConfig(**{field: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_number_must_be_finite(value):
    numbers = [field.name for field in fields(TrainConfig) if field.type in (float, float | None)]
    assert {"lr", "clip_norm", "z_weight"} <= set(numbers)
    for name in numbers:
        with pytest.raises(ValueError, match=f"^{name} must be finite, got {value}"):
            TrainConfig(**{name: value})


def test_whole_numbers_do_for_floats_and_lists_for_tuples():
    config = TrainConfig(lr=1, clip_norm=2, betas=[0, 0.5])
    assert (config.lr, config.clip_norm, config.betas) == (1.0, 2.0, (0.0, 0.5))
    assert all(isinstance(value, float) for value in (config.lr, config.clip_norm, *config.betas))


def test_a_config_is_read_from_an_object_only():
    with pytest.raises(TypeError, match="training must be an object of fields, got 3"):
        TrainConfig.from_dict(3)


@pytest.mark.parametrize(
    ("machine", "amx", "avx512", "arm", "expected"),
    [
        ("x86_64", False, False, True, "float32"),  # AVX-512 without bf16: mkldnn emulates, and says it supports it
        ("x86_64", True, False, False, "bf16"),
        ("x86_64", False, True, False, "bf16"),
        ("aarch64", False, False, True, "bf16"),
        ("aarch64", False, False, False, "float32"),
    ],
)
def test_automatic_precision_is_bf16_where_it_is_native(monkeypatch, machine, amx, avx512, arm, expected):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    # A wheel for macOS may be without oneDNN, and without its ops.
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: arm, raising=False)
    assert resolve_precision("auto", "cpu") == expected
    assert resolve_precision("float32", "cpu") == "float32"
    assert resolve_precision("bf16", "cpu") == "bf16"


def test_matrices_decay_and_nothing_else(make_model):
    model = make_model(qk_norm="head", qkv_bias=True, output_bias=True, tie_embeddings=False, selection_bias=True)
    model.layers[0].feed_forward.experts.gate_up_bias = nn.Parameter(torch.zeros(4, 16))
    with_decay, without = decay_groups(model)
    kinds = {name.partition("layers.0.")[2] or name for name in with_decay if not name.startswith("layers.1.")}
    assert kinds == {
        "mixer.q_proj.weight",
        "mixer.k_proj.weight",
        "mixer.v_proj.weight",
        "mixer.o_proj.weight",
        "feed_forward.router.weight",
        "feed_forward.experts.gate_up_proj",
        "feed_forward.experts.down_proj",
        "head.weight",
    }
    assert {
        "embedding.weight",
        "norm.weight",
        "layers.0.mixer.q_norm.weight",
        "layers.0.mixer.q_proj.bias",
        "layers.0.feed_forward.experts.gate_up_bias",
    } <= set(without)
    assert set(with_decay) | set(without) == {name for name, _ in model.named_parameters()}
    assert not set(with_decay) & set(without)


def test_a_tied_embedding_does_not_decay_and_a_frozen_weight_is_left_out(make_model):
    model = make_model(tie_embeddings=True)
    model.layers[0].mixer.q_proj.weight.requires_grad_(False)
    with_decay, without = decay_groups(model)
    assert "embedding.weight" in without
    assert "layers.0.mixer.q_proj.weight" not in with_decay | without
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        make_optimizer(model, TrainConfig())


def test_optimizer_decays_by_the_groups(make_model):
    """With zero gradients an AdamW step is the decay alone: w ← (1 - lr · decay) w."""
    model = make_model()
    optimizer = make_optimizer(model, TrainConfig(lr=0.5, weight_decay=0.2))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    with_decay, _ = decay_groups(model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name] * (0.9 if name in with_decay else 1.0))
