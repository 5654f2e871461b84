"""The benchmark of kernels counts what is right and refuses what is wrong; on a GPU, with a faked clock, it times."""

import importlib
import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SHAPE = (24, 32, 16, 4, 2)
SMALL = ["--device", "cpu", "--shape", *map(str, SHAPE)]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("kernel_cost")
    monkeypatch.setattr(module._bench, "keep_freed_memory", lambda: True)  # it would stay for all tests after this one
    return module


def test_counts_a_small_layer(bench, tmp_path, capsys, monkeypatch):
    """Compiled is one kernel only: each takes seconds."""
    compiled = bench._kernel_cost.compile_kernels

    def compile_first(cost, launches, target):
        if cost.name == bench.OURS:
            first = bench._kernel_cost.LayerCost(**{**vars(cost), "forward": cost.forward[:1], "backward": []})
            compiled(first, {"forward": launches["forward"]}, target)

    monkeypatch.setattr(bench._kernel_cost, "compile_kernels", compile_first)
    assert bench.main([*SMALL, "--target", "gfx942", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "kernel_cost.json").read_text(encoding="utf-8"))
    ours, recompute = content["cases"][:2]
    tokens, dim, hidden_dim, num_experts, top_k = SHAPE
    for case in (ours, recompute):
        assert case["useful_flops"] == 6 * tokens * top_k * dim * hidden_dim
        assert 0 < case["error"] < 5e-3
    # x, ids and weights, rows' places and experts' counts; H.
    saved = 2 * tokens * dim + tokens * top_k * (8 + 4) + 2 * 4 * tokens * top_k + 8 * num_experts
    assert recompute["saved"] <= saved
    assert ours["saved"] - recompute["saved"] == 4 * tokens * top_k * hidden_dim
    kernels = {kernel["kernel"]: kernel for kernel in ours["forward"]}
    rows = kernels["_combine"]
    assert rows["distinct_store"] == 2 * tokens * dim  # y
    assert rows["distinct_load"] >= 2 * tokens * top_k * dim
    assert all(kernel["bound_seconds"] > 0 for kernel in ours["forward"])
    assert kernels["_place"]["compiled"]["registers"] > 0
    assert kernels["_place"]["compiled"]["spilled"] == 0
    assert content["bars"] == []
    told = capsys.readouterr().out
    assert "counted requested MB" in told
    assert "nothing here is a time" in told
    assert "MI300X" in told
    assert (tmp_path / "kernel_cost.png").stat().st_size > 5000


def test_a_wrong_kernel_is_named(bench, tmp_path, capsys, monkeypatch):
    right = bench._kernel_cost.expert_mlp
    monkeypatch.setattr(bench._kernel_cost, "compile_kernels", lambda *_: None)
    monkeypatch.setattr(
        bench._kernel_cost,
        "expert_mlp",
        lambda *args, impl, **more: right(*args, impl=impl, **more) * (1.1 if impl == "triton" else 1),
    )
    assert bench.main([*SMALL, "--out", str(tmp_path)]) == 1
    assert "kernel_cost: wrong result: ours (T 24, D 32, F 16, E 4, K 2, float16): the error of y" in (
        capsys.readouterr().err
    )


def test_bars_are_judged(bench):
    """The first shape's, by what was counted, but for padding: the mean over routings."""
    cost = bench.KernelCost("k", 3, int(30e6), int(20e6), int(11e6), 100, 1e-6)
    labels = dict(zip("TDFEK", bench.SHAPES[0], strict=True)) | {"dtype": "float16"}
    ours = bench.LayerCost(bench.OURS, labels, [cost], [cost], 90, int(2e6), 64, 1e-4)
    found = {entry["what"]: (entry["value"], entry["met"]) for entry in bench.bars([ours])}
    assert found["distinct MB"] == (62.0, False)
    assert found["requested MB"] == (60.0, True)
    assert found["launches forward"] == (3, True)
    value, met = found["executed / useful FLOPs forward, mean of 100 routings"]
    assert met
    assert 1.11 < value < 1.13  # half a tile of padding for each of 16 experts: 1 + 16 · 32 / 4096 = 1.125 at most
    assert "62 > 32 MISSED" in bench.format_bars(bench.bars([ours]))
    assert bench.bars([bench.LayerCost(bench.OURS, labels | {"T": 8}, [cost], [cost], 90, 0, 16, 0.0)]) == []


def test_padding_is_what_kernels_execute(bench):
    """The closed form that the bar uses, against products counted."""
    costs = bench._kernel_cost
    problem = costs.make_problem((150, 32, 16, 3, 2), torch.float16, 0)
    expected = costs.expected_results(problem)
    cost, _ = costs.count("ours", costs.contenders()[0][bench.OURS], problem, expected, "sm_90", {"T": 150})
    assert cost.tile_rows == 32
    executed = costs.padded_over_used(problem.expert_ids, 3, cost.tile_rows)
    # Depths are multiples of 64 there: D 32 is half of one, F 16 is as it is.
    assert cost.total("flops", "forward") / cost.useful_flops == pytest.approx(executed * _depth_padding())


def _depth_padding() -> float:
    """x [32] · W1 by depth 64 for 2F columns; A [16] · W2 for D columns in tiles of 64: of 6·D·F FLOPs."""
    return (2 * 32 * 64 + 2 * 16 * 64) / (6 * 32 * 16)


def test_the_path_for_gpus_with_a_faked_clock(bench, tmp_path, capsys, monkeypatch):
    """All but the clock and the device: torch's implementations run, on a CPU."""
    timing = bench._kernel_time
    monkeypatch.setattr(timing, "CEILING_SIZE", 16)
    calls = []

    def clock(run):
        calls.append(run())
        return 1e-3

    options = bench.Options(shape=(SHAPE,), dtype="bfloat16", out=tmp_path, device="cpu")
    rows = timing.run(options, {"device": "none"}, clock)
    names = [row.name for row in rows if row.seconds]
    assert {"dense", bench.OURS, bench.RECOMPUTE, timing.TORCH_GROUPED} <= set(names)
    tokens, dim, hidden_dim, num_experts, top_k = SHAPE
    forward = next(row for row in rows if row.name == bench.OURS)
    assert forward.useful_flops == 6 * tokens * top_k * dim * hidden_dim
    assert forward.least_bytes == 2 * (2 * tokens * dim + 3 * num_experts * dim * hidden_dim)
    assert all(len(row.seconds) == timing.ROUNDS and row.error < 3e-2 for row in rows if row.seconds)
    assert len(calls) == 2 + timing.ROUNDS * len(names)
    told = capsys.readouterr().out
    assert "expert_mlp, recompute, 5 runs: the same bits every time" in told
    assert "ceilings, measured: 0.0 TFLOP/s" in told
    content = json.loads((tmp_path / "kernel_time.json").read_text(encoding="utf-8"))
    assert content["differs between runs"] == {
        name: [] for name in ("route_topk", "grouped_matmul", "expert_mlp", "expert_mlp, recompute")
    }
    assert (tmp_path / "kernel_time.png").stat().st_size > 5000


def test_runs_that_differ_are_told(bench):
    results = iter([1.0, 1.0, 2.0, 1.0, 1.0])
    op = lambda: {"y": torch.tensor(next(results)), "grad x": torch.zeros(1)}  # noqa: E731
    assert bench._kernel_time._differing(op) == ["y"]
