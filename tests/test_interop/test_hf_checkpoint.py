"""transformers' checkpoints in coterie's Transformer: its logits, gradients and tokens; files come back equal."""

import inspect
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from _check import relative_error  # noqa: E402
from coterie.interop import from_hf, to_hf  # noqa: E402
from coterie.interop.hf_config import config_from_hf  # noqa: E402
from coterie.interop.hf_families import FAMILIES  # noqa: E402
from coterie.interop.hf_places import places_of  # noqa: E402
from coterie.models import Transformer, TransformerConfig, generate  # noqa: E402
from coterie.modules import add_lora  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN_MOE = {"moe_intermediate_size": 12, "intermediate_size": 40, "num_experts": 8, "num_experts_per_tok": 3}
GLM = {
    "moe_intermediate_size": 12,
    "intermediate_size": 40,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "head_dim": 16,
}
DEEPSEEK = {
    "moe_intermediate_size": 12,
    "intermediate_size": 40,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 10,
    "q_lora_rank": None,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 7,
    "rms_norm_eps": 1e-2,  # which the norms within the attention do not have
}
QWEN_NEXT = {
    **QWEN_MOE,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "shared_expert_intermediate_size": 20,
    "linear_num_value_heads": 6,
    "linear_num_key_heads": 3,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 7,
}
GPT_OSS = {
    "intermediate_size": 12,
    "head_dim": 10,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "sliding_window": 4,
    "swiglu_limit": 0.3,  # which these weights reach
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
# name: (model type, settings); every option of a family's table stands in one of them.
CHECKPOINTS = {
    "llama": ("llama", {"intermediate_size": 40}),
    "llama, tied, biases": (
        "llama",
        {"intermediate_size": 40, "tie_word_embeddings": True, "attention_bias": True, "head_dim": 16},
    ),
    "llama, theta, gelu": (
        "llama",
        {
            "intermediate_size": 40,
            "hidden_act": "gelu_pytorch_tanh",
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
    ),
    "llama 3": (
        "llama",
        {
            "intermediate_size": 40,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "llama, yarn": ("llama", {"intermediate_size": 40, "rope_parameters": YARN}),
    "llama, yarn said by halves": (
        "llama",
        {
            "intermediate_size": 40,
            "rope_parameters": {
                **YARN,
                "original_max_position_embeddings": 64,
                "truncate": None,  # which is False
                "beta_fast": None,
                "attention_factor": None,
                "mscale": 0.5,
            },
        },
    ),
    "qwen3": (
        "qwen3",
        {
            "intermediate_size": 40,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        },
    ),
    "mixtral": ("mixtral", {"intermediate_size": 12, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "olmoe": ("olmoe", {"intermediate_size": 12, "num_experts": 8, "num_experts_per_tok": 3}),
    "olmoe, normalized": (
        "olmoe",
        {"intermediate_size": 12, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True},
    ),
    "qwen2_moe": ("qwen2_moe", {**QWEN_MOE, "shared_expert_intermediate_size": 20}),
    "qwen2_moe, dense layer": (
        "qwen2_moe",
        {**QWEN_MOE, "shared_expert_intermediate_size": 20, "mlp_only_layers": [1], "tie_word_embeddings": True},
    ),
    "qwen3_moe": ("qwen3_moe", {**QWEN_MOE, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3_moe, every second": (
        "qwen3_moe",
        {**QWEN_MOE, "num_hidden_layers": 4, "decoder_sparse_step": 2, "attention_bias": True},
    ),
    # hidden_size = 2 · moe_intermediate_size = heads · head_dim: every matrix is square.
    "qwen3_moe, square": ("qwen3_moe", {**QWEN_MOE, "moe_intermediate_size": 16, "head_dim": 8, "num_experts": 32}),
    "qwen3_next": ("qwen3_next", QWEN_NEXT),
    "qwen3_next, another pattern": (
        "qwen3_next",
        {
            **QWEN_NEXT,
            "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"],
            "mlp_only_layers": [1],
            "attention_bias": True,
            "norm_topk_prob": False,
            "linear_num_key_heads": 6,
            "linear_conv_kernel_dim": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5},
        },
    ),
    "gpt_oss": ("gpt_oss", GPT_OSS),
    "gpt_oss, another pattern, without biases, another yarn": (
        "gpt_oss",
        {
            **GPT_OSS,
            "num_hidden_layers": 4,
            "layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 2,  # with 1, the cache of transformers 5.23 drops nothing
            "attention_bias": False,
            "swiglu_alpha": 0.9,
            "swiglu_limit": 7.0,
            "tie_word_embeddings": True,
            "rope_parameters": {**YARN, "beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 0.7},
        },
    ),
    # hidden_size = 2 · intermediate_size = heads · head_dim: every matrix is square.
    "gpt_oss, square, no window": (
        "gpt_oss",
        {
            **GPT_OSS,
            "intermediate_size": 16,
            "head_dim": 8,
            "layer_types": ["full_attention"] * 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
        },
    ),
    "glm4_moe": ("glm4_moe", GLM),
    "glm4_moe, groups": (
        "glm4_moe",
        {
            **GLM,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 2,
            "use_qk_norm": True,
            "attention_bias": True,
            "routed_scaling_factor": 2.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
        },
    ),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "deepseek_v3, groups, compressed queries, biases": (
        "deepseek_v3",
        {
            **DEEPSEEK,
            "q_lora_rank": 9,
            "attention_bias": True,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.5,
            "norm_topk_prob": False,
        },
    ),
    "deepseek_v3, yarn": ("deepseek_v3", {**DEEPSEEK, "rope_parameters": YARN}),
    "deepseek_v3, halves": ("deepseek_v3", {**DEEPSEEK, "rope_interleave": False, "first_k_dense_replace": 0}),
    "deepseek_v3, wide values, biases, theta": (
        "deepseek_v3",
        {
            **DEEPSEEK,
            "attention_bias": True,
            "v_head_dim": 20,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
        },
    ),
    "granitemoe": (
        "granitemoe",
        {
            "intermediate_size": 12,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.3,
            "logits_scaling": 6.0,
        },
    ),
}
GENERATED = ["llama", "qwen3_moe", "granitemoe", "glm4_moe, groups"]
GENERATED += [name for name in CHECKPOINTS if name.startswith(("deepseek_v3", "gpt_oss", "qwen3_next"))]


def make_model(name, dtype=torch.float32, **settings):
    family, own = CHECKPOINTS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SHAPE, **own, **settings})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("dt_bias"):
                # Decays as Mamba-2 begins, e^-1.6 and more a token. Where transformers begins, down to e^-20, the
                # gradient of A_log is nearly 0 and has three or four digits in float32, there and here.
                tensor.copy_(torch.expm1(10 ** (2 * torch.rand_like(tensor) - 3)).log())
            elif "norm" in name or name.endswith("bias"):
                tensor.add_(0.2 * torch.randn_like(tensor))
            elif name.endswith("gate.weight") or "router" in name:
                tensor.normal_(std=0.5)
    for parameter in model.parameters():  # not the buffers: transformers keeps the router's bias in float32
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model.eval()


def load_eager(path):
    settings = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(path, **settings).eval()


@pytest.fixture(autouse=True)
def _torch_for_gated_delta(monkeypatch):
    """transformers' own code in torch: with flash-linear-attention installed it would call that one's kernels."""
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        monkeypatch.setattr(qwen, name, inspect.unwrap(getattr(qwen, name)))


@pytest.fixture
def ids():
    return torch.randint(3, 60, (3, 17))


@pytest.fixture
def saved(tmp_path):
    def save(name, **settings):
        model = make_model(name, **settings)
        model.save_pretrained(tmp_path / "theirs")
        return model, tmp_path / "theirs"

    return save


# --- the same model


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_and_gradients(name, ids, saved):
    theirs, path = saved(name)
    ours = from_hf(path)
    wanted, got = theirs(ids).logits, ours(ids).logits
    assert relative_error(got, wanted) < 1e-5
    grad = torch.randn_like(wanted)
    wanted.backward(grad)
    got.backward(grad)
    _compare_gradients(theirs, ours, 5e-5)


def _compare_gradients(theirs, ours, tolerance):
    """Of all parameters, through the same table as the weights (theirs has stacked experts in memory)."""
    family = FAMILIES[theirs.config.model_type]
    right = {key: p.grad for key, p in theirs.named_parameters()}
    right = transformers.core_model_loading.revert_weight_conversion(theirs, right)
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    places = dict(places_of(gradients, ours.config, family.weights, family.linear_weights))
    assert right.keys() - places.keys() <= {"lm_head.weight"} | {
        key for key in right if key.endswith("correction_bias")
    }
    for key, place in places.items():
        gradient = place.of(gradients)
        if right[key].norm() > 1e-4:  # an expert that got no token
            assert relative_error(gradient, right[key]) < tolerance, key
        else:
            assert gradient.norm() < 1e-3, key


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if "gpt_oss" in name or "yarn" in name])
def test_logits_and_gradients_in_float64(name, ids):
    """Angles, and routers here, are float32 all the same, and so are the norms of gpt_oss there."""
    theirs = make_model(name, torch.float64)
    ours = from_hf(theirs)
    wanted, got = theirs(ids).logits, ours(ids).logits
    assert relative_error(got, wanted) < 1e-6
    grad = torch.randn_like(wanted)
    wanted.backward(grad)
    got.backward(grad)
    _compare_gradients(theirs, ours, 5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_without_rotary_are_those_of_smollm3(dtype):
    """Which is a llama besides, so llama's table has its weights."""
    settings = {**SHAPE, "num_hidden_layers": 4, "intermediate_size": 40, "no_rope_layers": [1, 0, 1, 0]}
    settings |= {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model("smollm3", **settings), attn_implementation="eager")
    theirs = theirs.to(dtype).eval()
    llama = config_from_hf(AutoConfig.for_model("llama", **settings))
    ours = Transformer(replace(llama, rotary_layers=(True, False)), dtype=dtype)
    weights, right = ours.state_dict(), theirs.state_dict()
    for key, place in places_of(weights, ours.config, FAMILIES["llama"].weights, {}):
        place.fill(weights, right[key])
    ids = torch.randint(3, 60, (3, 17))
    padding = [[0], [4], [7]] if dtype == torch.float32 else [[0]] * 3  # where theirs is NaN in float64
    token_mask = torch.arange(17) >= torch.tensor(padding)
    wanted = theirs(ids, attention_mask=token_mask.long()).logits[token_mask]
    got = ours(ids, token_mask=token_mask).logits[token_mask]
    assert relative_error(got, wanted) < 1e-6
    grad = torch.randn_like(wanted)
    wanted.backward(grad)
    got.backward(grad)
    for key, place in places_of(weights, ours.config, FAMILIES["llama"].weights, {}):
        gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
        assert relative_error(place.of(gradients), theirs.get_parameter(key).grad) < 2e-5, key
    generation = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = theirs.generate(ids, attention_mask=token_mask.long(), **generation)
    assert torch.equal(generate(ours, ids, 12, token_mask=token_mask), wanted)
    ours.layers[1].has_rotary = True
    assert relative_error(ours(ids, token_mask=token_mask).logits[token_mask], got) > 1e-2


@pytest.mark.parametrize("index", [0, 1])  # with a window, and without
def test_parts_of_gpt_oss_in_float64(index):
    """From the same angles, experts and weights: nothing is float32 there."""
    theirs = make_model("gpt_oss", torch.float64)
    ours = from_hf(theirs)
    there, here = theirs.model.layers[index], ours.layers[index]
    x = torch.randn(2, 11, 32, dtype=torch.float64, requires_grad=True)
    rotary = [part.double() for part in ours.rotary(torch.arange(11))]
    distance = torch.arange(11)[:, None] - torch.arange(11)
    seen = (distance >= 0) & (distance < (here.mixer.window or 11))
    mask = torch.zeros(2, 1, 11, 11, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    wanted, _ = there.self_attn(x, [part[None] for part in rotary], mask)
    routing = here.feed_forward.router(x)
    weights = routing.weights.double().detach().requires_grad_()
    expert_ids = routing.expert_ids
    rows = x.flatten(0, 1) / 2
    hidden = rows[:, None] @ there.mlp.experts.gate_up_proj[expert_ids[:, 0]]
    assert 0.1 < (hidden.abs() > 0.3).double().mean() < 0.9  # swiglu_limit
    experts = here.feed_forward.experts(rows, replace(routing, weights=weights))
    pairs = (here.mixer(x, rotary), wanted, (x,)), (experts, there.mlp.experts(rows, expert_ids, weights), (x, weights))
    for got, wanted, inputs in pairs:
        assert relative_error(got, wanted) < 1e-12
        grad = torch.randn_like(wanted)
        both = [torch.autograd.grad(y, inputs, grad, retain_graph=True) for y in (got, wanted)]
        for a, b in zip(*both, strict=True):
            assert relative_error(a, b) < 1e-12
        got.backward(grad, retain_graph=True)
        wanted.backward(grad, retain_graph=True)
    family, prefix = FAMILIES["gpt_oss"], f"model.layers.{index}."
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    right = {key: p.grad for key, p in theirs.named_parameters()}
    compared = 0
    for key, place in places_of(ours.state_dict(), ours.config, family.weights, {}):
        if key.startswith((prefix + "self_attn", prefix + "mlp.experts")):
            assert relative_error(place.of(gradients), right[key]) < 1e-12, key
            compared += 1
    assert compared == 13


@pytest.mark.parametrize("name", GENERATED)
def test_left_padded_greedy_generation(name):
    theirs = make_model(name)
    ours = from_hf(theirs)
    ids = torch.randint(3, 60, (3, 9))
    token_mask = torch.arange(9) >= torch.tensor([[0], [4], [7]])
    count = 30 if name.startswith("gpt_oss") else 12  # several windows
    settings = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = theirs.generate(ids, attention_mask=token_mask.long(), **settings)
    assert torch.equal(generate(ours, ids, count, token_mask=token_mask), wanted)


@pytest.mark.parametrize("name", ["mixtral", "granitemoe"])
def test_a_model_in_memory_is_copied(name, ids):
    theirs = make_model(name)
    wanted = theirs(ids).logits
    ours = from_hf(theirs)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
    assert relative_error(ours(ids).logits, wanted) < 1e-5


# --- files


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_files_come_back_bit_for_bit(name, saved, tmp_path, ids):
    _, path = saved(name)
    to_hf(from_hf(path), tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (path / file).read_bytes(), file
    # From files as ours are: where weights begin in memory may decide how they are multiplied.
    assert torch.equal(load_eager(tmp_path / "again")(ids).logits, load_eager(path)(ids).logits)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_model_without_a_source_finds_its_family(name, saved, tmp_path, ids):
    """Through coterie's own format, which has no place for transformers' config."""
    theirs, path = saved(name)
    from_hf(path).save_pretrained(tmp_path / "ours")
    to_hf(Transformer.from_pretrained(tmp_path / "ours"), tmp_path / "again")
    again = load_eager(tmp_path / "again")
    # Where two families say the same (olmoe and others do not), either is right.
    assert again.config.model_type == theirs.config.model_type
    assert torch.equal(again(ids).logits, load_eager(path)(ids).logits)


@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe"])
def test_shards_are_those_that_transformers_writes(name, tmp_path, ids):
    theirs = make_model(name)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    files = sorted(path.name for path in (tmp_path / "theirs").glob("model*"))
    assert len(files) > 3
    ours = from_hf(tmp_path / "theirs")
    assert relative_error(ours(ids).logits, theirs(ids).logits) < 1e-5
    to_hf(ours, tmp_path / "again", max_shard_size="20KB")
    assert torch.equal(load_eager(tmp_path / "again")(ids).logits, theirs(ids).logits)
    for part in ("theirs", "again"):
        merged = [load_file(path) for path in (tmp_path / part).glob("*.safetensors")]
        tensors = {key: t for shard in merged for key, t in shard.items()}
        if part == "theirs":
            wanted = tensors
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[key], wanted[key]) for key in wanted)
    # A later save in one file leaves none of the shards, which a reader would take for its own.
    to_hf(ours, tmp_path / "again")
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert "from_hf" in (tmp_path / "again/README.md").read_text()


def test_dtypes(saved, tmp_path):
    _, path = saved("glm4_moe", dtype=torch.bfloat16)
    ours = from_hf(path)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert ours.layers[-1].feed_forward.router.selection_bias.dtype == torch.float32
    to_hf(ours, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    assert {p.dtype for p in from_hf(path, dtype=torch.float32).parameters()} == {torch.float32}
    assert json.loads((tmp_path / "again/config.json").read_text())["dtype"] == "bfloat16"


def test_stacked_experts_on_disk_are_read_too(saved, tmp_path, ids):
    """As transformers has them in memory; square, so that only the table knows which way round they stand."""
    theirs, path = saved("qwen3_moe, square")
    save_file({name: t for name, t in theirs.state_dict().items()}, path / "model.safetensors")
    assert relative_error(from_hf(path)(ids).logits, theirs(ids).logits) < 1e-5


def test_a_changed_config_is_written(saved, tmp_path):
    _, path = saved("qwen3_moe")
    ours = from_hf(path)
    ours.config = TransformerConfig.from_dict({**ours.config.to_dict(), "norm_eps": 1e-3, "router_normalize": False})
    to_hf(ours, tmp_path / "again")
    config = AutoConfig.from_pretrained(tmp_path / "again")
    assert (config.rms_norm_eps, config.norm_topk_prob, config.eos_token_id) == (1e-3, False, 2)


def test_memory_is_the_model_and_one_shard(tmp_path):
    """The most a fresh process ever held while it loaded, over what it held before."""
    probe = """
import sys, torch
from coterie.interop import from_hf
import transformers
from coterie.models import Transformer, TransformerConfig
def peak(what):
    line = next(line for line in open("/proc/self/status") if line.startswith(what))
    return int(line.split()[1]) * 1024
before = peak("VmRSS")
model = from_hf(sys.argv[1])
print(peak("VmHWM") - before, sum(p.nbytes for p in model.parameters()))
"""
    config = AutoConfig.for_model(
        "qwen3_moe", **{**SHAPE, **QWEN_MOE, "hidden_size": 512, "moe_intermediate_size": 512}
    )
    config.num_hidden_layers = 6
    model = AutoModelForCausalLM.from_config(config)  # 160 MB
    model.save_pretrained(tmp_path, max_shard_size="20MB")
    shard = max(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    run = subprocess.run([sys.executable, "-c", probe, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    extra, held = map(int, run.stdout.split())
    assert held > 150e6
    assert extra < held + shard + 15e6  # what is imported when needed


# --- refusals


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("llama", {"mlp_bias": True}, "llama's mlp_bias = True"),
        ("llama", {"hidden_act": "relu2"}, "activation hidden_act = 'relu2'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "scaling, rope_type = 'dynamic'",
        ),
        (
            "deepseek_v3",
            {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
            "deepseek_v3's mscale_all_dim = 1.0",
        ),
        ("llama", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}, "mscale beside mscale_all_dim"),
        (
            "deepseek_v3",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0, "mscale_all_dim": 1.0}},
            "deepseek_v3's mscale_all_dim = 1.0",
        ),
        ("llama", {"is_causal": False}, "is_causal = False"),
        ("mixtral", {"sliding_window": 8}, "mixtral's sliding_window = 8"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8}, "qwen3's sliding_window = 8"),
        ("olmoe", {"clip_qkv": 3.0}, "olmoe's clip_qkv = 3.0"),
        ("qwen3_next", {"hidden_act": "gelu"}, "qwen3_next's hidden_act = 'gelu'"),
        ("gpt_oss", {"hidden_act": "gelu"}, "gpt_oss's hidden_act = 'gelu'"),
        ("gpt_oss", {"layer_types": ["chunked_attention"] * 3}, "gpt_oss's layer_types = 'chunked_attention'"),
        ("qwen3_next", {"layer_types": ["sliding_attention"] * 4}, "layer_types = 'sliding_attention'"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, "qwen3_moe has no sparse layer"),
    ],
)
def test_a_feature_without_an_equivalent_is_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        from_hf(make_model(name, **settings))


def test_families_without_an_equivalent_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no table for the model type 'gpt2'; it has llama, qwen3, mixtral"):
        from_hf(AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=2)))
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v2"}')
    with pytest.raises(ValueError, match=r"no table for the model type 'deepseek_v2'"):
        from_hf(tmp_path)


DENSE = {"vocab_size": 60, "dim": 32, "num_layers": 2, "num_heads": 4, "feed_forwards": ("mlp",), "hidden_dim": 24}
SPARSE = {**DENSE, "feed_forwards": ("moe",), "num_experts": 8, "top_k": 2, "expert_hidden_dim": 12}
HYBRID = {
    **SPARSE,
    "mixers": ("attention", "linear_attention"),
    "qk_norm": "head",
    "attention_output_gate": True,
    "norm_zero_centered": True,
}
OSS = {
    **SPARSE,
    "mixers": ("window_attention", "attention"),
    "attention_window": 5,
    "attention_sink_logits": True,
    "router_order": "after",
    "router_bias": True,
    "expert_bias": True,
    "activation": "swiglu(up_offset=1, limit=7)",
}
LATENT = {**SPARSE, "mixers": ("latent_attention",), "kv_rank": 6, "rotary_dim": 4}


@pytest.mark.parametrize(
    ("config", "family", "message"),
    [
        ({**DENSE, "activation": "relu2"}, None, r"the closest, llama, has none of its activation = 'relu2'"),
        ({**DENSE, "qk_norm": "all"}, None, r"has none of its qk_norm = 'all'"),
        ({**DENSE, "residual_scale": 0.5}, "llama", r"llama has no equivalent of this model's residual_scale = 0.5"),
        ({**SPARSE, "selection_bias": True}, "mixtral", r"mixtral .* selection_bias = True \(there it is False\)"),
        ({**SPARSE, "feed_forwards": ("mlp", "moe")}, "mixtral", r"feed_forwards = .* all 'moe'"),
        ({**SPARSE, "output_bias": True}, "qwen3_moe", r"qkv_bias = False and output_bias = True"),
        ({**DENSE, "head_dim": 16}, "olmoe", r"head_dim = 16"),
        (DENSE, "gpt2", "no table for the model type 'gpt2'"),
        (SPARSE, "deepseek_v3", r"mixers = \('attention',\) \(there it is \('latent_attention',\)\)"),
        (LATENT, "glm4_moe", r"mixers = \('latent_attention',\) .*kv_rank = 6 \(there it is 0\)"),
        ({**HYBRID, "activation": "geglu"}, None, r"qwen3_next, .* activation = 'geglu' \(there it is one of swiglu\)"),
        ({**HYBRID, "linear_rule": "kda"}, None, r"qwen3_next, .* linear_rule = 'kda' \(there it is 'gated_delta'\)"),
        ({**HYBRID, "linear_negative_eigenvalues": True}, None, "linear_negative_eigenvalues = True"),
        ({**HYBRID, "linear_conv": 0}, None, r"linear_conv = 0 \(there it is positive\)"),
        ({**HYBRID, "norm_zero_centered": False}, "qwen3_next", "norm_zero_centered = False"),
        ({**HYBRID, "attention_output_gate": False}, "qwen3_moe", r"mixers = .*'linear_attention'.*norm_zero_centered"),
        (
            {**HYBRID, "mixers": ("attention", "latent_attention"), "kv_rank": 6, "rotary_dim": 4},
            "qwen3_next",
            r"mixers = .* \(there they are of 'attention', 'linear_attention'\)",
        ),
        ({**DENSE, "rotary_layers": (True, False)}, None, r"rotary_layers = \(True, False\) \(there it is \(True,\)\)"),
        (
            {**DENSE, "rotary_scaling": "ntk(factor=2.0)"},
            "llama",
            r"rotary_scaling = 'ntk\(factor=2.0\)' \(there it is None with rope_theta = 25198.4",
        ),
        (
            {**SPARSE, "router_bias": True, "router_order": "after"},
            "granitemoe",
            r"router_bias = True \(there it is Fal",
        ),
        ({**SPARSE, "expert_bias": True}, "mixtral", r"expert_bias = True \(there it is False\)"),
        (
            {**OSS, "activation": "swiglu"},
            "gpt_oss",
            r"activation = 'swiglu' \(there it is 'swiglu' with a limit and up",
        ),
        (
            {**OSS, "activation": "geglu(limit=7, up_offset=1)"},
            "gpt_oss",
            r"activation = 'geglu\(limit=7, up_offset=1\)",
        ),
        ({**OSS, "expert_bias": False}, "gpt_oss", r"expert_bias = False \(there it is True\)"),
        ({**OSS, "attention_sink_logits": False}, "gpt_oss", r"attention_sink_logits = False \(there it is True\)"),
        (
            {**OSS, "mixers": ("window_attention", "linear_attention")},
            "gpt_oss",
            r"mixers = .* \(there they are of 'attention', 'window_attention'\)",
        ),
        ({**DENSE, "rotary_interleaved": True}, None, r"rotary_interleaved = True \(there it is False\)"),
    ],
)
def test_a_model_without_an_equivalent_is_refused_by_name(config, family, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        to_hf(Transformer(TransformerConfig(**config)), tmp_path / "out", family=family)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({**SPARSE, "router_normalize": False}, "qwen2_moe"),  # without a shared expert
        (HYBRID, "qwen3_next"),
        (OSS, "gpt_oss"),
        ({**OSS, "mixers": ("attention",), "attention_window": None, "rotary_layers": (True, True)}, "gpt_oss"),
        (
            {
                **HYBRID,
                "linear_num_heads": 6,
                "linear_num_key_heads": 2,
                "linear_value_dim": 5,
                "shared_hidden_dim": 10,
                "shared_gate": True,
                "rotary_dim": 4,
            },
            "qwen3_next",
        ),
        ({**SPARSE, "head_dim": 44, "rotary_dim": 30, "router_score": "sigmoid", "selection_bias": True}, "glm4_moe"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # transformers', of the shared expert
def test_what_was_written_is_read_again(config, family, tmp_path, ids):
    model = Transformer(TransformerConfig(**config, num_kv_heads=2))
    to_hf(model, tmp_path, family=family)
    again = from_hf(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    torch.testing.assert_close(load_eager(tmp_path)(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_adapters_are_not_left_out_in_silence(tmp_path):
    model = Transformer(TransformerConfig(**DENSE))
    add_lora(model, targets="q_proj")
    with pytest.raises(ValueError, match=r"llama checkpoint has no place for layers.0.mixer.q_proj.lora.* merge_lora"):
        to_hf(model, tmp_path / "out")


def _edited(path, edit):
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


QKVZ = "model.layers.1.linear_attn.in_proj_qkvz.weight"
GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(GATE), f"{GATE} is missing"),
        (lambda t: t.update({GATE: t[GATE].T.contiguous()}), rf"{GATE} has the shape \[32, 12\], the config makes it"),
        (lambda t: t.update({GATE: t[GATE].to(torch.float8_e4m3fn)}), f"{GATE} is of torch.float8_e4m3fn"),
        (lambda t: t.update({GATE: t[GATE].bfloat16()}), "of torch.float32 and others .* give dtype|of torch.bfloat16"),
        (
            lambda t: t.update({"model.layers.0.mlp.fence.weight": t[GATE] + 0}),
            "fence.weight has no place",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.experts.down_proj": torch.zeros(8, 32, 12)}),
            "is there twice",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(edit, message, saved):
    _, path = saved("qwen3_moe")
    _edited(path, edit)
    with pytest.raises(ValueError, match=message):
        from_hf(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(QKVZ), f"{QKVZ} is missing"),
        (
            lambda t: t.update({QKVZ: t[QKVZ][:-1].contiguous()}),
            rf"{QKVZ} has the shape \[143, 32\], the config makes it",
        ),
        (lambda t: t.update({"model.layers.1.self_attn.q_proj.weight": t[QKVZ] + 0}), "q_proj.weight has no place"),
    ],
)
def test_fused_weights_that_do_not_fit_are_named(edit, message, saved):
    _, path = saved("qwen3_next")
    _edited(path, edit)
    with pytest.raises(ValueError, match=message):
        from_hf(path)


def test_a_tied_head_may_be_there_if_it_is_the_embedding(saved, ids):
    theirs, path = saved("qwen2_moe, dense layer")
    embedding = "model.embed_tokens.weight"
    _edited(path, lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    assert relative_error(from_hf(path)(ids).logits, theirs(ids).logits) < 1e-5
    _edited(path, lambda t: t.update({"lm_head.weight": t[embedding] + 1}))
    with pytest.raises(ValueError, match="weight differs from the embedding"):
        from_hf(path)


def test_layers_of_multi_token_prediction_are_told_not_read(saved):
    _, path = saved("glm4_moe")
    _edited(path, lambda t: t.update({"model.layers.3.eh_proj.weight": torch.zeros(3)}))
    with pytest.warns(UserWarning, match=r"1 weights of layers past the last, model.layers.3.eh_proj.weight"):
        from_hf(path)
    _, path = saved("qwen3_next")
    _edited(path, lambda t: t.update({"mtp.fc.weight": torch.zeros(3)}))
    with pytest.warns(UserWarning, match=r"1 weights of layers past the last, mtp.fc.weight"):
        from_hf(path)


def test_the_fused_rows_of_key_heads_are_told_apart(saved, ids):
    """By transformers' own reading of them; every other order gives other logits."""
    theirs, path = saved("qwen3_next")
    ours = from_hf(path)
    x = torch.randn(1, 5, 32)
    for index in (0, 1, 2):
        layer, mixer = theirs.model.layers[index].linear_attn, ours.layers[index].mixer
        parts = layer.fix_query_key_value_ordering(layer.in_proj_qkvz(x), layer.in_proj_ba(x))
        projections = mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.gate_proj, mixer.beta_proj, mixer.decay.proj
        for part, projection in zip(parts, projections, strict=True):
            torch.testing.assert_close(projection(x), part.flatten(2))


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_next, another pattern"])
@torch.no_grad()
def test_a_hybrid_continues_from_its_states_as_theirs_does(name, ids):
    """Logits of every step, not tokens alone: prefill in two pieces, then one by one, with padding on the left."""
    theirs = make_model(name)
    ours = from_hf(theirs)
    token_mask = torch.arange(17) >= torch.tensor([[0], [3], [8]])
    wanted = theirs(ids, attention_mask=token_mask.long()).logits
    cache, start = ours.new_cache(3, 17), 0
    for length in (9, 4, 1, 1, 1, 1):
        at = slice(start, start + length)
        got = ours(ids[:, at], token_mask=token_mask[:, at], cache=cache).logits
        assert relative_error(got[token_mask[:, at]], wanted[:, at][token_mask[:, at]]) < 1e-5
        start += length


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name.startswith("gpt_oss")])
@torch.no_grad()
def test_windows_and_sinks_continue_from_a_cache_as_theirs_do(name):
    """Several windows long: logits of every step, prefill in two pieces and one by one, with padding on the left."""
    theirs = make_model(name)
    ours = from_hf(theirs)
    ids = torch.randint(3, 60, (3, 40))
    token_mask = torch.arange(40) >= torch.tensor([[0], [3], [8]])
    wanted = theirs(ids, attention_mask=token_mask.long()).logits
    cache, start = ours.new_cache(3, 40), 0
    for length in (9, 11, *[1] * 20):
        at = slice(start, start + length)
        got = ours(ids[:, at], token_mask=token_mask[:, at], cache=cache).logits
        assert relative_error(got[token_mask[:, at]], wanted[:, at][token_mask[:, at]]) < 1e-5
        start += length


def test_gate_and_up_in_turns_are_told_apart(saved):
    """By transformers' own reading of them, in a model whose matrices are all square."""
    theirs, path = saved("gpt_oss, square, no window")
    ours = from_hf(path)
    for there, here in zip(theirs.model.layers, ours.layers, strict=True):
        there, here = there.mlp.experts, here.feed_forward.experts
        assert torch.equal(here.gate_up_proj[:, :16], there.gate_up_proj[..., ::2].mT)
        assert torch.equal(here.gate_up_proj[:, 16:], there.gate_up_proj[..., 1::2].mT)
        assert torch.equal(here.gate_up_bias[:, :16], there.gate_up_proj_bias[:, ::2])
        assert torch.equal(here.gate_up_bias[:, 16:], there.gate_up_proj_bias[:, 1::2])
        assert torch.equal(here.down_proj, there.down_proj.mT)


def test_damaged_and_foreign_folders_are_told(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder with a checkpoint"):
        from_hf(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no config"):
        from_hf(tmp_path / "empty")
    _, path = saved("llama")
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        from_hf(path)
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is pickled"):
        from_hf(path)
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}')
    with pytest.raises(ValueError, match="names a file outside its folder"):
        from_hf(path)
    config = json.loads((path / "config.json").read_text())
    for wrong in ("[]", json.dumps({**config, "hidden_act": None}), json.dumps({**config, "num_attention_heads": 0})):
        (path / "config.json").write_text(wrong)
        with pytest.raises(ValueError, match="not a config of transformers"):
            from_hf(path)
    (path / "config.json").write_text('{"model_type": ["llama"]}')
    with pytest.raises(ValueError, match="no table for the model type"):
        from_hf(path)
    with pytest.raises(NotADirectoryError, match="path must be a folder"):
        to_hf(Transformer(TransformerConfig(**DENSE)), path / "config.json")


def test_a_name_is_asked_of_the_hub(saved, monkeypatch, ids):
    theirs, path = saved("llama")
    asked = []

    def snapshot_download(name, **settings):
        asked.append((name, settings["revision"]))
        return str(path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert relative_error(from_hf("someone/a-model", revision="v1")(ids).logits, theirs(ids).logits) < 1e-5
    assert asked == [("someone/a-model", "v1")]


def test_without_transformers_it_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'coterie\[hf\]'"):
        from_hf(tmp_path)
