"""gpt_oss's experts in MXFP4: transformers' own numbers, bit for bit, and its logits."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402
from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # noqa: E402

from _check import relative_error  # noqa: E402
from coterie.interop import from_hf, to_hf  # noqa: E402
from coterie.interop.hf_config import config_from_hf  # noqa: E402
from coterie.interop.hf_mxfp4 import dequantize  # noqa: E402
from coterie.models import Transformer  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

BLOCKS, SCALES = (f"model.layers.1.mlp.experts.gate_up_proj_{part}" for part in ("blocks", "scales"))


@pytest.fixture
def published(tmp_path):
    """A folder like those that gpt_oss is published in, of random numbers."""
    config = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=60,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=5,
        num_experts_per_tok=2,
        sliding_window=4,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    path = tmp_path / "published"
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    for layer in range(2):
        for name, shape in (("gate_up_proj", (5, 192, 2)), ("down_proj", (5, 64, 3))):
            stem = f"model.layers.{layer}.mlp.experts.{name}"
            del tensors[stem]
            tensors[f"{stem}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8)
            tensors[f"{stem}_scales"] = torch.randint(120, 126, shape, dtype=torch.uint8)
    # Blocks and scales in files of their own: whichever comes first waits for the other.
    files = {"b": {}, "a": {}}
    for name, tensor in tensors.items():
        files["b" if name.endswith("blocks") else "a"][name] = tensor
    for file, part in files.items():
        save_file(part, path / f"model-{file}.safetensors", metadata={"format": "pt"})
    (path / "model.safetensors").unlink()
    where = {name: f"model-{file}.safetensors" for file, part in files.items() for name in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    settings = json.loads((path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(settings))
    return path


def test_every_byte_times_every_power_is_that_of_transformers():
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, 256, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8).reshape(1, 256, 1).repeat(2, 1, 16)
    got, wanted = dequantize(blocks, scales), convert_moe_packed_tensors(blocks, scales)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, wanted)
    assert torch.equal(got[0, :4, 130], torch.tensor([0.0, 0.0, 4.0, 0.0], dtype=torch.bfloat16))  # bytes 0 and 1, 2^3


def test_logits_are_those_of_transformers_that_dequantizes(published, tmp_path):
    settings = {"attn_implementation": "eager", "experts_implementation": "eager"}
    quantization = transformers.Mxfp4Config(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(published, quantization_config=quantization, **settings).eval()
    ours = from_hf(published)
    experts = ours.layers[1].feed_forward.experts
    there = theirs.model.layers[1].mlp.experts
    assert experts.gate_up_proj.dtype == there.gate_up_proj.dtype == torch.bfloat16
    assert torch.equal(experts.gate_up_proj[:, 96:], there.gate_up_proj[..., 1::2].mT)
    assert torch.equal(experts.down_proj, there.down_proj.mT)
    ids = torch.randint(60, (2, 13))
    wanted = theirs.float()(ids).logits
    assert relative_error(from_hf(published, dtype=torch.float32)(ids).logits, wanted) < 1e-5
    # Written again they are bfloat16, and the config says so.
    to_hf(ours, tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32, **settings)
    assert not hasattr(again.config, "quantization_config")
    assert torch.equal(again(ids).logits, wanted)


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        (SCALES, None, f"{BLOCKS} has no {SCALES} beside it"),
        (BLOCKS, None, f"{SCALES} has no {BLOCKS} beside it"),
        (BLOCKS, lambda t: t[..., :8], r"must be .* got \[5, 192, 2, 8\] and \[5, 192, 2\] of torch.uint8"),
        (SCALES, lambda t: t.float(), r"uint8, got .* of torch.uint8 and torch.float32"),
        (SCALES, lambda t: t[:4], r"must be .* got \[5, 192, 2, 16\] and \[4, 192, 2\]"),
    ],
)
def test_what_does_not_fit_is_named(published, name, edit, message):
    path = published / f"model-{'b' if name == BLOCKS else 'a'}.safetensors"
    tensors = load_file(path)
    tensor = tensors.pop(name)
    if edit is not None:
        tensors[name] = edit(tensor).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        from_hf(published)


def test_a_matrix_beside_its_blocks_is_named(published):
    path = published / "model-a.safetensors"
    tensors = load_file(path)
    tensors[BLOCKS.removesuffix("_blocks")] = torch.zeros(5, 64, 192, dtype=torch.bfloat16)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"gate_up_proj is there twice, once as .*gate_up_proj_blocks"):
        from_hf(published)


def test_the_published_config(tmp_path):
    """Of gpt-oss-20b, with the names of fields that transformers renames."""
    settings = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "eos_token_id": 200002,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "pad_token_id": 199999,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": 201088,
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = config_from_hf(AutoConfig.from_pretrained(tmp_path))
    assert config.mixers == ("window_attention", "attention")
    assert config.activation == "swiglu(alpha=1.702, limit=7.0, up_offset=1.0)"
    yarn = "beta_fast=32.0, beta_slow=1.0, factor=32.0, original_max_position_embeddings=4096.0, truncate=False"
    assert (config.rope_theta, config.rotary_scaling) == (150000.0, f"yarn({yarn})")
    model = Transformer(config, device="meta")
    assert sum(p.numel() for p in model.parameters()) == 20_914_757_184  # as OpenAI counts them, 20.91 B


def test_other_quantizations_say_what_to_do(published):
    config = json.loads((published / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "fp8"
    (published / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantized \(fp8\): .* have transformers dequantize them as it loads them"):
        from_hf(published)
