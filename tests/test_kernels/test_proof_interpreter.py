"""The interpreter's half of the proof chain: counts equal what a hand computes, and each planted fault is found."""

import os
import subprocess
import sys

import pytest
import torch
import toy_kernels as toys
from toy_kernels import launch_add, launch_matmul
from triton.runtime import interpreter

from coterie_kernels.proof.catalog import CATALOG, Entry, Example
from coterie_kernels.proof.check import Check, check_example
from coterie_kernels.proof.count import TensorInfo, record
from coterie_kernels.proof.interpreter import Observer, shuffled_grid, watched
from coterie_kernels.proof.sanitize import sanitize


def _failures(run):
    return check_example(Example("planted", run))


class _Raises(Observer):
    def access(self, access):
        raise ValueError("planted")


def test_counts_of_a_sum():
    """37 float32: 148 bytes in five sectors of 32, by three programs of 16."""
    with record() as counted:
        launch_add(toys.add)
    (launch,) = counted.launches
    assert (launch.kernel, launch.grid) == ("add", (3, 1, 1))
    vector = TensorInfo(torch.float32, (37,), True, 148)
    assert launch.arguments == {**dict.fromkeys(("x_ptr", "y_ptr", "out_ptr"), vector), "size": 37, "BLOCK": 16}
    assert (launch.module, launch.options) == ("toy_kernels", {"num_warps": 1})
    cost = counted.total
    assert (cost.launches, cost.programs, cost.flops) == (1, 3, 0)
    assert (cost.requested_load, cost.requested_store) == (2 * 148, 148)
    assert (cost.distinct_load, cost.distinct_store) == (2 * 5 * 32, 5 * 32)
    assert (cost.requested, cost.distinct) == (3 * 148, 3 * 160)


def test_counts_of_a_product():
    """[21, 19] gathered of [42, 19] by [33, 19]ᵀ, in tiles of 16: two by three programs of two steps each."""
    rows, dim, outer = 21, 19, 33
    with record() as counted:
        for _ in range(2):
            launch_matmul(rows, dim, outer, torch.bfloat16, tile=(16, 16, 16))
    cost = counted.launches[0].cost
    assert cost.flops == 2 * 3 * 2 * (2 * 16**3)
    # Each row of x for every tile of columns, each of the weight for every tile of rows, int64 ids with the former.
    assert cost.requested_load == 3 * rows * dim * 2 + 2 * outer * dim * 2 + 3 * rows * 8
    assert cost.requested_store == rows * outer * 2
    generator = torch.Generator().manual_seed(0)
    torch.randn(2 * rows, dim, generator=generator), torch.randn(outer, dim, generator=generator)
    source = torch.randint(2 * rows, (rows,), generator=generator).tolist()
    sectors = {byte // 32 for row in source for byte in range(row * dim * 2, (row + 1) * dim * 2)}
    assert cost.distinct_load == 32 * (len(sectors) + -(-outer * dim * 2 // 32) + -(-rows * 8 // 32))
    assert cost.distinct_store == 32 * -(-rows * outer * 2 // 32)
    assert counted.by_kernel() == {"gathered_matmul": cost + cost}


@pytest.mark.parametrize(
    ("kernel", "rule", "argument", "line"),
    [
        ("add_without_mask", "outside of its tensor", "out_ptr[37] and 10 more", "tl.store(out_ptr + at, x + y)"),
        ("add_twice", "two programs store to it", "out_ptr[15] and 1 more", "tl.store"),
        ("add_running", "loads what another program stores", "out_ptr[15] and 1 more", "x += tl.load"),
        ("add_and_reload", "loads what it stored, with no barrier", "out_ptr[0] and 36 more", "x = tl.load(out_ptr"),
        ("add_atomically", "an atomic on floating-point numbers", "out_ptr[0] and 36 more", "tl.atomic_add"),
        ("add_in_half_the_places", "two values for it in one store", "out_ptr[0] and 17 more", "at // 2 * 2"),
    ],
)
def test_a_planted_fault_is_found(kernel, rule, argument, line):
    found = _failures(lambda: launch_add(getattr(toys, kernel)))
    (said,) = [text for text in found if rule in text and argument in text]
    assert said.startswith(f"{kernel} (toy_kernels.py:")
    with open(toys.__file__) as source:
        assert line in source.readlines()[int(said.partition(":")[2].partition(")")[0]) - 1]


def test_an_unwritten_result_is_found():
    (found,) = _failures(lambda: launch_add(toys.add_but_last))
    assert "an element that no one has written: result 0[36]" in found


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bool])
def test_unwritten_memory_is_seen_whatever_it_holds(dtype):
    """By the next launch and by torch's operations; what torch writes is written."""
    fresh = lambda: torch.empty(37, dtype=dtype)  # noqa: E731
    launch = lambda x, y: toys.add[(3,)](x, y, torch.empty(37, dtype=dtype), 37, BLOCK=16)  # noqa: E731
    with sanitize() as sanitizer:
        launch(fresh().zero_(), torch.zeros(37, dtype=dtype))
        x = fresh()
        x[:5] = 1
        x[6:].copy_(torch.ones(31, dtype=dtype))
        assert not sanitizer.findings
        launch(x, x)
        assert [str(finding).partition(": ")[2] for finding in sanitizer.findings] == [
            "an element that no one has written: x_ptr[5]",
            "an element that no one has written: x_ptr[5]",
        ]
        x.sum()
        assert str(sanitizer.findings[-1]) == "sum (torch), program 0: torch reads what no one has written: self[5]"


def test_a_lane_masked_out_is_not_used():
    assert _failures(lambda: launch_add(toys.add_masked_lanes)) == [
        "results use lanes that a load masked out without naming a value"
    ]


def test_a_pointer_stays_in_the_tensor_that_it_was_made_of():
    """Its neighbour in memory is another argument; a column of a matrix does not own what lies between."""

    def neighbours():
        memory = torch.zeros(80)
        x, out = memory[:32], memory[32:]
        toys.add_without_mask[(3,)](x, torch.zeros(48), out, 48, BLOCK=16, num_warps=1)
        return [out]

    (found,) = _failures(neighbours)
    assert "outside of its tensor: x_ptr[32] and 15 more" in found

    def column():
        out = torch.empty(16)
        toys.add[(1,)](torch.zeros(8, 2)[:, 0], torch.zeros(16), out, 15, BLOCK=16, num_warps=1)
        return [out[:15]]

    (found,) = _failures(column)
    assert "outside of its tensor: x_ptr[1] and 6 more" in found


def test_what_is_right_is_left_alone():
    assert not _failures(lambda: launch_add(toys.add))
    assert not _failures(lambda: launch_add(toys.add_and_wait))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert not _failures(lambda dtype=dtype: launch_matmul(21, 19, 33, dtype, tile=(16, 16, 16)))


def test_watching_changes_no_result():
    plain = launch_matmul(21, 19, 33, torch.bfloat16, tile=(16, 16, 16))[0]
    with record():
        assert torch.equal(launch_matmul(21, 19, 33, torch.bfloat16, tile=(16, 16, 16))[0], plain)
    with sanitize():
        assert torch.equal(launch_matmul(21, 19, 33, torch.bfloat16, tile=(16, 16, 16))[0], plain)


def test_a_shuffled_grid_runs_each_program_once_and_shows_who_depends_on_order():
    (plain,), (running,) = launch_add(toys.add), launch_add(toys.add_running)
    orders = []

    class Watcher(Observer):
        def access(self, access):
            if access.kind == "store":
                orders[-1].append(access.program)

    differ = 0
    for seed in range(4):
        orders.append([])
        with shuffled_grid(seed), watched(Watcher()):
            assert torch.equal(launch_add(toys.add)[0], plain)
        with shuffled_grid(seed):
            differ += not torch.equal(launch_add(toys.add_running)[0], running)
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    assert len(set(map(tuple, orders))) > 1
    assert differ


def test_the_interpreter_is_left_as_it_was():
    before = {name: getattr(interpreter.InterpreterBuilder, name) for name in dir(interpreter.InterpreterBuilder)}
    call, convert = interpreter.GridExecutor.__call__, interpreter._implicit_cvt
    with sanitize(), shuffled_grid(0):
        assert interpreter.InterpreterBuilder.create_masked_load is not before["create_masked_load"]
    with pytest.raises(interpreter.InterpreterError, match="planted"), watched(_Raises()):
        launch_add(toys.add)
    assert before == {name: getattr(interpreter.InterpreterBuilder, name) for name in before}
    assert (call, convert) == (interpreter.GridExecutor.__call__, interpreter._implicit_cvt)


def test_without_the_interpreter_there_is_nothing_to_watch():
    code = "from coterie_kernels.proof.count import record\nwith record(): pass"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "RuntimeError: kernels are interpreted only where TRITON_INTERPRET=1 is set" in done.stderr


@pytest.mark.parametrize("entry", CATALOG, ids=lambda entry: entry.name)
def test_the_catalogs_kernels(entry):
    """Some examples of each; `python -m coterie_kernels.proof check` goes through all."""
    examples = list(entry.small())
    for example in examples[:: max(len(examples) // 3, 1)]:
        assert not check_example(example), example.label


def test_the_command_counts_what_is_wrong(monkeypatch, capsys):
    wrong = [Example("right", lambda: launch_add(toys.add)), Example("wrong", lambda: launch_add(toys.add_twice))]
    monkeypatch.setattr(toys, "CATALOG", (*toys.CATALOG, Entry("planted", lambda: iter(wrong), lambda *_: iter(()))))
    assert Check(catalog="toy_kernels").run() == 1
    assert "4 examples by Triton" in (said := capsys.readouterr().out)
    assert "1 failures\nplanted, wrong: add_twice (toy_kernels.py:" in said
    assert Check(entry=("toys",), catalog="toy_kernels").run() == 0
    with pytest.raises(SystemExit, match="no entry nothing in the catalog: toys, planted"):
        Check(entry=("nothing",), catalog="toy_kernels").run()
