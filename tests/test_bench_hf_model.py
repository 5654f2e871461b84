"""The benchmark of whole models on a tiny one: every contender right, every file written."""

import importlib
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
SMALL = "--vocab-size 300 --dim 64 --layers 1 --batch 1 --length 12 --tokens 4 --seconds-per-case 0"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "benchmarks")
    monkeypatch.setattr(importlib.import_module("_bench"), "keep_freed_memory", lambda: True)
    return importlib.import_module("bench_hf_model")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_contender_is_right_and_timed(bench, dtype, tmp_path, capsys):
    assert bench.main([*SMALL.split(), "--dtype", dtype, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "greedy tokens of our Transformer equal to those of HF grouped_mm, in float32: 4 of 4" in said
    written = json.loads((tmp_path / "hf_model.json").read_text())
    assert [case["labels"]["pass"] for case in written["cases"]] == ["training step", "prefill", "generation"]
    for case in written["cases"]:
        assert all(len(row["seconds"]) >= 3 or row["skipped"] for row in case["contenders"].values())
        assert case["contenders"]["our Transformer"]["seconds"]
    assert {bar["what"] for bar in written["bars"]} >= {"HF, our experts", "our Transformer"}
    assert (tmp_path / "hf_model.png").stat().st_size > 10_000


def test_a_wrong_model_is_not_timed(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "_our_last", lambda model, ids: 1.1 * bench._their_last(model, ids))
    monkeypatch.setattr(bench, "_our_logits", lambda model, ids: 2 * model(ids).logits)
    assert bench.main([*SMALL.split(), "--dtype", "float32", "--out", str(tmp_path)]) == 1
    assert "wrong result: our Transformer" in capsys.readouterr().err
