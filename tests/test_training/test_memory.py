import subprocess
import sys

import pytest

from coterie.training.memory import keep_freed_memory

FAULTS = """
import resource
import torch
from coterie.training.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB: 16384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

took_effect = keep_freed_memory()
faults()
print(int(took_effect), faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_used_again():
    """A buffer that takes a freed one's place touches no new page."""
    said = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    took_effect, faults = map(int, said.split())
    if not took_effect:
        pytest.skip("not glibc")
    assert faults < 100


def test_does_nothing_where_there_is_no_glibc(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
