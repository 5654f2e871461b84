"""`coterie tune` and the tables it writes, with time that a test makes up."""

import copy
import json

import pytest
import torch

from coterie.cli import main
from coterie.models import PRESETS
from coterie_kernels import tiles, tune
from coterie_kernels.tiles import TILES, read_tiles, use_tiles, write_tiles

LAYER = tune.Layer(24, 16, 2, 2)


@pytest.fixture(autouse=True)
def _own_tables(monkeypatch):
    """What a test takes is gone after it."""
    monkeypatch.setattr(tiles, "TILES", copy.deepcopy(TILES))
    monkeypatch.setattr(tune, "TILES", tiles.TILES)


@pytest.fixture
def few(monkeypatch):
    """Of every class one other candidate, 32 deep: interpreted kernels are slow."""
    monkeypatch.setattr(tune, "_neighbours", lambda sizes: iter([(32, *sizes[1:])]))
    monkeypatch.setattr(tune, "_tasks", lambda target, layer, tasks=tune._tasks: list(tasks(target, layer))[::4])


def _measured(run):
    """Half as long for sums 32 deep."""
    run()
    return 1.0 if tiles.TILES["sm_90"]["fused_forward"][32, 16][0] == 64 else 0.5


def test_the_fastest_is_chosen(few, tmp_path):
    table, choices = tune.tune(LAYER, torch.device("cpu"), measure=_measured)
    forward = next(choice for choice in choices if choice.kernel == "fused_forward")
    assert (forward.key, forward.before, forward.after, forward.gain) == ((32, 16), (64, 64, 4, 3), (32, 64, 4, 3), 2.0)
    others = [choice for choice in choices if choice is not forward]
    assert len(others) == 2
    assert all(choice.after == choice.before for choice in others)
    assert tiles.TILES["sm_90"]["fused_forward"][32, 16] == (64, 64, 4, 3)  # nothing is taken without a word
    write_tiles(tmp_path / "tiles.json", table)
    use_tiles(tmp_path / "tiles.json")
    assert tiles.TILES["sm_90"]["fused_forward"][32, 16] == (32, 64, 4, 3)
    assert tiles.mlp_tile("sm_90", torch.bfloat16, 16, 2, "forward").depth == 32


def test_a_wrong_result_is_never_timed(few, monkeypatch):
    timed = []
    monkeypatch.setattr(tune, "_is_same", lambda got, truth: False)
    tune.tune(LAYER, torch.device("cpu"), measure=lambda run: timed.append(run) or 1.0)
    assert len(timed) == 3  # the table's own entries alone


def test_what_cannot_run_is_passed_by(few, monkeypatch):
    def launch(*args):
        if tiles.TILES["sm_90"]["fused_forward"][32, 16][0] == 32:
            raise tune.TritonError("out of resource")
        return [torch.ones(2)]

    monkeypatch.setattr(tune, "_runner", lambda *args: launch)
    _, choices = tune.tune(LAYER, torch.device("cpu"), measure=lambda run: 1.0)
    assert choices[0].after == choices[0].before


def test_the_classes_of_a_layer():
    def kernels(layer):
        return {(kernel, key) for kernel, key, _, _ in tune._tasks("sm_90", layer)}

    narrow = kernels(tune.Layer(512, 100, 8, 2))
    assert {key for kernel, key in narrow if kernel == "fused_forward"} == {(128, 16), (128, 32), (128, 64)}
    assert ("multiply_columns", 1 << 30) in narrow
    assert not any(kernel == "multiply_rows" for kernel, _ in narrow)
    wide = kernels(tune.Layer(512, 300, 8, 2, torch.float32))
    assert ("float32 multiply_rows", 64) in wide
    assert not any(kernel.startswith("fused") for kernel, _ in wide)


def test_neighbours():
    found = list(tune._neighbours((64, 64, 4, 3)))
    assert len(found) == len(set(found)) == 5 * 8 - 1
    assert (128, 64, 8, 1) in found
    assert (64, 64, 4, 3) not in found


def test_files_are_whole(tmp_path):
    table = {"sm_80": {"fused_forward": {(64, 16): (32, 64, 4, 2)}, "multiply_rows": {128: (64, 32, 8, 2)}}}
    path = tmp_path / "tiles.json"
    write_tiles(path, table)
    assert read_tiles(path) == table
    assert json.loads(path.read_text())["sm_80"]["fused_forward"] == {"64, 16": [32, 64, 4, 2]}
    assert [p.name for p in tmp_path.iterdir()] == ["tiles.json"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"sm_70": {"forward": {16: (64, 64, 4, 3)}}}, "tiles: sm_70, forward, 16: there is no such target, kernel"),
        ({"sm_80": {"sideways": {16: (64, 64, 4, 3)}}}, "there is no such target, kernel or class"),
        ({"sm_80": {"fused_forward": {16: (64, 64, 4, 3)}}}, "there is no such target, kernel or class"),
        ({"sm_80": {"forward": {16: (64, 4, 3)}}}, r"must be 4 positive integers, got \(64, 4, 3\)"),
        ({"sm_80": {"forward": {16: (64, 64, 4, 0)}}}, "must be 4 positive integers"),
    ],
)
def test_a_wrong_table_is_refused_whole(table, message):
    before = copy.deepcopy(tiles.TILES)
    with pytest.raises(ValueError, match=message):
        use_tiles({"sm_90": {"forward": {16: (32, 64, 4, 3)}}, **table})
    assert before == tiles.TILES


def test_a_wrong_file_is_named(tmp_path):
    path = tmp_path / "tiles.json"
    for text in ("[]", "{", '{"sm_80": {"forward": {"sixteen": [1]}}}', '{"sm_80": {"forward": {"16": 3}}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"tiles\.json: no table of tiles"):
            use_tiles(path)


def test_the_command(few, monkeypatch, tmp_path, capsys):
    """As on a GPU, but for the GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    seen = []

    def fake(layer, device, *, progress):
        seen.append((layer, device))
        list(progress([1]))
        choice = tune.Choice("forward", 16, (64, 64, 4, 3), (32, 64, 4, 3), 3.0, 2.0)
        return {"sm_90": {"forward": {16: (32, 64, 4, 3)}}}, [choice]

    monkeypatch.setattr(tune, "tune", fake)
    out = tmp_path / "mine.json"
    assert main(["tune", "tiny", "--dtype", "float16", "--out", str(out)]) == 0
    config = PRESETS["tiny"]
    layer, device = seen[0]
    assert (layer.dim, layer.hidden_dim, layer.num_experts) == (
        config.dim,
        config.expert_hidden_dim,
        config.num_experts,
    )
    assert (layer.dtype, device.type, layer.activation.gated) == (torch.float16, "cuda", True)
    printed = capsys.readouterr().out
    assert "1.50×" in printed
    assert f"{out} is written" in printed
    assert read_tiles(out) == {"sm_90": {"forward": {16: (32, 64, 4, 3)}}}
