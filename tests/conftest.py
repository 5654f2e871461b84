"""What every test shares: a fixed seed, and fresh memory full of NaN so that an unwritten output is seen."""

import os

# Before anything imports Triton: kernels run in its interpreter, on CPU tensors.
os.environ["TRITON_INTERPRET"] = "1"
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nan_filled_memory():
    """`torch.utils.deterministic.fill_uninitialized_memory` acts only with deterministic algorithms on."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
