"""The causal convolution against torch's conv1d, and the laws of padding, packing and carrying on."""

import pytest
import torch
import torch.nn.functional as F

from coterie.ops import short_conv

B, L, CHANNELS = 3, 11, 5
F64 = {"dtype": torch.float64}
ROUNDING = {"rtol": 1e-14, "atol": 1e-15}  # torch fuses multiply and add in whole vectors, not in what is left of a row


def parts(width=4, **settings):
    """x, weight, bias and a state, requiring gradients."""
    shapes = (B, L, CHANNELS), (CHANNELS, width), (CHANNELS,), (B, width - 1, CHANNELS)
    return [torch.randn(shape, **{**F64, **settings}).requires_grad_() for shape in shapes]


def mask(kind):
    """[B, L] bool."""
    positions = torch.arange(L)
    if kind == "left":
        return positions >= torch.tensor([[0], [4], [10]])
    if kind == "right":
        return positions < torch.tensor([[11], [6], [0]])
    return torch.tensor([[1, 0, 0, 1, 1, 0, 1, 1, 1, 0, 1], [0] * 11, [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0]]).bool()


def plain(x, weight, bias, state):
    """By torch, which pads on both sides."""
    rows = torch.cat((state, x), 1)
    return F.conv1d(rows.mT, weight.unsqueeze(1), bias, groups=weight.shape[0]).mT


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_is_torchs_convolution_values_and_gradients(width, activation):
    x, weight, bias, state = parts(width)
    got, last = short_conv(x, weight, bias, activation=activation, initial_state=state)
    wanted = plain(x, weight, bias, state)
    wanted = F.silu(wanted) if activation else wanted
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(last, torch.cat((state, x), 1)[:, L:])
    grad, leaves = torch.randn_like(got), (x, weight, bias) + ((state,) if width > 1 else ())
    for a, b in zip(
        torch.autograd.grad(got, leaves, grad, retain_graph=True),
        torch.autograd.grad(wanted, leaves, grad, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    begun = short_conv(x, weight, activation=activation)[0]
    wanted = plain(x, weight, None, torch.zeros_like(state))
    torch.testing.assert_close(begun, F.silu(wanted) if activation else wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("case", ["plain", "masked", "packed", "packed and masked"])
def test_gradcheck(width, case):
    x, weight, bias, state = parts(width)
    settings = {}
    if "masked" in case:
        settings["token_mask"] = mask("inside")
    if "packed" in case:
        x = x.detach()[:1].requires_grad_()
        settings["cu_seqlens"] = torch.tensor([0, 4, 4, L])
        if "masked" in case:
            settings["token_mask"] = mask("inside")[:1]

    def fn(x, weight, bias, state):
        return short_conv(x, weight, bias, activation="silu", initial_state=state, **settings)

    assert torch.autograd.gradcheck(fn, (x, weight, bias, state))


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("kind", ["left", "right", "inside"])
def test_padding_is_as_if_it_were_not_there(width, kind):
    x, weight, bias, state = (t.detach() for t in parts(width))
    token_mask = mask(kind)
    noise = x.masked_fill(~token_mask.unsqueeze(-1), float("nan"))
    y, last = short_conv(noise, weight, bias, activation="silu", initial_state=state, token_mask=token_mask)
    assert (y[~token_mask] == 0).all()
    for b in range(B):
        alone = x[b : b + 1, token_mask[b]]
        wanted, wanted_last = short_conv(alone, weight, bias, activation="silu", initial_state=state[b : b + 1])
        torch.testing.assert_close(y[b, token_mask[b]], wanted[0], **ROUNDING)
        assert torch.equal(last[b : b + 1], wanted_last)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_packed_equals_separate(width, masked):
    bounds = [0, 5, 5, 6, 11]
    x, weight, bias, _ = (t.detach() for t in parts(width))
    x, token_mask = x[:1], mask("inside")[:1] if masked else None
    states = torch.randn(4, width - 1, CHANNELS, **F64)
    settings = {"activation": "silu"}
    y, last = short_conv(
        x,
        weight,
        bias,
        initial_state=states,
        cu_seqlens=torch.tensor(bounds),
        token_mask=token_mask,
        **settings,
    )
    for i in range(4):
        at = slice(bounds[i], bounds[i + 1])
        own = None if token_mask is None else token_mask[:, at]
        wanted, wanted_last = short_conv(
            x[:, at], weight, bias, initial_state=states[i : i + 1], token_mask=own, **settings
        )
        torch.testing.assert_close(y[:, at], wanted, **ROUNDING)
        assert torch.equal(last[i : i + 1], wanted_last)


@pytest.mark.parametrize("splits", [(11,), (1,) * 11, (2, 0, 1, 5, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_split_and_carried_on_equals_whole(splits, masked):
    x, weight, bias, state = (t.detach() for t in parts())
    token_mask = mask("inside") if masked else None
    wanted, wanted_last = short_conv(x, weight, bias, initial_state=state, token_mask=token_mask)
    pieces, start = [], 0
    for length in splits:
        at = slice(start, start + length)
        own = None if token_mask is None else token_mask[:, at]
        y, state = short_conv(x[:, at], weight, bias, initial_state=state, token_mask=own)
        pieces.append(y)
        start += length
    torch.testing.assert_close(torch.cat(pieces, 1), wanted, **ROUNDING)
    assert torch.equal(state, wanted_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_round_once(dtype):
    x, weight, bias, state = (t.detach() for t in parts(dtype=dtype))
    got, last = short_conv(x, weight, bias, activation="silu", initial_state=state)
    wanted = F.silu(plain(*(t.double() for t in (x, weight, bias, state))))
    assert (got.dtype, last.dtype) == (dtype, dtype)
    assert (got - wanted).norm() / wanted.norm() < torch.finfo(dtype).eps / 2


def test_compiles_in_one_piece():
    x, weight, bias, state = parts(dtype=torch.float32)
    token_mask = mask("inside")

    def fn(x, weight, bias, state):
        return short_conv(x, weight, bias, activation="silu", initial_state=state, token_mask=token_mask)

    got = torch.compile(fn, fullgraph=True, backend="aot_eager")(x, weight, bias, state)
    for a, b in zip(got, fn(x, weight, bias, state), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 4)}, ValueError, r"x must have shape \[B, L, channels\], got \(3, 4\)"),
        ({"weight": torch.zeros(4, 3)}, ValueError, r"weight must have shape \[channels, W\] = \[5, W\], got \(4, 3\)"),
        ({"weight": torch.zeros(5, 0)}, ValueError, "weight must be at least one token wide"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \[channels\]"),
        ({"activation": "relu"}, ValueError, "activation must be None or 'silu', got 'relu'"),
        (
            {"initial_state": torch.zeros(2, 2, 5)},
            ValueError,
            r"initial_state must have .* \[2, 3, 5\], got \(2, 2, 5\)",
        ),
        ({"token_mask": torch.ones(2, 6)}, TypeError, "token_mask must be torch.bool, got torch.float32"),
        (
            {"x": torch.zeros(1, 6, 5), "cu_seqlens": torch.tensor([0, 4])},
            ValueError,
            r"cu_seqlens must go from 0 to L = 6 and never down, got \[0, 4\]",
        ),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "cu_seqlens needs B = 1 .* got B = 2, 2 bounds"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {"x": torch.zeros(2, 6, 5), "weight": torch.zeros(5, 4), **change}
    with pytest.raises(error, match=message):
        short_conv(arguments.pop("x"), arguments.pop("weight"), **arguments)
