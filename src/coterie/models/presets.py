"""Named configs, and the models that a sparse one has to beat: with dense MLPs, and with full attention."""

from dataclasses import fields, replace

from coterie.models.config import TransformerConfig

# Three layers of linear attention (the gated delta rule) to one of full attention, as in Qwen3-Next and Kimi Linear.
_HYBRID = ("linear_attention",) * 3 + ("attention",)
# Of eight layers six are linear attention, one sees a window and the blocks it chooses, one sees all: without rotary
# embedding, as in Kimi Linear (arXiv:2510.26692), for the other layers know the order.
_LONG = {
    "mixers": (*_HYBRID[:3], "sparse_attention", *_HYBRID),
    "rotary_layers": (True,) * 7 + (False,),
    "max_length": 65536,
}

PRESETS: dict[str, TransformerConfig] = {
    # Bytes, and minutes on a laptop's two cores: the demo.
    "tiny": TransformerConfig(
        vocab_size=256,
        dim=128,
        num_layers=4,
        num_heads=2,
        num_experts=32,
        top_k=2,
        expert_hidden_dim=128,
        qk_norm="head",
        max_length=256,
        init_std=0.06,
    ),
    # 53 M parameters, 20 M active: hours on one GPU.
    "nano": TransformerConfig(
        vocab_size=32768,
        dim=384,
        num_layers=8,
        num_heads=6,
        num_kv_heads=2,
        num_experts=32,
        top_k=4,
        expert_hidden_dim=128,
        qk_norm="head",
        max_length=1024,
    ),
    # 0.97 B parameters, 149 M active: days on one GPU.
    "mini": TransformerConfig(
        vocab_size=32768,
        dim=768,
        num_layers=24,
        num_heads=12,
        num_kv_heads=4,
        num_experts=64,
        top_k=6,
        expert_hidden_dim=256,
        qk_norm="head",
        max_length=2048,
    ),
}
PRESETS |= {f"{name}-hybrid": replace(PRESETS[name], mixers=_HYBRID) for name in ("tiny", "mini")}
PRESETS |= {
    # Contexts of 65,536 tokens: few heads of keys, for the one layer in eight that keeps and reads them all.
    "tiny-long": replace(
        PRESETS["tiny"],
        num_layers=8,
        num_heads=4,
        num_kv_heads=1,
        linear_num_heads=2,
        linear_head_dim=64,
        **_LONG,
    ),
    "mini-long": replace(PRESETS["mini"], num_kv_heads=2, **_LONG),
    # 4.1 B parameters, 0.8 B active, contexts of 262,144: for those who have many GPUs.
    "full-long": TransformerConfig(
        vocab_size=65536,
        dim=1536,
        num_layers=32,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
        num_experts=64,
        top_k=6,
        expert_hidden_dim=384,
        shared_hidden_dim=384,
        qk_norm="head",
        **(_LONG | {"max_length": 262144}),
    ),
}


def preset(name: str) -> TransformerConfig:
    """The config of that name; ValueError names the ones there are."""
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(map(repr, PRESETS))}, got {name!r}")
    return PRESETS[name]


def dense_twin(config: TransformerConfig, match: str = "active") -> TransformerConfig:
    """The same model with a dense MLP in place of every MoE.

    The MLP's width is K·F + shared for match="active" (the feed-forward FLOPs of a token) and E·F + shared for
    match="params" (the feed-forward parameters). The router, about 1/(3·F) of an expert layer, is left out of both:
    the dense model gets nothing for it. Where a pattern mixes "mlp" and "moe", all layers get the mean width, so that
    the model's sum is the same.

    Args:
        config: a config with at least one "moe" layer.
        match: "active" | "params".
    """
    if match not in ("active", "params"):
        raise ValueError(f"match must be 'active' or 'params', got {match!r}")
    if "moe" not in config.feed_forwards:
        raise ValueError("config must have a 'moe' in feed_forwards to have a dense twin")
    experts = config.top_k if match == "active" else config.num_experts
    widths = {
        "moe": experts * config.expert_hidden_dim + config.shared_hidden_dim,
        "mlp": config.hidden_dim,
    }
    total = sum(widths[name] for name in config.feed_forwards)
    return replace(
        config,
        feed_forwards=("mlp",),
        hidden_dim=round(total / len(config.feed_forwards)),
        num_experts=0,
        top_k=0,
        expert_hidden_dim=0,
        shared_hidden_dim=0,
        shared_gate=False,
        router_bias=False,
        expert_bias=False,
        selection_bias=False,
    )


def attention_twin(config: TransformerConfig) -> TransformerConfig:
    """The same model with full attention in place of every linear, window and sparse attention.

    Latent attention and the feed-forwards stay. What belongs to the replaced mixers alone is set to its default, so
    that the twin of a hybrid is equal to the config that was written with attention in every layer. Where there was
    linear attention, which knows the order by itself, there is a rotary embedding now, whatever `rotary_layers` says;
    other layers keep theirs, or do without as before.

    Args:
        config: a config with at least one mixer other than "attention" and "latent_attention".
    """
    kept = {"attention", "latent_attention"}
    if {*config.mixers} <= kept:
        raise ValueError(
            "config must have a 'linear_attention', 'window_attention' or 'sparse_attention' in mixers to have an "
            f"attention twin, got {config.mixers}"
        )
    mixers = tuple(mixer if mixer in kept else "attention" for mixer in config.layer_mixers)
    pairs = zip(config.layer_rotary, config.layer_mixers, strict=True)
    rotary = tuple(has_rotary or mixer == "linear_attention" for has_rotary, mixer in pairs)
    own = ("linear_", "sparse_", "attention_window")
    defaults = {field.name: field.default for field in fields(config) if field.name.startswith(own)}
    return replace(config, mixers=_shortest(mixers), rotary_layers=_shortest(rotary), **defaults)


def _shortest(pattern: tuple) -> tuple:
    """The shortest pattern that gives `pattern` when it is repeated."""
    length = len(pattern)
    return next(pattern[:n] for n in range(1, length + 1) if pattern[:n] * (length // n) == pattern)
