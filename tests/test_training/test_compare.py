"""Contenders that take turns."""

import json

import numpy as np
import pytest
import torch

from coterie.training import Batches, Comparison, Contender, TrainConfig, Trainer, compare, load_comparison

DENSE = {"feed_forwards": ("mlp",)}


def timeless(records):
    clock = ("seconds", "tokens_per_second")
    return [{name: value for name, value in record.items() if name not in clock} for record in records]


@pytest.fixture
def models(make_model):
    return lambda: {"moe": make_model(dropout=0.1), "dense": make_model(dropout=0.1, **DENSE)}


def test_contenders_take_turns_on_the_same_batches(models, make_config, corpus, valid):
    seen = []
    contenders = models()
    for name, model in contenders.items():
        model.embedding.register_forward_pre_hook(
            lambda m, inputs, name=name: seen.append((name, inputs[0])) if m.training else None
        )
    compare(contenders, make_config(), corpus, valid, progress=False)
    assert [name for name, _ in seen] == ["moe", "dense"] * 6
    for (_, one), (_, other) in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(seen[0][1], seen[2][1])


def test_a_contender_is_trained_as_if_it_were_alone(models, make_config, corpus, valid):
    config = make_config()
    comparison = compare(models(), config, corpus, valid, progress=False)
    for name, model in models().items():
        alone = Trainer(model, config, Batches(corpus, 4, 16), valid)
        alone.train(progress=False)
        contender = comparison.contenders[name]
        assert timeless(contender.history) == timeless(alone.history)
        for key, tensor in model.state_dict().items():
            assert torch.equal(contender.model.state_dict()[key], tensor)


def test_a_comparison_that_was_cut_off_between_two_checkpoints_goes_on(models, make_config, corpus, valid, tmp_path):
    config = make_config()
    whole = compare(models(), config, corpus, valid, tmp_path / "whole", progress=False)
    for name, steps in (("moe", 5), ("dense", 2)):  # moe at its checkpoint of step 3, dense without any
        trainer = Trainer(models()[name], config, Batches(corpus, 4, 16), valid, tmp_path / "cut" / name)
        for _ in range(steps):
            trainer.step()
    with pytest.raises(FileExistsError, match="holds a run already"):
        compare(models(), config, corpus, valid, tmp_path / "cut", progress=False)
    resumed = compare(models(), config, corpus, valid, tmp_path / "cut", resume=True, progress=False)
    for name, contender in whole.contenders.items():
        assert timeless(resumed.contenders[name].history) == timeless(contender.history)
        for key, tensor in contender.model.state_dict().items():
            assert torch.equal(resumed.contenders[name].model.state_dict()[key], tensor)
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume"):
        compare(models(), config, corpus, valid, tmp_path / "nowhere", resume=True)


def test_a_comparison_can_be_read_from_its_folder(models, make_config, corpus, valid, tmp_path):
    comparison = compare(models(), make_config(), corpus, valid, tmp_path, progress=False)
    loaded = load_comparison(tmp_path)
    assert loaded.config == comparison.config
    assert loaded.to_dict() == comparison.to_dict()
    assert {name: c.history for name, c in loaded.contenders.items()} == {
        name: c.history for name, c in comparison.contenders.items()
    }
    assert list(loaded.contenders) == ["dense", "moe"]  # by name
    json.dumps(loaded.to_dict())
    with pytest.raises(FileNotFoundError, match="no runs to compare below"):
        load_comparison(tmp_path / "nowhere")


def test_curves_and_loads_have_one_entry_per_step_or_evaluation(models, make_config, corpus, valid):
    comparison = compare(models(), make_config(), corpus, valid, progress=False)
    moe, dense = comparison.contenders["moe"], comparison.contenders["dense"]
    assert moe.tokens.tolist() == [64 * i for i in range(1, 7)]
    assert moe.train_bpb[0] == pytest.approx(moe.history[1]["ce"] / np.log(2))
    assert moe.valid_tokens.tolist() == [0, 192, 384]
    assert moe.expert_load.shape == (3, 2, 4)
    np.testing.assert_allclose(moe.expert_load.sum(-1), 1)
    assert (np.diff(moe.seconds) > 0).all()
    assert dense.expert_load is None
    assert dense.load_entropy is None
    assert dense.dead_experts is None
    assert 0 < moe.load_entropy <= 1
    assert comparison.equal_tokens == 384
    assert comparison.equal_seconds == min(moe.seconds[-1], dense.seconds[-1])
    assert comparison.bpb_at_tokens("moe") == moe.valid_bpb[-1]
    assert moe.position_edges.tolist() == [0, 16]
    assert moe.position_bpb.tolist() == pytest.approx([moe.valid_bpb[-1]])
    assert comparison.to_dict()["dense"]["position_bpb"] == dense.position_bpb.tolist()


def made_up(name, seconds_per_step, curve):
    history = [{"step": 0, "tokens": 0, "seconds": 0.0, "valid_bpb": curve[0]}]
    for step in range(1, 5):
        record = {"step": step, "tokens": 100 * step, "seconds": seconds_per_step * step, "ce": 1.0}
        record["tokens_per_second"] = 100 / seconds_per_step
        if step % 2 == 0:
            record["valid_bpb"] = curve[step // 2]
        history.append(record)
    return Contender(name, None, history)


def test_equal_tokens_and_equal_seconds():
    comparison = Comparison(
        {"slow": made_up("slow", 2.0, [8.0, 4.0, 2.0]), "quick": made_up("quick", 1.5, [8.0, 5.0, 3.0])}, TrainConfig()
    )
    assert comparison.equal_tokens == 400
    assert comparison.equal_seconds == 6.0
    assert comparison.bpb_at_tokens("slow") == 2.0
    assert comparison.bpb_at_tokens("quick", 300) == 4.0
    assert comparison.bpb_at_seconds("slow") == 3.0  # half way between 4 s and 8 s
    assert comparison.bpb_at_seconds("quick") == 3.0
    figures = comparison.to_dict()["slow"]
    assert figures["valid_bpb_equal_seconds"] == 3.0
    assert figures["tokens_per_second"] == 50.0
    assert figures["seconds"] == 8.0
    assert figures["load_entropy"] is None
    assert figures["position_bpb"] is None  # as in logs from before there was such a figure
    assert comparison.contenders["slow"].position_edges is None


def test_names_that_are_no_folders_are_refused(models, make_config, corpus, valid):
    model = models()["dense"]
    for name in ("../moe", "a/b", "", ".hidden"):
        with pytest.raises(ValueError, match="which names a folder"):
            compare({name: model}, make_config(), corpus, valid)
    with pytest.raises(ValueError, match="got none to compare"):
        compare({}, make_config(), corpus, valid)
