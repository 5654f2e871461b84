"""What may import what, read from the syntax; and what `import coterie` costs, measured in fresh processes."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALL = {"ops", "modules", "models", "training", "interop", "report", "cli", "coterie_kernels"}
# A package and those it may import, its own included. Kernels are imported inside functions only.
MAY_IMPORT = {
    "coterie_kernels": {"coterie_kernels"},
    "ops": {"ops", "coterie_kernels"},
    "modules": {"ops", "modules"},
    "models": {"ops", "modules", "models"},
    "training": {"ops", "modules", "models", "training"},
    "report": {"ops", "modules", "models", "report"},
    "interop": {"ops", "modules", "models", "report", "interop"},
    "coterie": {"ops", "modules", "models"},
    "cli": ALL,
}
# Never at the top of a file: optional, slow, or of one platform.
LAZY = {"triton", "coterie_kernels", "matplotlib", "transformers", "huggingface_hub", "peft", "accelerate", "tyro"}
LAZY |= {"tensorboard", "torch._dynamo", "gguf", "llama_cpp", "onnx", "onnxscript", "onnxruntime", "tokenizers"}
# But in the one file that is about it, and is itself imported when it is needed.
ITS_OWN_FILE = {"cli_options.py": "tyro", "hf_model.py": "transformers"}
FILES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def _package(path: Path) -> str:
    """Of which package in MAY_IMPORT a file is."""
    parts = path.relative_to(ROOT).parts[1:]
    if parts[0] == "coterie_kernels":
        return "coterie_kernels"
    name = parts[1].removesuffix(".py")
    if name.startswith("cli") or name == "__main__":
        return "cli"
    return "coterie" if name == "__init__" else name


def _imports(path: Path) -> list[tuple[str, bool]]:
    """(dotted name, whether at the top of the file) of every import; `from a import b` gives a and a.b."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    lazy = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: relative imports hide where a name lives"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found += [(name, node not in lazy and not _is_type_checking(tree, node)) for name in names]
    return found


def _is_type_checking(tree: ast.Module, node: ast.stmt) -> bool:
    return any(
        isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING") and node in ast.walk(block)
        for block in tree.body
    )


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_run_one_way(path):
    package = _package(path)
    assert package in MAY_IMPORT, f"give {package} a place in MAY_IMPORT"
    for name, at_top in _imports(path):
        parts = name.split(".")
        if parts[0] == "coterie" and len(parts) > 1 and parts[1] in ALL:
            assert parts[1] in MAY_IMPORT[package], f"{package} may not import {name}"
        elif parts[0] == "coterie" and len(parts) == 1 and package not in ("coterie", "cli"):
            pytest.fail(f"{package} imports the package itself, which is above it: name the module")
        elif parts[0] == "coterie_kernels":
            assert "coterie_kernels" in MAY_IMPORT[package], f"{package} may not import {name}"
        elif package == "coterie_kernels":
            # What proves kernels, and mends the interpreter, which computes in numpy, is no kernel.
            more = ("numpy", "tqdm", "tyro") if "proof" in path.parts or path.name == "_interpreter.py" else ()
            assert parts[0] in ("torch", "triton", *more, *sys.stdlib_module_names), (
                f"kernels need torch and triton, not {name}"
            )
        its_own = path.name in ITS_OWN_FILE and _within(name, ITS_OWN_FILE[path.name])
        if at_top and package != "coterie_kernels" and not its_own:
            assert not any(_within(name, lazy) for lazy in LAZY), f"import {name} inside the function that needs it"


def test_the_rule_sees_what_it_should(tmp_path, monkeypatch):
    """The reader itself: planted imports are found, and told apart by where they stand."""
    planted = tmp_path / "planted.py"
    planted.write_text(
        "import os.path\n"
        "from coterie.training import trainer\n"
        "if TYPE_CHECKING:\n    import matplotlib\n"
        "def f():\n    from coterie_kernels import x\n"
        "class C:\n    import tyro\n"
    )
    assert set(_imports(planted)) == {
        ("os.path", True),
        ("coterie.training", True),
        ("coterie.training.trainer", True),
        ("matplotlib", False),
        ("tyro", True),
        ("coterie_kernels", False),
        ("coterie_kernels.x", False),
    }
    assert _package(ROOT / "src/coterie/cli_options.py") == "cli"
    assert _package(ROOT / "src/coterie/__init__.py") == "coterie"
    assert _package(ROOT / "src/coterie/ops/routing.py") == "ops"
    assert _package(ROOT / "kernels/coterie_kernels/__init__.py") == "coterie_kernels"


PROBE = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import coterie
seconds = time.perf_counter() - start
print(json.dumps({"new": sorted(set(sys.modules) - before), "seconds": seconds}))
"""


@pytest.fixture(scope="module")
def probes():
    runs = [subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True) for _ in range(3)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    return [json.loads(run.stdout) for run in runs]


def test_import_loads_nothing_optional(probes):
    """Beyond what `import torch` has loaded by itself."""
    _loads_nothing_optional(probes[0]["new"])


@pytest.mark.parametrize("package", ["interop", "report", "training"])
def test_nor_do_the_packages_that_use_it(package):
    probe = PROBE.replace("import coterie\n", f"import coterie.{package}\n")
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _loads_nothing_optional(json.loads(done.stdout)["new"])


def _loads_nothing_optional(modules):
    for name in modules:
        assert not any(_within(name, lazy) for lazy in LAZY), f"the import loads {name}"


def test_import_takes_under_half_a_second_beyond_torch(probes):
    assert min(probe["seconds"] for probe in probes) < 0.5
