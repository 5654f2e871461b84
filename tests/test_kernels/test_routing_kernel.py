"""`route_topk` in Triton: the reference's choice to the last expert, its weights and its gradients."""

import itertools
import sys

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from _check import TOLERANCES, check_op, fuzz, relative_error
from coterie.ops import route_topk, z_loss
from coterie_kernels import routing as kernels

INF, NAN = float("inf"), float("nan")
GROUPS = {
    "ungrouped": {},
    "max": {"num_groups": 3, "top_groups": 2, "group_score": "max"},
    "top2_sum": {"num_groups": 3, "top_groups": 2, "group_score": "top2_sum"},
}
_V3 = {"score": "sigmoid", "normalize": True, "num_groups": 4, "top_groups": 2, "group_score": "top2_sum"}
# family → (has a selection bias, settings): the rows of the table in `route_topk`.
FAMILIES = {
    "mixtral": (False, {"normalize": True}),
    "olmoe": (False, {}),
    "deepseek_v2": (False, {"scale": 16.0, "num_groups": 4, "top_groups": 2}),
    "deepseek_v3": (True, {**_V3, "scale": 2.5}),
    "gpt_oss": (False, {"order": "after"}),
    "ernie4_5_moe": (True, {"normalize": True}),
    "llama4": (False, {"score": "sigmoid", "order": "after"}),
}


def _route(logits, top_k, bias, mask, settings, *, impl):
    routing = route_topk(logits, top_k, selection_bias=bias, token_mask=mask, impl=impl, **settings)
    return routing.weights, routing.logits


def _check(logits, top_k, bias=None, mask=None, settings=(), **how):
    """The same experts as the reference, to the last; weights and gradients as `check_op` judges them."""
    settings = dict(settings)
    wanted, got = (
        route_topk(logits, top_k, selection_bias=bias, token_mask=mask, impl=impl, **settings)
        for impl in ("reference", "triton")
    )
    assert got.expert_ids.dtype == torch.int64
    assert torch.equal(got.expert_ids, wanted.expert_ids)
    check_op(_route, (logits.requires_grad_(), top_k, bias, mask, settings), "triton", **how)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("groups", GROUPS)
def test_every_setting(score, order, normalize, groups):
    settings = {"score": score, "order": order, "normalize": normalize, "scale": 1.7, **GROUPS[groups]}
    for bias in (None, torch.randn(15) / 4):
        _check(torch.randn(7, 15), 4, bias, settings=settings, layouts=["dense"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_families(family, dtype):
    has_bias, settings = FAMILIES[family]
    bias = torch.randn(24) / 5 if has_bias else None
    _check(torch.randn(40, 24).to(dtype), 5, bias, torch.rand(40) < 0.8, settings)


@pytest.mark.parametrize("num_experts", [1, 3, 8, 60, 128, 160, 256])
def test_every_number_of_experts(num_experts):
    logits = torch.randn(5, num_experts)
    for top_k in {1, min(16, num_experts)}:
        _check(logits, top_k, settings={"normalize": True}, layouts=["strided"])
        _check((logits * 2).round(), top_k, settings={"order": "after"}, layouts=["expanded"])


@pytest.mark.parametrize("num_tokens", [0, 1, 5, 130])
def test_every_number_of_tokens(num_tokens):
    _check(torch.randn(num_tokens, 8), 3, torch.randn(8), torch.rand(num_tokens) < 0.7, {"score": "sigmoid"})


@pytest.mark.parametrize(("num_experts", "num_groups"), [(60, 5), (160, 8), (256, 8), (12, 12), (21, 7)])
@pytest.mark.parametrize("order", ["before", "after"])
def test_groups_of_any_size_with_ties(num_experts, num_groups, order):
    logits, bias = torch.randn(40, num_experts).round(), torch.randn(num_experts).round() / 4
    for group_score, top_groups in itertools.product(("max", "top2_sum"), (1, 3, num_groups - 1)):
        if group_score == "top2_sum" and num_groups == num_experts:
            continue
        settings = {"num_groups": num_groups, "top_groups": top_groups, "group_score": group_score, "order": order}
        # As many as there are: what comes last ties with the experts of other groups where it is -inf.
        top_k = min(16, top_groups * num_experts // num_groups)
        logits[0, : num_experts // 2] = -INF
        ids = [
            route_topk(logits, top_k, score="sigmoid", selection_bias=bias, impl=impl, **settings).expert_ids
            for impl in ("reference", "triton")
        ]
        assert torch.equal(*ids)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("groups", GROUPS)
def test_infinite_and_nan_logits(score, order, groups, monkeypatch):
    monkeypatch.setattr(sys.modules["coterie.ops.routing"], "_is_small", lambda selection: False)
    logits = torch.randn(9, 6)
    logits[0] = -INF
    logits[1, 2:] = -INF
    logits[2] = torch.tensor([0.0, -0.0, 0.0, -0.0, -1e-40, 1e-40])
    logits[3] = INF
    logits[4] = NAN
    logits[5] = torch.tensor([200.0, -200.0, 100.0, -100.0, 1e38, -1e38])
    logits[6, 4] = NAN
    logits[7] = torch.tensor([NAN, INF, NAN, -INF, 1.0, NAN])
    for top_k in range(1, 5):
        wanted, by_keys, got = (
            route_topk(logits, top_k, score=score, order=order, impl=impl, **GROUPS[groups])
            for impl in ("reference", "torch", "triton")
        )
        assert torch.equal(got.expert_ids, wanted.expert_ids)
        # But where a score is NaN: to torch's keys it is the best or the worst by its sign, which processors differ in.
        comparable = [1, 2, 5, 8]
        assert torch.equal(got.expert_ids[comparable], by_keys.expert_ids[comparable])
        torch.testing.assert_close(got.weights, wanted.weights, equal_nan=True, rtol=1e-6, atol=1e-30)
        assert all(len(set(row)) == top_k for row in got.expert_ids.tolist())


def test_nan_stays_in_its_row():
    logits = torch.randn(6, 8)
    poisoned = logits.clone()
    poisoned[2] = NAN
    grads = []
    for values in (logits, poisoned):
        leaf = values.requires_grad_()
        route_topk(leaf, 3, normalize=True, impl="triton").weights.square().sum().backward()
        grads.append(leaf.grad)
    clean, dirty = grads
    assert dirty[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(clean[others], dirty[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_on_the_logits_keep_their_gradient(dtype):
    mask = torch.tensor([True, False, True, True])
    logits = torch.randn(4, 6, dtype=dtype)
    logits[1] = NAN
    logits.requires_grad_()
    grads = []
    for impl in ("reference", "triton"):
        routing = route_topk(logits, 2, normalize=True, token_mask=mask, impl=impl)
        assert routing.logits.dtype == torch.float32
        assert (routing.logits[1] == 0).all()
        loss = routing.weights.square().sum() + z_loss(routing)
        grads += torch.autograd.grad(loss, logits)
    wanted, got = grads
    assert (got[1] == 0).all()
    torch.testing.assert_close(got, wanted)


def test_memory_of_any_order():
    bias = torch.randn(20)[::2]
    mask = (torch.rand(14) < 0.6)[::2]
    for logits in (torch.randn(10, 7).t(), torch.randn(7, 20)[:, ::2], torch.randn(1, 10).expand(7, 10)):
        _check(logits, 3, bias, mask, {"normalize": True})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_launchers_take_narrow_logits(dtype):
    logits = torch.randn(40, 12).to(dtype)
    grad = torch.randn(40, 4)
    settings = ("softmax", "before", True, 1.0)
    wide, ids = kernels.route_topk(logits.float(), None, None, 4, *settings, 1, 1, "max")
    weights, ids_of_narrow = kernels.route_topk(logits, None, None, 4, *settings, 1, 1, "max")
    assert torch.equal(ids, ids_of_narrow)
    assert torch.equal(wide, weights)
    got = kernels.route_topk_backward(grad, logits, ids, *settings)
    assert got.dtype == dtype
    wanted = kernels.route_topk_backward(grad, logits.float(), ids, *settings)
    assert relative_error(got, wanted) <= TOLERANCES[dtype][1]


@given(st.data())
@fuzz
def test_any_router(data):
    num_groups, members = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 7))
    top_groups = data.draw(st.integers(1, num_groups))
    scores = ["max", "top2_sum"] if members > 1 else ["max"]
    settings = {
        "score": data.draw(st.sampled_from(["softmax", "sigmoid"])),
        "order": data.draw(st.sampled_from(["before", "after"])),
        "normalize": data.draw(st.booleans()),
        "scale": data.draw(st.sampled_from([1.0, 0.5, 16.0])),
        "num_groups": num_groups,
        "top_groups": top_groups,
        "group_score": data.draw(st.sampled_from(scores)),
    }
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    num_tokens, num_experts = data.draw(st.integers(0, 9)), num_groups * members
    logits = torch.randn(num_tokens, num_experts)
    bias = torch.randn(num_experts) / 4 if data.draw(st.booleans()) else None
    mask = torch.rand(num_tokens) < 0.7 if data.draw(st.booleans()) else None
    _check(logits, data.draw(st.integers(1, top_groups * members)), bias, mask, settings, layouts=["dense"])


@pytest.mark.parametrize("num_tokens", [0, 6])
def test_opcheck(num_tokens):
    logits, mask = torch.randn(num_tokens, 12), torch.rand(num_tokens) < 0.7
    settings = ("sigmoid", "before", True, 2.5)
    for more in ((None, None), (torch.randn(12), mask)):
        args = (logits.requires_grad_(), *more, 3, *settings, 4, 2, "top2_sum")
        torch.library.opcheck(torch.ops.coterie.route_topk.default, args)
    _, ids = torch.ops.coterie.route_topk.default(*args)
    args = (torch.randn(num_tokens, 3), logits.detach(), ids, *settings)
    torch.library.opcheck(torch.ops.coterie.route_topk_backward.default, args)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph(backend):
    def loss(logits, bias, mask):
        routing = route_topk(logits, 3, selection_bias=bias, token_mask=mask, normalize=True, impl="triton")
        return routing.weights.square().sum() + z_loss(routing), routing.expert_ids

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for num_tokens in (6, 11):
        args = torch.randn(num_tokens, 8, requires_grad=True), torch.randn(8), torch.rand(num_tokens) < 0.7
        (wanted, ids), (got, compiled_ids) = loss(*args), compiled(*args)
        assert torch.equal(ids, compiled_ids)
        torch.testing.assert_close(got, wanted)
        grads = (torch.autograd.grad(value, args[0])[0] for value in (got, wanted))
        torch.testing.assert_close(*grads)
