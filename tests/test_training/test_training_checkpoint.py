"""Checkpoints: exact, whole or absent, and never code."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from coterie.training import load_checkpoint, save_checkpoint

HARNESS = Path(__file__).with_name("kill_harness.py")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "checkpoint.safetensors"


def some_tensors():
    torch.manual_seed(0)
    shared = torch.randn(4, 6)
    return {
        "f32": torch.randn(3, 5),
        "f64": torch.randn(2).double(),
        "bf16": torch.randn(7).bfloat16(),
        "i64": torch.tensor([2**62, -1]),
        "u8": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "not contiguous": torch.randn(4, 6).T,
        "shared": shared,
        "its part": shared[1:3],
        "needs grad": torch.nn.Parameter(torch.randn(2)),
    }


def test_everything_comes_back_bit_for_bit(path):
    tensors = some_tensors()
    tensors["f32"][0, 0] = float("nan")
    state = {"step": 3, "tiny": 5e-324, "third": 1 / 3, "big": 2**80, "list": [1, None, {"σ": "é"}]}
    save_checkpoint(path, tensors, state)
    loaded, loaded_state = load_checkpoint(path)
    assert loaded_state == state
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(
            loaded[name].view(torch.uint8) if name == "f32" else loaded[name],
            tensor.view(torch.uint8) if name == "f32" else tensor,
        )
    others = load_file(path)  # the library's own reader agrees
    assert all(torch.equal(others[name], tensor) for name, tensor in loaded.items() if name != "f32")


def test_what_was_loaded_is_not_a_map_of_the_file(path):
    save_checkpoint(path, {"a": torch.ones(3)}, {})
    tensors, _ = load_checkpoint(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert tensors["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, -1, -100])
def test_a_file_that_is_cut_short_is_refused(path, size):
    save_checkpoint(path, some_tensors(), {"step": 1})
    data = path.read_bytes()
    path.write_bytes(data[:size])
    with pytest.raises(ValueError, match=r"is not a whole checkpoint") as raised:
        load_checkpoint(path)
    assert str(path) in str(raised.value)


def test_any_changed_bit_is_noticed(path):
    tensors = {"a": torch.randn(40), "b": torch.arange(10)}
    save_checkpoint(path, tensors, {"step": 1})
    data = path.read_bytes()
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << (position % 8)
        path.write_bytes(changed)
        try:
            loaded, state = load_checkpoint(path)
        except ValueError:
            continue
        # A blank of the header may become another blank.
        assert state == {"step": 1}
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_other_files_are_refused_and_never_executed(path, tmp_path):
    class Planted:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    path.parent.mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Planted()))
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        load_checkpoint(path)
    torch.save({"a": Planted()}, path)
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="not a training checkpoint: format None"):
        load_checkpoint(path)


def test_a_failed_save_leaves_the_old_one_and_nothing_else(path, monkeypatch):
    save_checkpoint(path, {"a": torch.ones(2)}, {"step": 1})

    def fail(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="no space"):
            save_checkpoint(path, {"a": torch.zeros(2)}, {"step": 2})
    with pytest.raises(TypeError, match="JSON"):
        save_checkpoint(path, {}, {"step": object()})
    with pytest.raises(TypeError, match=r"tensors: c is torch\.complex64"):
        save_checkpoint(path, {"c": torch.ones(1, dtype=torch.complex64)}, {})
    tensors, state = load_checkpoint(path)
    assert state == {"step": 1}
    assert tensors["a"].tolist() == [1, 1]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def run_harness(mode, folder):
    done = subprocess.run([sys.executable, HARNESS, mode, folder], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_sixty_kills_at_random_moments_leave_the_old_or_the_new_checkpoint(tmp_path):
    result = run_harness("checkpoint", tmp_path)
    assert result["failures"] == []
    assert result["kills"] >= 60
    assert result["changed"] >= 10  # the kills came while it saved, not before it began
    assert set(result["files"]) <= {"checkpoint.safetensors", ".checkpoint.tmp.safetensors"}


def test_the_same_kills_find_out_a_writer_that_is_not_atomic(tmp_path):
    result = run_harness("planted", tmp_path)
    assert len(result["failures"]) >= 3
    assert any("not loadable" in failure for failure in result["failures"])


def test_a_run_that_is_killed_again_and_again_is_the_run_that_never_was(tmp_path):
    result = run_harness("trainer", tmp_path)
    assert result["kills"] >= 5
    assert result["records"] == 61
    assert result["same_tensors"]
    assert result["same_state"]
    assert result["same_log"]
