"""Folders for transformers, loaded by it before they take their name."""

import json
import os

import pytest
import torch

transformers = pytest.importorskip("transformers")

from _check import relative_error  # noqa: E402
from coterie.interop import hf_export  # noqa: E402
from coterie.interop._exported import VerificationError  # noqa: E402
from coterie.interop.hf_export import export_hf  # noqa: E402
from coterie.models import Transformer, TransformerConfig  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
CONFIG = TransformerConfig(
    vocab_size=256, dim=32, num_layers=2, num_heads=4, num_experts=8, top_k=2, expert_hidden_dim=16, qk_norm="head"
)


def test_transformers_computes_the_same_and_its_tokens_are_the_bytes(tmp_path):
    model = Transformer(CONFIG)
    said = export_hf(model, tmp_path / "hf", byte_vocabulary=True)
    assert said.startswith("verified: transformers loads it as Qwen3MoeForCausalLM; logits equal to ")
    assert said.endswith("; the tokenizer's ids are the bytes")
    assert os.listdir(tmp_path) == ["hf"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "def main(x):\n\treturn 'grüße 😀'  "
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert bytes(ids[0].tolist()) == text.encode()
    assert tokenizer.decode(ids[0]) == text
    assert tokenizer("a<|endoftext|>b").input_ids == [97, 0, 98]
    assert tokenizer.decode([97, 0, 98], skip_special_tokens=True) == "ab"
    assert theirs.generation_config.eos_token_id == 0
    with torch.no_grad():
        assert relative_error(theirs(ids).logits, model(ids).logits) < 1e-5


def test_an_earlier_export_is_replaced_and_other_files_stay(tmp_path):
    model = Transformer(CONFIG, dtype=torch.bfloat16)
    export_hf(model, tmp_path)
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    other = Transformer(CONFIG, dtype=torch.bfloat16)
    export_hf(other, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "config.json", "model.safetensors"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.model.embed_tokens.weight, other.embedding.weight)


def test_a_coterie_model_is_not_overwritten(tmp_path):
    model = Transformer(CONFIG)
    model.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match="holds a coterie model, which would be overwritten"):
        export_hf(model, tmp_path)
    assert (tmp_path / "config.json").read_text() == before
    with pytest.raises(NotADirectoryError, match="path must be a folder"):
        export_hf(model, tmp_path / "config.json")
    for foreign in ("[1]", "{"):
        (tmp_path / "config.json").write_text(foreign)
        with pytest.raises(ValueError, match=r"config.json is no model's, and would be overwritten"):
            export_hf(model, tmp_path)


def test_what_is_not_verified_does_not_take_the_name(tmp_path, monkeypatch):
    def wrong(model, path):
        to_hf(model, path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "norm_topk_prob": False}))

    to_hf = hf_export.to_hf
    monkeypatch.setattr(hf_export, "to_hf", wrong)
    with pytest.raises(VerificationError, match=r"logits equal to .*, which must be 1e-04 at most"):
        export_hf(Transformer(CONFIG), tmp_path / "hf")
    assert os.listdir(tmp_path) == []
