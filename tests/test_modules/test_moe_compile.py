"""`MoE` under torch.compile: one graph, forward and backward, whatever the number of tokens."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from _check import relative_error
from coterie.modules import MoE, TopKRouter
from coterie.ops import balance_loss, z_loss

LENGTHS = [3, 7, 40, 300, 5]  # few rows and many


def _moe(kind):
    if kind == "plain":
        return MoE(8, 6, 4, 2)
    if kind == "triton":
        return MoE(8, 6, 4, 2, shared_hidden_dim=5, impl="triton")
    if kind == "recompute":
        return MoE(8, 6, 4, 2, recompute=True, activation="geglu")
    router = TopKRouter(
        8, 4, 2, score="sigmoid", num_groups=2, top_groups=1, group_score="top2_sum", bias=True, selection_bias=True
    )
    return MoE(8, 6, 4, 2, router=router, bias=True, shared_hidden_dim=5, shared_gate=True)


def _step(moe, x, mask):
    y, routing = moe(x, mask)
    return y.square().sum() + balance_loss(routing) + z_loss(routing)


def _compare(compiled, moe, length, mark=False, masked=True, autocast=False):
    x = torch.randn(2, length, 8, requires_grad=True)
    mask = torch.rand(2, length) < 0.8 if masked else None
    if mark:
        torch._dynamo.mark_dynamic(x, 1)
        if masked:
            torch._dynamo.mark_dynamic(mask, 1)
    tensors = (x, *moe.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss, wanted = compiled(moe, x, mask), _step(moe, x, mask)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(loss, tensors), torch.autograd.grad(wanted, tensors), strict=True):
        assert relative_error(a, b) < (5e-3 if autocast else 1e-5)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("kind", "masked"), [("plain", False), ("recompute", True), ("everything", True), ("triton", True)]
)
def test_one_graph_for_every_length(kind, masked):
    """fullgraph=True raises at a graph break; the counter counts recompilations."""
    moe = _moe(kind)
    moe.reset_parameters(0.4)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_step, backend=counter, fullgraph=True)
    for length in LENGTHS[:3] if kind == "triton" else LENGTHS:  # its kernels are interpreted
        _compare(compiled, moe, length, mark=True, masked=masked)
    assert counter.frame_count == 1


def test_at_most_two_graphs_unasked():
    """The first length is compiled for itself, the second for all."""
    moe = _moe("plain")
    moe.reset_parameters(0.4)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_step, backend=counter, fullgraph=True)
    for length in LENGTHS:
        _compare(compiled, moe, length)
    assert counter.frame_count == 2


def test_under_autocast():
    moe = _moe("plain")
    moe.reset_parameters(0.4)
    compiled = torch.compile(_step, backend="aot_eager", fullgraph=True)
    for length in (7, 300):
        _compare(compiled, moe, length, mark=True, autocast=True)


def test_without_gradients():
    moe = _moe("plain")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: moe(x)[0], backend=counter, fullgraph=True)
    with torch.no_grad():
        for length in LENGTHS:
            x = torch.randn(2, length, 8)
            torch._dynamo.mark_dynamic(x, 1)
            torch.testing.assert_close(compiled(x), moe(x)[0])
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.parametrize("kind", ["plain", "everything"])
def test_inductor(kind):
    moe = _moe(kind)
    moe.reset_parameters(0.4)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(_step, backend=counter, fullgraph=True)
    for length in LENGTHS:
        _compare(compiled, moe, length, mark=True)
    graphs = counter.frame_count
    # Its C++ has one graph for a sum over few numbers and one for many, and two for tiny products: none are ours.
    assert graphs <= 3
    for length in (4, 30, 280, 500):
        _compare(compiled, moe, length, mark=True)
    assert counter.frame_count == graphs
