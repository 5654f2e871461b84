"""`TopKRouter`: float32 whatever surrounds it, settings passed on, the selection bias under explicit control only."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from _check import relative_error
from coterie.modules import TopKRouter
from coterie.ops import route_topk

SETTINGS = [
    {},
    {"normalize": False, "scale": 2.5},
    {"score": "sigmoid", "num_groups": 4, "top_groups": 2, "group_score": "top2_sum", "selection_bias": True},
    {"order": "after", "bias": True},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_is_a_linear_layer_and_route_topk(settings):
    router = TopKRouter(10, 8, 3, **settings)
    x = torch.randn(2, 7, 10)
    mask = torch.rand(2, 7) < 0.7
    passed = {"normalize": True, **settings}
    has_bias, has_selection_bias = passed.pop("bias", False), passed.pop("selection_bias", False)
    with torch.no_grad():
        for t in (router.bias, router.selection_bias):
            if t is not None:
                t.normal_()
    assert (router.bias is not None, router.selection_bias is not None) == (has_bias, has_selection_bias)
    routing = router(x, mask)
    logits = F.linear(x.flatten(0, 1), router.weight, router.bias)
    wanted = route_topk(logits, 3, selection_bias=router.selection_bias, token_mask=mask.flatten(), **passed)
    for name in ("expert_ids", "weights", "logits", "token_mask"):
        assert torch.equal(getattr(routing, name), getattr(wanted, name))
    assert (routing.num_experts, routing.score) == (8, passed.get("score", "softmax"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_arithmetic_is_float32(dtype, autocast):
    router = TopKRouter(64, 8, 2, bias=True, dtype=dtype)
    x = torch.randn(100, 64).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        routing = router(x)
    assert routing.logits.dtype == routing.weights.dtype == torch.float32
    exact = F.linear(x.double(), router.weight.double(), router.bias.double())
    assert relative_error(routing.logits, exact) < 1e-6  # bfloat16 products: 2e-3
    routing.weights.square().sum().backward()
    assert (x.grad.dtype, router.weight.grad.dtype) == (dtype, dtype)


def test_a_bf16_model_chooses_as_its_float32_copy():
    router = TopKRouter(64, 16, 4).bfloat16()
    x = torch.randn(200, 64).bfloat16()
    copy = TopKRouter(64, 16, 4)
    copy.load_state_dict(router.state_dict())
    assert torch.equal(router(x).expert_ids, copy(x.float()).expert_ids)


def test_gradients_reach_input_and_weight():
    router = TopKRouter(6, 5, 2)
    x = torch.randn(4, 6, requires_grad=True)

    def weights(x, weight):  # float32 inside: coarse differences
        return torch.func.functional_call(router, {"weight": weight}, (x,)).weights

    with torch.no_grad():
        router.weight.mul_(50)
    y = weights(x, router.weight)
    direction = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, router.weight), direction)
    exact = [t.detach().double().requires_grad_() for t in (x, router.weight)]
    exact_y = route_topk(exact[0] @ exact[1].t(), 2, normalize=True, impl="reference").weights
    for a, b in zip(got, torch.autograd.grad(exact_y, exact, direction.double()), strict=True):
        assert relative_error(a, b) < 1e-5


def test_selection_bias_moves_only_when_told():
    router = TopKRouter(6, 4, 2, score="sigmoid", selection_bias=True)
    assert router.selection_bias.dtype == torch.float32
    assert not router.selection_bias.any()
    assert "selection_bias" in router.state_dict()
    assert "selection_bias" not in dict(router.named_parameters())
    optimizer = torch.optim.SGD(router.parameters(), lr=0.1)
    x = torch.randn(50, 6) + 1
    for _ in range(3):
        router(x).weights.square().sum().backward()
        optimizer.step()
    assert not router.selection_bias.any()
    counts = torch.tensor([0, 60, 20, 20])
    kept = router.selection_bias
    router.update_selection_bias(counts, 0.5)
    assert router.selection_bias is kept  # in place: a compiled or sharded model sees it
    assert router.selection_bias.tolist() == [0.5, -0.5, 0.5, 0.5]
    router.update_selection_bias(counts)
    assert router.selection_bias.tolist() == pytest.approx([0.501, -0.501, 0.501, 0.501])

    other = TopKRouter(6, 4, 2, score="sigmoid", selection_bias=True)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.selection_bias, router.selection_bias)
    assert torch.equal(other(x).expert_ids, router(x).expert_ids)
    other.reset_parameters()
    assert not other.selection_bias.any()


def test_selection_bias_stays_float32_in_a_bf16_model():
    router = TopKRouter(6, 4, 2, selection_bias=True, dtype=torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.selection_bias.dtype == torch.float32
    values = torch.tensor([0.5001, -0.5001, 0.001, 1.0])
    router.selection_bias.copy_(values)
    for change in (lambda r: r.to(torch.bfloat16), lambda r: r.bfloat16(), lambda r: r.half(), lambda r: r.float()):
        change(nn.Sequential(router))
        assert torch.equal(router.selection_bias, values)  # which bfloat16 does not hold
    router.update_selection_bias(torch.tensor([0, 60, 20, 20]), 1e-3)
    torch.testing.assert_close(router.selection_bias, torch.tensor([0.5011, -0.5011, 0.002, 1.001]))
    assert router.to("meta").selection_bias.device.type == "meta"
    assert router.to_empty(device="cpu").selection_bias.dtype == torch.float32


def test_update_without_a_bias_says_so():
    with pytest.raises(ValueError, match="this router has no selection bias: build it with selection_bias=True"):
        TopKRouter(6, 4, 2).update_selection_bias(torch.zeros(4))


@pytest.mark.parametrize("settings", [{"score": "tanh"}, {"num_groups": 3}, {"order": "x"}])
def test_bad_settings_are_named_when_built(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        TopKRouter(6, 8, 2, **settings)


@pytest.mark.parametrize("top_k", [0, 9])
def test_bad_top_k_is_named_when_built(top_k):
    with pytest.raises(ValueError, match=r"top_k must be in 1\.\.8"):
        TopKRouter(6, 8, top_k)


def test_init():
    router = TopKRouter(500, 64, 2, bias=True)
    assert router.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert not router.bias.any()
    router.reset_parameters(0.3)
    assert router.weight.std().item() == pytest.approx(0.3, rel=0.03)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (0, 6), (2, 0, 6), (2, 3, 4, 6)])
def test_leading_sizes(shape):
    router = TopKRouter(6, 4, 2)
    mask = torch.ones(shape[:-1], dtype=torch.bool)
    tokens = mask.numel()
    assert router(torch.randn(shape)).weights.shape == (tokens, 2)
    assert router(torch.randn(shape), mask).expert_ids.shape == (tokens, 2)
