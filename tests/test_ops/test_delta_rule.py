"""`delta_rule`: chunks against the recurrence in float64, and the laws that a state must keep."""

from functools import partial
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

import _check
from _check import fuzz, relative_error
from _delta_rule import DECAYS, EDITS, NAMES, make_inputs, op
from coterie.ops import _delta_rule_chunks
from coterie.ops.delta_rule import delta_rule

# The chunks' arithmetic is not the recurrence's: a triangle is solved, and the gradient to a decay is what is left when
# a sum over keys is taken from one over queries.
check_op = partial(_check.check_op, factor=10)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunks_are_the_recurrence(edit, decay, dtype):
    for sizes in ((2, 37, 4, 2, 8, 5), (1, 100, 2, 2, 16, 16)):
        check_op(op, make_inputs(*sizes, edit=edit, decay=decay, dtype=dtype), "torch", layouts=["dense", "strided"])


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("decay", DECAYS)
def test_gradcheck(edit, decay):
    inputs = make_inputs(1, 6, 2, 1, 3, 2, edit=edit, decay=decay, dtype=torch.float64)
    given = [t for t in inputs if t is not None]

    def run(*tensors, impl):
        rest = iter(tensors)
        return op(*(None if t is None else next(rest) for t in inputs), impl=impl)

    assert torch.autograd.gradcheck(lambda *t: run(*t, impl="reference"), given)
    assert torch.autograd.gradgradcheck(lambda *t: run(*t, impl="reference"), given)
    assert torch.autograd.gradcheck(lambda *t: run(*t, impl="torch"), given)


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 3), st.integers(1, 2)),
    st.tuples(st.integers(3, 9), st.integers(3, 9)),
    st.sampled_from(EDITS),
    st.sampled_from(DECAYS),
    st.sampled_from([16, 32, 64]),
    st.sampled_from([64, 2**14]),
)
@fuzz
def test_any_shape(sizes, widths, edit, decay, chunk, span):
    batch, length, key_heads, groups = sizes
    inputs = make_inputs(batch, length, key_heads * groups, key_heads, *widths, edit=edit, decay=decay)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_delta_rule_chunks, "_SPAN_ROWS", span)
        check_op(lambda *t, impl: op(*t, impl=impl, chunk_size=chunk), inputs, "torch", layouts=["dense"])


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("decay", DECAYS)
def test_a_sequence_is_its_parts_with_the_state_carried(decay, impl):
    inputs = make_inputs(2, 90, 2, 2, 8, 6, decay=decay, dtype=torch.float64)
    whole, last = op(*inputs, impl=impl)
    for cut in (1, 3, 16, 40, 89):
        *tensors, state = inputs
        first, state = op(*(t if t is None else t[:, :cut] for t in tensors), state, impl=impl)
        second, state = op(*(t if t is None else t[:, cut:] for t in tensors), state, impl=impl)
        torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(state, last, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("decay", DECAYS)
def test_packed_sequences_are_separate_ones(decay, impl):
    *tensors, _ = make_inputs(1, 75, 2, 1, 8, 6, decay=decay, dtype=torch.float64)
    ends = [0, 7, 7, 40, 41, 75]
    states = torch.randn(5, 2, 8, 6, dtype=torch.float64, requires_grad=True)
    packed, last = op(*tensors, states, impl=impl, cu_seqlens=torch.tensor(ends))
    outs, lasts = [], []
    for i, (start, stop) in enumerate(pairwise(ends)):
        o, state = op(*(t if t is None else t[:, start:stop] for t in tensors), states[i : i + 1], impl="reference")
        outs.append(o)
        lasts.append(state)
    wanted, wanted_last = torch.cat(outs, 1), torch.cat(lasts)
    torch.testing.assert_close(packed, wanted, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(last, wanted_last, rtol=1e-11, atol=1e-11)
    leaves = [t for t in (*tensors, states) if t is not None]
    directions = [torch.randn_like(packed), torch.randn_like(last)]
    for got, want in zip(
        torch.autograd.grad((packed, last), leaves, directions),
        torch.autograd.grad((wanted, wanted_last), leaves, directions),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("length", [3, 50])
def test_padding_changes_nothing_whatever_it_contains(length, impl):
    inputs = make_inputs(2, length, 2, 2, 8, 6, decay="channels", dtype=torch.float64)
    mask = torch.rand(2, length) < 0.7
    mask[:, 0] = True
    with torch.no_grad():
        for t in inputs[:-1]:
            if t is not None:
                t[~mask] = torch.nan
    o, state = op(*inputs, impl=impl, token_mask=mask)
    assert (o[~mask] == 0).all()
    grads = torch.autograd.grad(o.sum() + state.sum(), [t for t in inputs if t is not None])
    assert all(g.isfinite().all() for g in grads)
    for b in range(2):
        kept = [t if t is None else t[b : b + 1, mask[b]] for t in inputs[:-1]]
        wanted, last = op(*kept, inputs[-1][b : b + 1], impl="reference")
        torch.testing.assert_close(o[b : b + 1, mask[b]], wanted, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(state[b : b + 1], last, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_no_token_at_all(impl):
    inputs = make_inputs(2, 0, 2, 2, 8, 6)
    o, state = op(*inputs, impl=impl)
    assert o.shape == (2, 0, 2, 6)
    assert torch.equal(state, inputs[-1])
    assert delta_rule(*inputs[:3], return_state=False, impl=impl)[1] is None
    o, state = op(*make_inputs(0, 9, 2, 2, 8, 6), impl=impl)
    assert (o.shape, state.shape) == ((0, 9, 2, 6), (0, 2, 8, 6))


def test_no_token_sees_a_later_one():
    inputs = [t if t is None else t.detach() for t in make_inputs(1, 70, 2, 2, 8, 6, decay="channels")]
    o, _ = op(*inputs)
    for t in (5, 16, 40):
        changed = [x if x is None or x is inputs[-1] else x.clone() for x in inputs]
        for x in changed[:-1]:
            if x is not None:
                x[:, t:] *= 0.5
        torch.testing.assert_close(op(*changed)[0][:, :t], o[:, :t], rtol=0, atol=0)
        assert not torch.equal(op(*changed)[0][:, t:], o[:, t:])


def test_sequences_of_a_batch_are_independent():
    inputs = make_inputs(4, 33, 2, 2, 8, 6)
    turned = [t if t is None else t.flip(0) for t in inputs]
    torch.testing.assert_close(op(*turned)[0].flip(0), op(*inputs)[0], rtol=0, atol=0)


@pytest.mark.parametrize("beta", [1.0, 1.9, 2.0])
@pytest.mark.parametrize("alike", [0.0, 0.98, 1.0])
def test_keys_that_are_alike(alike, beta):
    """(I + A)⁻¹ by a series of powers would be off by 1e10 here."""
    inputs = make_inputs(1, 256, 1, 1, 32, 16, decay="none")
    with torch.no_grad():
        inputs[1].copy_(F.normalize((1 - alike) * inputs[1] + alike * torch.ones(32) / 32**0.5, dim=-1))
        inputs[5].fill_(beta)
    check_op(lambda *t, impl: op(*t, impl=impl, chunk_size=64), inputs, "torch", layouts=["dense"])


@pytest.mark.parametrize("decay", ["heads", "channels"])
@pytest.mark.parametrize("least", [-5.0, -50.0, -1e4, -torch.inf])
def test_decays_of_every_strength(decay, least):
    """Strong ones beside weak ones in a chunk; -inf forgets all."""
    inputs = make_inputs(1, 100, 2, 2, 8, 6, decay=decay)
    with torch.no_grad():
        inputs[3].mul_(1e-3)
        inputs[3][torch.rand(inputs[3].shape) < 0.1] = least
    if least == -torch.inf:
        inputs[3] = inputs[3].detach()
    check_op(lambda *t, impl: op(*t, impl=impl, chunk_size=64), inputs, "torch", layouts=["dense"])


@pytest.mark.slow
@pytest.mark.parametrize("edit", ["none", "beta"])
def test_a_hundred_thousand_tokens(edit):
    inputs = [t if t is None else t.detach() for t in make_inputs(1, 100_000, 1, 1, 16, 16, edit=edit)]
    exact = [t if t is None else t.double() for t in inputs]
    o, state = op(*inputs, chunk_size=64)
    wanted, last = op(*exact, chunk_size=64)
    assert relative_error(o[:, -1000:], wanted[:, -1000:]) < 1e-5
    assert relative_error(state, last) < 1e-5


@pytest.mark.parametrize("decay", DECAYS)
def test_opcheck(decay):
    inputs = make_inputs(1, 20, 2, 1, 4, 3, decay=decay)
    flat = [t if t is None else t.detach().flatten(0, 1).requires_grad_() for t in inputs[:-1]]
    bounds = torch.tensor([[0, 20]])
    args = (*flat, inputs[-1], bounds, 0.5, 16)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.coterie.delta_rule.default, args, test_utils=utilities)


def test_bytes_kept_for_backward():
    """The inputs, and a state every 2¹⁴ rows."""
    inputs = make_inputs(1, 4096, 8, 8, 64, 64)
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        op(*inputs, chunk_size=64)
    of_inputs = sum(t.nbytes for t in inputs[:-1] if t is not None)
    assert of_inputs <= sum(saved.values()) <= 1.1 * of_inputs


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"q": torch.zeros(2, 5, 3)}, ValueError, r"q must have shape \[B, L, H', P\], got \(2, 5, 3\)"),
        ({"k": torch.zeros(1, 20, 1, 4)}, ValueError, r"k must have shape .* got \(1, 20, 1, 4\)"),
        ({"v": torch.zeros(1, 20, 3, 3)}, ValueError, "v must have a multiple of q's 2 heads"),
        ({"v": torch.zeros(1, 20, 2, 3).bfloat16()}, TypeError, "v must be torch.float32, got torch.bfloat16"),
        ({"g": torch.zeros(1, 20, 1)}, ValueError, r"g must have shape \[B, L, H\]"),
        ({"g": torch.full((1, 20, 2), 0.5)}, ValueError, "g is the log of a decay and must be at most 0, got 0.5"),
        ({"erase": torch.zeros(1, 20, 2, 4)}, ValueError, "erase and beta exclude each other"),
        ({"beta": torch.zeros(1, 20)}, ValueError, r"beta must have shape \[B, L, H\]"),
        ({"initial_state": torch.zeros(1, 2, 3, 4)}, ValueError, r"initial_state must have shape \[B, H, P, V\]"),
        ({"cu_seqlens": torch.tensor([0, 5, 4, 20])}, ValueError, "cu_seqlens must go from 0 to L = 20 and never down"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens must go from 0 to L = 20"),
        ({"token_mask": torch.ones(1, 20)}, TypeError, "token_mask must be torch.bool"),
        ({"chunk_size": 24}, ValueError, "chunk_size must be a power of two and at least 16, got 24"),
        ({"impl": "fast"}, ValueError, "impl must be one of 'reference', 'torch', 'triton', got 'fast'"),
    ],
)
def test_wrong_arguments_are_named(impl, wrong, error, message):
    good = dict(zip(NAMES, make_inputs(1, 20, 2, 2, 4, 3), strict=True))
    if "cu_seqlens" in wrong:
        good["initial_state"] = None
    with pytest.raises(error, match=message):
        delta_rule(**{**good, "impl": impl, **wrong})
