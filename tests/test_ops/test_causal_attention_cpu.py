"""Blockwise causal attention in bfloat16, wherever torch's own is slower: the formula in float64, and torch's error."""

import pytest
import torch
import torch.nn.functional as F

from _check import relative_error
from coterie.modules.attention import causal_attention
from coterie.ops import _causal_attention_cpu as ours

SHAPES = [(2, 4, 2, 37, 37, 16, 16), (1, 6, 2, 40, 55, 8, 8), (2, 2, 2, 16, 16, 8, 12), (3, 3, 1, 2, 9, 8, 8)]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(ours, "_QUERIES", 16)
    monkeypatch.setattr(ours, "_SCORES", 3000)  # a group or two at a time


def formula(queries, keys, values, key_mask=None, scale=None):
    """In float64; a query on padding sees all before it."""
    shared, num_queries, num_keys = queries.shape[1] // keys.shape[1], queries.shape[2], keys.shape[2]
    keys, values = (x.repeat_interleave(shared, 1) for x in (keys, values))
    scores = queries @ keys.mT * (queries.shape[-1] ** -0.5 if scale is None else scale)
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    if key_mask is not None:
        seen = seen & (key_mask[:, None, None, :] | ~key_mask[:, None, num_keys - num_queries :, None])
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values


def inputs(shape, std=1.0):
    batch, heads, groups, num_queries, num_keys, width, value_width = shape
    sizes = ((heads, num_queries, width), (groups, num_keys, width), (groups, num_keys, value_width))
    tensors = [torch.randn(batch, *size).mul_(std).bfloat16().requires_grad_() for size in sizes]
    return tensors, torch.randn(batch, heads, num_queries, value_width).bfloat16()


def results(function, tensors, grad, **settings):
    y = function(*tensors, **settings)
    return [y, *torch.autograd.grad(y, tensors, grad.to(y.dtype))]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_values_and_gradients(shape, masked, scale):
    tensors, grad = inputs(shape)
    key_mask = torch.rand(shape[0], shape[4]) < 0.7 if masked else None
    wide = [t.detach().double().requires_grad_() for t in tensors]
    wanted = results(formula, wide, grad, key_mask=key_mask, scale=scale)
    got = results(ours.causal_attention, tensors, grad, key_mask=key_mask, scale=scale)
    for a, b, tolerance in zip(got, wanted, (5e-3, 1e-2, 1e-2, 1e-2), strict=True):
        assert a.dtype == torch.bfloat16
        assert relative_error(a, b) < tolerance


def test_large_scores_are_no_worse_than_torch_has_them():
    """Rounding scores of 50 to bfloat16 as they are would make weights wrong by a fifth."""
    tensors, grad = inputs((2, 4, 2, 64, 64, 16, 16), std=4.0)
    wanted = results(formula, [t.detach().double().requires_grad_() for t in tensors], grad)
    torchs = results(lambda *t: F.scaled_dot_product_attention(*t, is_causal=True, enable_gqa=True), tensors, grad)
    for got, right, theirs in zip(results(ours.causal_attention, tensors, grad), wanted, torchs, strict=True):
        assert relative_error(got, right) < 2 * relative_error(theirs, right)


def test_absurd_scores_stay_finite():
    """Of a training that goes astray: the largest score takes all, as in torch."""
    tensors, grad = inputs((1, 2, 1, 40, 40, 16, 16), std=300.0)
    wanted = results(formula, [t.detach().double().requires_grad_() for t in tensors], grad)
    got = results(ours.causal_attention, tensors, grad)
    assert relative_error(got[0], wanted[0]) < 5e-3
    assert all(t.isfinite().all() for t in got)


def test_no_token_sees_a_later_one():
    """Bitwise: not even through rounding."""
    (queries, keys, values), _ = inputs((1, 2, 1, 40, 40, 8, 8))
    first = ours.causal_attention(queries, keys, values)
    with torch.no_grad():
        keys[:, :, 23:] += 50
        values[:, :, 23:] += 50
    assert torch.equal(ours.causal_attention(queries, keys, values)[:, :, :23], first[:, :, :23])


def test_sequences_do_not_depend_on_their_batch():
    (queries, keys, values), _ = inputs((3, 2, 1, 40, 40, 8, 8))
    whole = ours.causal_attention(queries, keys, values)
    alone = ours.causal_attention(queries[1:2], keys[1:2], values[1:2])
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-2, atol=1e-2)


def test_is_an_op_as_torch_wants_it():
    tensors, _ = inputs((2, 4, 2, 21, 21, 8, 8))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ours._forward_op, (*tensors, None, 0.3), test_utils=tests)


def test_strided_inputs():
    """As attention has them: heads beside positions."""
    (queries, keys, values), grad = inputs((2, 4, 2, 37, 37, 16, 16))
    strided = [
        t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in (queries, keys, values)
    ]
    strided_grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
    for a, b in zip(
        results(ours.causal_attention, strided, strided_grad),
        results(ours.causal_attention, [queries, keys, values], grad),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_an_empty_batch():
    tensors, grad = inputs((0, 4, 2, 5, 7, 8, 12))
    for got, like in zip(results(ours.causal_attention, tensors, grad), (grad, *tensors), strict=True):
        assert got.shape == like.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("heads", "groups", "length", "before"), [(4, 1, 5, 1), (4, 2, 2, 700), (3, 3, 300, 40)])
def test_queries_that_follow_many_keys(dtype, heads, groups, length, before):
    torch.manual_seed(0)
    q = torch.randn(2, heads, length, 16, dtype=torch.float64)
    k, v = (torch.randn(2, groups, 2 * (before + length), 16, dtype=torch.float64)[:, :, ::2] for _ in range(2))
    mask = torch.ones(length, before + length, dtype=torch.bool).tril(before)
    wanted, torchs = (
        F.scaled_dot_product_attention(*(t.to(kind) for t in (q, k, v)), attn_mask=mask, scale=0.3, enable_gqa=True)
        for kind in (torch.float64, dtype)
    )
    got = ours.continued_attention(*(t.to(dtype) for t in (q, k, v)), 0.3)
    assert got.dtype == dtype
    assert relative_error(got, wanted) < max(1.5 * relative_error(torchs, wanted), 1e-14)


@torch.no_grad()
def test_queries_whose_channels_are_apart_and_none_at_all():
    q, k, v = (torch.randn(1, 2, length, 16).mT.contiguous().mT for length in (3, 50, 50))
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(3, 50, dtype=torch.bool).tril(47))
    torch.testing.assert_close(causal_attention(q, k, v), wanted)
    assert causal_attention(q[:, :, :0], k, v).shape == (1, 2, 0, 16)
    wider = torch.randn(1, 2, 50, 24)
    wanted = F.scaled_dot_product_attention(q, k, wider, attn_mask=torch.ones(3, 50, dtype=torch.bool).tril(47))
    torch.testing.assert_close(causal_attention(q, k, wider), wanted)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [40, 41])
def test_keys_in_parts(dtype, count, monkeypatch):
    monkeypatch.setattr(ours, "_SPLIT", 40)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    q, (k, v) = torch.randn(1, 3, 1, 16), (torch.randn(1, 1, 60, 16)[:, :, :count] for _ in range(2))
    wanted = F.scaled_dot_product_attention(*(t.double() for t in (q, k, v)), enable_gqa=True)
    assert ours.is_split(k)
    got = causal_attention(*(t.to(dtype) for t in (q, k, v)))
    assert relative_error(got, wanted) < {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert not ours.is_split(k[:, :, :39])
    assert not ours.is_split(k.expand(2, -1, -1, -1))
