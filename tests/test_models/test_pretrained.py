import json
import os
import pickle
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from coterie.models import Transformer
from coterie.models.pretrained import write_atomically


@pytest.fixture
def saved(small_model, tmp_path):
    for moe in small_model.moe_layers():
        moe.router.selection_bias.copy_(torch.randn(6))
    small_model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_bit_equal(small_config, tmp_path, dtype, tied):
    model = Transformer(replace(small_config, tie_embeddings=tied), dtype=dtype)
    model.save_pretrained(tmp_path / "new" / "folder")
    again = Transformer.from_pretrained(tmp_path / "new" / "folder")
    assert _same(model, again)
    assert again.config == model.config
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in again.parameters())
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)
    names = load_file(tmp_path / "new" / "folder" / "model.safetensors").keys()
    assert ("head.weight" in names) == (not tied)
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["config.json", "model.safetensors"]


def test_dtype_casts_parameters_and_leaves_the_selection_bias(saved, small_model):
    model = Transformer.from_pretrained(saved, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, small_model.get_parameter(name).bfloat16())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, small_model.get_buffer(name))


def test_training_a_loaded_model_leaves_the_file_alone(saved, small_model):
    model = Transformer.from_pretrained(saved)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert _same(Transformer.from_pretrained(saved), small_model)


def test_weights_of_other_tools_have_no_checksums_and_load(saved, small_model):
    save_file(dict(small_model.state_dict()), saved / "model.safetensors")
    assert _same(Transformer.from_pretrained(saved), small_model)


@pytest.mark.parametrize("kept", [0, 1, 7, 100, 0.3, 0.9, 0.999])
def test_truncated_weights(saved, kept):
    file = saved / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        Transformer.from_pretrained(saved)


def test_any_changed_byte_is_noticed(saved, small_model):
    """In the header it is no safetensors file, or no fit; in the data the checksum differs."""
    file = saved / "model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    places = torch.randint(header, len(content), (10,)).tolist() + torch.randint(0, header, (20,)).tolist()
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 0x55
        file.write_bytes(changed)
        if place >= header:
            with pytest.raises(ValueError, match=r"corrupted: \S+ differs from the checksum"):
                Transformer.from_pretrained(saved)
            continue
        try:  # a change of spaces or of other tools' metadata is harmless
            assert _same(Transformer.from_pretrained(saved), small_model)
        except ValueError as error:
            assert "model.safetensors" in str(error)  # noqa: PT017 (either outcome is right)


def test_mismatches_are_named(saved, small_model):
    state = dict(small_model.state_dict())
    state["layers.0.mixer.q_proj.weight"] = torch.zeros(3, 24)
    state["stranger"] = torch.zeros(2)
    del state["norm.weight"], state["embedding.weight"]
    save_file(state, saved / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit its config\.json") as error:
        Transformer.from_pretrained(saved)
    for part in (
        "missing embedding.weight, norm.weight",
        "unexpected stranger",
        "another shape layers.0.mixer.q_proj.weight ([3, 24], the config makes it [32, 24])",
    ):
        assert part in str(error.value)


def test_weights_of_another_config(saved, small_config):
    less = replace(small_config, num_layers=2, mixers=small_config.mixers[:2], attention_window=None)
    text = json.dumps(less.to_dict())
    (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"unexpected layers\.2\..* and \d+ more"):
        Transformer.from_pretrained(saved)


class _Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["protocol 0", "protocol 2", "protocol 5", "torch zip", "torch legacy", "any zip"])
def test_pickled_weights_are_refused_and_not_run(saved, tmp_path, kind):
    trap = tmp_path / "executed"
    file = saved / "model.safetensors"
    if kind.startswith("protocol"):
        file.write_bytes(pickle.dumps(_Malicious(trap), protocol=int(kind[-1])))
    elif kind == "any zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(_Malicious(trap)))
    else:
        torch.save({"x": _Malicious(trap)}, file, _use_new_zipfile_serialization=kind == "torch zip")
    with pytest.raises(ValueError, match=r"model\.safetensors is (pickled|not a whole safetensors file)"):
        Transformer.from_pretrained(saved)
    assert not trap.exists()


def test_a_folder_of_pickled_weights_alone(saved, tmp_path):
    trap = tmp_path / "executed"
    (saved / "model.safetensors").unlink()
    torch.save({"x": _Malicious(trap)}, saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no model\.safetensors \(pytorch_model\.bin is pickled"):
        Transformer.from_pretrained(saved)
    assert not trap.exists()


def test_missing_folder_and_files(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model folder at .*nowhere"):
        Transformer.from_pretrained(tmp_path / "nowhere")
    (saved / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        Transformer.from_pretrained(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "is not a coterie config"),
        (b"\xff\xfe\x00", "is not a coterie config"),
        (b"[1, 2]", "JSON object"),
        (b"[" * 100000, "is not a coterie config"),
        (b'{"hidden_size": 64}', "no field 'hidden_size'"),
        (b'{"vocab_size": 50, "dim": 24, "num_layers": 4, "num_heads": "four"}', "num_heads must be int"),
    ],
)
def test_a_config_that_is_none(saved, text, message):
    (saved / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        Transformer.from_pretrained(saved)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "weights.txt"
    file.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, fail)
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["weights.txt"]


@pytest.mark.skipif(os.name != "posix", reason="a limit stands for a full disk")
def test_a_full_disk_is_an_oserror_and_leaves_the_old_model(saved, small_model):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"model.safetensors cannot be written: .*large"):
            small_model.save_pretrained(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert _same(Transformer.from_pretrained(saved), small_model)
    assert sorted(os.listdir(saved)) == ["config.json", "model.safetensors"]


def test_a_killed_save_leaves_a_whole_model(saved, tmp_path):
    """The process dies between the write and the rename: the folder still loads as what it was."""
    script = (
        "import os, sys, torch\n"
        "from coterie.models import Transformer\n"
        "model = Transformer.from_pretrained(sys.argv[1])\n"
        "for parameter in model.parameters(): parameter.data.zero_()\n"
        "os.replace = lambda *_: os._exit(9)\n"
        "model.save_pretrained(sys.argv[1])\n"
    )
    before = Transformer.from_pretrained(saved)
    done = subprocess.run([sys.executable, "-c", script, str(saved)], capture_output=True, check=False)
    assert done.returncode == 9, done.stderr
    assert _same(Transformer.from_pretrained(saved), before)
    before.save_pretrained(saved)
    assert sorted(os.listdir(saved)) == ["config.json", "model.safetensors"]
