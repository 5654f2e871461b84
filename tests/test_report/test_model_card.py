"""The card says what the model is in figures that are counted, and its own code loads the model."""

import re
from dataclasses import replace
from importlib import import_module

import pytest
import torch

import coterie
from coterie.report import format_cost, model_card, model_cost, write_model_card
from coterie.report.model_card import MARK, is_own_card

SPARSE = coterie.TransformerConfig(
    vocab_size=256,
    dim=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    feed_forwards=("mlp", "moe"),
    hidden_dim=24,
    num_experts=4,
    top_k=2,
    expert_hidden_dim=8,
    shared_hidden_dim=12,
    max_length=32,
)
DENSE = coterie.dense_twin(SPARSE)


@pytest.mark.parametrize("config", [SPARSE, DENSE], ids=["sparse", "dense"])
def test_the_hub_reads_its_header(config):
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(model_card(config), ignore_metadata_errors=False)
    assert card.data.library_name == "coterie"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.license is None  # the user's to say
    assert ("mixture-of-experts" in card.data.tags) == (config is SPARSE)
    assert card.text.strip().startswith("# A sparse transformer" if config is SPARSE else "# A dense transformer")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_figures_are_the_counted_ones(dtype):
    text = model_card(SPARSE, dtype=dtype)
    cost = model_cost(SPARSE, dtype=dtype)
    model = coterie.Transformer(SPARSE)
    assert f"| parameters | {sum(p.numel() for p in model.parameters()):,} |" in text
    assert f"| active for a token | {cost.total.active_params:,} |" in text
    assert f"| weights | {str(dtype).removeprefix('torch.')} |" in text
    assert f"```text\n{format_cost(cost)}\n```" in text
    assert "In 1 of the layers the feed-forward is a mixture of" in text
    assert "2 heads over 1 of keys and values" in text
    assert "4 experts of width 8, 2 of which act on a token, beside one of width 12 for all." in text
    assert "In the others it is an MLP of width 24." in text


def test_more_facts_stay_in_their_cells():
    text = model_card(SPARSE, facts={"trained on": "a|b\nc", "steps": 7})
    assert "| trained on | a\\|b c |\n| steps | 7 |\n" in text


def test_a_cost_that_is_known_is_not_counted_again(monkeypatch):
    cost = model_cost(SPARSE, 5)
    monkeypatch.setattr(import_module("coterie.report.model_card"), "model_cost", None)
    assert "at length 5 in float32" in model_card(SPARSE, cost=cost)


def test_every_checkpoint_of_a_training_counts_once(monkeypatch):
    calls = []
    counted = lambda *args, **kwargs: calls.append(args) or model_cost(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(import_module("coterie.report.model_card"), "model_cost", counted)
    config = replace(SPARSE, max_length=33)  # another test has not asked for it
    assert model_card(config) == model_card(config)
    assert len(calls) == 1


def test_a_card_that_someone_took_over_stays(tmp_path):
    path = tmp_path / "README.md"
    assert write_model_card(tmp_path, DENSE)
    assert is_own_card(path)
    assert path.read_text("utf-8") == model_card(DENSE)
    assert write_model_card(tmp_path, SPARSE)  # ours: written anew
    text = path.read_text("utf-8")
    assert text == model_card(SPARSE)
    for own in (text.replace(MARK, ""), "# My model\n", "", text + "\nMy own words.\n"):
        path.write_text(own, "utf-8")
        assert not is_own_card(path)
        assert not write_model_card(tmp_path, SPARSE)
        assert path.read_text("utf-8") == own


def test_its_code_runs_in_the_folder(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    model = coterie.Transformer(SPARSE)
    model.save_pretrained(tmp_path)
    write_model_card(tmp_path, SPARSE)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (tmp_path / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for block in blocks:
        names = {}
        exec(block, names)
        loaded = names["model"]
        assert torch.equal(next(loaded.parameters()), model.embedding.weight)
    assert names["model"].generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False).shape == (1, 5)
