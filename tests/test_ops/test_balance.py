"""The balance losses against plain loops over their formulas, and against transformers."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from _check import fuzz
from coterie.ops import Routing, balance_loss, route_topk, selection_bias_update, z_loss


def _loop_balance(routing, num_sequences=1):
    """E · Σ_e f_e P_e per sequence, averaged over the sequences with a token; in Python floats."""
    logits, ids = routing.logits.detach().double(), routing.expert_ids.tolist()
    num_tokens, num_experts = logits.shape
    mask = [True] * num_tokens if routing.token_mask is None else routing.token_mask.tolist()
    length = num_tokens // num_sequences
    losses = []
    for s in range(num_sequences):
        tokens = [t for t in range(s * length, (s + 1) * length) if mask[t]]
        if not tokens:
            continue
        slots = [e for t in tokens for e in ids[t] if e < num_experts]
        loss = 0.0
        for e in range(num_experts):
            probability = 0.0
            for t in tokens:
                row = logits[t].softmax(0) if routing.score == "softmax" else logits[t].sigmoid()
                probability += float(row[e] / row.sum()) / len(tokens)
            loss += num_experts * slots.count(e) / max(len(slots), 1) * probability
        losses.append(loss)
    return sum(losses) / len(losses) if losses else 0.0


def _loop_z(routing):
    mask = routing.token_mask
    rows = [row for t, row in enumerate(routing.logits.tolist()) if mask is None or mask[t]]
    return sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in rows) / max(len(rows), 1)


@st.composite
def _routings(draw, num_tokens):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    num_experts = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, num_experts))
    logits = 2 * torch.randn(num_tokens, num_experts, generator=generator)
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(num_tokens, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.8]))
    score = draw(st.sampled_from(["softmax", "sigmoid"]))
    routing = route_topk(logits.requires_grad_(), top_k, score=score, token_mask=mask)
    if draw(st.booleans()):  # unused slots among the used ones
        unused = torch.rand(num_tokens, top_k, generator=generator) < 0.3
        ids = routing.expert_ids.masked_fill(unused, num_experts)
        weights = routing.weights.masked_fill(unused, 0.0)
        routing = Routing(ids, weights, routing.logits, num_experts, mask, score)
    return routing, logits


@given(st.data(), st.integers(1, 4), st.integers(0, 5))
@fuzz
def test_losses_are_the_plain_loops(data, num_sequences, length):
    routing, logits = data.draw(_routings(num_sequences * length))
    pairs = [
        (balance_loss(routing), _loop_balance(routing)),
        (balance_loss(routing, num_sequences=num_sequences), _loop_balance(routing, num_sequences)),
        (z_loss(routing), _loop_z(routing)),
    ]
    for got, wanted in pairs:
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(wanted, rel=1e-5, abs=1e-6)
        (grad,) = torch.autograd.grad(got, logits, retain_graph=True)
        assert grad.isfinite().all()
        if routing.token_mask is not None:
            assert (grad[~routing.token_mask] == 0).all()


def test_a_sequence_of_padding_is_not_averaged():
    logits = torch.randn(12, 5)
    mask = torch.tensor([True] * 3 + [False] + [False] * 4 + [True] * 4)
    loss = balance_loss(route_topk(logits, 2, token_mask=mask), num_sequences=3)
    each = [balance_loss(route_topk(part, 2)) for part in (logits[:3], logits[8:])]
    torch.testing.assert_close(loss, sum(each) / 2)


@given(st.data())
@fuzz
def test_layers_are_averaged(data):
    layers = [data.draw(_routings(6))[0] for _ in range(data.draw(st.integers(1, 3)))]
    for loss, loop in ((balance_loss, _loop_balance), (z_loss, _loop_z)):
        wanted = sum(map(loop, layers)) / len(layers)
        for form in (layers, tuple(layers), iter(layers)):
            assert loss(form).item() == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("num_sequences", [None, 3])
def test_gradients_are_exact(score, num_sequences):
    logits = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(12) % 4 != 2

    def losses(logits):
        routing = route_topk(logits, 2, score=score, token_mask=mask)
        return balance_loss([routing], num_sequences=num_sequences), z_loss(routing)

    assert torch.autograd.gradcheck(losses, logits)


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 1), (8, 2), (16, 16)])
def test_one_when_uniform_and_e_when_collapsed(num_experts, top_k):
    tokens = torch.arange(num_experts)
    ids = (tokens[:, None] + torch.arange(top_k)) % num_experts  # every expert equally often
    even = Routing(ids, torch.ones(ids.shape), torch.zeros(num_experts, num_experts), num_experts)
    assert balance_loss(even).item() == pytest.approx(1.0, abs=1e-6)
    assert balance_loss(even, num_sequences=num_experts).item() == pytest.approx(1.0, abs=1e-6)
    collapsed = torch.full((10, num_experts), -100.0).index_fill_(1, torch.tensor(0), 100.0)
    assert balance_loss(route_topk(collapsed, 1)).item() == pytest.approx(num_experts)
    # Even scores are at the minimum for whatever choice, even choices for whatever scores.
    scores = torch.randn(num_experts, num_experts)
    assert balance_loss(Routing(ids, even.weights, scores, num_experts)).item() == pytest.approx(1.0, abs=1e-6)
    assert balance_loss(route_topk(torch.zeros(10, num_experts), 1)).item() == pytest.approx(1.0, abs=1e-6)


def test_its_gradient_spreads_the_tokens():
    x, weight = torch.randn(256, 16), torch.randn(8, 16) / 4
    x[:, 0] += 1.0
    weight[:2, 0] += 1.0  # two favourites
    weight.requires_grad_()
    losses, most = [], []
    for _ in range(100):
        routing = route_topk(x @ weight.t(), 2)
        losses.append(balance_loss(routing))
        most.append(routing.counts().max().item())
        (grad,) = torch.autograd.grad(losses[-1], weight)
        weight = (weight - 0.1 * grad).detach().requires_grad_()
    assert losses[0] > 1.4
    assert losses[-1] < 1.01
    assert most[0] > 150
    assert most[-1] < 80  # 64 would be even


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_transformers_is_k_times_ours(masked, top_k):
    pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(4 * 9, 8, requires_grad=True)
    attention_mask = (torch.arange(9) >= torch.tensor([0, 3, 8, 5])[:, None]).long() if masked else None
    token_mask = None if attention_mask is None else attention_mask.flatten().bool()
    theirs = load_balancing_loss_func((logits,), 8, top_k, attention_mask)
    ours = balance_loss(route_topk(logits, top_k, token_mask=token_mask))
    torch.testing.assert_close(top_k * ours, theirs)
    (got,), (wanted,) = (torch.autograd.grad(loss, logits) for loss in (top_k * ours, theirs))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("loss", [balance_loss, lambda r: balance_loss(r, num_sequences=4), z_loss])
def test_padding_cannot_matter(loss):
    mask = torch.rand(20) < 0.5
    mask[5:10] = False  # a sequence of nothing but padding
    clean = torch.randn(20, 6)
    dirty = torch.where(mask[:, None], clean, torch.tensor([float("nan"), float("inf"), 3e38, -9.0, 0.0, 7.0]))
    results = []
    for values in (clean, dirty):
        logits = values.clone().requires_grad_()
        value = loss(route_topk(logits, 2, token_mask=mask))
        results.append((value, *torch.autograd.grad(value, logits)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    if loss is not z_loss:
        return
    dropped = route_topk(clean[mask], 2)
    torch.testing.assert_close(z_loss(dropped), results[0][0])
    torch.testing.assert_close(balance_loss(dropped), balance_loss(route_topk(clean, 2, token_mask=mask)))


@pytest.mark.parametrize("loss", [balance_loss, lambda r: balance_loss(r, num_sequences=2), z_loss])
def test_no_tokens_is_zero_with_finite_gradients(loss):
    empty = torch.zeros(0, 4, requires_grad=True)
    padding = torch.randn(6, 4, requires_grad=True)
    for logits, mask in ((empty, None), (padding, torch.zeros(6, dtype=torch.bool))):
        value = loss(route_topk(logits, 2, token_mask=mask))
        (grad,) = torch.autograd.grad(value, logits)
        assert value.item() == 0.0
        assert (grad == 0).all()
    assert loss([]).item() == 0.0


def test_unused_slots_everywhere_is_zero():
    logits = torch.randn(5, 4, requires_grad=True)
    routing = Routing(torch.full((5, 2), 4), torch.zeros(5, 2), logits, 4)
    loss = balance_loss(routing)
    assert loss.item() == 0.0
    assert (torch.autograd.grad(loss, logits)[0] == 0).all()


def test_large_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0], [300.0, 299.0, -2e4]], requires_grad=True)
    value = z_loss(route_topk(logits, 1))
    assert value.item() == pytest.approx((1e8 + (300 + math.log1p(math.exp(-1))) ** 2) / 2, rel=1e-6)
    value.backward()
    assert logits.grad.isfinite().all()


def test_num_sequences_must_divide_the_tokens():
    routing = route_topk(torch.zeros(6, 4), 2)
    for wrong in (4, 0, -1):
        with pytest.raises(ValueError, match=f"num_sequences must divide the number of tokens, 6, got {wrong}"):
            balance_loss(routing, num_sequences=wrong)


def test_selection_bias_update_is_a_step_towards_the_mean():
    bias = torch.tensor([0.5, 0.0, -0.5, 0.25])
    new = selection_bias_update(bias, torch.tensor([0, 10, 5, 5]), 0.125)
    assert new.tolist() == [0.625, -0.125, -0.5, 0.25]
    assert bias.tolist() == [0.5, 0.0, -0.5, 0.25]
    even = selection_bias_update(bias, torch.full((4,), 2**60 + 1), 0.125)  # not lost to rounding
    assert torch.equal(even, bias)
    with pytest.raises(ValueError, match=r"counts must have shape \[E\] = \[4\], got \(3,\)"):
        selection_bias_update(bias, torch.zeros(3), 0.1)


def test_selection_bias_balances_without_a_loss():
    logits = torch.randn(512, 8) + torch.linspace(0, 1.5, 8)
    bias = torch.zeros(8)
    spread = []
    for _ in range(200):
        counts = route_topk(logits, 2, score="sigmoid", selection_bias=bias).counts()
        spread.append((counts.max() / counts.double().mean()).item())
        bias = selection_bias_update(bias, counts, 1e-2)
    assert spread[0] > 1.5
    assert max(spread[-5:]) < 1.15
