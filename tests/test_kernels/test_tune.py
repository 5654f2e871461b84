"""`coterie tune` and the tables it writes, with time that a test makes up."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from coterie.cli import main
from coterie.models import PRESETS
from coterie_kernels import tiles, tune, tune_attention, tune_delta_rule
from coterie_kernels.tiles import TILES, read_tiles, use_tiles, write_tiles
from coterie_kernels.tune_attention import AttentionLayer
from coterie_kernels.tune_delta_rule import DeltaRuleLayer
from coterie_kernels.tune_experts import ExpertLayer

CPU = torch.device("cpu")
EXPERTS = ExpertLayer(24, 16, 2, 2)
LINEAR = DeltaRuleLayer(2, 1, 8, 5)
SPARSE = AttentionLayer(2, 1, 8, window=4, sinks=1, block_size=4, num_blocks=2, sink_logits=True)


@pytest.fixture(autouse=True)
def _own_tables():
    """What a test takes is gone after it."""
    before = copy.deepcopy(TILES)
    yield
    TILES.clear()
    TILES.update(before)


@pytest.fixture
def few(monkeypatch):
    """Of every class one other candidate, 32 deep: interpreted kernels are slow."""
    monkeypatch.setattr(ExpertLayer, "candidates", lambda layer, kernel, sizes: [(32, *sizes[1:])])
    monkeypatch.setattr(
        ExpertLayer, "tasks", lambda layer, target, tasks=ExpertLayer.tasks: list(tasks(layer, target))[::4]
    )


@pytest.fixture
def short(monkeypatch):
    """Few tokens, for the same reason."""
    monkeypatch.setattr(tune_delta_rule, "_LENGTH", 40)
    monkeypatch.setattr(tune_delta_rule, "_STATES", 1)
    monkeypatch.setattr(tune_attention, "_LENGTH", 24)
    monkeypatch.setattr(tune_attention, "_UNITS", 1)


def _measured(run):
    """Half as long for sums 32 deep."""
    run()
    return 1.0 if TILES["sm_90"]["fused_forward"][32, 16][0] == 64 else 0.5


def test_the_fastest_is_chosen(few, tmp_path):
    table, choices = tune.tune([EXPERTS], CPU, measure=_measured)
    forward = next(choice for choice in choices if choice.kernel == "fused_forward")
    assert (forward.key, forward.before, forward.after, forward.gain) == ((32, 16), (64, 64, 4, 3), (32, 64, 4, 3), 2.0)
    others = [choice for choice in choices if choice is not forward]
    assert len(others) == 2
    assert all(choice.after == choice.before for choice in others)
    assert TILES["sm_90"]["fused_forward"][32, 16] == (64, 64, 4, 3)  # nothing is taken without a word
    write_tiles(tmp_path / "tiles.json", table)
    use_tiles(tmp_path / "tiles.json")
    assert TILES["sm_90"]["fused_forward"][32, 16] == (32, 64, 4, 3)
    assert tiles.mlp_tile("sm_90", torch.bfloat16, 16, 2, "forward").depth == 32


@pytest.mark.parametrize(
    ("layer", "kernel", "key", "fastest"),
    [
        (LINEAR, "delta_chunk", 16, (32,)),
        (LINEAR, "delta_prepare", 16, (32, 4, 2)),
        (LINEAR, "delta_forward", 16, (16, 4, 2)),
        (LINEAR, "delta_gradients", 16, (16, 64, 4, 2)),
        (replace(LINEAR, num_heads=1, decay="channels"), "delta_prepare_channels", 16, (32, 4, 1)),
        (replace(LINEAR, num_heads=1, decay="channels"), "delta_channel_gradients", 16, (16, 16, 4, 1)),
        (SPARSE, "attention_forward", 32, (32, 64, 4, 2)),
        (SPARSE, "attention_selected", 32, (32, 8, 2)),
        (SPARSE, "attention_key_gradients", 32, (32, 32, 4, 2)),
    ],
)
def test_the_fastest_is_chosen_for_every_kind_of_layer(short, monkeypatch, tmp_path, layer, kernel, key, fastest):
    """A candidate of the layer's own, whose result is the same within the tolerance; and the table takes it."""
    before = TILES["sm_90"][kernel][key]
    assert fastest in list(layer.candidates(kernel, before))
    task = next(task for task in layer.tasks("sm_90") if task.kernel == kernel)
    monkeypatch.setattr(type(layer), "tasks", lambda *_: [task])
    monkeypatch.setattr(type(layer), "candidates", lambda *_: [fastest])

    table, (choice,) = tune.tune([layer], CPU, measure=lambda run: 1.0 + (TILES["sm_90"][kernel][key] == before))
    assert (choice.key, choice.before, choice.after, choice.gain) == (key, before, fastest, 2.0)
    assert TILES["sm_90"][kernel][key] == before
    write_tiles(tmp_path / "tiles.json", table)
    use_tiles(tmp_path / "tiles.json")
    assert TILES["sm_90"][kernel][key] == fastest


def test_what_was_chosen_holds_for_what_is_measured_after_it(monkeypatch):
    """The chunk comes first, and everything else is measured with the one that was chosen."""
    seen = []
    monkeypatch.setattr(DeltaRuleLayer, "candidates", lambda layer, kernel, sizes: [(32,)] if len(sizes) == 1 else [])

    def launch(layer, task, device):
        seen.append((task.kernel, TILES["sm_90"]["delta_chunk"][16]))
        return lambda: [torch.ones(2)]

    monkeypatch.setattr(DeltaRuleLayer, "runner", launch)
    wide = replace(LINEAR, num_heads=4)  # which meets the same classes
    _, choices = tune.tune([LINEAR, wide], CPU, measure=lambda run: float(TILES["sm_90"]["delta_chunk"][16][0]))
    assert len(choices) == len(seen) == 5
    assert seen[0] == ("delta_chunk", (64,))
    assert {chunk for _, chunk in seen[1:]} == {(32,)}
    assert TILES["sm_90"]["delta_chunk"][16] == (64,)


def test_a_wrong_result_is_never_timed(few, monkeypatch):
    timed = []
    monkeypatch.setattr(tune, "_is_same", lambda got, truth: False)
    tune.tune([EXPERTS], CPU, measure=lambda run: timed.append(run) or 1.0)
    assert len(timed) == 3  # the table's own entries alone


def test_what_cannot_run_is_passed_by(few, monkeypatch):
    def launch(*args):
        if TILES["sm_90"]["fused_forward"][32, 16][0] == 32:
            raise tune.TritonError("out of resource")
        return [torch.ones(2)]

    monkeypatch.setattr(ExpertLayer, "runner", lambda *args: launch)
    _, choices = tune.tune([EXPERTS], CPU, measure=lambda run: 1.0)
    assert choices[0].after == choices[0].before


def test_the_classes_of_experts():
    def kernels(layer):
        return {(task.kernel, task.key) for task in layer.tasks("sm_90")}

    narrow = kernels(ExpertLayer(512, 100, 8, 2))
    assert {key for kernel, key in narrow if kernel == "fused_forward"} == {(128, 16), (128, 32), (128, 64)}
    assert ("multiply_columns", 1 << 30) in narrow
    assert not any(kernel == "multiply_rows" for kernel, _ in narrow)
    wide = kernels(ExpertLayer(512, 300, 8, 2, torch.float32))
    assert ("float32 multiply_rows", 64) in wide
    assert not any(kernel.startswith("fused") for kernel, _ in wide)


@pytest.mark.parametrize(
    ("settings", "kernels"),
    [
        ({}, "chunk prepare forward backward gradients"),
        ({"decay": "channels"}, "chunk prepare_channels forward backward channel_gradients"),
        ({"decay": "none", "erases": False}, "chunk forward backward gradients"),
        ({"dtype": torch.float32}, "prepare forward backward gradients"),
    ],
)
def test_the_classes_of_linear_attention(settings, kernels):
    layer = DeltaRuleLayer(2, 2, 48, 100, **settings)
    prefix = "float32 delta_" if layer.dtype == torch.float32 else "delta_"
    assert [(t.kernel, t.key) for t in layer.tasks("sm_90")] == [(prefix + name, 64) for name in kernels.split()]


@pytest.mark.parametrize(
    ("settings", "kernels"),
    [
        ({"window": 512}, "forward query_gradients key_gradients"),
        ({"window": None, "sink_logits": True}, "forward query_gradients key_gradients"),
        ({"window": 0, "num_blocks": 4}, "selected selected_gradients key_gradients"),
        (
            {"window": 0, "sinks": 4, "num_blocks": 4, "dtype": torch.float32},
            "forward query_gradients selected selected_gradients key_gradients",
        ),
    ],
)
def test_the_classes_of_sparse_attention(settings, kernels):
    layer = AttentionLayer(4, 2, 80, **settings)
    prefix = "float32 attention_" if layer.dtype == torch.float32 else "attention_"
    assert [(t.kernel, t.key) for t in layer.tasks("sm_90")] == [(prefix + name, 128) for name in kernels.split()]


def test_layers_that_no_class_is_for():
    with pytest.raises(ValueError, match="keys may have 256 channels at most, got 300"):
        tune.tune([DeltaRuleLayer(2, 2, 300, 8)], CPU)
    with pytest.raises(ValueError, match="keys and values may have 256 channels at most, got 300"):
        tune.tune([AttentionLayer(2, 2, 300, 8)], CPU)


def test_candidates_that_would_be_wrong():
    """A chunk has no warps and no fourth block; by channels, a program takes all of P."""
    assert LINEAR.candidates("delta_chunk", (64,)) == [(16,), (32,)]
    found = list(LINEAR.candidates("float32 delta_channel_gradients", (64, 32, 8, 1)))
    assert {sizes[:2] for sizes in found} == {(64, 16), (64, 32), (64, 64)}


def test_every_selected_block_is_another_one(short):
    generator = torch.Generator().manual_seed(0)
    ids = SPARSE._block_ids(2, 24, generator)
    assert ids.shape == (2, 24, 1, 2)
    assert (ids[:, :3] == -1).all()
    assert (ids[:, 8:] >= 0).all()
    assert (ids[:, 8:, :, 0] != ids[:, 8:, :, 1]).all()
    assert ((ids + 1) * 4 <= torch.arange(24)[:, None, None]).all()


def test_neighbours():
    found = list(tune.neighbours((64, 64, 4, 3)))
    assert len(found) == len(set(found)) == 5 * 8 - 1
    assert (128, 64, 8, 1) in found
    assert (64, 64, 4, 3) not in found
    assert {warps for *_, warps, _ in tune.neighbours((32, 1, 1))} == {1, 2, 4}


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
    before = copy.deepcopy(TILES)
    with pytest.raises(ValueError, match=message):
        use_tiles({"sm_90": {"forward": {16: (32, 64, 4, 3)}}, **table})
    assert before == TILES


def test_a_wrong_file_is_named(tmp_path):
    path = tmp_path / "tiles.json"
    for text in ("[]", "{", '{"sm_80": {"forward": {"sixteen": [1]}}}', '{"sm_80": {"forward": {"16": 3}}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"tiles\.json: no table of tiles"):
            use_tiles(path)


@pytest.fixture
def tuned(monkeypatch):
    """The layers and devices that `coterie tune` asks for, as on a GPU, but for the GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    seen = []

    def fake(layers, device, *, progress):
        seen.append((layers, device))
        list(progress([1]))
        choice = tune.Choice("forward", 16, (64, 64, 4, 3), (32, 64, 4, 3), 3.0, 2.0)
        return {"sm_90": {"forward": {16: (32, 64, 4, 3)}}}, [choice]

    monkeypatch.setattr(tune, "tune", fake)
    return seen


def test_the_command(tuned, tmp_path, capsys):
    out = tmp_path / "mine.json"
    assert main(["tune", "tiny", "--dtype", "float16", "--out", str(out)]) == 0
    config = PRESETS["tiny"]
    ([layer], device) = tuned[0]
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


def _layers(tuned, tmp_path, config):
    """That are tuned for a model."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert main(["tune", str(path), "--out", str(tmp_path / "tiles.json")]) == 0
    return tuned[-1][0]


def test_the_command_with_all_kinds_of_layers(tuned, tmp_path):
    config = PRESETS["tiny-long"]
    linear, experts, sparse = _layers(tuned, tmp_path, config)
    assert linear == DeltaRuleLayer(2, 2, 64, 64, "heads", True)
    assert experts == ExpertLayer(128, 128, 32, 2)
    assert sparse == AttentionLayer(4, 1, 32, window=512, block_size=64, num_blocks=16)


def test_the_command_without_experts(tuned, tmp_path):
    dense = replace(PRESETS["tiny"], num_layers=2, feed_forwards=("mlp",), hidden_dim=64, num_experts=0, top_k=0)
    dense = replace(dense, expert_hidden_dim=0, qk_norm=None)
    kda = replace(dense, mixers=("linear_attention", "attention"), linear_rule="kda", linear_num_key_heads=1)
    assert _layers(tuned, tmp_path, kda) == [DeltaRuleLayer(2, 1, 64, 64, "channels", True)]
    retention = replace(dense, mixers=("linear_attention",), linear_rule="retention", linear_value_dim=128)
    assert _layers(tuned, tmp_path, retention) == [DeltaRuleLayer(2, 2, 64, 128, "heads", False)]
    linear = replace(dense, mixers=("linear_attention",), linear_rule="linear")
    assert _layers(tuned, tmp_path, linear) == [DeltaRuleLayer(2, 2, 64, 64, "none", False)]
    windows = replace(dense, mixers=("window_attention", "attention"), attention_window=128, attention_sink_logits=True)
    expected = [AttentionLayer(2, 2, 64, window=window, sink_logits=True) for window in (128, None)]
    assert _layers(tuned, tmp_path, windows) == expected
    sinks = replace(dense, mixers=("sparse_attention",), sparse_scorer="window", sparse_window=32, sparse_sinks=4)
    assert _layers(tuned, tmp_path, sinks) == [AttentionLayer(2, 2, 64, window=32, sinks=4)]


def test_a_model_with_nothing_to_tune_is_refused(tuned, tmp_path, capsys):
    config = replace(PRESETS["tiny"], feed_forwards=("mlp",), hidden_dim=64, num_experts=0, top_k=0)
    path = tmp_path / "dense.json"
    path.write_text(json.dumps(config.to_dict()))
    assert main(["tune", str(path), "--out", str(tmp_path / "tiles.json")]) == 2
    assert f"coterie tune: {path} has nothing to tune: no experts, no linear_attention" in capsys.readouterr().err
    assert tuned == []
    assert not (tmp_path / "tiles.json").exists()
