"""Ahead-of-time compilation: the kernels' examples pass, and planted faults are all found. In processes of their own,
as Triton only compiles where TRITON_INTERPRET was never set."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")
FAULTS = {
    "spills": "spills",
    "shared_memory": "384.0 KiB of shared memory, but there are 227.0 KiB",
    "tensor_memory": "1024 columns of tensor memory, but there are 512",
    "no_tensor_cores": "has no tcgen05.mma",
    "no_dot": "multiplies nothing by tl.dot",
    "no_launch": "no example launches multiplies",
    "does_not_compile": "arange's range must be a power of 2",
}


def _compile(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-m", "coterie_kernels.proof", "compile", "--workers", "1", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_every_kernel_compiles_for_every_target(tmp_path):
    done = _compile("--quick", "--json", tmp_path / "figures.json")
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {figure["target"] for figure in figures} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {"forward_kernel", "_multiply_rows", "_place"} <= {figure["kernel"].split(".")[1] for figure in figures}
    for figure in figures:
        assert 0 < figure["registers"] <= (512 if figure["target"] == "gfx942" else 255)
        assert figure["spilled"] == figure["stack"] == 0
        assert 0 < figure["warps"] <= 64
        assert figure["tensor_memory"] == 0 or figure["target"] == "sm_100"
        assert not figure["multiplies"] or sum(figure["instructions"].values()) > 0


def test_every_planted_fault_is_found():
    done = _compile("--catalog", "faulty_kernels", "--target", "sm_100")
    assert done.returncode == 1, done.stdout + done.stderr
    faults = done.stdout.split("faults\n")[1].splitlines()
    for name, fault in FAULTS.items():
        assert any(name in line and fault in line for line in faults), (name, faults)
    assert any("tensor_memory" in line and "traps" in line for line in faults)


def test_unknown_entries_are_told():
    done = _compile("--entry", "attention")
    assert done.returncode == 1
    assert "no entry attention in the catalog: sort, routing" in done.stderr
