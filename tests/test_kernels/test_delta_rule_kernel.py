"""`delta_rule` in Triton, under its interpreter: the recurrence in float64, and the laws that a state must keep."""

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import _check
from _check import relative_error
from _delta_rule import DECAYS, EDITS, NAMES, make_inputs, op
from coterie.ops.delta_rule import delta_rule
from coterie_kernels import delta_rule as kernels
from coterie_kernels import delta_rule_segments

# As in test_delta_rule: the chunks' arithmetic is not the recurrence's.
check_op = partial(_check.check_op, impl="triton", factor=10, layouts=["dense"])
triton_op = partial(op, impl="triton")


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("decay", ["none", "heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_chunks_are_the_recurrence(edit, decay, dtype):
    for sizes in ((2, 21, 1, 1, 8, 5), (1, 80, 1, 1, 20, 33)):
        inputs = make_inputs(*sizes, edit=edit, decay=decay, dtype=dtype)
        check_op(op, inputs, layouts=["strided"] if sizes[0] == 2 else ["dense"])


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_chunks_are_the_recurrence_with_a_decay_for_each_channel(edit, dtype):
    check_op(op, make_inputs(1, 40, 1, 1, 20, 17, edit=edit, decay="channels", dtype=dtype))


@pytest.mark.parametrize("decay", DECAYS)
def test_heads_share_keys(decay):
    """Also the erase of a key's head, and one of its own."""
    check_op(op, make_inputs(1, 12, 3, 1, 5, 4, decay=decay))
    q, k, v, g, erase, *rest = make_inputs(1, 12, 2, 1, 5, 4, edit="erase", decay=decay)
    shared = erase.detach()[:, :, :1].clone().requires_grad_()
    check_op(op, [q, k, v, g, shared, *rest])


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65])
def test_last_chunks_of_every_length(length):
    check_op(op, make_inputs(1, length, 1, 1, 4, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize("widths", [(1, 1), (16, 64), (130, 16), (256, 40)])
def test_every_width(widths):
    check_op(op, make_inputs(1, 70, 1, 1, *widths, dtype=torch.bfloat16))


@pytest.mark.parametrize("decay", DECAYS)
def test_packed_sequences_are_separate_ones(decay):
    *tensors, _ = make_inputs(1, 55, 1, 1, 8, 6, decay=decay)
    ends = [0, 7, 7, 40, 41, 55]
    states = torch.randn(5, 1, 8, 6, requires_grad=True)
    packed, last = triton_op(*tensors, states, cu_seqlens=torch.tensor(ends))
    outs, lasts = [], []
    for i, (start, stop) in enumerate(pairwise(ends)):
        o, state = op(*(t if t is None else t[:, start:stop] for t in tensors), states[i : i + 1], impl="reference")
        outs.append(o)
        lasts.append(state)
    wanted, wanted_last = torch.cat(outs, 1), torch.cat(lasts)
    leaves = [t for t in (*tensors, states) if t is not None]
    directions = [torch.randn_like(packed), torch.randn_like(last)]
    got = (packed, last, *torch.autograd.grad((packed, last), leaves, directions))
    want = (wanted, wanted_last, *torch.autograd.grad((wanted, wanted_last), leaves, directions))
    assert max(map(relative_error, got, want)) < 3e-6


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("decay", DECAYS)
def test_long_sequences_are_their_segments(edit, decay, monkeypatch):
    """Of one chunk each here, the last not whole."""
    monkeypatch.setattr(delta_rule_segments, "_LEAST_CHUNKS", 1)
    taken = []
    through = kernels.through_segments
    monkeypatch.setattr(kernels, "through_segments", lambda *a, **s: taken.append(a[2].shape[0]) or through(*a, **s))
    check_op(op, make_inputs(2, 75, 1, 1, 20, 17, edit=edit, decay=decay))
    assert taken
    assert set(taken) == {2 * 5}


@pytest.mark.parametrize("decay", DECAYS)
def test_segments_in_16_bits(decay, monkeypatch):
    monkeypatch.setattr(delta_rule_segments, "_LEAST_CHUNKS", 1)
    check_op(op, make_inputs(1, 260, 1, 1, 16, 16, decay=decay, dtype=torch.bfloat16))


def test_few_heads_and_long_sequences_are_cut():
    """So that 128 programs are at work, if segments have eight chunks, and there are four of them."""
    assert delta_rule_segments.segment_length(65536, 64, programs=16) == 65536 // 8
    assert delta_rule_segments.segment_length(65536, 64, programs=33) == 65536
    assert delta_rule_segments.segment_length(2048, 64, programs=1) == 512
    assert delta_rule_segments.segment_length(2047 - 64, 64, programs=1) == 2047 - 64
    assert delta_rule_segments.segment_length(0, 64, programs=1) == 0


@pytest.mark.parametrize("decay", DECAYS)
def test_a_sequence_is_its_parts_with_the_state_carried(decay):
    inputs = [t if t is None else t.detach() for t in make_inputs(1, 40, 1, 1, 8, 6, decay=decay)]
    whole, last = triton_op(*inputs)
    for cut in (1, 25):
        *tensors, state = inputs
        first, state = triton_op(*(t if t is None else t[:, :cut] for t in tensors), state)
        second, state = triton_op(*(t if t is None else t[:, cut:] for t in tensors), state)
        assert relative_error(torch.cat((first, second), 1), whole) < 1e-6
        assert relative_error(state, last) < 1e-6


def test_padding_changes_nothing_whatever_it_contains():
    inputs = make_inputs(2, 50, 1, 1, 8, 6)
    mask = torch.rand(2, 50) < 0.7
    with torch.no_grad():
        for t in inputs[:-1]:
            if t is not None:
                t[~mask] = torch.nan
    o, state = triton_op(*inputs, token_mask=mask)
    assert (o[~mask] == 0).all()
    grads = torch.autograd.grad(o.sum() + state.sum(), [t for t in inputs if t is not None])
    assert all(g.isfinite().all() for g in grads)
    wanted, last = op(*inputs, impl="torch", token_mask=mask)
    assert relative_error(o, wanted) < 1e-6
    assert relative_error(state, last) < 1e-6


def test_no_token_at_all():
    inputs = make_inputs(2, 0, 2, 2, 8, 6)
    o, state = triton_op(*inputs)
    assert o.shape == (2, 0, 2, 6)
    assert torch.equal(state, inputs[-1])
    (grad,) = torch.autograd.grad(state.sum(), inputs[-1])
    assert (grad == 1).all()
    assert delta_rule(*inputs[:3], return_state=False, impl="triton")[1] is None


def test_no_token_sees_a_later_one():
    inputs = [t if t is None else t.detach() for t in make_inputs(1, 70, 1, 1, 8, 6)]
    o, _ = triton_op(*inputs)
    for t in (5, 16, 40):
        changed = [x if x is None or x is inputs[-1] else x.clone() for x in inputs]
        for x in changed[:-1]:
            if x is not None:
                x[:, t:] *= 0.5
        later, _ = triton_op(*changed)
        assert torch.equal(later[:, :t], o[:, :t])
        assert not torch.equal(later[:, t:], o[:, t:])


def _alike(alike, beta, dtype):
    inputs = make_inputs(1, 130, 1, 1, 32, 16, decay="none", dtype=dtype)
    with torch.no_grad():
        inputs[1].copy_(F.normalize((1 - alike) * inputs[1].float() + alike * torch.ones(32) / 32**0.5, dim=-1))
        inputs[5].fill_(beta)
    return inputs


@pytest.mark.parametrize("beta", [1.0, 1.9, 2.0])
@pytest.mark.parametrize("alike", [0.98, 1.0])
def test_keys_that_are_alike(alike, beta):
    """(I + A)⁻¹ by a series of powers would be off by 1e10 here.

    A is float32, and what its rounding costs comes to 1.0e-5 in the worst of these; the recurrence errs by 8.5e-7.
    """
    check_op(op, _alike(alike, beta, torch.float32), factor=12)


@pytest.mark.parametrize(("beta", "alike", "bound"), [(1.0, 0.98, 0.01), (1.9, 0.98, 0.01), (2.0, 1.0, 0.06)])
def test_keys_that_are_alike_in_16_bits(beta, alike, bound):
    """What a triangle of float16 costs where its inverse is large: no tolerance of 16 bits holds at β = 2."""
    inputs = _alike(alike, beta, torch.bfloat16)
    exact = [t if t is None else t.detach().double() for t in inputs]
    for got, wanted in zip(triton_op(*inputs), op(*exact, impl="reference"), strict=True):
        assert relative_error(got, wanted) < bound


@pytest.mark.parametrize("decay", ["heads", "channels"])
@pytest.mark.parametrize("least", [-5.0, -50.0, -1e4, -torch.inf])
def test_decays_of_every_strength(decay, least):
    """Strong ones beside weak ones in a chunk; -inf forgets all."""
    inputs = make_inputs(1, 48, 1, 1, 8, 6, decay=decay)
    with torch.no_grad():
        inputs[3].mul_(1e-3)
        inputs[3][torch.rand(inputs[3].shape) < 0.1] = least
    if least == -torch.inf:
        inputs[3] = inputs[3].detach()
    check_op(op, inputs)


def test_magnitudes_that_float16_has_not():
    """bfloat16's range is float32's: what is formed in float16 inside is scaled."""
    for size, scaled in ((1e6, "q v initial_state"), (1e-9, "v initial_state")):
        inputs = make_inputs(1, 70, 1, 1, 16, 16, dtype=torch.bfloat16)
        with torch.no_grad():
            for name in scaled.split():
                inputs[NAMES.index(name)].mul_(size)
        check_op(op, inputs)


def test_dtypes_of_their_own():
    q, k, v, g, erase, beta, state = make_inputs(1, 40, 1, 1, 8, 6, dtype=torch.bfloat16)
    check_op(op, [q, k, v, g.detach().float().requires_grad_(), erase, beta.detach().float().requires_grad_(), state])


@pytest.mark.parametrize(
    ("decay", "packed", "cut"),
    [("none", False, False), ("heads", True, False), ("channels", False, False), ("heads", False, True)],
)
def test_opcheck(decay, packed, cut, monkeypatch):
    if cut:
        monkeypatch.setattr(delta_rule_segments, "_LEAST_CHUNKS", 1)
        monkeypatch.setattr(delta_rule_segments, "_LEAST_SEGMENTS", 2)
    length = 5 if decay == "channels" else 20
    inputs = make_inputs(1, length, 1, 1, 4, 3, decay=decay, edit="erase" if packed else "beta")
    flat = [t if t is None else t.detach().flatten(0, 1).requires_grad_() for t in inputs[:-1]]
    args = (*flat, inputs[-1], torch.tensor([0, length]) if packed else None, 0.5)
    utilities = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if decay != "channels":  # which are slow to interpret
        utilities.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.coterie.delta_rule_triton.default, args, test_utils=utilities)
    _, _, *kept = torch.ops.coterie.delta_rule_triton.default(*args)
    tensors = [t if t is None else t.detach() for t in (*args[:-1], *kept)]
    grads = (torch.randn_like(tensors[2]), torch.randn_like(tensors[6]))
    backward = torch.ops.coterie.delta_rule_triton_backward.default
    torch.library.opcheck(backward, (*grads, *tensors, 0.5), test_utils=utilities)


def test_compiles_into_one_graph():
    def loss(*inputs):
        o, state = triton_op(*inputs)
        return o.square().sum() + state.sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = make_inputs(1, 20, 1, 1, 8, 6)
    leaves = [t for t in inputs if t is not None]
    for wanted, got in zip(
        torch.autograd.grad(loss(*inputs), leaves), torch.autograd.grad(compiled(*inputs), leaves), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_bytes_kept_for_backward():
    """Inputs; 84 bytes a token and head of G and triangles in 16 bits."""
    inputs = make_inputs(1, 64, 2, 2, 8, 6, dtype=torch.bfloat16)
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        triton_op(*inputs)
    assert sum(saved.values()) == sum(t.nbytes for t in inputs if t is not None) + 64 * 2 * 84


def test_keys_too_wide_are_told():
    with pytest.raises(ValueError, match="keys may have 256 channels at most, got 257"):
        triton_op(*make_inputs(1, 5, 1, 1, 257, 2))
    good = dict(zip(NAMES, make_inputs(1, 20, 2, 2, 4, 3), strict=True))
    with pytest.raises(ValueError, match=r"beta must have shape \[B, L, H\]"):
        delta_rule(**{**good, "beta": torch.zeros(1, 20), "impl": "triton"})
    with pytest.raises(TypeError, match=r"impl='triton' computes in float16, bfloat16, float32, got torch.float64"):
        delta_rule(*(t.double() for t in make_inputs(1, 5, 1, 1, 4, 3)[:3]), impl="triton")


@pytest.mark.parametrize("packed", [False, True])
def test_slots_of_chunks_are_apart(packed):
    """Every chunk of every sequence has one of its own, and no more than are asked for."""
    lengths = [0, 7, 64, 65, 1, 0, 130] if packed else [70] * 4
    ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    slots = kernels.num_slots(ends[-1], len(lengths), packed, 64)
    used = [
        (start // 64 + i if packed else i * 2) + chunk
        for i, (start, length) in enumerate(zip(ends, lengths, strict=False))
        for chunk in range(-(-length // 64))
    ]
    assert len(set(used)) == len(used)
    assert max(used) < slots
