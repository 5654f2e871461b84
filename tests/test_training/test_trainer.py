"""The trainer: what a step computes, and that it can be interrupted anywhere."""

import json
import math
import random
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coterie.models.transformer import Transformer, TransformerOutput
from coterie.ops import balance_loss, z_loss
from coterie.training import Batches, Trainer, load_checkpoint, read_log, save_checkpoint
from coterie.training.evaluation import evaluate, evaluation_windows, position_edges

DENSE = {"feed_forwards": ("mlp",)}


def timeless(records):
    clock = ("seconds", "tokens_per_second")
    return [{name: value for name, value in record.items() if name not in clock} for record in records]


def gradients_of_first_step(trainer):
    """The gradients that the optimizer sees, by name."""
    seen = {}

    def keep(*_):
        seen.update({name: p.grad.clone() for name, p in trainer.model.named_parameters()})

    trainer.optimizer.register_step_pre_hook(keep)
    trainer.step()
    return seen


class FixedBatches:
    """The same batch for ever."""

    def __init__(self, *batch):
        self.batch = batch

    def __next__(self):
        return self.batch

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class NoisyBatches(Batches):
    """Batches with two bytes changed at random: one by numpy's global generator, one by Python's."""

    def __next__(self):
        inputs, targets = super().__next__()
        inputs[0, np.random.randint(self.length)] = 7
        inputs[1, random.randrange(self.length)] = 7
        return inputs, targets


# --- one step


def test_the_loss_is_cross_entropy_and_both_router_losses(make_model, make_config, make_batches, valid):
    config = make_config(balance_weight=0.3, z_weight=0.2, clip_norm=None)
    batches = make_batches(config)
    trainer = Trainer(make_model(), config, batches, valid)
    twin = make_model()
    inputs, targets = batches.batch(0)
    output = twin(inputs)
    ce = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
    balance, z = balance_loss(output.routings), z_loss(output.routings)
    loss = ce + 0.3 * balance + 0.2 * z
    loss.backward()

    gradients = gradients_of_first_step(trainer)
    record = trainer.history[-1]
    for name, value in (("loss", loss), ("ce", ce), ("balance", balance), ("z", z)):
        assert record[name] == pytest.approx(value.item(), rel=1e-6), name
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name)
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in twin.parameters()))
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-5)
    shares = torch.stack([routing.counts() for routing in output.routings]).double()
    shares = shares / shares.sum(1, keepdim=True)
    entropy = -(shares * shares.log()).nan_to_num().sum(1).mean() / math.log(4)
    assert record["load_entropy"] == pytest.approx(entropy.item(), rel=1e-5)
    assert record["tokens"] == 64
    assert record["lr"] == config.lr / 2
    assert record["tokens_per_second"] == pytest.approx(64 / record["seconds"])


def test_long_gradients_are_clipped(make_model, make_config, make_batches, valid):
    config = make_config(clip_norm=0.01)
    trainer = Trainer(make_model(), config, make_batches(config), valid)
    gradients = gradients_of_first_step(trainer)
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm().item()
    assert norm == pytest.approx(0.01, rel=1e-3)
    assert trainer.history[-1]["grad_norm"] > 0.1


@pytest.mark.parametrize("accumulation", [2, 4])
def test_micro_batches_add_up_to_the_batch(make_model, make_config, make_batches, valid, accumulation):
    """In float64, where nothing hides: cross entropy, with unequal numbers of targets per micro-batch."""
    inputs, targets = make_batches(make_config()).batch(0)
    targets[0, 2:] = -100
    targets[3, :] = -100
    gradients, records = [], []
    for parts in (1, accumulation):
        config = make_config(accumulation=parts, clip_norm=None)
        trainer = Trainer(make_model(dtype=torch.float64, **DENSE), config, FixedBatches(inputs, targets), valid)
        gradients.append(gradients_of_first_step(trainer))
        records.append(trainer.history[-1])
    for name, whole in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], whole, rtol=1e-12, atol=1e-15, msg=name)
    assert records[0]["tokens"] == records[1]["tokens"] == 2 + 16 + 16
    assert records[0]["loss"] == pytest.approx(records[1]["loss"], rel=1e-6)


def test_micro_batches_of_a_mixture_add_up_but_for_the_balance_loss(make_model, make_config, make_batches, valid):
    """The z-loss is that of the batch; the balance loss the mean of the micro-batches'."""
    for balance_weight, z_weight in ((0.0, 0.5), (0.5, 0.0)):
        config = make_config(accumulation=2, clip_norm=None, balance_weight=balance_weight, z_weight=z_weight)
        batches = make_batches(config)
        inputs, targets = batches.batch(0)
        twin = make_model()
        output = twin(inputs)
        loss = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten()) + z_weight * z_loss(output.routings)
        if balance_weight:
            halves = [balance_loss(twin(half).routings) for half in inputs.chunk(2)]
            loss = loss + balance_weight * sum(halves) / 2
        loss.backward()
        gradients = gradients_of_first_step(Trainer(make_model(), config, batches, valid))
        for name, parameter in twin.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_selection_bias_moves_once_a_step_by_the_whole_batchs_load(make_model, make_config, make_batches, valid):
    config = make_config(accumulation=4, selection_bias_rate=0.01)
    batches = make_batches(config)
    model = make_model(selection_bias=True, router_score="sigmoid")
    counts = [
        routing.counts().double()
        for routing in make_model(selection_bias=True, router_score="sigmoid")(batches.batch(0)[0]).routings
    ]
    trainer = Trainer(model, config, batches, valid)
    trainer.step()
    for layer, load in zip(model.moe_layers(), counts, strict=True):
        expected = 0.01 * torch.sign(load.mean() - load).float()
        assert torch.equal(layer.router.selection_bias, expected)
    with pytest.raises(ValueError, match="selection_bias_rate: the model's routers have no selection bias"):
        Trainer(make_model(), config, batches, valid)


def test_masked_tokens_cannot_matter(make_model, make_config, make_batches, valid):
    config = make_config()
    inputs, targets = make_batches(config).batch(0)
    mask = torch.ones_like(inputs, dtype=torch.bool)
    mask[:, 12:] = False
    targets[:, 11:] = -100
    runs = []
    for filler in (0, 77):
        batch = FixedBatches(inputs.masked_fill(~mask, filler), targets, mask)
        trainer = Trainer(make_model(selection_bias=True), make_config(selection_bias_rate=0.1), batch, valid)
        for _ in range(2):
            trainer.step()
        runs.append((timeless(trainer.history), trainer.model.state_dict()))
    assert runs[0][0][1:] == runs[1][0][1:]
    assert runs[0][0][-1]["tokens"] == 2 * 4 * 11
    for name, tensor in runs[0][1].items():
        assert torch.equal(tensor, runs[1][1][name]), name


def test_bf16_leaves_the_weights_in_float32(make_model, make_config, make_batches, valid):
    seen = []
    config = make_config(precision="bf16")
    model = make_model()
    model.layers[0].mixer.q_proj.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    trainer = Trainer(model, config, make_batches(config), valid)
    trainer.step()
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    full = Trainer(make_model(), make_config(precision="float32"), make_batches(config), valid)
    full.step()
    assert trainer.history[-1]["loss"] == pytest.approx(full.history[-1]["loss"], rel=1e-2)
    assert trainer.history[-1]["loss"] != full.history[-1]["loss"]


def test_training_learns(make_model, make_config, make_batches, valid, corpus):
    config = make_config(steps=100, batch_size=8, lr=1e-2, eval_every=50, checkpoint_every=100)
    trainer = Trainer(make_model(), config, make_batches(config), corpus[:700])
    trainer.train(progress=False)
    curve = [record["valid_bpb"] for record in trainer.history if "valid_bpb" in record]
    assert len(curve) == 3
    assert curve[0] == pytest.approx(8, abs=0.5)
    assert curve[-1] < 3.3  # the frequencies of the letters alone would be 3.67


def test_a_compiled_model_computes_the_same(make_model, make_config, make_batches, valid, monkeypatch):
    # Dynamo without code generation: what is tested is that the trainer goes through it.
    calls = []

    def compile_eagerly(model):
        calls.append(model)
        return torch._dynamo.optimize("eager")(model)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    config = make_config(compile=True)
    trainer = Trainer(make_model(), config, make_batches(config), valid)
    plain = Trainer(make_model(), make_config(), make_batches(config), valid)
    trainer.step(), plain.step()
    assert calls == [trainer.model]
    for compiled, eager in zip(timeless(trainer.history), timeless(plain.history), strict=True):
        for name in ("expert_load", "position_edges"):
            assert compiled.pop(name, None) == eager.pop(name, None)
        assert compiled.pop("position_bpb", []) == pytest.approx(eager.pop("position_bpb", []), rel=1e-5)
        assert compiled == pytest.approx(eager, rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(make_model, make_config, make_batches, valid, tmp_path):
    config = make_config(checkpoint_every=1)
    trainer = Trainer(make_model(), config, make_batches(config), valid, tmp_path)
    trainer.step()
    with torch.no_grad():
        trainer.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 2: the loss is nan"):
        trainer.step()
    tensors, state = load_checkpoint(tmp_path / "checkpoint.safetensors")
    assert state["step"] == 1
    assert tensors["model/norm.weight"].isfinite().all()
    assert len(read_log(tmp_path / "log.jsonl")) == 2


# --- evaluation


@pytest.mark.parametrize("accumulation", [1, 2])
def test_evaluation_is_the_mean_of_minus_log2_p(make_model, make_config, make_batches, valid, accumulation):
    config = make_config(accumulation=accumulation)
    model = make_model(dropout=0.5)
    trainer = Trainer(model, config, make_batches(config), valid)
    evaluation = trainer.evaluate()
    starts = evaluation_windows(valid, 8, 16)
    assert len(starts) == 8
    assert (np.diff(starts) >= 16).all()
    assert starts[-1] + 17 <= len(valid)
    bits, counts = [], torch.zeros(2, 4, dtype=torch.long)
    model.eval()
    with torch.no_grad():
        for start in starts:
            window = torch.tensor(valid[start : start + 17].astype(np.int64))
            output = model(window[None, :-1])
            chances = output.logits[0].double().softmax(-1)
            bits += [-math.log2(chances[i, window[i + 1]]) for i in range(16)]
            counts += torch.stack([routing.counts() for routing in output.routings])
    assert evaluation.bpb == pytest.approx(np.mean(bits), rel=1e-6)
    torch.testing.assert_close(torch.tensor(evaluation.expert_load), (counts / counts.sum(1, keepdim=True)))
    assert evaluation.dead_experts == int((counts == 0).sum())
    assert trainer.evaluate() == evaluation


class ByPosition(nn.Module):
    """Gives byte 7 the chance 2^-bits[t] at position t, whatever it reads."""

    def __init__(self, bits):
        super().__init__()
        chance = 2.0 ** -torch.tensor(bits, dtype=torch.float64)
        logits = ((1 - chance) / 255).log()[:, None].repeat(1, 256)
        logits[:, 7] = chance.log()
        self.logits = nn.Parameter(logits.float())

    def forward(self, ids):
        return TransformerOutput(logits=self.logits[: ids.shape[1]].expand(*ids.shape, 256), routings=())


def test_bits_by_position_by_hand():
    corpus = np.full(5 * 48 + 1, 7, dtype=np.uint8)
    bits = [4.0] * 16 + [2.0] * 8 + [1.0] * 8 + [0.5] * 16
    for length, edges, expected in (
        (48, [0, 16, 32, 48], [4.0, 1.5, 0.5]),
        (32, [0, 16, 32], [4.0, 1.5]),
        (23, [0, 23], [(16 * 4 + 7 * 2) / 23]),
        (3, [0, 3], [4.0]),
    ):
        evaluation = evaluate(ByPosition(bits), corpus, count=5, length=length, batch_size=2)  # the last batch is one
        assert evaluation.position_edges == edges
        assert evaluation.position_bpb == pytest.approx(expected, rel=1e-6)
        assert evaluation.bpb == pytest.approx(np.mean(bits[:length]), rel=1e-6)


def test_bins_of_positions_double_to_the_second_half_of_the_context():
    assert position_edges(1024) == [0, 16, 32, 64, 128, 256, 512, 1024]
    assert position_edges(1536) == [0, 16, 32, 64, 128, 256, 512, 1024, 1536]
    assert position_edges(1535) == [0, 16, 32, 64, 128, 256, 512, 1535]
    assert len(position_edges(65536)) == 14


def test_the_mean_over_positions_is_the_whole(make_model, make_config, make_batches, valid):
    config = make_config(length=100)
    record = Trainer(make_model(), config, make_batches(config), valid).train(progress=False)[-1]
    widths = np.diff(record["position_edges"])
    assert widths.tolist() == [16, 16, 32, 36]
    assert np.average(record["position_bpb"], weights=widths) == pytest.approx(record["valid_bpb"], rel=1e-12)


def test_evaluation_of_one_expert_for_all(make_model, make_config, make_batches, valid):
    """Two of four experts with all tokens: entropy log 2 / log 4, two dead ones in that layer."""
    model = make_model(router_score="sigmoid", selection_bias=True)
    model.layers[0].feed_forward.router.selection_bias.copy_(torch.tensor([9.0, 0, 9, 0]))
    model.layers[1].feed_forward.router.selection_bias.copy_(torch.tensor([0, 9.0, 0, 9]))
    config = make_config()
    evaluation = Trainer(model, config, make_batches(config), valid).evaluate()
    assert evaluation.expert_load == [[0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5]]
    assert evaluation.load_entropy == pytest.approx(0.5)
    assert evaluation.dead_experts == 4


def test_a_dense_model_has_no_load(make_model, make_config, make_batches, valid):
    config = make_config()
    trainer = Trainer(make_model(**DENSE), config, make_batches(config), valid)
    record = trainer.step()
    assert not {"load_entropy", "expert_load", "dead_experts"} & set(record)
    assert record["balance"] == record["z"] == 0
    assert trainer.evaluate().load_entropy is None


def test_evaluation_leaves_training_as_it_was(make_model, make_config, make_batches, valid):
    runs = []
    for every in (1, 6):
        config = make_config(eval_every=every)
        trainer = Trainer(make_model(dropout=0.3), config, make_batches(config), valid)
        runs.append([record["loss"] for record in trainer.train(progress=False)[1:]])
    assert runs[0] == runs[1]


def test_a_validation_text_shorter_than_a_window_is_an_error_at_once(make_model, make_config, make_batches, valid):
    config = make_config()
    with pytest.raises(ValueError, match="valid_corpus: got 16 bytes, must be more than length = 16"):
        Trainer(make_model(), config, make_batches(config), valid[:16])


# --- interruption


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_three_steps_resume_and_three_are_six(make_model, make_config, corpus, valid, tmp_path, precision):
    """Bitwise; with dropout from torch's stream, noise from numpy's and Python's, and a selection bias."""
    model = {"dropout": 0.1, "selection_bias": True, "router_score": "sigmoid", "qk_norm": "head"}
    config = make_config(selection_bias_rate=0.01, precision=precision, accumulation=2)

    def trainer(name, seed=0, **options):
        batches = NoisyBatches(corpus, config.batch_size, config.length)
        return Trainer(make_model(seed, **model), config, batches, valid, tmp_path / name, **options)

    straight = trainer("straight")
    straight.train(progress=False)
    halted = trainer("halted")
    for _ in range(3):
        halted.step()
    torch.manual_seed(99)  # what else the process does cannot matter
    np.random.seed(99)
    random.seed(99)
    resumed = trainer("halted", seed=5, resume=True)
    assert resumed.current_step == 3
    resumed.train(progress=False)

    (one, state), (other, other_state) = (
        load_checkpoint(tmp_path / name / "checkpoint.safetensors") for name in ("straight", "halted")
    )
    assert one.keys() == other.keys()
    assert {name.partition("/")[0] for name in one} == {"model", "optimizer", "random"}
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert state.pop("seconds") > 0
    assert other_state.pop("seconds") > 0
    assert state == other_state
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert timeless(straight.history) == timeless(resumed.history)
    assert timeless(read_log(tmp_path / "halted" / "log.jsonl")) == timeless(straight.history)
    assert (one["model/layers.0.feed_forward.router.selection_bias"] != 0).any()


def test_resume_drops_the_steps_after_the_checkpoint_from_the_log(
    make_model, make_config, make_batches, valid, tmp_path
):
    config = make_config()
    trainer = Trainer(make_model(), config, make_batches(config), valid, tmp_path)
    for _ in range(5):
        trainer.step()
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "lo')  # killed within a line
    resumed = Trainer(make_model(), config, make_batches(config), valid, tmp_path, resume=True)
    assert [record["step"] for record in resumed.history] == [0, 1, 2, 3]
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [0, 1, 2, 3]
    before = resumed.seconds
    resumed.train(progress=False)
    records = read_log(tmp_path / "log.jsonl")
    assert [record["step"] for record in records] == list(range(7))
    assert records == resumed.history
    assert records[4]["seconds"] > before
    assert [record["step"] for record in records if "valid_bpb" in record] == [0, 3, 6]


@pytest.mark.parametrize("line", ["3", '"step"', "[]", "{}", '{"step": "x"}', "[" * 100_000, '{"step": 2'])
def test_a_line_that_is_no_record_ends_the_log(make_model, make_config, make_batches, valid, tmp_path, line):
    config = make_config()
    trainer = Trainer(make_model(), config, make_batches(config), valid, tmp_path)
    for _ in range(4):
        trainer.step()
    path = tmp_path / "log.jsonl"
    records = read_log(path)
    lines = path.read_text().splitlines()

    path.write_text("\n".join([*lines[:4], line, lines[4]]) + "\n")  # after the checkpoint of step 3
    assert read_log(path) == records[:4]
    resumed = Trainer(make_model(), config, make_batches(config), valid, tmp_path, resume=True)
    assert resumed.history == read_log(path) == records[:4]

    damaged = "\n".join([*lines[:2], line, *lines[2:]]) + "\n"  # before it: what the run did is lost
    path.write_text(damaged)
    with pytest.raises(ValueError, match=r"log.jsonl is damaged in line 3, before step 3 to resume"):
        Trainer(make_model(), config, make_batches(config), valid, tmp_path, resume=True)
    assert path.read_text() == damaged


def test_a_finished_run_resumes_to_itself(make_model, make_config, make_batches, valid, tmp_path):
    config = make_config()
    history = Trainer(make_model(), config, make_batches(config), valid, tmp_path).train(progress=False)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    assert Trainer(make_model(), config, make_batches(config), valid, tmp_path, resume=True).train(False) == history
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_the_run_folder_holds_the_model(make_model, make_config, make_batches, valid, tmp_path):
    config = make_config()
    trainer = Trainer(make_model(), config, make_batches(config), valid, tmp_path / "runs" / "one")
    trainer.train(progress=False)
    folder = tmp_path / "runs" / "one"
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint.safetensors",
        "config.json",
        "log.jsonl",
        "model.safetensors",
        "train.json",
    }
    assert json.loads((folder / "train.json").read_text()) == config.to_dict()
    model = Transformer.from_pretrained(folder)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_an_old_run_is_neither_continued_nor_lost_by_accident(make_model, make_config, make_batches, valid, tmp_path):
    config = make_config()

    def trainer(**options):
        return Trainer(make_model(), config, make_batches(config), valid, tmp_path / "run", **options)

    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        trainer(resume=True)
    trainer().train(progress=False)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds a run already; resume it, overwrite it, or name another"):
        trainer()
    anew = trainer(overwrite=True)
    assert anew.current_step == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"train.json", "log.jsonl", "notes.txt"}
    anew.step()
    assert [record["step"] for record in read_log(tmp_path / "run" / "log.jsonl")] == [0, 1]
    with pytest.raises(ValueError, match="resume: needs an out_dir"):
        Trainer(make_model(), config, make_batches(config), valid, resume=True)


def test_only_the_same_run_is_resumed(make_model, make_config, make_batches, valid, tmp_path, corpus):
    config = make_config()
    Trainer(make_model(), config, make_batches(config), valid, tmp_path).train(progress=False)

    def resume(model=None, config=config, batches=None):
        return Trainer(model or make_model(), config, batches or make_batches(config), valid, tmp_path, resume=True)

    with pytest.raises(ValueError, match="another run: the model's expert_hidden_dim was 8, is 16 now"):
        resume(make_model(expert_hidden_dim=16))
    with pytest.raises(ValueError, match=r"another run: the training lr was 0\.003, is 0\.01 now"):
        resume(config=make_config(lr=0.01))
    with pytest.raises(ValueError, match="another run: state: seed was 0, these batches have 1"):
        resume(batches=make_batches(config, seed=1))
    with pytest.raises(ValueError, match="another run: state: corpus_bytes was"):
        resume(batches=Batches(corpus[:-5], 4, 16))
    frozen = make_model()
    frozen.layers[0].mixer.q_proj.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"layers\.0\.mixer\.q_proj\.weight is not trained here"):
        resume(frozen)
    assert resume(config=make_config(eval_every=1, checkpoint_every=2)).current_step == 6

    path = tmp_path / "checkpoint.safetensors"
    tensors, state = load_checkpoint(path)
    save_checkpoint(path, {name: t for name, t in tensors.items() if name != "model/norm.weight"}, state)
    with pytest.raises(ValueError, match=r"another run: .*norm\.weight"):
        resume()
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        resume()


# --- surroundings


def test_the_callers_random_numbers_are_left_alone(make_model, make_config, make_batches, valid):
    config = make_config()
    model, batches = make_model(dropout=0.5), make_batches(config)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    Trainer(model, config, batches, valid).train(progress=False)
    assert torch.equal(torch.rand(3), expected)


def test_tensorboard_is_written_where_it_is_installed(
    make_model, make_config, make_batches, valid, tmp_path, monkeypatch
):
    calls = []

    class SummaryWriter:
        def __init__(self, folder, purge_step=None):
            calls.append(("open", folder, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def close(self):
            calls.append(("close",))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    config = make_config()
    trainer = Trainer(make_model(), config, make_batches(config), valid, tmp_path)
    history = trainer.train(progress=False)
    assert calls[0] == ("open", tmp_path / "tensorboard", None)
    assert calls[-1] == ("close",)
    assert [call for call in calls if call[0] == "loss"] == [("loss", r["loss"], r["step"]) for r in history[1:]]
    assert ("valid_bpb", history[-1]["valid_bpb"], 6) in calls
    assert {call[0] for call in calls}.isdisjoint({"step", "expert_load"})
    Trainer(make_model(), config, make_batches(config), valid, tmp_path, resume=True)
    assert calls[-1] == ("open", tmp_path / "tensorboard", 7)


def test_progress_says_loss_speed_and_entropy(make_model, make_config, make_batches, valid, capsys):
    config = make_config()
    Trainer(make_model(), config, make_batches(config), valid).train()
    shown = capsys.readouterr().err
    assert "6/6" in shown
    assert "tokens/s, load entropy" in shown
