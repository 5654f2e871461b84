"""The count of sparse_attention's kernels: checked results, and bytes and FLOPs that follow from what is seen."""

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
LENGTH, KEYS, HEADS, WIDTH = 16, 192, 8, 64


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("kernel_cost_sparse_attention")
    monkeypatch.setattr(module._bench, "keep_freed_memory", lambda: True)  # it would stay for all tests after this one
    monkeypatch.setattr(module, "interpreted_fla", lambda: None)  # whose patches would
    monkeypatch.setattr(module._kernel_cost, "compile_kernels", lambda *_: None)
    monkeypatch.setattr(module, "SIZES", {"last queries": (LENGTH, KEYS), "decode": (1, KEYS)})
    for name, value in (("WINDOW", 32), ("BLOCK", 16), ("SELECTED", 3)):
        monkeypatch.setattr(module, name, value)
    return module


def test_counts_what_is_seen(bench, tmp_path, capsys):
    assert bench.main(["--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "kernel_cost_sparse_attention.json").read_text(encoding="utf-8"))
    full, sparse, decode, _ = content["cases"]
    seen = sum(range(KEYS - LENGTH + 1, KEYS + 1))
    assert full["useful_flops"] == 4 * WIDTH * HEADS * seen
    assert 4 * WIDTH * HEADS * LENGTH * 32 < sparse["useful_flops"] <= 4 * WIDTH * HEADS * LENGTH * (32 + 3 * 16)
    assert decode["useful_flops"] == 4 * WIDTH * HEADS * KEYS
    queries, keys = 2 * LENGTH * HEADS * WIDTH, 2 * KEYS * 2 * WIDTH
    (forward,), (of_queries, of_keys) = full["forward"], full["backward"]
    assert forward["distinct_load"] == queries + 2 * keys
    assert forward["distinct_store"] == queries + 4 * LENGTH * HEADS
    assert of_queries["distinct_load"] == 3 * queries + 2 * keys + 2 * 4 * LENGTH * HEADS
    assert of_keys["distinct_store"] == 2 * keys
    assert [kernel["launches"] for kernel in sparse["forward"] + sparse["backward"]] == [2, 2, 1]
    assert sparse["saved"] > full["saved"] == 2 * queries + 2 * keys + 4 * LENGTH * HEADS
    assert decode["backward"] == []
    assert all(0 < case["error"] < 2e-3 for case in content["cases"])
    assert "last queries, L 16, Lk 192: window and blocks" in capsys.readouterr().out


def test_a_wrong_result_is_refused(bench, tmp_path, capsys, monkeypatch):
    right = bench._ours
    monkeypatch.setattr(bench, "_ours", lambda *tensors, **settings: 1.1 * right(*tensors, **settings))
    assert bench.main(["--out", str(tmp_path)]) == 1
    assert "wrong result: last queries, all keys: relative error 1.0e-01" in capsys.readouterr().err
