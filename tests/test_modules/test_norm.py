import pytest
import torch

from coterie.modules.norm import RMSNorm


def _formula(x, weight, eps):
    x = x.double()
    return weight.double() * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 5), (0, 4)])
def test_is_the_formula_values_and_gradients(shape):
    norm = RMSNorm(shape[-1], eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(shape, requires_grad=True)
    grad = torch.randn(shape)
    y, wanted = norm(x), _formula(x, norm.weight, 1e-5)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad(y, (x, norm.weight), grad)
    right = torch.autograd.grad(wanted, (x, norm.weight), grad.double())
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bf16_is_rounded_only_at_its_end(weight_dtype):
    norm = RMSNorm(256, dtype=weight_dtype)
    torch.nn.init.normal_(norm.weight)
    x = (torch.randn(64, 256) * 100).bfloat16()
    y = norm(x)
    assert y.dtype == torch.bfloat16
    wanted = _formula(x, norm.weight, 1e-6)
    # One rounding to bf16 (8 bits of mantissa) is at most 2⁻⁹ relative, 0.0017 in norm; two would be 0.0023.
    assert (y.double() - wanted).norm() / wanted.norm() < 2e-3


def test_float64_weights_keep_float64():
    norm = RMSNorm(8, dtype=torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(norm(x), _formula(x, norm.weight, 1e-6), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(norm, (x,))


def test_a_row_of_zeros_is_zero_with_a_finite_gradient():
    x = torch.zeros(2, 8, requires_grad=True)
    y = RMSNorm(8)(x)
    y.sum().backward()
    assert (y == 0).all()
    assert x.grad.isfinite().all()
