"""The benchmarks' harness: what it measures is right, and what is wrong it does not measure."""

import importlib
import importlib.util
import json
import math
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TOLERANCES = {"y": 1e-6}


@pytest.fixture(scope="module", autouse=True)
def _importable():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield


@pytest.fixture
def bench():
    return importlib.import_module("_bench")


@pytest.fixture
def expert_mlp(monkeypatch, bench):
    monkeypatch.setattr(bench, "keep_freed_memory", lambda: True)  # it would stay for all tests after this one
    return importlib.import_module("bench_expert_mlp")


def double(x):
    return {"y": 2 * x.double()}


def case(bench, *contenders, baseline="right", make_inputs=lambda seed: torch.full((4,), float(seed + 1))):
    right = bench.Contender("right", lambda x: {"y": x + x}, double, TOLERANCES)
    return bench.Case({"n": 4}, baseline, [right, *contenders], make_inputs)


# --- refusing ---


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x: {"y": 2.001 * x}, r"wrong \(n 4\): the error of y is 5\.00e-04, must be at most 1e-06"),
        (lambda x: {"y": x * math.nan}, "the error of y is nan"),
        (lambda x: {"y": torch.zeros(4, 4)}, r"y is \[4, 4\], must be \[4\]"),
        (lambda x: {"z": 2 * x}, "no 'y' among its results"),
    ],
)
def test_a_wrong_result_is_not_timed(bench, run, message):
    calls = []

    def counted(x):
        calls.append(x)
        return run(x)

    with pytest.raises(bench.WrongResult, match=message):
        bench.measure(case(bench, bench.Contender("wrong", counted, double, TOLERANCES)), bench.Options())
    assert len(calls) == 1


def test_expected_values_may_be_of_the_first_rows_only(bench):
    contender = bench.Contender("rows", lambda x: {"y": 2 * x, "z": x}, lambda x: {"y": 2 * x[:2].double()}, TOLERANCES)
    assert bench.measure(case(bench, contender), bench.Options(seconds_per_case=0)).rows["rows"].seconds


def test_an_error_of_ours_ends_the_benchmark_and_one_of_a_peer_skips_it(bench):
    def fails(x):
        raise RuntimeError("strides should be multiple of 16 bytes\nand more")

    peer = bench.Contender("peer", fails, double, TOLERANCES, optional=True)
    result = bench.measure(case(bench, peer), bench.Options(seconds_per_case=0))
    assert result.rows["peer"].skipped == "raises RuntimeError: strides should be multiple of 16 bytes"
    assert result.ratio("peer", "right") is None
    with pytest.raises(RuntimeError, match="strides"):
        bench.measure(case(bench, bench.Contender("ours", fails, double, TOLERANCES)), bench.Options())


def test_who_is_too_slow_is_skipped_and_the_baseline_never(bench):
    slow = bench.Contender("slow", lambda x: {"y": 2 * x}, double, TOLERANCES)
    foreseen = bench.Contender("foreseen", lambda x: pytest.fail("was run"), double, TOLERANCES, work=1e9)
    rows = bench.measure(case(bench, slow, foreseen), bench.Options(limit_seconds=1e-9, seconds_per_case=0)).rows
    assert rows["slow"].skipped.startswith("takes")
    assert rows["foreseen"].skipped.startswith("would take about")
    assert len(rows["right"].seconds) == bench.MIN_ROUNDS


# --- measuring ---


def test_contenders_take_turns_on_fresh_inputs(bench):
    log = []

    def contender(name):
        def run(x):
            log.append((float(x[0]), name))
            return {"y": 2 * x}

        return bench.Contender(name, run, double, TOLERANCES)

    result = bench.measure(case(bench, contender("a"), contender("b")), bench.Options(seconds_per_case=0))
    log = log[4:]  # both ran twice, to be checked and to warm up
    assert [seed for seed, _ in log] == [2.0, 2.0, 3.0, 3.0, 4.0, 4.0]
    assert all({log[i][1], log[i + 1][1]} == {"a", "b"} for i in range(0, 6, 2))
    assert [len(row.seconds) for row in result.rows.values()] == [3, 3, 3]


def test_ratios_are_medians_of_ratios_with_quartiles(bench):
    rows = {
        "dense": bench.Row(seconds=[1.0, 2.0, 3.0, 4.0, 5.0]),
        "ours": bench.Row(seconds=[2.0, 2.0, 2.0, 2.0, 2.0]),
        "slow": bench.Row(seconds=[10.0]),  # sat out all rounds but the first
        "absent": bench.Row("too slow"),
    }
    result = bench.Result({}, "dense", rows)
    assert result.ratio("ours", "dense") == bench.Ratio(1.5, 1.0, 2.0)
    assert result.ratio("slow", "dense") == bench.Ratio(0.1, 0.1, 0.1)
    assert result.ratio("absent", "dense") is None
    assert result.fastest(["slow", "ours", "absent"]) == "ours"
    assert result.fastest(["absent"]) is None


def test_peak_memory_is_exact(bench):
    mebi = 2**20

    def run():
        first = torch.empty(mebi, dtype=torch.uint8)
        second = torch.empty(2 * mebi, dtype=torch.uint8)  # the peak: 3 MiB
        del first
        third = torch.empty(mebi // 2, dtype=torch.uint8)
        return second, third

    _, peak, seconds = bench.peak_bytes(run)
    assert peak == 3 * mebi
    assert seconds > 0


def test_saved_bytes_are_exact(bench):
    x = torch.ones(100, requires_grad=True)
    weight = torch.ones(100, requires_grad=True)

    def run():
        h = x * weight  # keeps both its factors
        return h.exp().sin()  # exp keeps its result, which sin keeps too

    assert bench.saved_bytes(run)[0] == 3 * 400
    assert bench.saved_bytes(run, [weight])[0] == 2 * 400
    with torch.no_grad():
        assert bench.saved_bytes(run)[0] == 0


# --- the expert MLP ---


def test_zipf_routings_are_skewed_and_balanced_ones_are_not(expert_mlp):
    contenders = importlib.import_module("_expert_mlp")
    shape, options = (2048, 8, 8, 16, 2), expert_mlp.Options(quick=True)
    parameters = contenders.make_parameters(shape, torch.float32, options)
    shares = {}
    for routing in ("balanced", "zipf"):
        make_inputs = contenders.make_case(shape, "float32", routing, "fwd", parameters, options).make_inputs
        ids = make_inputs(0).expert_ids
        assert (ids[:, 0] != ids[:, 1]).all()
        assert not torch.equal(ids, make_inputs(1).expert_ids)
        shares[routing] = ids.flatten().bincount(minlength=16).sort(descending=True).values / ids.numel()
    assert shares["balanced"][0] < 1.25 / 16
    # The r-th most popular is drawn first with probability (1/r) / 3.38, and is likelier yet to be among the two.
    assert 1 / 3.38 < 2 * shares["zipf"][0] < 0.7
    assert shares["zipf"][0] / shares["zipf"][7] > 3


def test_from_end_to_end(expert_mlp, tmp_path, capsys):
    words = shlex.split("--shape 96 32 16 4 2 --shape 1 32 16 4 2 --seconds-per-case 0 --limit-gib 0.0001")
    assert expert_mlp.main([*words, "--routings", "zipf", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "expert_mlp.json").read_text())
    assert report["machine"]["torch"] == torch.__version__
    # Two dtypes; T = 1 only forward.
    assert len(report["cases"]) == 2 * (2 + 1)
    for case in report["cases"]:
        ran = {name: row for name, row in case["contenders"].items() if not row["skipped"]}
        assert {"dense", "dense, all params", "ours"} <= set(ran)
        assert ("ours recompute" in ran) == (case["labels"]["pass"] == "fwd+bwd")
        assert ("dense float32" in ran) == (case["labels"]["dtype"] == "bfloat16")
        for row in ran.values():
            assert math.isfinite(row["ratio"]["median"])
            assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
            assert row["peak_bytes"] > 0
            assert (row["saved_bytes"] > 0) == (case["labels"]["pass"] == "fwd+bwd")
        if case["labels"]["T"] == 96:
            assert "HF batched_mm" not in ran  # gathers 96 · 2 · 3 · 32 · 16 elements
    if importlib.util.find_spec("transformers"):
        assert "HF grouped_mm" in ran
        assert "skipped: would gather" in said
    else:
        assert "skipped: transformers ≥ 5 is not installed" in said
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "expert_mlp.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))


def test_recompute_and_ours_keep_what_the_op_promises(expert_mlp):
    contenders = importlib.import_module("_expert_mlp")
    shape, options = (96, 32, 16, 4, 2), expert_mlp.Options(seconds_per_case=0, limit_gib=0)
    parameters = contenders.make_parameters(shape, torch.float32, options)
    made = contenders.make_case(shape, "float32", "balanced", "fwd+bwd", parameters, options)
    rows = expert_mlp._bench.measure(made, options).rows
    hidden = 96 * 2 * 2 * 16 * 4
    assert rows["ours"].saved_bytes - rows["ours recompute"].saved_bytes == hidden
    # The gradients of all experts at least, and of x and the weights.
    assert rows["ours recompute"].peak_bytes >= 4 * (4 * 3 * 16 * 32 + 96 * 32 + 96 * 2)


def test_a_broken_op_is_named(expert_mlp, tmp_path, capsys, monkeypatch):
    contenders = importlib.import_module("_expert_mlp")
    right = contenders.expert_mlp
    monkeypatch.setattr(contenders, "expert_mlp", lambda *args, **options: 1.01 * right(*args, **options))
    words = shlex.split("--quick --shape 8 16 16 4 2 --passes fwd --seconds-per-case 0")
    assert expert_mlp.main([*words, "--out", str(tmp_path)]) == 1
    assert "ours (T 8, D 16, F 16, E 4, K 2, float32, fwd, balanced): the error of y is" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_bars_are_judged(expert_mlp):
    bench = expert_mlp._bench

    def result(shape, dtype, passes, **seconds):
        labels = dict(zip("TDFEK", shape, strict=True)) | {"dtype": dtype, "pass": passes, "routing": "balanced"}
        peaks = {"ours": 90, "ours recompute": 70, "HF grouped_mm": 100}
        names = {name.replace("_", " ").replace("grouped ", "grouped_"): value for name, value in seconds.items()}
        return bench.Result(
            labels, "dense", {n: bench.Row(seconds=[v], peak_bytes=peaks.get(n, 0)) for n, v in names.items()}
        )

    results = [
        result(expert_mlp.SHAPES[0], "float32", "fwd", dense=1.0, ours=1.1, HF_grouped_mm=4.0, HF_eager=3.0),
        result(expert_mlp.SHAPES[0], "float32", "fwd+bwd", dense=1.0, ours=2.0, ours_recompute=2.2, HF_grouped_mm=4.0),
        result(
            expert_mlp.SHAPES[1],
            "bfloat16",
            "fwd+bwd",
            **{"dense": 5.0, "dense_float32": 1.0, "ours": 1.0, "HF_grouped_mm": 9.0, "HF_eager": 8.0},
        ),
        result(expert_mlp.SHAPES[3], "bfloat16", "fwd", dense=1.0, ours=1.0, HF_grouped_mm=1.4, HF_eager=3.0),
    ]
    found = {(entry.get("T"), entry.get("pass"), entry["what"]): entry for entry in expert_mlp.bars(results)}
    first, fine = expert_mlp.SHAPES[0][0], expert_mlp.SHAPES[1][0]
    assert found[first, "fwd", "over dense"]["met"]  # 0.91 of 0.90
    assert not found[first, "fwd+bwd", "over dense"]["met"]  # 0.50 of 0.85
    assert found[fine, "fwd+bwd", "over dense"]["over dense float32"] == 1.0
    assert not found[1, "fwd", "over HF's best"]["met"]  # 1.4 of 1.5
    assert found[first, "fwd+bwd", "ours: peak over HF grouped_mm's"]["met"]
    assert not found[first, "fwd+bwd", "ours recompute: peak over HF grouped_mm's"]["met"]  # 0.7 of 0.6
    (mean,) = [entry for (tokens, *_), entry in found.items() if tokens is None]
    assert mean["value"] == pytest.approx(statistics.geometric_mean([2.0, 8.0]))
    text = expert_mlp.format_bars(results)
    assert "0.91 ≥ 0.90 met" in text
    assert "5.00 ≥ 0.40 met (float32: 1.00)" in text
    assert "0.50 < 0.85 MISSED" in text
    assert "0.70 > 0.60 MISSED" in text


# --- the command line ---


def _run(*words):
    script = BENCHMARKS / "bench_expert_mlp.py"
    return subprocess.run([sys.executable, script, *words], capture_output=True, text=True, encoding="utf-8")


def test_help():
    told = _run("--help")
    assert told.returncode == 0
    assert "--shape T D F E K" in told.stdout
    assert "--seconds-per-case" in told.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--shape 4 4 4 2 3", "--shape: got 4 4 4 2 3, must be T D F E K, all positive, with K at most E"),
        ("--device tpu", "--device: got 'tpu', must be cpu or cuda"),
        ("--threads 0", "--threads: got 0, must be at least 1"),
    ],
)
def test_wrong_options(expert_mlp, words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        expert_mlp.main(words.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip() == f"bench_expert_mlp: {message}"
