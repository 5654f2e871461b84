"""The benchmark of long contexts: it runs, refuses what is wrong, sums what it sampled and judges its bar."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from coterie.models import PRESETS, Transformer, preset

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("bench_long_context")
    small = replace(preset("tiny-long"), dim=32, num_experts=4, expert_hidden_dim=16, linear_head_dim=16)
    monkeypatch.setitem(PRESETS, "tiny-long", small)
    return module


def test_measures_small_contexts(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "CHUNK", 8)
    monkeypatch.setattr(bench, "TIMED_CHUNKS", 3)
    monkeypatch.setattr(bench, "TURNS", 2)
    assert bench.main(["--length", "8", "1024", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "long_context.json").read_text(encoding="utf-8"))
    figures = {(f["model"], f["length"]): f for f in content["figures"]}
    assert {*figures} == {(model, length) for model in ("hybrid", "full") for length in (8, 1024)}
    for (model, length), f in figures.items():
        assert (f["chunks"], f["timed"]) == (length // 8, min(length // 8, 3))
        assert f["prefill"] > 0 < f["step"]
        config = PRESETS["tiny-long"] if model == "hybrid" else bench.attention_twin(PRESETS["tiny-long"])
        assert f["cache"] == Transformer(config, device="meta").new_cache(1, length).nbytes
    assert (tmp_path / "long_context.png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert "* of 3 chunks of 8 tokens, spread evenly" in printed
    assert "No bars for these cases." in printed


def test_chunks_that_are_not_timed_are_on_the_line_between(bench, monkeypatch):
    """Chunks whose time is their index, of a clock that says so."""
    monkeypatch.setattr(bench, "CHUNK", 4)
    monkeypatch.setattr(bench, "TIMED_CHUNKS", 3)
    model = Transformer(PRESETS["tiny-long"]).eval()
    now, seen = [0.0], []

    def forward(ids, cache, num_logits):
        seen.append(cache.length)
        now[0] += cache.length / 4

    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(model, "forward", forward)
    assert bench.prefill(model, 36) == (9, 3, sum(range(9)))
    assert seen == [0, 0, 16, 32]  # the first one twice: once to warm up


def test_a_wrong_result_is_named(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "chunks_differ", lambda model: 0.5)
    assert bench.main(["--length", "8", "--out", str(tmp_path)]) == 1
    assert "wrong result: hybrid in chunks differs by 5e-01" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_chunks_are_compared_with_the_whole(bench, monkeypatch):
    model = Transformer(PRESETS["tiny-long"]).eval()
    assert bench.chunks_differ(model) < 1e-4
    own = model.layers[7].mixer.forward
    monkeypatch.setattr(model.layers[7].mixer, "forward", lambda x, *a, cache_layer=None, **k: own(x, *a, **k))
    assert bench.chunks_differ(model) > 1e-3


def test_bars(bench):
    found = [
        bench.Figures(model, L, 1, 1, 1.0, step, 1) for model, L, step in (("hybrid", 1024, 2.0), ("full", 65536, 9.0))
    ]
    assert bench.bars(found) == []
    found.append(bench.Figures("hybrid", 65536, 1, 1, 1.0, 3.0, 1))
    (entry,) = bench.bars(found)
    assert (entry["value"], entry["bar"], entry["met"]) == (1.5, 1.3, False)


@pytest.mark.parametrize("words", [["--length", "0"], ["--preset", "huge"], ["--threads", "0"]])
def test_wrong_options(bench, words, capsys):
    assert bench.main(words) == 2
    assert capsys.readouterr().err.startswith(
        f"bench_long_context: {words[0]}: got {words[1].strip()}".replace("huge", "'huge'")
    )


def test_a_filled_cache_is_as_long_as_said(bench):
    model = Transformer(PRESETS["tiny-long"]).eval()
    cache = model.new_cache(1, 40)
    bench.fill(cache, 30)
    with torch.no_grad():
        assert model(torch.zeros(1, 1, dtype=torch.int64), cache=cache).logits.isfinite().all()
    assert {layer.length for layer in cache.layers if hasattr(layer, "length")} == {31}
