"""The whole model against Hugging Face's, with the same weights: values to 1e-5, gradients too."""

import pytest
import torch

from coterie.models import Transformer, TransformerConfig, generate

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "attn_implementation": "eager",
}
OURS = {
    "vocab_size": 60,
    "dim": 32,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_length": 64,
}
MOE = {"feed_forwards": ("moe",), "num_experts": 8, "expert_hidden_dim": 12}
# name: (their class, their settings, our settings); their eps and theta are read from their config.
FAMILIES = {
    "llama": ("Llama", {"intermediate_size": 40, "tie_word_embeddings": True}, {"hidden_dim": 40}),
    "qwen3": (
        "Qwen3",
        {"intermediate_size": 40, "head_dim": 16, "tie_word_embeddings": False},
        {"hidden_dim": 40, "head_dim": 16, "qk_norm": True, "tie_embeddings": False},
    ),
    "mixtral": (
        "Mixtral",
        {"intermediate_size": 12, "num_local_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": False},
        {**MOE, "top_k": 2, "tie_embeddings": False},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "moe_intermediate_size": 12,
            "intermediate_size": 40,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "head_dim": 16,
            "tie_word_embeddings": True,
        },
        {**MOE, "top_k": 3, "head_dim": 16, "qk_norm": True},
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 20,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
        },
        {
            **MOE,
            "top_k": 3,
            "shared_hidden_dim": 20,
            "shared_gate": True,
            "router_normalize": False,
            "attention_bias": True,
        },
    ),
}


def _translated(state: dict[str, torch.Tensor], config: TransformerConfig) -> dict[str, torch.Tensor]:
    """Their state dict under our names."""
    renamed = {
        "model.embed_tokens.": "embedding.",
        "model.norm.": "norm.",
        "lm_head.": "head.",
        "model.layers.": "layers.",
        ".self_attn.": ".mixer.",
        ".input_layernorm.": ".mixer_norm.",
        ".post_attention_layernorm.": ".feed_forward_norm.",
        ".mlp.gate.": ".feed_forward.router.",
        ".mlp.shared_expert_gate.": ".feed_forward.shared_gate.",
        ".mlp.": ".feed_forward.",
    }
    ours = {}
    for name, tensor in state.items():
        for theirs, our in renamed.items():
            name = name.replace(theirs, our)
        ours[name] = tensor
    for name in [name for name in ours if name.endswith("gate_proj.weight")]:
        up = name.replace("gate_proj", "up_proj")
        ours[name.replace("gate_proj", "gate_up_proj")] = torch.cat((ours.pop(name), ours.pop(up)))
    if config.tie_embeddings:
        ours.pop("head.weight", None)
    if config.attention_bias:  # theirs has none on the output
        for index in range(config.num_layers):
            ours[f"layers.{index}.mixer.o_proj.bias"] = torch.zeros(config.dim)
    return ours


def _pair(family):
    name, theirs, ours = FAMILIES[family]
    torch.manual_seed(0)
    their_config = getattr(transformers, f"{name}Config")(**SHAPE, **theirs)
    their_model = getattr(transformers, f"{name}ForCausalLM")(their_config).eval()
    with torch.no_grad():
        for parameter_name, parameter in their_model.named_parameters():
            if "norm" in parameter_name or parameter_name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    config = TransformerConfig(
        **OURS,
        **{"feed_forwards": ("mlp",), **ours},
        norm_eps=their_config.rms_norm_eps,
        rope_theta=their_config.rope_parameters["rope_theta"],
    )
    our_model = Transformer(config)
    our_model.load_state_dict(_translated(their_model.state_dict(), config))
    return their_model, our_model


def _error(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients(family):
    theirs, ours = _pair(family)
    ids = torch.randint(60, (3, 17))
    wanted, got = theirs(ids).logits, ours(ids).logits
    assert _error(got, wanted) < 1e-5
    grad = torch.randn_like(wanted)
    wanted.backward(grad)
    got.backward(grad)
    right = _translated({name: p.grad for name, p in theirs.named_parameters()}, ours.config)
    for name, parameter in ours.named_parameters():
        if not name.endswith("o_proj.bias"):
            assert _error(parameter.grad, right[name]) < 2e-5, name


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_left_padded_greedy_generation(family):
    theirs, ours = _pair(family)
    ids = torch.randint(1, 60, (3, 9))
    token_mask = torch.arange(9) >= torch.tensor([[0], [4], [7]])
    wanted = theirs.generate(
        ids,
        attention_mask=token_mask.long(),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(generate(ours, ids, 12, token_mask=token_mask), wanted)
