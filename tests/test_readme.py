"""Everything the README shows is run: its Python blocks, its commands (cut short), its links to files; and examples."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    lines = "".join(blocks("bash")).splitlines()
    return [line.split("  #")[0].split(" #")[0].strip() for line in lines if line.strip()]


def run(*arguments: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    exec(compile(block, "README.md", "exec"), {})


def test_the_two_commands_come_first_and_exist():
    assert commands()[:2] == ["make demo", "make test"]
    demo = run("make", "-n", "demo")
    assert "coterie train --preset tiny --compare dense --out runs/demo" in demo
    assert "-m pytest" in run("make", "-n", "test")


def test_coterie_commands_run(tmp_path):
    """In the order of the README; training is cut to a few small steps."""
    ran = 0
    for command in commands():
        if not command.startswith("coterie "):
            continue
        short = {
            "train": "--steps 3 --batch-size 2 --length 32 --eval-batches 1",
            "generate": "--max-new-tokens 4",
            "export": "",
            "inspect": "",
        }[command.split()[1]]
        printed = run(sys.executable, "-m", *shlex.split(f"{command} {short}"), cwd=tmp_path)
        assert printed.strip()
        ran += 1
    assert ran >= 3


def test_benchmark_commands_parse():
    named = re.findall(r"`python (benchmarks/\w+\.py)[^`]*`", README)
    assert named
    for script in named:
        assert "usage" in run(sys.executable, script, "--help")


def test_files_named_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_names_in_the_table_are_public():
    import coterie

    table = README.split("## One name for one mechanism")[1].split("##")[0]
    names = re.findall(
        r"`(\w+)`", "\n".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    )
    assert len(names) > 12
    for name in names:
        assert name in coterie.__all__, name


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_run(example):
    assert len(run(sys.executable, str(example)).splitlines()) >= 5


def test_nothing_names_a_machine():
    """Files speak of the project alone: no absolute paths of whoever wrote them."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".txt", ".json"} and path.exists() and path != Path(__file__):
            assert not re.search(r"/(root|home|Users|work)/", path.read_text(encoding="utf-8")), name
