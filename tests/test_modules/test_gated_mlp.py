"""`GatedMLP`: its formula, its gradients, its init."""

import pytest
import torch
import torch.nn.functional as F

from _check import relative_error
from coterie.modules import GatedMLP


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(9,), (5, 9), (2, 3, 9), (0, 9)])
def test_is_its_formula(bias, shape):
    mlp = GatedMLP(9, 14, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    y = mlp(x)
    w1, w2 = mlp.gate_up_proj.weight, mlp.down_proj.weight
    hidden = x @ w1.t() + (mlp.gate_up_proj.bias if bias else 0)
    wanted = (F.silu(hidden[..., :14]) * hidden[..., 14:]) @ w2.t() + (mlp.down_proj.bias if bias else 0)
    torch.testing.assert_close(y, wanted)
    tensors = (x, *mlp.parameters())
    direction = torch.randn_like(y)
    got, right = (torch.autograd.grad(out, tensors, direction, retain_graph=True) for out in (y, wanted))
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("activation", "width"), [("swiglu", 10), ("geglu", 10), ("relu2", 5), ("gelu", 5)])
def test_width_follows_the_gate(activation, width):
    mlp = GatedMLP(4, 5, activation=activation)
    assert mlp.gate_up_proj.weight.shape == (width, 4)
    assert mlp.down_proj.weight.shape == (4, 5)
    assert torch.autograd.gradcheck(mlp.double(), torch.randn(3, 4, dtype=torch.float64, requires_grad=True))


def test_bf16_errs_as_bf16_does():
    mlp = GatedMLP(96, 64)
    x = torch.randn(128, 96)
    mlp, x = mlp.bfloat16(), x.bfloat16()
    y = mlp(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, mlp.double()(x.double())) < 5e-3


def test_init():
    mlp = GatedMLP(300, 200, bias=True)
    mlp.reset_parameters(0.5, down_std=0.1)
    assert mlp.gate_up_proj.weight.std().item() == pytest.approx(0.5, rel=0.02)
    assert mlp.down_proj.weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert not mlp.gate_up_proj.bias.any()
    assert not mlp.down_proj.bias.any()
    mlp.reset_parameters()
    assert mlp.down_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
