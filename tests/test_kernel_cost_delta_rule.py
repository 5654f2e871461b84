"""The count of delta_rule's kernels: checked results, bytes that add up, bars that are judged."""

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TOKENS = 64


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("kernel_cost_delta_rule")
    monkeypatch.setattr(module._bench, "keep_freed_memory", lambda: True)  # it would stay for all tests after this one
    monkeypatch.setattr(module, "interpreted_fla", lambda: None)  # whose patches would
    monkeypatch.setattr(module, "WIDTHS", (16,))
    return module


def test_counts_what_moves(bench, tmp_path, capsys):
    assert bench.main(["--tokens", str(TOKENS), "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "kernel_cost_delta_rule.json").read_text(encoding="utf-8"))
    erase, erase_back, beta, _ = content["cases"]
    row, triangle = 2 * 16, 80
    # k, e, g and T, G written and read again; then q, k, e, v, o, T, G.
    assert erase["kernels"] == {"prepare_kernel": 2 * row + triangle + 12, "forward_kernel": 5 * row + triangle + 4}
    assert beta["kernels"] == {"prepare_kernel": row + triangle + 14, "forward_kernel": 4 * row + triangle + 6}
    assert erase["once"] == erase_back["once"] - 16 * 16 * 4 == 2 * 16 * 16 * 4
    assert (erase["launches"], erase_back["launches"]) == (2, 2)
    assert erase["saved"] == 4 * row + 4 + triangle + 4
    assert all(0 < case["error"] < 2e-3 for case in content["cases"])
    told = capsys.readouterr().out
    assert "P = V = 16, erase, forward: ours" in told
    assert "0 of 0 bars met" in told


def test_bars_are_judged(bench):
    cost = bench.Cost(bench.OURS, 64, "erase", "forward", {"a": 700.0, "b": 401.0}, 0, 2, 600, 1e-4)
    assert "> 1100" in bench.format_costs([cost], bench.Options())
    assert bench.Cost(bench.FLA, 64, "beta", "forward", {}, 0, 5, 0, 0.0).bar is None


def test_a_wrong_result_is_refused(bench, tmp_path, capsys, monkeypatch):
    right = bench._ours
    monkeypatch.setattr(bench, "_ours", lambda **inputs: tuple(1.1 * t for t in right(**inputs)))
    assert bench.main(["--tokens", str(TOKENS), "--out", str(tmp_path)]) == 1
    assert "wrong result: ours, P 16, erase: relative error 1.0e-01" in capsys.readouterr().err
