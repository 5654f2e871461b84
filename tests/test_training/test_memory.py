import subprocess
import sys

import pytest

from coterie.training.memory import keep_freed_memory

FAULTS = """
import resource
import sys

import torch
from coterie.training.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB: 16384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

took_effect = sys.argv[1] == "kept" and keep_freed_memory()
settled = [faults() for _ in range(8)][4:]  # the first few find their place in the heap
print(int(took_effect), *settled)
"""


def count_faults(how: str) -> tuple[int, list[int]]:
    said = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout
    took_effect, *faults = map(int, said.split())
    return took_effect, faults


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_used_again():
    """A buffer that takes a freed one's place touches no new page; by default it touches every one."""
    took_effect, faults = count_faults("kept")
    if not took_effect:
        pytest.skip("not glibc")
    assert max(faults) < 100
    assert min(count_faults("default")[1]) > 100


def test_does_nothing_where_there_is_no_glibc(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
