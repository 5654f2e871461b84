import pytest
import torch

from coterie.modules.rotary import RotaryEmbedding, apply_rotary


def _by_complex_numbers(x, positions, theta):
    """Channel i and i + P/2 as one complex number, times e^(i · position · theta^(-2i/P))."""
    half = x.shape[-1] // 2
    frequencies = theta ** -(torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones(()).double(), positions.double()[..., None] * frequencies)
    z = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn.unsqueeze(-2)
    return torch.cat((z.real, z.imag), dim=-1)


@pytest.mark.parametrize("positions", [torch.arange(9), torch.randint(0, 50, (3, 9))])
def test_is_a_rotation_of_pairs(positions):
    x = torch.randn(3, 9, 4, 16)
    y = apply_rotary(x, RotaryEmbedding(16, 500.0)(positions))
    torch.testing.assert_close(y.double(), _by_complex_numbers(x, positions, 500.0), rtol=1e-5, atol=1e-5)


def test_interleaved_pairs_are_neighbours():
    x = torch.randn(2, 9, 3, 20)
    rotary = RotaryEmbedding(16, 500.0)(torch.arange(9))
    y = apply_rotary(x, rotary, interleaved=True)
    order = torch.arange(16).reshape(8, 2).T.flatten()  # evens, then odds
    assert torch.equal(y[..., order], apply_rotary(x[..., order], rotary))
    assert torch.equal(y[..., 16:], x[..., 16:])


def test_products_depend_on_distance_alone():
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)
    rotary = RotaryEmbedding(32)

    def product(i, j):
        turned = [apply_rotary(x, rotary(torch.tensor([at]))) for x, at in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(5, 2), product(105, 102), rtol=1e-4, atol=1e-4)
    assert abs(product(5, 2) - product(5, 3)) > 1e-3


def test_bf16_in_bf16_out_with_float32_angles():
    x = torch.randn(1, 4, 2, 8).bfloat16()
    positions = torch.arange(1001, 1005)  # bf16 would round these all to 1000 or 1008
    cos, sin = RotaryEmbedding(8)(positions)
    assert cos.dtype == sin.dtype == torch.float32
    y = apply_rotary(x, (cos, sin))
    assert y.dtype == torch.bfloat16
    wanted = _by_complex_numbers(x, positions, 10000.0)
    assert (y.double() - wanted).norm() / wanted.norm() < 2e-3


@pytest.mark.parametrize(("head_dim", "theta", "named"), [(7, 1e4, "head_dim"), (0, 1e4, "head_dim"), (8, 0, "theta")])
def test_wrong_arguments_are_named(head_dim, theta, named):
    with pytest.raises(ValueError, match=named):
        RotaryEmbedding(head_dim, theta)
