"""What every test shares: a fixed seed, and fresh memory full of NaN so that an unwritten output is seen."""

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
