"""The quality benchmark: its tasks ask what they say, and its runs are repeatable, chosen and judged as told."""

import importlib
import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("quality.run")


def sample(quality, name, length=None, batch=200):
    task = quality.TASKS[name]
    ids, targets = task.sample(batch, length or task.length, torch.Generator().manual_seed(1))
    assert ids.shape == targets.shape == (batch, length or task.length)
    assert ids.min() >= 0
    assert ids.max() < task.vocab_size
    return ids, targets, targets != quality.IGNORED


def test_mqar_asks_for_the_value_that_stood_behind_the_key(quality):
    ids, targets, asked = sample(quality, "mqar")
    assert (asked.sum(1) == 8).all()
    assert not asked[:, :16].any()
    for row in range(len(ids)):
        pairs = dict(zip(ids[row, 0:16:2].tolist(), ids[row, 1:16:2].tolist(), strict=True))
        assert len(pairs) == 8
        assert [pairs[key] for key in ids[row, asked[row]].tolist()] == targets[row, asked[row]].tolist()


def test_noisy_recall_asks_at_keys_that_were_there_before(quality):
    ids, targets, asked = sample(quality, "noisy-recall")
    assert asked.any(1).all()
    assert (ids >= 32).any(1).all()
    for row in range(len(ids)):
        pairs = {}
        for at in range(0, 64, 2):
            key, value = ids[row, at : at + 2].tolist()
            assert targets[row, at] == (pairs.get(key, quality.IGNORED))
            assert targets[row, at + 1] == quality.IGNORED
            if key < 16:
                assert pairs.setdefault(key, value) == value


def test_selective_copy_asks_for_the_tokens_in_order(quality):
    ids, targets, asked = sample(quality, "selective-copy")
    assert (asked == (torch.arange(64) >= 56)).all()
    for row in range(len(ids)):
        assert ids[row][ids[row] < 16].tolist() == targets[row, asked[row]].tolist()
    assert (ids[:, :56] == 16).sum() == 48 * len(ids)


def test_parity_counts(quality):
    ids, targets, asked = sample(quality, "parity", 160)
    assert asked.all()
    assert targets[:, 0].equal(ids[:, 0])
    assert targets[:, -1].equal(ids.sum(1) % 2)


def test_longer_tests_score_what_lies_beyond_the_trained_length(quality, monkeypatch):
    task = quality.TASKS["parity"]

    def right_from_40_on(ids):
        logits = torch.nn.functional.one_hot(ids.cumsum(1) % 2, 2).float()
        logits[:, :40] = logits[:, :40].flip(-1)
        return logits

    assert quality._test(right_from_40_on, task, 160)[1] == 1
    assert quality._test(right_from_40_on, task, 40)[1] == 0


def test_a_run_is_repeatable(quality):
    run = quality.Run("noisy-recall", "kda ±", 3e-3, seed=1, steps=3)
    first, second = quality.train(run), quality.train(run)
    assert (first.loss, first.accuracy) == (second.loss, second.accuracy)
    assert quality.train(quality.Run("noisy-recall", "kda ±", 3e-3, seed=2, steps=3)).loss != first.loss


def test_every_mixer_learns(quality):
    for name in quality.MIXERS:
        run = quality.train(quality.Run("selective-copy", name, 3e-3, seed=0, steps=25))
        assert run.loss < 2.9, name  # log 16, of a guess among the tokens, is 2.77


def test_the_least_loss_chooses_the_rate_and_the_median_is_judged(quality):
    def run(mixer, rate, seed, accuracy, loss):
        return quality.Run("mqar", mixer, rate, seed, 10, {"L 64, 8 pairs": accuracy}, loss)

    runs = [
        run("gated delta", 1e-3, 0, 0.5, 0.9),
        run("gated delta", 3e-3, 0, 0.99, 0.1),
        run("gated delta", 3e-3, 1, 0.2, float("nan")),
        run("gated delta", 3e-3, 2, 1.0, 0.1),
        run(quality.DEEP_ATTENTION, 1e-3, 0, 1.0, 0.1),
        run(quality.HYBRID, 1e-3, 0, 0.98, 0.1),
    ]
    rates = {mixer: quality.best_rate(runs, mixer) for mixer in ("gated delta", quality.DEEP_ATTENTION, quality.HYBRID)}
    assert rates["gated delta"] == 3e-3
    recall, hybrid = quality.expectations(runs, rates)
    assert (recall["value"], recall["expected"], recall["met"]) == (0.99, "≥ 0.98", True)
    assert (hybrid["value"], hybrid["met"]) == (0.98, False)


@pytest.mark.slow
def test_the_program_runs(quality, tmp_path, capsys):
    assert quality.main(["parity", "--quick", "--steps", "3", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "quality_parity.json").read_text(encoding="utf-8"))
    assert {run["mixer"] for run in content["runs"]} == {"attention", "linear", "gated delta"}
    assert (tmp_path / "quality_parity.png").stat().st_size > 5000
    assert "on to 160: median [range]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["copying"], "task: got 'copying', must be one of mqar"),
        (["mqar", "--mixers", "mamba"], "--mixers: got 'mamba', must be of 'attention'"),
        (["mqar", "--seeds", "0"], "--seeds: got 0, must be at least 1"),
        (["mqar", "--learning-rates", "0"], "--learning-rates: got (0.0,), must be positive"),
    ],
)
def test_wrong_options(quality, words, message, capsys):
    assert quality.main(words) == 2
    assert capsys.readouterr().err.startswith(f"quality: {message}")
