import pytest
import torch

from coterie.modules.norm import RMSNorm, unit_norm


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 8), (700, 8)])
def test_zero_centered_is_one_plus_the_weight(dtype, shape):
    norm = RMSNorm(8, zero_centered=True, dtype=dtype)
    assert (norm.weight == 0).all()
    torch.nn.init.normal_(norm.weight, std=0.3)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    y, wanted = norm(x), _formula(x, 1 + norm.weight.double(), 1e-6)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-3  # rounded once
    assert (y.double() - wanted).norm() / wanted.norm() < tolerance
    got = torch.autograd.grad(y, (x, norm.weight), torch.ones_like(y))
    right = torch.autograd.grad(wanted, (x, norm.weight), torch.ones_like(wanted))
    for a, b in zip(got, right, strict=True):
        assert (a.double() - b.double()).norm() / b.double().norm() < 2 * tolerance


def test_unit_norm_has_length_one_and_a_finite_gradient_at_zero():
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    y = unit_norm(x)
    torch.testing.assert_close(y, x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt(), rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(unit_norm, (x,))
    zeros = torch.zeros(2, 7, requires_grad=True)
    unit_norm(zeros).sum().backward()
    torch.testing.assert_close(zeros.grad, torch.full((2, 7), 1e3))
    half = torch.randn(50, 64).bfloat16()
    assert (unit_norm(half).double() - unit_norm(half.double())).norm() / 50**0.5 < 2e-3
