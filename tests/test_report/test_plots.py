import struct
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from coterie.report import report_figure, save_figure
from coterie.report.plots import load_finding, loss_finding, position_finding, smoothed

pytest.importorskip("matplotlib")


@dataclass
class Run:
    tokens: np.ndarray
    seconds: np.ndarray
    train_bpb: np.ndarray
    valid_tokens: np.ndarray
    valid_seconds: np.ndarray
    valid_bpb: np.ndarray
    expert_load: np.ndarray | None = None
    position_edges: np.ndarray | None = None
    position_bpb: np.ndarray | None = None


def make_run(end, speed, *, load=None, steps=40, every=10):
    step, valid = np.arange(1, steps + 1), np.arange(0, steps + 1, every)
    curve = lambda n: end + 5 * np.exp(-n / 8)  # noqa: E731
    return Run(
        tokens=step * 100.0,
        seconds=step * 100.0 / speed,
        train_bpb=curve(step),
        valid_tokens=valid * 100.0,
        valid_seconds=valid * 100.0 / speed,
        valid_bpb=curve(valid),
        expert_load=load,
    )


def some_load(layers=3, num_experts=8, evaluations=5):
    load = np.random.default_rng(0).uniform(0.5, 1.5, (evaluations, layers, num_experts))
    load[-1, 0, 0] = 0.0
    return load / load.sum(-1, keepdims=True)


@pytest.fixture
def contenders():
    return {"moe": make_run(2.0, 50.0, load=some_load()), "dense": make_run(2.5, 100.0)}


def axes_titled(figure, beginning):
    (axes,) = [axes for axes in figure.axes if axes.get_title(loc="left").startswith(beginning)]
    return axes


def test_losses_are_drawn_over_tokens_and_over_seconds(contenders):
    figure = report_figure(contenders)
    for axes, kind in zip(figure.axes[:2], ("tokens", "seconds"), strict=True):
        drawn = [line.get_xydata() for line in axes.lines]
        for run in contenders.values():
            train = np.column_stack([getattr(run, kind), smoothed(run.train_bpb)])
            valid = np.column_stack([getattr(run, f"valid_{kind}"), run.valid_bpb])
            assert any(np.array_equal(line, train) for line in drawn)
            assert any(np.array_equal(line, valid) for line in drawn)
        assert axes.get_xlabel() == f"training {kind}"
        low, high = axes.get_ylim()
        assert low < 2.0
        assert high > 2.5
        assert {text.get_text() for text in axes.texts} >= {"moe", "dense"}


def test_positions_are_drawn_where_the_context_is_long(contenders):
    short = report_figure(contenders)
    edges = np.array([0, 16, 32, 512, 1024])
    bpb = {"moe": np.array([4.0, 3.5, 3.0, 2.5]), "dense": np.array([4.25, 3.5, 2.75, 2.125])}
    for name, run in contenders.items():
        run.position_edges, run.position_bpb = edges, bpb[name]
    figure = report_figure(contenders)
    assert len(figure.axes) == len(short.axes) + 1
    axes = axes_titled(figure, "From position 512 on dense is ahead of moe: 2.125 against 2.500 bits per byte")
    for line, values in zip(axes.lines, bpb.values(), strict=True):
        np.testing.assert_array_equal(line.get_xydata(), np.column_stack([[7.5, 23.5, 271.5, 767.5], values]))
    assert axes.get_xscale() == "log"
    assert axes.get_ylim() == pytest.approx((2.125 - 0.07, 3.0 + 0.07))  # the farther positions, from 32 on
    assert [label.get_text() for label in axes.get_xticklabels()] == ["16", "32", "512", "1,024"]
    assert [text.get_text() for text in axes.texts] == ["dense", "moe"]
    assert [text.get_color() for text in axes.texts] == [line.get_color() for line in axes.lines[::-1]]
    only = {"moe": contenders["moe"]}
    assert position_finding(only) == "From position 512 on 2.500 bits per byte, 4.000 before position 16"
    contenders["dense"].position_bpb = bpb["moe"]
    assert "on dense and moe are level: 2.500 against" in position_finding(contenders)
    contenders["dense"].position_edges = None  # a log from before there was such a figure
    assert len(report_figure(contenders).axes) == len(short.axes)


def test_load_is_drawn_layer_by_layer_as_a_ratio_to_the_fair_share(contenders):
    figure = report_figure(contenders)
    load = contenders["moe"].expert_load
    axes = axes_titled(figure, "moe: 1 of 24 experts are dead")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["MoE 1", "MoE 2", "MoE 3"]
    assert len(axes.collections) == 3
    for layer, mesh in enumerate(axes.collections):
        expected = np.log2(np.clip(load[:, layer].T * 8, 0.25, 4))  # [E, evaluations]; a dead expert at the scale's end
        np.testing.assert_allclose(np.asarray(mesh.get_array()).reshape(8, 5), expected)
        assert mesh.get_clim() == (-2.0, 2.0)  # the fair share, 0, is the colour scale's middle


def test_titles_state_what_the_data_say(contenders):
    figure = report_figure(contenders, title="tiny", subtitle="small")
    assert loss_finding(contenders, "tokens") == (
        "At equal tokens (4.00 k) moe is ahead\nof dense: 2.034 against 2.534 bits per byte"
    )
    # moe is half as fast: after dense's 40 s it has seen 2000 tokens.
    assert loss_finding(contenders, "seconds") == (
        "At equal seconds (40 s) moe is ahead\nof dense: 2.410 against 2.534 bits per byte"
    )
    slow = {**contenders, "moe": make_run(2.0, 20.0)}
    assert loss_finding(slow, "seconds").startswith("At equal seconds (40 s) dense is ahead\nof moe")
    same = {"a": make_run(2.0, 1.0), "b": make_run(2.001, 1.0)}
    assert "a and b\nare level: 2.034 against 2.035" in loss_finding(same, "tokens")
    assert loss_finding({"a": same["a"]}, "tokens") == "2.034 bits per byte on unseen text\nafter 4.00 k tokens"
    assert axes_titled(figure, "At equal tokens").get_xlabel() == "training tokens"
    assert {text.get_text() for text in figure.texts} >= {"tiny", "small"}


def test_the_load_title_counts_dead_experts():
    even = np.full((2, 2, 4), 0.25)
    assert (
        load_finding(even)
        == "All 8 experts are in use; load entropy 1.000 of 1, the busiest carries 1.0× its fair share"
    )
    uneven = even.copy()
    uneven[-1, 0] = [0.0, 0.5, 0.25, 0.25]
    entropy = (1.5 / 2 + 1) / 2
    assert load_finding(uneven, "moe") == (
        f"moe: 1 of 8 experts are dead; load entropy {entropy:.3f} of 1, the busiest carries 2.0× its fair share"
    )


def test_the_file_is_a_png_of_a_readable_size(contenders, tmp_path):
    path = tmp_path / "report.png"
    save_figure(report_figure(contenders, title="a title"), path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    assert width == 1500
    assert 700 < height < 1500
    assert [file.name for file in tmp_path.iterdir()] == ["report.png"]


@pytest.mark.parametrize("layers", [1, 24])
def test_one_run_of_any_depth_fits(layers, tmp_path):
    run = make_run(2.0, 50.0, load=some_load(layers, 64, 5))
    figure = report_figure({"only": run})
    assert len(axes_titled(figure, f"1 of {64 * layers} experts are dead").collections) == layers
    save_figure(figure, tmp_path / "one.png")
    assert figure.get_figheight() < 12


def test_a_run_evaluated_once_can_be_drawn(tmp_path):
    run = make_run(2.0, 50.0, steps=1, every=5, load=some_load(2, 4, 1))
    save_figure(report_figure({"short": run}), tmp_path / "short.png")


def test_pyplot_is_left_alone(contenders):
    code = set(sys.modules)
    report_figure(contenders)
    assert "matplotlib.pyplot" not in set(sys.modules) - code


def test_what_cannot_be_drawn_is_an_error(contenders):
    with pytest.raises(ValueError, match="contenders: got 0, must be 1 to 6"):
        report_figure({})
    contenders["dense"].valid_bpb = np.array([])
    with pytest.raises(ValueError, match="'dense' was never evaluated"):
        report_figure(contenders)


def test_without_matplotlib_the_error_says_how_to_get_it(contenders, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'coterie\[plot\]'"):
        report_figure(contenders)
