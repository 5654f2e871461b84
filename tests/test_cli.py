"""The commands end to end, on a model of a few thousand parameters."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from coterie.cli import main
from coterie.models import Transformer, TransformerConfig, attention_twin, generate, preset
from coterie.report import model_cost
from coterie.training import ByteTokenizer, Trainer, load_checkpoint, load_corpus

CONFIG = TransformerConfig(
    vocab_size=256, dim=16, num_layers=2, num_heads=2, num_experts=4, top_k=2, expert_hidden_dim=8, max_length=64
)
TINY_RUN = ["--steps=4", "--batch-size=2", "--length=16", "--eval-every=2", "--eval-batches=1", "--checkpoint-every=2"]
TINY_RUN += ["--precision=float32"]  # whatever the machine multiplies natively


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model's config and a text."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "small.json").write_text(json.dumps(CONFIG.to_dict()))
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    return folder


@pytest.fixture(scope="module")
def train(inputs):
    """Trains with the small model on the small text; further arguments are added."""

    def run(out, *more):
        small = ["--preset", f"{inputs}/small.json", "--data", f"{inputs}/text.txt"]
        return main(["train", *small, "--out", str(out), *TINY_RUN, *more])

    return run


@pytest.fixture(scope="module")
def compared(train, tmp_path_factory):
    """A finished comparison: (folder, what it printed)."""
    out = tmp_path_factory.mktemp("runs") / "compared"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert train(out, "--compare", "dense") == 0
    return out, printed.getvalue()


def complaint(capsys, out=""):
    """The one line on stderr; on stdout was nothing, or what matches `out`."""
    captured = capsys.readouterr()
    assert re.fullmatch(out, captured.out)
    assert captured.err.endswith("\n")
    (line,) = captured.err.splitlines()
    return line


def test_train_compare_writes_a_run_a_report_and_a_table(compared, inputs):
    out, printed = compared
    report = json.loads((out / "report.json").read_text())
    assert list(report["figures"]) == ["moe", "dense"]
    moe, dense = report["figures"].values()
    cost = model_cost(CONFIG, 16).total
    assert (moe["params"], moe["active_params"]) == (cost.params, cost.active_params)
    assert (moe["flops_per_token"], moe["saved_bytes_per_token"]) == (cost.flops, cost.saved_bytes)
    assert dense["params"] < moe["params"]
    assert moe["tokens"] == dense["tokens"] == report["equal_tokens"] == 4 * 2 * 16
    assert 0 < moe["load_entropy"] <= 1
    assert 4 < moe["valid_bpb_equal_tokens"] < 9
    table = {line[:32].strip(): line[32:].split() for line in printed.splitlines()[2:13]}
    assert table[""] == ["moe", "dense", "moe", ":", "dense"]
    assert table["bits per byte at equal tokens"][:2] == [
        f"{figures['valid_bpb_equal_tokens']:.3f}" for figures in (moe, dense)
    ]
    assert table["dead experts"] == [str(moe["dead_experts"]), "–"]
    assert (out / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for name in ("moe", "dense"):
        model = Transformer.from_pretrained(out / name)
        assert sum(p.numel() for p in model.parameters()) == report["figures"][name]["params"]
        assert len((out / name / "log.jsonl").read_text().splitlines()) == 5
    # The sample follows the beginning of the unseen text.
    unseen = load_corpus(inputs / "text.txt", "valid")[:48].tobytes().decode()
    _, _, sample = printed.partition(f"A sample, after {unseen!r}:\n\n")
    assert sample.startswith(unseen)
    assert len(sample) > len(unseen) + 50


def test_every_trained_model_has_a_card(compared, train, tmp_path):
    out, _ = compared
    for name in ("moe", "dense"):
        card = (out / name / "README.md").read_text("utf-8")
        total = model_cost(Transformer.from_pretrained(out / name).config, 16).total
        assert f"| parameters | {total.params:,} |" in card
        assert "| trained on | text.txt |" in card
        last = json.loads((out / name / "log.jsonl").read_text().splitlines()[-1])
        assert f"| bits per byte on unseen text | {last['valid_bpb']:.3f} |" in card
    for name in ("moe", "dense"):
        shutil.copytree(out / name, tmp_path / "old" / name)
    shutil.copy(out / "run.json", tmp_path / "old")
    (tmp_path / "old" / "dense" / "README.md").write_text("mine")
    assert train(tmp_path / "old", "--overwrite") == 0
    assert "| trained on |" in (tmp_path / "old" / "README.md").read_text("utf-8")
    assert not (tmp_path / "old" / "moe" / "README.md").exists()  # with the model that it described
    assert (tmp_path / "old" / "dense" / "README.md").read_text() == "mine"


def test_both_contenders_saw_the_same_batches(compared):
    out, _ = compared
    runs = [(out / name / "train.json").read_text() for name in ("moe", "dense")]
    assert runs[0] == runs[1]
    assert json.loads(runs[0])["warmup_steps"] == 0  # a fifth of four steps at most


def test_dense_params_twin_has_as_many_parameters(train, tmp_path, capsys):
    assert train(tmp_path / "run", "--compare", "dense-params", "--steps", "1") == 0
    figures = json.loads((tmp_path / "run" / "report.json").read_text())["figures"]
    router = CONFIG.num_layers * CONFIG.num_experts * CONFIG.dim
    assert figures["moe"]["params"] - figures["dense-params"]["params"] == router


def test_attention_twin_of_a_long_context(inputs, train, tmp_path, capsys):
    hybrid = replace(CONFIG, mixers=("linear_attention", "attention"), linear_head_dim=4)
    (tmp_path / "hybrid.json").write_text(json.dumps(hybrid.to_dict()))
    out = tmp_path / "run"
    text = inputs / "text.txt"
    (tmp_path / "long.txt").write_text(text.read_text() * 3)
    more = ["--preset", f"{tmp_path}/hybrid.json", "--data", f"{tmp_path}/long.txt", "--length=1024", "--steps=1"]
    assert train(out, "--compare", "attention", *more) == 0
    assert Transformer.from_pretrained(out / "hybrid").config == hybrid
    assert Transformer.from_pretrained(out / "attention").config == attention_twin(hybrid) == CONFIG
    printed = capsys.readouterr().out
    figures = json.loads((out / "report.json").read_text())["figures"]
    assert list(figures) == ["hybrid", "attention"]
    for name in figures:
        last = json.loads((out / name / "log.jsonl").read_text().splitlines()[-1])
        assert figures[name]["position_edges"] == last["position_edges"] == [0, 16, 32, 64, 128, 256, 512, 1024]
        assert figures[name]["position_bpb"] == last["position_bpb"]
    far = [f"{figures[name]['position_bpb'][-1]:.3f}" for name in figures]
    assert re.search(rf"512–1,023 +{far[0]} +{far[1]} +[+−]", printed)
    assert main(["train", "--resume", "--out", str(out), "--compare", "attention"]) == 0
    assert re.search(rf"512–1,023 +{far[0]} +{far[1]} +[+−]", capsys.readouterr().out)
    assert train(tmp_path / "none", "--compare", "attention") == 2
    assert "config must have a 'linear_attention', 'window_attention' or" in complaint(capsys)


@pytest.mark.parametrize(
    ("mixers", "compare", "name"),
    [
        (("linear_attention",), "attention", "linear"),
        (("sparse_attention",), "attention", "sparse"),
        (("sparse_attention", "attention"), "attention", "hybrid"),
        (("linear_attention",), "dense", "moe"),
    ],
)
def test_a_contender_is_named_by_what_its_twin_lacks(train, tmp_path, mixers, compare, name):
    (tmp_path / "model.json").write_text(json.dumps(replace(CONFIG, mixers=mixers).to_dict()))
    assert train(tmp_path / "run", "--preset", f"{tmp_path}/model.json", "--compare", compare, "--steps=1") == 0
    assert list(json.loads((tmp_path / "run" / "run.json").read_text())["models"]) == [name, compare]


def test_a_run_is_not_replaced_unless_asked(train, compared, tmp_path, capsys):
    out, _ = compared
    before = (out / "moe" / "model.safetensors").read_bytes()
    assert train(out) == 2
    line = complaint(capsys)
    assert line.startswith(f"coterie train: {out} holds a run already: give --resume")
    assert (out / "moe" / "model.safetensors").read_bytes() == before

    run = tmp_path / "run"
    assert train(run, "--compare", "dense") == 0
    (run / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert train(run, "--overwrite", "--seed", "1") == 0
    # The comparison's models are gone, what is not the run's has stayed.
    assert sorted(str(path.relative_to(run)) for path in run.rglob("model.safetensors")) == ["model.safetensors"]
    assert (run / "notes.txt").read_text() == "mine"
    assert "bits per byte on unseen text" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data", "tiny.txt"], "--length 16 must be less than the 9 train bytes of --data "),
        (["--data", "short.txt"], "--length 16 must be less than the 3 valid bytes of --data "),
        (["--length", "100000"], "--length 100000 must be less than the 17460 train bytes of --data "),
        (["--seed", str(2**63)], "error parsing --seed"),
        (["--preset", "groups.json"], "groups.json is not a model's config: router_group_score 'top2_sum' needs"),
        (["--preset", "huge.json"], "not enough memory: "),
        (["--device", "meta"], "--device meta is of no use here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_old_run_stays_until_the_new_one_is_possible(
    train, compared, inputs, tmp_path, capsys, monkeypatch, arguments, expected
):
    out = shutil.copytree(compared[0], tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("t" * 100)
    (tmp_path / "tiny.txt").write_text("t" * 10)
    groups = {"router_groups": 4, "router_top_groups": 2, "router_group_score": "top2_sum"}
    (tmp_path / "groups.json").write_text(json.dumps({**CONFIG.to_dict(), **groups}))
    huge = {"dim": 2**40, "head_dim": 8}  # an embedding of a pebibyte
    (tmp_path / "huge.json").write_text(json.dumps({**CONFIG.to_dict(), **huge}))

    def files():
        return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    before = files()
    assert train(out, "--overwrite", *arguments) == 2
    assert f"coterie train: {expected}" in complaint(capsys)
    assert files() == before


def test_an_interrupted_run_resumes_bit_for_bit(train, tmp_path, capsys, monkeypatch):
    assert train(tmp_path / "whole", "--compare", "dense") == 0
    capsys.readouterr()

    step = Trainer.step

    def interrupted(self):
        if self.current_step == 3:
            raise KeyboardInterrupt
        return step(self)

    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert train(out, "--compare", "dense") == 130
    begun = rf"moe and dense: 4 steps of 2 × 16 bytes, (float32|bf16) on (cpu|cuda:0), into {re.escape(str(out))}\n\n"
    assert complaint(capsys, begun) == (
        f"coterie train: interrupted; coterie train --resume --out {out} continues from the last checkpoint"
    )
    assert load_checkpoint(out / "moe" / "checkpoint.safetensors")[1]["step"] == 2

    assert main(["train", "--resume", "--out", str(out)]) == 0  # nothing else needs to be said
    for name in ("moe", "dense"):
        resumed, whole = (Transformer.from_pretrained(tmp_path / run / name).state_dict() for run in ("cut", "whole"))
        assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    assert (out / "report.png").exists()
    figures = [json.loads((tmp_path / run / "report.json").read_text())["figures"]["moe"] for run in ("cut", "whole")]
    assert figures[0]["valid_bpb_equal_tokens"] == figures[1]["valid_bpb_equal_tokens"]


def test_an_interrupt_before_the_first_checkpoint_says_so(train, tmp_path, capsys, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "step", interrupted)
    assert train(tmp_path / "run") == 130
    assert complaint(capsys, r"moe: 4 steps.*\n\n") == "coterie train: interrupted before the first checkpoint"


def test_resume_refuses_another_run(compared, tmp_path, capsys):
    out, _ = compared
    for arguments, expected in (
        (["--preset", "nano"], "--preset is nano, but the run in .* has small"),
        (["--compare", "dense-params"], "--compare is dense-params, but the run in .* has dense"),
        (["--data", "elsewhere"], "--data is .*elsewhere, but the run in .* has .*text.txt"),
        (["--lr", "1"], "is of another run: the training lr was 0.003, is 1.0 now"),
        (["--overwrite"], "--resume continues a run and --overwrite replaces it: give one of them"),
    ):
        assert main(["train", "--resume", "--out", str(out), *arguments]) == 2
        assert re.search(expected, complaint(capsys, r"(moe and dense: 4 steps.*\n\n)?"))
    assert main(["train", "--resume", "--out", f"{tmp_path}/none"]) == 2
    assert f"{tmp_path}/none holds no run to resume" in complaint(capsys)


def test_generate_streams_what_the_library_generates(compared, capsys):
    out, _ = compared
    sampling = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 3}
    flags = [word for name, value in sampling.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    arguments = ["--prompt", "the quïck", "--max-new-tokens", "40", *flags]
    assert main(["generate", str(out), *arguments]) == 0
    printed = capsys.readouterr().out
    tokenizer = ByteTokenizer()
    model = Transformer.from_pretrained(out / "moe").eval()
    ids = generate(model, tokenizer.encode("the quïck")[None], 40, stop=[0], **sampling)[0]
    assert printed == tokenizer.decode(ids[ids != 0]) + "\n"

    assert main(["generate", str(out / "dense"), *arguments]) == 0
    assert capsys.readouterr().out != printed


def test_sampling_without_a_seed_differs_every_time(compared, capsys):
    out, _ = compared
    texts = set()
    for _ in range(3):
        assert main(["generate", str(out), "--prompt", "a", "--max-new-tokens", "30"]) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 3


def test_a_text_that_is_too_short_leaves_no_run_behind(inputs, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("too short for a batch")
    small = ["train", "--preset", f"{inputs}/small.json", "--out", f"{tmp_path}/run", *TINY_RUN]
    assert main([*small, "--data", f"{tmp_path}/short.txt"]) == 2
    assert complaint(capsys) == (
        f"coterie train: --length 16 must be less than the 1 valid bytes of --data {tmp_path}/short.txt"
    )
    assert main([*small, "--data", f"{inputs}/text.txt"]) == 0


def test_a_model_of_any_vocabulary_is_trained_on_bytes(tmp_path, inputs, capsys):
    (tmp_path / "words.json").write_text(json.dumps({**CONFIG.to_dict(), "vocab_size": 1000}))
    out = tmp_path / "run"
    arguments = ["--preset", f"{tmp_path}/words.json", "--data", f"{inputs}/text.txt", "--out", str(out), *TINY_RUN]
    assert main(["train", *arguments]) == 0
    assert Transformer.from_pretrained(out).config == CONFIG
    # A model of another vocabulary, trained elsewhere, cannot be asked for text.
    Transformer(replace(CONFIG, vocab_size=1000)).save_pretrained(tmp_path / "other")
    capsys.readouterr()
    assert main(["generate", f"{tmp_path}/other", "--prompt", "a"]) == 2
    assert "the model has a vocabulary of 1000" in complaint(capsys)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"coterie \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_generate_from_nothing_begins_a_text(compared, capsys):
    out, _ = compared
    assert main(["generate", str(out), "--prompt", "", "--max-new-tokens", "5", "--temperature", "0"]) == 0
    assert len(capsys.readouterr().out) > 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of transformers
def test_export_writes_and_verifies_every_format(compared, tmp_path, capsys):
    out, _ = compared
    for name, file, package in (("hf", "hf", "transformers"), ("gguf", "model.gguf", "gguf"), ("onnx", "o", "onnx")):
        pytest.importorskip(package)
        path = out / "moe" / file if name != "onnx" else tmp_path / file
        arguments = ["export", str(out), "--format", name] + (["--out", str(path)] if name == "onnx" else [])
        assert main(arguments) == 0
        said = capsys.readouterr()
        first, second = said.out.splitlines()
        assert first == f"{path} is written, from {out / 'moe'}"
        assert second.startswith("verified: ")
        assert path.exists()
    assert (
        main(["export", f"{out}/dense", "--format", "gguf", "--dtype", "f16", "--out", f"{tmp_path}/dense.gguf"]) == 0
    )
    assert f"{tmp_path}/dense.gguf is written, from {out}/dense\n" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["dense.gguf", "o"]


def test_an_export_that_cannot_be_is_one_line(compared, tmp_path, capsys, monkeypatch):
    out, _ = compared
    onnx = ["export", str(out), "--format", "onnx"]
    assert main([*onnx, "--dtype", "f16"]) == 2
    assert complaint(capsys) == "coterie export: --dtype is of --format gguf only, got --format onnx"
    assert main(["export", str(out), "--format", "hf", "--out", f"{out}/moe"]) == 2
    assert f"{out}/moe holds a coterie model, which would be overwritten" in complaint(capsys)
    assert main([*onnx, "--out", f"{out}/moe/model.safetensors"]) == 2
    assert (
        complaint(capsys)
        == f"coterie export: --out {out}/moe/model.safetensors has the name of a run's own file: give another"
    )
    Transformer(replace(CONFIG, activation="relu2")).save_pretrained(tmp_path / "relu2")
    for name in ("hf", "gguf"):
        pytest.importorskip({"hf": "transformers"}.get(name, name))
        assert main(["export", f"{tmp_path}/relu2", "--format", name]) == 2
        assert "has none of its activation = 'relu2'" in complaint(capsys)
    assert sorted(os.listdir(tmp_path / "relu2")) == ["config.json", "model.safetensors"]
    for package in ("transformers", "gguf", "onnx"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            name, extra = {"transformers": ("hf", "hf")}.get(package, (package, "export"))
            assert main(["export", str(out), "--format", name]) == 2
        assert complaint(capsys).startswith(f"coterie export: {package} is needed: pip install 'coterie[{extra}]'")


def test_an_export_that_is_not_verified_is_one_line_and_exit_code_1(compared, tmp_path, capsys, monkeypatch):
    pytest.importorskip("gguf")
    from coterie.interop import gguf_export

    def wrong(*arguments):
        raise gguf_export.VerificationError("token_embd.weight is not read back as it was written")

    monkeypatch.setattr(gguf_export, "_check_tensors", wrong)
    assert main(["export", str(compared[0]), "--format", "gguf", "--out", f"{tmp_path}/model.gguf"]) == 1
    assert complaint(capsys) == "coterie export: token_embd.weight is not read back as it was written"
    assert os.listdir(tmp_path) == []


def test_a_hybrid_trains_generates_and_says_what_cannot_be_exported(inputs, tmp_path, capsys):
    out = tmp_path / "run"
    data = ["--data", f"{inputs}/text.txt"]
    assert main(["train", "--preset", "tiny-hybrid", *data, "--out", str(out), *TINY_RUN]) == 0
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert all(0 < line["loss"] < 20 for line in log if "loss" in line)
    capsys.readouterr()
    assert main(["generate", str(out), "--prompt", "the ", "--max-new-tokens", "5", "--temperature", "0"]) == 0
    assert Transformer.from_pretrained(out).config.mixers == preset("tiny-hybrid").mixers
    for form in ("onnx", "gguf"):
        assert main(["export", str(out), "--format", form, "--out", str(tmp_path / form)]) == 2
        assert re.search("equivalent of this model.* mixers = .*linear_attention", capsys.readouterr().err)
        assert not (tmp_path / form).exists()


def test_inspect_a_preset(capsys):
    assert main(["inspect", "tiny", "--length", "100"]) == 0
    printed = capsys.readouterr().out
    config, cost = preset("tiny"), model_cost(preset("tiny"), 100)
    assert printed.startswith(f"tiny: {config.num_layers} layers of width {config.dim}, vocabulary 256")
    assert f"moe × {config.num_layers}" in printed
    assert "at length 100 in float32" in printed
    assert main(["inspect", "tiny", "--length", "100", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)["tiny"]
    assert values["total"] == json.loads(json.dumps(cost.to_dict()))["total"]
    assert values["config"] == config.to_dict()
    assert main(["inspect", "tiny", "--dtype", "bfloat16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tiny"]["total"]["weight_bytes"] * 2 == values["total"]["weight_bytes"]


def test_inspect_a_run_shows_all_its_models(compared, capsys):
    out, _ = compared
    assert main(["inspect", str(out), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert list(values) == [str(out / "moe"), str(out / "dense")]
    assert values[str(out / "moe")]["total"] == model_cost(CONFIG).to_dict()["total"]
    assert values[str(out / "dense")]["break_even"] is None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", "coterie: no command, must be one of train, generate, export, inspect, tune (see coterie --help)"),
        ("trian", "coterie: unknown command 'trian', did you mean 'train'?"),
        (
            "fly",
            "coterie: unknown command 'fly', must be one of train, generate, export, inspect, tune "
            "(see coterie --help)",
        ),
        (
            "train --stps 3",
            "coterie train: unrecognized options: --stps, 3; did you mean --steps? (see coterie train --help)",
        ),
        (
            "train --steps many",
            "coterie train: error parsing --steps: got 'many', must be a whole number below 2**63 "
            "(see coterie train --help)",
        ),
        ("train --steps", "coterie train: missing value for argument '--steps' (see coterie train --help)"),
        (
            "train --compare sparse",
            "coterie train: error parsing --compare: got 'sparse', must be one of dense, dense-params, attention "
            "(see coterie train --help)",
        ),
        (
            "generate",
            "coterie generate: missing from coterie generate: RUN --prompt TEXT (see coterie generate --help)",
        ),
        (
            "train --preset huge",
            "coterie train: --preset huge: must be tiny, nano, mini, tiny-hybrid, mini-hybrid, tiny-long, mini-long, "
            "full-long, or the path of a "
            "config.json",
        ),
        ("train --preset no.json", "coterie train: no file no.json"),
        ("train --data nowhere.txt", "coterie train: no text file or folder at {cwd}/nowhere.txt"),
        ("train --steps 0", "coterie train: steps: got 0, must be at least 1"),
        (
            "generate nowhere --prompt a",
            "coterie generate: no folder of a run at nowhere",
        ),
        ("generate . --prompt a", "coterie generate: . holds no model yet: no config.json in it or in a folder of it"),
        (
            "inspect nowhere",
            "coterie inspect: nowhere is neither a preset (tiny, nano, mini, tiny-hybrid, mini-hybrid, tiny-long, "
            "mini-long, full-long) nor ",
        ),
        (
            f"generate . --prompt a --max-new-tokens {10**24}",
            f"coterie generate: error parsing --max-new-tokens: got '{10**24}', must be a whole number below 2**63 "
            "(see coterie generate --help)",
        ),
        (
            f"inspect tiny --length {10**20}",
            f"coterie inspect: error parsing --length: got '{10**20}', must be a whole number below 2**63 "
            "(see coterie inspect --help)",
        ),
        (
            f"inspect tiny --length {2**63 - 1}",
            "coterie inspect: not enough memory: make --length smaller, or take a smaller model",
        ),
        (
            f"train --seed {10**20}",
            f"coterie train: error parsing --seed: got '{10**20}', must be a whole number below 2**63 "
            "(see coterie train --help)",
        ),
        ("train --seed -1", "coterie train: seed: got -1, must be at least 0"),
        ("train --lr nan", "coterie train: lr must be finite, got nan"),
        ("train --device meta", "coterie train: --device meta is of no use here: "),
        ("train --device hpu", "coterie train: --device hpu is of no use here: "),
        ("train --device abacus", "coterie train: --device abacus is of no use here: "),
        ("tune tiny", "coterie tune: tiles are measured on a GPU, and there is none here"),
        ("inspect tiny --length 0", "coterie inspect: length must be at least 1, got 0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 2
    line, expected = complaint(capsys), expected.replace("{cwd}", str(tmp_path))
    assert line.startswith(expected) if expected.endswith(" ") else line == expected
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_one_line_and_exit_code_2(train, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(run) == 0
    capsys.readouterr()
    for name, arguments in (
        ("checkpoint.safetensors", ["train", "--resume", "--out", str(run)]),
        ("model.safetensors", ["generate", str(run), "--prompt", "a"]),
        ("config.json", ["inspect", str(run)]),
        ("run.json", ["train", "--resume", "--out", str(run)]),
    ):
        data = (run / name).read_bytes()
        (run / name).write_bytes(data[: len(data) // 2])
        assert main(arguments) == 2
        assert f"{run}/{name}" in complaint(capsys, r"(moe: 4 steps.*\n\n)?")
        (run / name).write_bytes(data)


def test_a_deeply_nested_file_is_one_line_and_exit_code_2(inputs, tmp_path, capsys):
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    for arguments in (["inspect", str(deep)], ["train", "--preset", str(deep), "--out", f"{tmp_path}/run"]):
        assert main(arguments) == 2
        assert f"{deep} is not a model's config: " in complaint(capsys)
    assert list(tmp_path.iterdir()) == [deep]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ({"training": {"steps": "x"}}, "steps must be int, got 'x'"),
        ({"training": {"betas": 3}}, "betas must be a sequence of float, got 3"),
        ({"training": {"stpes": 3}}, "unknown training field 'stpes'"),
        ({"training": 3}, "training must be an object, got 3"),
        ({"models": ["x"]}, "models must be an object, got ['x']"),
        ({"models": {}}, "models must be one or more, got none"),
        ({"models": {"../moe": CONFIG.to_dict()}}, "models: got the name '../moe', which names a folder: "),
        ({"models": {"moe": 3}}, "a config must be a JSON object of fields, got int"),
        ({"preset": None}, "preset must be a string, got None"),
        ({"data": 3}, "data must be a string, got 3"),
        ("[" * 100_000, "maximum recursion depth exceeded"),
        ("3", "compare, data, models, preset, training missing"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_damaged_plan_is_one_line_and_exit_code_2(compared, tmp_path, capsys, damage, expected):
    whole = json.loads((compared[0] / "run.json").read_text())
    (tmp_path / "run.json").write_text(damage if isinstance(damage, str) else json.dumps({**whole, **damage}))
    assert main(["train", "--resume", "--out", str(tmp_path)]) == 2
    assert complaint(capsys).startswith(f"coterie train: {tmp_path}/run.json is not a run's file: {expected}")


def test_a_damaged_plan_still_says_that_there_is_a_run(train, compared, tmp_path, capsys):
    out = shutil.copytree(compared[0], tmp_path / "run")
    (out / "run.json").write_text("{")
    assert train(out) == 2
    assert f"{out} holds a run already" in complaint(capsys)
    assert (out / "run.json").read_text() == "{"
    assert (out / "report.json").exists()


def test_a_damaged_log_is_one_line_and_exit_code_2(train, tmp_path, capsys):
    assert train(tmp_path) == 0
    capsys.readouterr()
    log = tmp_path / "log.jsonl"
    log.write_text("3\n" + log.read_text())
    assert main(["train", "--resume", "--out", str(tmp_path)]) == 2
    assert f"{log} is damaged in line 1, before step 4 to resume" in complaint(capsys, r"moe: 4 steps.*\n\n")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_lack_of_memory_is_one_line_and_exit_code_2(train, tmp_path, capsys, monkeypatch, error):
    def greedy(self):
        raise error

    monkeypatch.setattr(Trainer, "step", greedy)
    assert train(tmp_path / "run") == 2
    assert complaint(capsys, r"moe: 4 steps.*\n\n") == (
        "coterie train: not enough memory: make --batch-size or --length smaller or --accumulation larger, "
        "or take a smaller --preset"
    )


def test_any_other_runtime_error_is_ours_and_shows_where(train, tmp_path, monkeypatch):
    def broken(self):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Trainer, "step", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        train(tmp_path / "run")


def test_generate_says_what_it_has_no_memory_for(compared, capsys):
    for many in (10**15, 2**63 - 2):
        assert main(["generate", str(compared[0]), "--prompt", "a", "--max-new-tokens", str(many)]) == 2
        assert complaint(capsys) == (
            "coterie generate: not enough memory: make --max-new-tokens smaller, the prompt shorter, "
            "or take a smaller model"
        )


def test_generate_at_a_temperature_next_to_zero_takes_the_likeliest(compared, capsys):
    printed = []
    for temperature in ("0", "1e-40", "1e-300"):
        arguments = ["--prompt", "the", "--max-new-tokens", "8", "--temperature", temperature]
        assert main(["generate", str(compared[0]), *arguments]) == 0
        printed.append(capsys.readouterr().out)
    assert len(set(printed)) == 1


def test_a_diverged_run_is_one_line_and_exit_code_1(train, tmp_path, capsys, monkeypatch):
    def diverged(self):
        raise FloatingPointError("step 3: the loss is nan")

    monkeypatch.setattr(Trainer, "step", diverged)
    assert train(tmp_path / "run") == 1
    assert complaint(capsys, r"moe: 4 steps.*\n\n") == "coterie train: step 3: the loss is nan"


def test_without_matplotlib_the_picture_is_skipped(train, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert train(tmp_path / "run") == 0
    printed = capsys.readouterr().out
    assert "no picture: plots need matplotlib: pip install 'coterie[plot]'" in printed
    assert (tmp_path / "run" / "report.json").exists()
    assert not (tmp_path / "run" / "report.png").exists()


@pytest.mark.parametrize("command", [[], ["train"], ["generate"], ["export"], ["inspect"], ["tune"]])
def test_help_names_every_option(command, capsys):
    assert main([*command, "--help"]) == 0
    printed = capsys.readouterr().out
    expected = {
        (): ["train", "generate", "export", "inspect", "tune"],
        ("train",): [
            "--preset NAME",
            "--compare {dense,dense-params,attention}",
            "--steps INT",
            "--resume",
            "(default: tiny)",
        ],
        ("generate",): ["RUN", "--prompt TEXT", "--max-new-tokens INT", "--top-p FLOAT", "(default: 200)"],
        ("export",): ["RUN", "--format {hf,gguf,onnx}", "--out PATH", "--dtype {f32,f16,bf16,q8_0}"],
        ("inspect",): ["PRESET|RUN", "--length INT", "--json"],
        ("tune",): ["PRESET|RUN", "--dtype {float16,bfloat16,float32}", "--out FILE", "(default: tiles.json)"],
    }[tuple(command)]
    assert [text for text in expected if text not in printed] == []


def test_ctrl_c_on_the_program_itself(inputs, tmp_path):
    out = tmp_path / "run"
    program = [sys.executable, "-m", "coterie", "train", "--preset", f"{inputs}/small.json", "--out", str(out)]
    program += ["--data", f"{inputs}/text.txt", *TINY_RUN, "--steps", "1000000"]
    with subprocess.Popen(
        program,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 180
        while not (out / "model.safetensors").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        assert (out / "model.safetensors").exists()
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed.startswith("moe: 1000000 steps of 2 × 16 bytes")
    assert len(printed.splitlines()) == 2
    how = f"coterie train --resume --out {out} continues from the last checkpoint"
    assert errors == f"coterie train: interrupted; {how}\n"
    assert load_checkpoint(out / "checkpoint.safetensors")[1]["step"] >= 2


def test_the_command_line_imports_little_until_it_runs():
    code = (
        "import sys, coterie.cli; "
        "print(sorted({'tyro', 'matplotlib', 'transformers', 'coterie.training', 'coterie.report'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
