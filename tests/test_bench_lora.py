"""The benchmark of LoRA: it runs, refuses what is wrong and judges by the best of PEFT's."""

import importlib
import json
import shlex
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SMALL = "--shape 24 64 16 4 2 --layers 1 --rank 2 --dtypes float32 --seconds-per-case 0"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("bench_lora")
    monkeypatch.setattr(module._bench, "keep_freed_memory", lambda: True)  # it would stay for all tests after this one
    return module


def test_measures_a_small_case(bench, tmp_path, capsys):
    assert bench.main([*shlex.split(SMALL), "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "lora.json").read_text(encoding="utf-8"))
    (case,) = content["cases"]
    assert set(case["contenders"]) == {bench.OURS, bench.OURS_SHARED, *bench.PEFT_KINDS}
    for name, row in case["contenders"].items():
        assert len(row["seconds"]) >= 3, name
        assert row["error"] < 1e-5, name
    assert (tmp_path / "lora.png").stat().st_size > 5000
    assert [entry["what"] for entry in content["bars"]] == ["speed", "peak", "peak and weights"]
    told = capsys.readouterr().out
    assert "coterie over the best of PEFT's" in told
    assert "of 2 met" in told


def test_a_broken_update_is_named(bench, tmp_path, capsys, monkeypatch):
    layers = importlib.import_module("coterie.modules.lora_layers")
    right = layers.lora_expert_mlp
    monkeypatch.setattr(layers, "lora_expert_mlp", lambda *args, **settings: 1.1 * right(*args, **settings))
    assert bench.main([*shlex.split(SMALL), "--out", str(tmp_path)]) == 1
    assert "bench_lora: wrong result: coterie (T 24" in capsys.readouterr().err


def test_bars_are_over_the_best_of_peft(bench):
    labels = dict(zip("TDFEK", bench.SHAPES[0], strict=True)) | {"dtype": "float32"}
    seconds = {"coterie": 1.0, "PEFT coterie": 1.5, "PEFT grouped_mm": 4.0, "PEFT eager": 9.0}
    peaks = {"coterie": 50, "PEFT coterie": 200, "PEFT grouped_mm": 100, "PEFT eager": 150}
    rows = {name: bench._bench.Row(seconds=[s], peak_bytes=peaks[name]) for name, s in seconds.items()}
    result = bench.Result(labels, bench.BASELINE, rows)
    speed, peak, whole = bench.bars([result], {result.title: 100})
    assert (speed["over"], speed["value"], speed["met"]) == ("PEFT coterie", 1.5, False)
    assert (peak["over"], peak["value"], peak["met"]) == ("PEFT grouped_mm", 0.5, True)
    assert (whole["value"], whole["met"]) == (0.75, None)
    assert "1.50 < 2.0 MISSED (coterie)" in bench.format_bars([result], {result.title: 100})


@pytest.mark.parametrize("words", ["--shape 24 60 16 4 2", "--shape 24 64 16 4 5", "--rank 0"])
def test_wrong_options(bench, words, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(words.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"bench_lora: {words.split()[0]}")


def test_contenders_share_the_frozen_memory(bench):
    base = bench._make_model((24, 64, 16, 4, 2), torch.float32, bench.Options())
    for model in (bench._ours(base, bench.Options(), "none").module, bench._twin(base, "eager")):
        own = {p.data_ptr() for name, p in model.named_parameters() if ".lora." not in name}
        assert own == {p.data_ptr() for p in base.parameters()}
