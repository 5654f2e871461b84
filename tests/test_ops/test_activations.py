"""Activations: against their formulas in float64, and the gradient formed by hand against autograd's."""

import math
from types import SimpleNamespace

import pytest
import torch

from _check import relative_error
from coterie.ops import activation_is_gated, apply_activation
from coterie.ops.activations import activation_and_gradient

GPT_OSS = "swiglu(alpha=1.702, limit=7.0, up_offset=1.0)"


def _silu(x):
    return x / (1 + (-x).exp())


def _gelu(x):
    return x * (1 + torch.special.erf(x / math.sqrt(2))) / 2


def _gelu_tanh(x):
    return x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh()) / 2


def _relu(x):
    return x * (x > 0)


FORMULAS = {
    "swiglu": lambda g, u: _silu(g) * u,
    "geglu": lambda g, u: _gelu(g) * u,
    "geglu_tanh": lambda g, u: _gelu_tanh(g) * u,
    "reglu": lambda g, u: _relu(g) * u,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "relu2": lambda h: _relu(h) ** 2,
    "silu(alpha=1.702)": lambda h: h / (1 + (-1.702 * h).exp()),
    "swiglu(alpha=1.5)": lambda g, u: g / (1 + (-1.5 * g).exp()) * u,
    "swiglu(limit=2.0)": lambda g, u: _silu(g.clamp(max=2)) * u.clamp(-2, 2),
    "geglu(limit=1.0, up_offset=0.5)": lambda g, u: _gelu(g.clamp(max=1)) * (u.clamp(-1, 1) + 0.5),
    "reglu(up_offset=-1)": lambda g, u: _relu(g) * (u - 1),
    GPT_OSS: lambda g, u: g.clamp(max=7) / (1 + (-1.702 * g.clamp(max=7)).exp()) * (u.clamp(-7, 7) + 1),
}


@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("shape", [(9, 14), (2, 3, 2), (0, 4), (8,)])
def test_is_its_formula(activation, shape):
    hidden = 4 * torch.randn(shape, dtype=torch.float64)
    gated = activation_is_gated(activation)
    assert gated == (FORMULAS[activation].__code__.co_argcount == 2)
    wanted = FORMULAS[activation](*hidden.chunk(2, -1)) if gated else FORMULAS[activation](hidden)
    torch.testing.assert_close(apply_activation(hidden, activation), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_by_hand_is_autograds(activation, dtype):
    """Also beyond and at the clamps, and for transposed memory and expanded gradients."""
    hidden = (4 * torch.randn(16, 30)).to(dtype)
    hidden[0, :8] = torch.tensor([7.0, -7.0, 2.0, -2.0, 1.0, -1.0, 0.0, -0.0])
    hidden[0, -8:] = torch.tensor([7.0, -7.0, 2.0, -2.0, 1.0, -1.0, 0.0, 3.0])
    hidden = hidden.t().contiguous().t()
    exact = hidden.clone().double().requires_grad_()
    y = apply_activation(exact, activation)
    dense = torch.randn(y.shape).to(dtype)
    for grad in (dense, dense[:1].expand(y.shape)):
        (wanted,) = torch.autograd.grad(y, exact, grad.double(), retain_graph=True)
        keep = hidden.clone()
        got_y, got = activation_and_gradient(hidden, grad, activation)
        tolerance = {torch.float64: 1e-14, torch.float32: 3e-7, torch.bfloat16: 5e-3}[dtype]
        assert got.dtype == got_y.dtype == dtype
        assert relative_error(got_y, y) < tolerance
        assert relative_error(got, wanted) < tolerance
        assert torch.equal(hidden, keep)


@pytest.mark.parametrize("activation", FORMULAS)
def test_gradcheck(activation):
    hidden = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: apply_activation(h, activation), hidden)
    assert torch.autograd.gradgradcheck(lambda h: apply_activation(h, activation), hidden)


def test_is_the_gate_of_gpt_oss():
    pytest.importorskip("transformers")
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    theirs = SimpleNamespace(alpha=1.702, limit=7.0)
    interleaved = 6 * torch.randn(20, 32)
    wanted = GptOssExperts._apply_gate(theirs, interleaved)
    hidden = torch.cat((interleaved[:, ::2], interleaved[:, 1::2]), 1)  # gate first, then up
    torch.testing.assert_close(apply_activation(hidden, GPT_OSS), wanted)


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        ("swish", r"activation must be one of swiglu, geglu, .*, got 'swish'"),
        ("", r"activation must be one of"),
        ("swiglu(alpha)", r"activation 'swiglu\(alpha\)' must read like"),
        ("swiglu(1.7)", r"must read like .*: parameters need names"),
        ("swiglu(alpha='a')", r"must read like"),
        ("swiglu(alpha=1.7", r"must read like"),
        ("swiglu(alpha=__import__('os'))", r"must read like"),
        ("swiglu(beta=1)", r"activation 'swiglu' takes \['alpha', 'limit', 'up_offset'\], got \['beta'\]"),
        ("geglu(alpha=1)", r"activation 'geglu' takes \['limit', 'up_offset'\], got \['alpha'\]"),
        ("relu2(limit=1)", r"activation 'relu2' takes no parameters, got \['limit'\]"),
        ("silu(limit=1)", r"activation 'silu' takes \['alpha'\], got \['limit'\]"),
        ("swiglu(**{'alpha': 1})", r"must read like|takes"),
        ("swiglu(alpha=1) + 1", r"must read like .*: one name, one pair of brackets"),
        ("swiglu(alpha=1)(alpha=2)", r"must read like"),
        ("swiglu.x(alpha=2)", r"activation must be one of"),
    ],
)
def test_what_cannot_be_read_is_refused(activation, message):
    with pytest.raises(ValueError, match=message):
        activation_is_gated(activation)
