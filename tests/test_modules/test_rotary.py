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


ORIGINAL = "original_max_position_embeddings"
YARNS = [
    {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, ORIGINAL: 4096},  # gpt_oss
    {"factor": 4.0, ORIGINAL: 128},
    {"factor": 4.0, ORIGINAL: 128, "truncate": False},
    {"factor": 40.0, ORIGINAL: 4096, "beta_fast": 8.0, "beta_slow": 0.5, "attention_factor": 0.7},
    {"factor": 1.0, ORIGINAL: 2048},
    {"factor": 0.5, ORIGINAL: 2048},
    {"factor": 16.0, ORIGINAL: 5},  # no pair turns once over it
    {"factor": 2.0, ORIGINAL: 10**9, "truncate": True},  # all turn more often than beta_fast
]


def _from_transformers(head_dim, theta, kind, parameters, seq_len=None, fraction=1.0):
    """Its frequencies and its factor of cosines and sines."""
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": kind, "rope_theta": theta, "partial_rotary_factor": fraction, **parameters}
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=64, rope_parameters=rope)
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len)


def _compare(rotary, positions, frequencies, factor):
    cos, sin = rotary(positions)
    angles = positions[:, None].double() * frequencies.double()
    tolerance = {"rtol": 0, "atol": 5e-7 * positions.max().item()}  # of the angles, in float32
    torch.testing.assert_close(cos.double(), factor * angles.cos(), **tolerance)
    torch.testing.assert_close(sin.double(), factor * angles.sin(), **tolerance)


@pytest.mark.parametrize("parameters", YARNS)
@pytest.mark.parametrize(("head_dim", "theta"), [(64, 150000.0), (16, 1e4), (6, 50.0)])
def test_yarn_is_that_of_transformers(parameters, head_dim, theta):
    spec = ", ".join(f"{name}={value}" for name, value in parameters.items())
    rotary = RotaryEmbedding(head_dim, theta, f"yarn({spec})")
    for fraction in (1.0, 0.5):
        frequencies, factor = _from_transformers(int(head_dim / fraction), theta, "yarn", parameters, None, fraction)
        assert len(frequencies) == head_dim // 2
        _compare(rotary, torch.tensor([0, 1, 7, 100]), frequencies, factor)


def test_yarn_leaves_fast_pairs_alone_and_slows_down_slow_ones_by_the_factor():
    positions = torch.arange(1, 50)
    plain = RotaryEmbedding(64, 1e4)(positions)
    slow = RotaryEmbedding(64, 1e4, "linear(factor=8.0)")(positions)
    yarn = RotaryEmbedding(64, 1e4, "yarn(factor=8.0, original_max_position_embeddings=4096, attention_factor=1.0)")
    got = yarn(positions)
    for i in (0, 1):
        torch.testing.assert_close(got[i][:, :10], plain[i][:, :10], rtol=0, atol=0)
        torch.testing.assert_close(got[i][:, -8:], slow[i][:, -8:], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("head_dim", "theta"), [(64, 1e4), (6, 50.0), (4, 1e4)])
def test_ntk_is_a_larger_base(head_dim, theta):
    positions = torch.tensor([0, 1, 7, 100])
    rotary = RotaryEmbedding(head_dim, theta, "ntk(factor=3.0)")
    # transformers stretches as a text grows: a factor of 2 at twice the length is 3, its formula says.
    _compare(rotary, positions, *_from_transformers(head_dim, theta, "dynamic", {"factor": 2.0}, seq_len=128))
    larger = RotaryEmbedding(head_dim, theta * 3.0 ** (head_dim / (head_dim - 2)))
    for got, wanted in zip(rotary(positions), larger(positions), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=5e-5)
    slow = RotaryEmbedding(head_dim, theta, "linear(factor=3.0)")
    torch.testing.assert_close(rotary(positions)[0][:, -1], slow(positions)[0][:, -1], rtol=0, atol=5e-5)


def test_ntk_of_the_one_pair_that_no_base_changes():
    positions = torch.arange(9)
    got, wanted = (RotaryEmbedding(2, 1e4, scaling)(positions) for scaling in ("ntk(factor=3.0)", None))
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])
