"""GGUF files of coterie models: read back by gguf, and run by llama.cpp where there is one.

COTERIE_LLAMA_PYTHON names a Python that has llama-cpp-python, if this one has not.
"""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")

from coterie.interop import gguf_export, to_gguf  # noqa: E402
from coterie.interop._exported import VerificationError  # noqa: E402
from coterie.interop.gguf_architectures import family_for_gguf  # noqa: E402
from coterie.interop.gguf_export import DTYPES, run_gguf  # noqa: E402
from coterie.models import Transformer, TransformerConfig, preset  # noqa: E402
from coterie.modules import add_lora  # noqa: E402

LLAMA_PYTHON = os.environ.get("COTERIE_LLAMA_PYTHON")
if LLAMA_PYTHON is None and importlib.util.find_spec("llama_cpp"):
    LLAMA_PYTHON = sys.executable
needs_llama = pytest.mark.skipif(LLAMA_PYTHON is None, reason="no llama-cpp-python here nor in COTERIE_LLAMA_PYTHON")

SHAPE = {
    "vocab_size": 256,
    "dim": 64,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_length": 128,
    "init_std": 0.15,
    "norm_eps": 1e-5,
}
DENSE = {**SHAPE, "feed_forwards": ("mlp",), "hidden_dim": 96}
SPARSE = {**SHAPE, "num_experts": 8, "top_k": 3, "expert_hidden_dim": 32}
GLM = {
    **SPARSE,
    "router_score": "sigmoid",
    "router_group_score": "top2_sum",
    "selection_bias": True,
    "shared_hidden_dim": 32,
}
# name: (family, architecture, config); every switch of the exporter stands in one of them.
MODELS = {
    "llama": ("llama", "llama", DENSE),
    "llama, biases, own head": (
        "llama",
        "llama",
        {**DENSE, "qkv_bias": True, "output_bias": True, "head_dim": 32, "tie_embeddings": False, "rope_theta": 5e5},
    ),
    "qwen3": ("qwen3", "qwen3", {**DENSE, "qk_norm": "head", "head_dim": 32}),
    "mixtral": ("mixtral", "llama", {**SPARSE, "tie_embeddings": False}),
    "olmoe": ("olmoe", "olmoe", {**SPARSE, "num_kv_heads": 4, "qk_norm": "all", "router_normalize": False}),
    "qwen2_moe": (
        "qwen2_moe",
        "qwen2moe",
        {**SPARSE, "qkv_bias": True, "router_normalize": False, "shared_hidden_dim": 96, "shared_gate": True},
    ),
    "qwen3_moe": ("qwen3_moe", "qwen3moe", {**SPARSE, "qk_norm": "head", "head_dim": 32}),
    "glm4_moe": (
        "glm4_moe",
        "glm4moe",
        {
            **GLM,
            "feed_forwards": ("mlp", "moe", "moe"),
            "hidden_dim": 96,
            "shared_hidden_dim": 64,
            "router_scale": 2.5,
            "rotary_dim": 8,
            "qkv_bias": True,
            "qk_norm": "head",
        },
    ),
    "glm4_moe, groups": (
        "glm4_moe",
        "glm4moe",
        {**GLM, "router_groups": 4, "router_top_groups": 2, "router_normalize": False},
    ),
    "granitemoe": (
        "granitemoe",
        "granitemoe",
        {
            **SPARSE,
            "router_order": "after",
            "attention_scale": 0.2,
            "embedding_scale": 3.0,
            "residual_scale": 0.3,
            "logit_divisor": 6.0,
            "qkv_bias": True,
            "output_bias": True,
        },
    ),
}


def make_model(name, dtype=torch.float32):
    model = Transformer(TransformerConfig(**MODELS[name][2]), dtype=dtype)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if "norm" in key or key.endswith("bias"):
                tensor.add_(0.2 * torch.randn_like(tensor))
            elif "router" in key:
                tensor.normal_(std=0.3)
    return model


def read(path):
    """(metadata, tensors) of a file, tensors in float32."""
    reader = gguf.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    return metadata, tensors


# --- what is in the file


@pytest.mark.parametrize("name", MODELS)
def test_family_metadata_and_every_tensor(name, tmp_path):
    family, architecture, _ = MODELS[name]
    model = make_model(name)
    config = model.config
    assert family_for_gguf(config) == family
    said = to_gguf(model, tmp_path / "model.gguf")
    metadata, tensors = read(tmp_path / "model.gguf")
    assert said.startswith(f"verified: all {len(tensors)} tensors read back equal; ")
    assert os.listdir(tmp_path) == ["model.gguf"]
    own = {key.removeprefix(f"{architecture}."): value for key, value in metadata.items()}
    assert own["general.architecture"] == architecture
    assert (own["vocab_size"], own["context_length"], own["block_count"]) == (256, 128, 3)
    assert (own["attention.head_count"], own["attention.head_count_kv"]) == (4, config.num_kv_heads)
    assert own["rope.freq_base"] == config.rope_theta
    assert own["rope.dimension_count"] == (config.rotary_dim or config.head_dim or 16)
    assert own["attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    if "moe" in config.feed_forwards:
        assert (own["expert_count"], own["expert_used_count"]) == (8, 3)
        width = "feed_forward_length" if architecture in ("llama", "olmoe", "granitemoe") else None
        assert own[width or "expert_feed_forward_length"] == 32
    elements = sum(tensor.numel() for tensor in tensors.values())
    copied_head = model.embedding.weight.numel() if name in ("olmoe", "qwen2_moe") else 0
    assert elements == sum(t.numel() for t in model.state_dict().values()) + copied_head
    ours = model.state_dict()
    assert torch.equal(tensors["token_embd.weight"], ours["embedding.weight"])
    assert torch.equal(tensors["blk.2.attn_v.weight"], ours["layers.2.mixer.v_proj.weight"])
    if "moe" in config.feed_forwards:
        gate, up = ours["layers.2.feed_forward.experts.gate_up_proj"].chunk(2, dim=1)
        assert torch.equal(tensors["blk.2.ffn_gate_exps.weight"], gate)
        assert torch.equal(tensors["blk.2.ffn_up_exps.weight"], up)


def test_metadata_of_router_and_multipliers(tmp_path):
    to_gguf(make_model("glm4_moe, groups"), tmp_path / "groups.gguf")
    groups, tensors = read(tmp_path / "groups.gguf")
    assert (groups["glm4moe.expert_group_count"], groups["glm4moe.expert_group_used_count"]) == (4, 2)
    assert groups["glm4moe.expert_gating_func"] == gguf.ExpertGatingFuncType.SIGMOID
    assert groups["glm4moe.expert_weights_norm"] is False
    assert tensors["blk.0.exp_probs_b.bias"].abs().max() > 0
    to_gguf(make_model("glm4_moe"), tmp_path / "glm.gguf")
    glm, _ = read(tmp_path / "glm.gguf")
    assert (glm["glm4moe.leading_dense_block_count"], glm["glm4moe.expert_weights_scale"]) == (1, 2.5)
    assert glm["glm4moe.expert_shared_count"] == 2
    to_gguf(make_model("granitemoe"), tmp_path / "granite.gguf", name="a name")
    granite, _ = read(tmp_path / "granite.gguf")
    scales = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
    assert [granite[f"granitemoe.{key}"] for key in scales] == pytest.approx([0.2, 3.0, 0.3, 6.0])
    assert granite["general.name"] == "a name"


@pytest.mark.parametrize("name", ["llama, biases, own head", "qwen3"])
def test_only_interleaved_architectures_have_their_rows_reordered(name, tmp_path):
    model = make_model(name)
    to_gguf(model, tmp_path / "model.gguf")
    _, tensors = read(tmp_path / "model.gguf")
    ours = model.layers[1].mixer.q_proj.weight
    if name == "qwen3":
        assert torch.equal(tensors["blk.1.attn_q.weight"], ours)
    else:  # heads of 32: row 2i is the first half's i, row 2i + 1 the second half's
        heads = tensors["blk.1.attn_q.weight"].view(4, 32, 64)
        assert torch.equal(heads[:, 0::2], ours.view(4, 2, 16, 64)[:, 0])
        assert torch.equal(heads[:, 1::2], ours.view(4, 2, 16, 64)[:, 1])
        bias = model.layers[1].mixer.k_proj.bias.view(2, 2, 16)
        assert torch.equal(tensors["blk.1.attn_k.bias"].view(2, 16, 2), bias.transpose(1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, tmp_path):
    model = make_model("qwen2_moe")
    to_gguf(model, tmp_path / "model.gguf", dtype=dtype)
    kinds = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.ffn_gate_exps.weight"] == kinds["token_embd.weight"] == dtype
    for name in ("attn_norm.weight", "attn_q.bias", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight"):
        assert kinds[f"blk.0.{name}"] == "f32"
    _, tensors = read(tmp_path / "model.gguf")
    ours = model.embedding.weight
    error = (tensors["token_embd.weight"] - ours).norm() / ours.norm()
    assert error <= {"f32": 0, "f16": 3e-4, "bf16": 3e-3, "q8_0": 1e-2}[dtype]


def test_rows_that_q8_0_cannot_hold_are_f16(tmp_path):
    config = replace(make_model("qwen3_moe").config, expert_hidden_dim=24)
    to_gguf(Transformer(config), tmp_path / "model.gguf", dtype="q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.ffn_down_exps.weight"] == "F16"
    assert kinds["blk.0.ffn_up_exps.weight"] == "Q8_0"


def test_the_models_own_dtype_is_kept(tmp_path):
    to_gguf(make_model("qwen3_moe", torch.bfloat16), tmp_path / "model.gguf")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.ffn_down_exps.weight"] == "BF16"


def test_byte_vocabulary(tmp_path):
    to_gguf(make_model("qwen3"), tmp_path / "bytes.gguf", byte_vocabulary=True)
    metadata, _ = read(tmp_path / "bytes.gguf")
    tokens = metadata["tokenizer.ggml.tokens"]
    assert len(set(tokens)) == 256
    assert (tokens[ord("a")], tokens[ord(" ")], tokens[10], tokens[0]) == ("a", "Ġ", "Ċ", "<|endoftext|>")
    assert metadata["tokenizer.ggml.eos_token_id"] == 0
    to_gguf(make_model("qwen3"), tmp_path / "ids.gguf")
    metadata, _ = read(tmp_path / "ids.gguf")
    assert metadata["tokenizer.ggml.model"] == "none"
    words = Transformer(replace(make_model("qwen3").config, vocab_size=60))
    with pytest.raises(ValueError, match="byte_vocabulary needs a vocabulary of the 256 bytes, the model's is 60"):
        to_gguf(words, tmp_path / "words.gguf", byte_vocabulary=True)


def test_every_preset_has_an_architecture():
    assert {family_for_gguf(preset(name)) for name in ("tiny", "nano", "mini")} == {"qwen3_moe"}


# --- refusals


def test_adapters_are_not_left_out_in_silence(tmp_path):
    model = Transformer(TransformerConfig(**DENSE))
    add_lora(model, targets="q_proj", name="maths")
    with pytest.raises(ValueError, match=r"no place for adapters \(maths\): merge_lora"):
        to_gguf(model, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**DENSE, "rotary_scaling": "linear(factor=2.0)"}, r"none of its rotary_scaling = .linear\(factor=2.0\)."),
        (
            {**DENSE, "rotary_scaling": "ntk(factor=2.0)"},
            r"rotary_scaling = 'ntk\(.* is None with rope_theta = 22081.79",
        ),
        (
            {**DENSE, "rotary_layers": (True, True, False)},
            r"rotary_layers = \(True, True, False\) \(there it is \(True,",
        ),
        ({**SPARSE, "router_bias": True}, r"router_bias = True \(there it is False\)"),
        ({**SPARSE, "expert_bias": True}, r"expert_bias = True \(there it is False\)"),
        ({**DENSE, "activation": "geglu"}, r"closest, llama, has none of its activation = 'geglu' \(there it is 'swig"),
        (
            {**DENSE, "qk_norm": "head", "qkv_bias": True, "output_bias": True},
            r"llama, has none of its qk_norm = 'head'",
        ),
        ({**SPARSE, "qk_norm": "head", "router_normalize": False}, r"router_normalize = False \(there it is True\)"),
        ({**SPARSE, "qk_norm": "all", "router_normalize": False}, r"num_kv_heads = 2 \(there it is num_heads\)"),
        ({**MODELS["qwen2_moe"][2], "head_dim": 32}, r"head_dim = 32 \(there it is dim / num_heads\)"),
        (
            {**SPARSE, "num_layers": 4, "qk_norm": "head", "feed_forwards": ("mlp", "moe"), "hidden_dim": 8},
            r"feed_forwards = \('mlp', 'moe'\) \(there they are all 'moe'\)",
        ),
        ({**GLM, "shared_hidden_dim": 0}, r"glm4_moe, has none of its shared_hidden_dim = 0 \(there it is positive\)"),
    ],
)
def test_a_model_without_an_architecture_is_refused_by_name(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        to_gguf(Transformer(TransformerConfig(**config)), tmp_path / "model.gguf")
    assert os.listdir(tmp_path) == []


def test_wrong_arguments_are_named(tmp_path):
    model = make_model("llama")
    with pytest.raises(ValueError, match="dtype must be one of f32, f16, bf16, q8_0, got 'q4'"):
        to_gguf(model, tmp_path / "model.gguf", dtype="q4")
    with pytest.raises(IsADirectoryError, match="path must be a file"):
        to_gguf(model, tmp_path)
    with torch.no_grad():
        model.layers[0].mixer.v_proj.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"'f16' cannot hold blk.0.attn_v.weight, which has values over 65504"):
        to_gguf(model, tmp_path / "model.gguf", dtype="f16")
    assert os.listdir(tmp_path) == []


def test_without_gguf_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"gguf is needed: pip install 'coterie\[export\]'"):
        to_gguf(make_model("llama"), tmp_path / "model.gguf")


def test_a_file_that_is_not_verified_does_not_take_the_name(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    to_gguf(make_model("llama"), path)
    before = path.read_bytes()
    encoded, calls = gguf_export._encoded, []

    def wrong(key, tensor, dtype):
        calls.append(key)
        return encoded(key, tensor, dtype) + np.float32(len(calls) == 7)

    monkeypatch.setattr(gguf_export, "_encoded", wrong)
    with pytest.raises(VerificationError, match="is not read back as it was written"):
        to_gguf(make_model("llama"), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.gguf"]


def test_a_file_that_llama_cpp_does_not_run_does_not_take_the_name(tmp_path, monkeypatch):
    def refuse(model, file, *, dtype):
        raise VerificationError(f"llama.cpp does not run the {dtype} file")

    monkeypatch.setattr(gguf_export, "run_gguf", refuse)
    monkeypatch.setattr(gguf_export, "_has_llama", lambda: True)
    with pytest.raises(VerificationError, match=r"llama\.cpp does not run the bf16 file"):
        to_gguf(make_model("qwen3"), tmp_path / "model.gguf", dtype="bf16")
    assert os.listdir(tmp_path) == []


# --- llama.cpp


@needs_llama
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(name, dtype, tmp_path, monkeypatch):
    model = make_model(name)
    monkeypatch.setattr(gguf_export, "run_gguf", partial(run_gguf, python=LLAMA_PYTHON))
    monkeypatch.setattr(gguf_export, "_has_llama", lambda: True)
    said = to_gguf(model, tmp_path / "model.gguf", dtype=dtype)
    print(f"{name}, {dtype}: {said}")
    if dtype == "f32":
        assert "; llama.cpp: 32 of 32 greedy tokens equal, logits equal to " in said
        assert float(said.rpartition(" ")[2]) < 5e-6


@needs_llama
def test_llama_cpp_computing_something_else_is_seen(tmp_path):
    model = make_model("qwen3_moe")
    to_gguf(model, tmp_path / "model.gguf")
    model.rotary.theta = 100.0
    with pytest.raises(VerificationError, match="it computes something else"):
        run_gguf(model, tmp_path / "model.gguf", dtype="f32", python=LLAMA_PYTHON)
    (tmp_path / "model.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:50_000])
    with pytest.raises(VerificationError, match=r"llama.cpp does not run the file: .*error"):
        run_gguf(model, tmp_path / "model.gguf", dtype="f32", python=LLAMA_PYTHON)


@needs_llama
def test_llama_cpp_reads_and_writes_bytes(tmp_path):
    to_gguf(make_model("qwen3_moe"), tmp_path / "model.gguf", byte_vocabulary=True)
    probe = """
import sys
from llama_cpp import Llama
llama = Llama(sys.argv[1], vocab_only=True, verbose=False)
text = "def main(x):\\n\\treturn 'grüße 😀'  aa".encode()
ids = llama.tokenize(text, add_bos=False)
assert bytes(ids) == text, ids
assert llama.detokenize(ids) == text
assert llama.tokenize(b"a<|endoftext|>b", add_bos=True, special=True) == [97, 0, 98]
assert (llama.token_bos(), llama.token_eos()) == (0, 0)
"""
    run = subprocess.run([LLAMA_PYTHON, "-c", probe, tmp_path / "model.gguf"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
