"""The benchmark of the delta rule: it runs, refuses what is wrong and judges each bar by the right figures."""

import importlib
import json
import shlex
from pathlib import Path

import pytest

pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SMALL = "--length 40 70 --dtypes float32 --heads 2 --width 16 --seconds-per-case 0"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("bench_delta_rule")
    monkeypatch.setattr(module._bench, "keep_freed_memory", lambda: True)  # it would stay for all tests after this one
    monkeypatch.setattr(module, "PART", 32)
    monkeypatch.setattr(module, "CHECKED", 32)
    monkeypatch.setattr(module, "FEW", 24)
    return module


def test_measures_small_cases(bench, tmp_path, capsys):
    assert bench.main([*shlex.split(SMALL), "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "delta_rule.json").read_text(encoding="utf-8"))
    kinds = [(case["labels"]["kind"], case["labels"]["L"]) for case in content["cases"]]
    assert kinds == [
        ("fwd", 40),
        ("fwd", 70),
        ("fwd+bwd", 40),
        ("fwd+bwd", 70),
        ("linear", 70),
        ("decode", 40),
        ("decode", 70),
    ]
    for case in content["cases"]:
        for name, row in case["contenders"].items():
            assert row["skipped"] or (len(row["seconds"]) >= 3 and row["error"] < 1e-5), (name, row)
        assert not case["contenders"][bench.OURS]["skipped"]
    assert {*content["cases"][0]["contenders"]} == {bench.OURS, bench.SDPA, bench.HF, bench.FLA}
    assert (tmp_path / "delta_rule.png").stat().st_size > 5000
    told = capsys.readouterr().out
    assert "bytes kept over bytes of the inputs" in told
    assert "time of a step over that after 24 tokens" in told


def test_a_wrong_state_is_named(bench, tmp_path, capsys, monkeypatch):
    chunks = importlib.import_module("coterie.ops._delta_rule_chunks")
    right = chunks._inverse
    monkeypatch.setattr(chunks, "_inverse", lambda a: right(1.01 * a))
    assert bench.main([*shlex.split(SMALL), "--kinds", "fwd", "--out", str(tmp_path)]) == 1
    assert "bench_delta_rule: wrong result: coterie (L 40" in capsys.readouterr().err


def test_bars(bench):
    def result(kind, length, seconds, saved=0):
        labels = {"L": length, "H": 8, "P": 64, "dtype": "float32", "kind": kind}
        rows = {name: bench._bench.Row(seconds=[s], saved_bytes=saved) for name, s in seconds.items()}
        return bench.Result(labels, bench.OURS, rows)

    inputs = bench.input_bytes({"L": 32, "H": 8, "P": 64, "dtype": "float32"})
    assert inputs == 32 * 8 * (3 * 64 * 4 + 8)
    found = bench.bars(
        [
            result("fwd+bwd", 32, {bench.OURS: 1.0, bench.HF: 5.0, bench.SDPA: 9.0}, saved=2 * inputs),
            result("fwd", 2048, {bench.OURS: 1.0, bench.SDPA: 0.5}),
            result("linear", 64, {bench.OURS: 1.05, bench.PARTS: 1.0}),
            result("decode", 64, {bench.OURS: 1.2, bench.AFTER_FEW: 1.0, bench.SDPA: 2.0}),
        ]
    )
    assert [(entry["what"].split(" of ")[0], entry["value"], entry["met"]) for entry in found] == [
        ("bytes kept over bytes", 2.0, False),
        ("speed over transformers", 5.0, True),
        ("speed over SDPA", 0.5, False),
        ("time over that", 1.05, True),
        ("time", 1.2, False),
    ]


@pytest.mark.parametrize("words", ["--length 0", "--heads 0", "--width -1"])
def test_wrong_options(bench, words, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(words.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"bench_delta_rule: {words.split()[0]}")
