"""How transformers' model types and coterie's config say the same: one table a family.

A table holds what the two call by different names, what the family fixes, what coterie has no equivalent for, and where
each weight stands in a checkpoint. Everything is refused by name that a table does not say: in either direction.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "max_position_embeddings": "max_length",
    "initializer_range": "init_std",
}
_MOE_FIELDS = {**_FIELDS, "num_experts_per_tok": "top_k", "moe_intermediate_size": "expert_hidden_dim"}
_WEIGHTS = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "mixer_norm.weight": "input_layernorm.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    **{
        f"mixer.{part}.{kind}": f"self_attn.{part}.{kind}"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
        for kind in ("weight", "bias")
    },
    "feed_forward.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "feed_forward.down_proj.weight": "mlp.down_proj.weight",
}
_EXPERT_WEIGHTS = {
    **_WEIGHTS,
    "feed_forward.router.weight": "mlp.gate.weight",
    "feed_forward.experts.gate_up_proj": ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"),
    "feed_forward.experts.down_proj": "mlp.experts.{e}.down_proj.weight",
}
# Of layers of linear attention. Several of ours: theirs has the rows of each, key head by key head.
_LINEAR_WEIGHTS = {
    tuple(f"mixer.{name}_proj.weight" for name in ("q", "k", "v", "gate")): "linear_attn.in_proj_qkvz.weight",
    ("mixer.beta_proj.weight", "mixer.decay.proj.weight"): "linear_attn.in_proj_ba.weight",
    "mixer.conv_weight": "linear_attn.conv1d.weight",
    "mixer.decay.A_log": "linear_attn.A_log",
    "mixer.decay.dt_bias": "linear_attn.dt_bias",
    "mixer.norm.weight": "linear_attn.norm.weight",
    "mixer.o_proj.weight": "linear_attn.out_proj.weight",
}
# As transformers has them in memory, and as some tools write them: expert first, gate before up.
_STACKED_EXPERTS = {
    "feed_forward.experts.gate_up_proj": "mlp.experts.gate_up_proj",
    "feed_forward.experts.down_proj": "mlp.experts.down_proj",
}


@dataclass(frozen=True)
class Stored:
    """Where a weight stands, if not as in ours.

    Attributes:
        name: theirs.
        transposed: with its last two dimensions the other way round.
        in_turns: gate and up in turns along its last dimension; ours has gate, then up.
    """

    name: str
    transposed: bool = False
    in_turns: bool = False


@dataclass(frozen=True)
class Family:
    """One model type of transformers.

    Attributes:
        model_type: its name there.
        fields: theirs → ours (one, or several that must agree), where the values are the same.
        ours: fields of ours that the family fixes.
        theirs: fields of theirs whose other values coterie has no equivalent for, and the values it has.
        feed_forwards: how theirs says which layers are sparse: "mlp" or "moe" (all are), "step" (decoder_sparse_step
            and mlp_only_layers) or "first" (first_k_dense_replace).
        shared: how many expert widths the shared expert has, a field of theirs; None: `fields` has its width, if any.
        partial_rotary: rope_parameters may have a partial_rotary_factor.
        optional_qk_norm: use_qk_norm says whether queries and keys have the norm of every head.
        layer_types: what their layer_types calls our mixers; empty: it has none, and all layers mix alike.
        mxfp4: checkpoints may have their experts in MXFP4, with names that end in _blocks and _scales.
        clamped: the activation is "swiglu" with swiglu_alpha and swiglu_limit, and 1 added to up.
        latent: the attention is latent, and the width of a head is said in two parts, qk_nope_head_dim and
            qk_rope_head_dim.
        weights: our names of weights, without layers.<i>, → theirs, without model.layers.<i>. Several: one above the
            other in ours; {e}: one an expert.
        linear_weights: the same of the mixers that are linear attention. Several of ours: their rows stand in theirs
            key head by key head.
        stacked_weights: other places where the experts may stand, all in one tensor.
    """

    model_type: str
    fields: Mapping[str, str | tuple[str, ...]] = field(default_factory=lambda: _FIELDS)
    ours: Mapping[str, Any] = field(default_factory=dict)
    theirs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    feed_forwards: str = "moe"
    shared: str | None = None
    partial_rotary: bool = False
    optional_qk_norm: bool = False
    layer_types: Mapping[str, str] = field(default_factory=dict)
    mxfp4: bool = False
    clamped: bool = False
    latent: bool = False
    weights: Mapping[str, str | tuple[str, ...] | Stored] = field(default_factory=lambda: _EXPERT_WEIGHTS)
    linear_weights: Mapping[str | tuple[str, ...], str] = field(default_factory=dict)
    stacked_weights: Mapping[str, str] = field(default_factory=lambda: _STACKED_EXPERTS)


_NO_WINDOW = {"sliding_window": (None, 0)}
_SIGMOID_ROUTER = {"router_score": "sigmoid", "router_group_score": "top2_sum", "selection_bias": True}
_GATED_SHARED_EXPERT = {
    **_EXPERT_WEIGHTS,
    "feed_forward.shared_expert.gate_up_proj.weight": (
        "mlp.shared_expert.gate_proj.weight",
        "mlp.shared_expert.up_proj.weight",
    ),
    "feed_forward.shared_expert.down_proj.weight": "mlp.shared_expert.down_proj.weight",
    "feed_forward.shared_gate.weight": "mlp.shared_expert_gate.weight",
}
_SHARED_EXPERTS = {
    **_EXPERT_WEIGHTS,
    "feed_forward.router.selection_bias": "mlp.gate.e_score_correction_bias",
    "feed_forward.shared_expert.gate_up_proj.weight": (
        "mlp.shared_experts.gate_proj.weight",
        "mlp.shared_experts.up_proj.weight",
    ),
    "feed_forward.shared_expert.down_proj.weight": "mlp.shared_experts.down_proj.weight",
}

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            fields={**_FIELDS, "attention_bias": ("qkv_bias", "output_bias")},
            theirs={"mlp_bias": (False,)},
            feed_forwards="mlp",
            weights=_WEIGHTS,
            stacked_weights={},
        ),
        Family(
            "qwen3",
            fields={**_FIELDS, "attention_bias": ("qkv_bias", "output_bias")},
            ours={"qk_norm": "head"},
            theirs=_NO_WINDOW,
            feed_forwards="mlp",
            weights=_WEIGHTS,
            stacked_weights={},
        ),
        Family(
            "mixtral",
            fields={
                **_FIELDS,
                "num_local_experts": "num_experts",
                "num_experts_per_tok": "top_k",
                "intermediate_size": "expert_hidden_dim",
            },
            theirs=_NO_WINDOW,
            weights={
                **_WEIGHTS,
                "feed_forward.router.weight": "block_sparse_moe.gate.weight",
                "feed_forward.experts.gate_up_proj": (
                    "block_sparse_moe.experts.{e}.w1.weight",
                    "block_sparse_moe.experts.{e}.w3.weight",
                ),
                "feed_forward.experts.down_proj": "block_sparse_moe.experts.{e}.w2.weight",
            },
        ),
        Family(
            "olmoe",
            fields={
                **{theirs: ours for theirs, ours in _FIELDS.items() if theirs != "head_dim"},
                "num_experts": "num_experts",
                "num_experts_per_tok": "top_k",
                "intermediate_size": "expert_hidden_dim",
                "norm_topk_prob": "router_normalize",
                "attention_bias": ("qkv_bias", "output_bias"),
            },
            ours={"qk_norm": "all"},
            theirs={"clip_qkv": (None,)},
        ),
        Family(
            "qwen2_moe",
            fields={
                **_MOE_FIELDS,
                "num_experts": "num_experts",
                "norm_topk_prob": "router_normalize",
                "qkv_bias": "qkv_bias",
                "shared_expert_intermediate_size": "shared_hidden_dim",
            },
            ours={"shared_gate": True},
            theirs=_NO_WINDOW,
            feed_forwards="step",
            weights=_GATED_SHARED_EXPERT,
        ),
        Family(
            "qwen3_moe",
            fields={
                **_MOE_FIELDS,
                "num_experts": "num_experts",
                "norm_topk_prob": "router_normalize",
                "attention_bias": ("qkv_bias", "output_bias"),
            },
            ours={"qk_norm": "head"},
            theirs=_NO_WINDOW,
            feed_forwards="step",
        ),
        Family(
            "qwen3_next",
            fields={
                **_MOE_FIELDS,
                "num_experts": "num_experts",
                "norm_topk_prob": "router_normalize",
                "shared_expert_intermediate_size": "shared_hidden_dim",
                "attention_bias": ("qkv_bias", "output_bias"),
                "linear_num_value_heads": "linear_num_heads",
                "linear_num_key_heads": "linear_num_key_heads",
                "linear_key_head_dim": "linear_head_dim",
                "linear_value_head_dim": "linear_value_dim",
                "linear_conv_kernel_dim": "linear_conv",
            },
            ours={
                "shared_gate": True,
                "qk_norm": "head",
                "attention_output_gate": True,
                "norm_zero_centered": True,
            },
            theirs={"hidden_act": ("silu",)},  # the convolution's activation too, which coterie has no other for
            feed_forwards="step",
            partial_rotary=True,
            layer_types={"full_attention": "attention", "linear_attention": "linear_attention"},
            weights=_GATED_SHARED_EXPERT,
            linear_weights=_LINEAR_WEIGHTS,
        ),
        Family(
            "glm4_moe",
            fields={
                **_MOE_FIELDS,
                "n_routed_experts": "num_experts",
                "norm_topk_prob": "router_normalize",
                "routed_scaling_factor": "router_scale",
                "n_group": "router_groups",
                "topk_group": "router_top_groups",
                "attention_bias": "qkv_bias",
            },
            ours=_SIGMOID_ROUTER,
            feed_forwards="first",
            shared="n_shared_experts",
            partial_rotary=True,
            optional_qk_norm=True,
            weights=_SHARED_EXPERTS,
        ),
        Family(
            "granitemoe",
            fields={
                **_FIELDS,
                "num_local_experts": "num_experts",
                "num_experts_per_tok": "top_k",
                "intermediate_size": "expert_hidden_dim",
                "attention_bias": ("qkv_bias", "output_bias"),
                "attention_multiplier": "attention_scale",
                "embedding_multiplier": "embedding_scale",
                "residual_multiplier": "residual_scale",
                "logits_scaling": "logit_divisor",
            },
            ours={"router_order": "after"},
            weights={
                **_WEIGHTS,
                "feed_forward.router.weight": "block_sparse_moe.router.layer.weight",
                "feed_forward.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
                "feed_forward.experts.down_proj": "block_sparse_moe.output_linear.weight",
            },
            stacked_weights={},
        ),
        Family(
            "gpt_oss",
            fields={
                **_FIELDS,
                "num_local_experts": "num_experts",
                "num_experts_per_tok": "top_k",
                "intermediate_size": "expert_hidden_dim",
                "attention_bias": ("qkv_bias", "output_bias"),
                "sliding_window": "attention_window",
            },
            ours={
                "router_order": "after",
                "router_bias": True,
                "expert_bias": True,
                "attention_sink_logits": True,
            },
            theirs={"hidden_act": ("silu",)},
            layer_types={"sliding_attention": "window_attention", "full_attention": "attention"},
            mxfp4=True,
            clamped=True,
            weights={
                **_WEIGHTS,
                "mixer.sink_logits": "self_attn.sinks",
                "feed_forward.router.weight": "mlp.router.weight",
                "feed_forward.router.bias": "mlp.router.bias",
                "feed_forward.experts.gate_up_proj": Stored("mlp.experts.gate_up_proj", transposed=True, in_turns=True),
                "feed_forward.experts.gate_up_bias": Stored("mlp.experts.gate_up_proj_bias", in_turns=True),
                "feed_forward.experts.down_proj": Stored("mlp.experts.down_proj", transposed=True),
                "feed_forward.experts.down_bias": "mlp.experts.down_proj_bias",
            },
            stacked_weights={},
        ),
        Family(
            "deepseek_v3",
            fields={
                **{theirs: ours for theirs, ours in _MOE_FIELDS.items() if theirs != "head_dim"},
                "n_routed_experts": "num_experts",
                "norm_topk_prob": "router_normalize",
                "routed_scaling_factor": "router_scale",
                "n_group": "router_groups",
                "topk_group": "router_top_groups",
                "kv_lora_rank": "kv_rank",
                "q_lora_rank": "query_rank",
                "qk_rope_head_dim": "rotary_dim",
                "v_head_dim": "value_dim",
                "rope_interleave": "rotary_interleaved",
                "attention_bias": ("qkv_bias", "output_bias"),
            },
            ours={**_SIGMOID_ROUTER, "mixers": ("latent_attention",)},
            feed_forwards="first",
            shared="n_shared_experts",
            latent=True,
            weights={
                **_SHARED_EXPERTS,
                **{
                    f"mixer.{ours}.{kind}": f"self_attn.{theirs}.{kind}"
                    for ours, theirs in (
                        ("q_a_proj", "q_a_proj"),
                        ("q_norm", "q_a_layernorm"),
                        ("q_b_proj", "q_b_proj"),
                        ("kv_a_proj", "kv_a_proj_with_mqa"),
                        ("kv_norm", "kv_a_layernorm"),
                        ("kv_b_proj", "kv_b_proj"),
                    )
                    for kind in ("weight", "bias")
                },
            },
        ),
    )
}
