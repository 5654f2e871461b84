"""The benchmark of sparse attention: it runs, refuses what is wrong and judges each bar by the right figures."""

import importlib
import json
import shlex
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SMALL = "--length 40 150 --heads 4 --groups 2 --width 16 --window 20 --blocks 1 --seconds-per-case 0"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("bench_sparse_attention")
    monkeypatch.setattr(module._bench, "keep_freed_memory", lambda: True)  # it would stay for all tests after this one
    monkeypatch.setattr(module, "CHECKED", 32)
    return module


def test_measures_small_cases(bench, tmp_path, capsys):
    assert bench.main([*shlex.split(SMALL), "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "sparse_attention.json").read_text(encoding="utf-8"))
    kinds = [(case["labels"]["kind"], case["labels"]["L"]) for case in content["cases"]]
    assert kinds == [(kind, length) for kind in ("fwd", "fwd+bwd", "decode") for length in (40, 150)]
    for case in content["cases"]:
        plain = {bench.PLAIN} if case["labels"]["kind"] == "decode" else set()
        assert {*case["contenders"]} == {bench.OURS, bench.WINDOW, bench.SDPA} | plain
        for name, row in case["contenders"].items():
            assert not row["skipped"], name
            assert len(row["seconds"]) >= 3
            assert row["error"] < 1e-5
    assert (tmp_path / "sparse_attention.png").stat().st_size > 5000
    assert "No bars for these cases." in capsys.readouterr().out


def test_a_wrong_output_is_named(bench, tmp_path, capsys, monkeypatch):
    tiles = importlib.import_module("coterie.ops._sparse_attention_tiles")
    monkeypatch.setattr(tiles.Plan, "_blocks", lambda self: iter(()))
    assert bench.main([*shlex.split(SMALL), "--kinds", "fwd", "--length", "300", "--out", str(tmp_path)]) == 1
    assert "bench_sparse_attention: wrong result: coterie, window and blocks (L 300" in capsys.readouterr().err


def test_bars(bench):
    def result(kind, length, ours, full, peak=0):
        labels = {"L": length, "H": 8, "G": 2, "P": 64, "dtype": "float32", "kind": kind}
        row = bench._bench.Row(seconds=[ours], peak_bytes=peak)
        return bench.Result(labels, bench.OURS, {bench.OURS: row, bench.SDPA: bench._bench.Row(seconds=[full])})

    found = bench.bars(
        [
            result("fwd", 65536, 1.0, 9.0, peak=2 * 2**30),
            result("fwd+bwd", 16384, 1.0, 3.0),
            result("fwd+bwd", 4096, 1.0, 0.5),
            result("decode", 65536, 1.0, 20.0),
        ]
    )
    assert [(entry["what"], entry["value"], entry["bar"], entry["met"]) for entry in found] == [
        ("GiB at once", 2.0, 3.0, True),
        ("speed over full attention", 3.0, 4.0, False),
        ("speed over full attention", 20.0, 10.0, True),
    ]


@pytest.mark.parametrize("words", ["--length 0", "--heads 0", "--groups 3", "--window 0"])
def test_wrong_options(bench, words, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(words.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"bench_sparse_attention: {words.split()[0]}")
