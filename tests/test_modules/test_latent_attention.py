import pytest
import torch

from coterie.modules.attention import Attention
from coterie.modules.latent_attention import LatentAttention
from coterie.modules.rotary import RotaryEmbedding

D, H, P, R = 24, 4, 10, 4  # R: rotary channels
OPTIONS = [
    {},
    {"query_rank": 5},
    {"query_rank": 5, "qkv_bias": True, "output_bias": True, "rotary_interleaved": True},
    {"value_dim": 13, "scale": 0.7, "rotary_interleaved": True},
    {"kv_rank": 2, "value_dim": 1},
]


def _layer(**options):
    torch.manual_seed(0)
    layer = LatentAttention(D, H, **{"head_dim": P, "rotary_dim": R, "kv_rank": 7, **options})
    layer.reset_parameters(std=0.4)
    for name, parameter in layer.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return layer


def _rotary(length):
    return RotaryEmbedding(R, 50.0)(torch.arange(length))


def _turn(x, rotary, interleaved):
    """One vector per position, [B, L, R], by complex numbers."""
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    z = torch.complex(first, second) * torch.complex(*(part.double() for part in rotary))
    return torch.cat((z.real, z.imag), dim=-1)  # in whatever order: queries and keys agree


def _norm(x, weight):
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def _plain(layer, x, rotary, token_mask=None, scale=P**-0.5):
    """The paper's equations (37) to (47) head by head, in float64; what padding sees is zero."""
    w = {name: parameter.double() for name, parameter in layer.named_parameters()}
    zero = x.new_zeros(())
    if token_mask is not None:
        x = torch.where(token_mask[..., None], x, zero)
    if layer.query_rank is None:
        queries = x @ w["q_proj.weight"].T
    else:
        compressed = x @ w["q_a_proj.weight"].T + w.get("q_a_proj.bias", zero)
        queries = _norm(compressed, w["q_norm.weight"]) @ w["q_b_proj.weight"].T
    down = x @ w["kv_a_proj.weight"].T + w.get("kv_a_proj.bias", zero)
    latent = _norm(down[..., : layer.kv_rank], w["kv_norm.weight"])
    shared_key = _turn(down[..., layer.kv_rank :], rotary, layer.rotary_interleaved)
    seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    if token_mask is not None:
        seen = seen & token_mask[:, None, :]
    heads = []
    for q, up in zip(queries.chunk(H, -1), w["kv_b_proj.weight"].chunk(H), strict=True):
        key, value = latent @ up[: P - R].T, latent @ up[P - R :].T
        scores = q[..., : P - R] @ key.mT + _turn(q[..., P - R :], rotary, layer.rotary_interleaved) @ shared_key.mT
        heads.append((scale * scores).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0) @ value)
    y = torch.cat(heads, -1)
    if token_mask is not None:
        y = torch.where(token_mask[..., None], y, zero)
    return y @ w["o_proj.weight"].T + w.get("o_proj.bias", zero)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_is_the_papers_formula_values_and_gradients(options, masked, dtype, tolerance):
    layer = _layer(**options).to(dtype)
    x = torch.randn(3, 11, D, dtype=dtype, requires_grad=True)
    token_mask = torch.rand(3, 11) < 0.6 if masked else None
    rotary = _rotary(11)
    got = layer(x, rotary, token_mask=token_mask)
    wanted = _plain(layer, x.double(), rotary, token_mask, options.get("scale", P**-0.5))
    assert _error(got, wanted) < tolerance
    grad = torch.randn_like(got)
    leaves = {"x": x, **dict(layer.named_parameters())}
    gradients = torch.autograd.grad(got, leaves.values(), grad)
    right = torch.autograd.grad(wanted, leaves.values(), grad.double())
    for name, a, b in zip(leaves, gradients, right, strict=True):
        assert _error(a, b) < tolerance, name


def _error(got, wanted):
    return (got - wanted).norm() / wanted.norm()


def test_gradcheck():
    layer = _layer(query_rank=5, qkv_bias=True, rotary_interleaved=True).double()
    x = torch.randn(2, 4, D, dtype=torch.float64, requires_grad=True)
    token_mask = torch.tensor([[True] * 4, [False, True, True, False]])
    torch.autograd.gradcheck(lambda x: layer(x, _rotary(4), token_mask=token_mask), (x,))


# --- the cache


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("splits", [(12,), (1,) * 12, (5, 1, 1, 3, 2), (8, 4)])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_cached_equals_whole(options, splits, masked):
    layer = _layer(**options)
    x = torch.randn(3, 12, D)
    token_mask = torch.rand(3, 12) < 0.7 if masked else None
    if masked:
        token_mask[0, :9] = False
        x = torch.where(token_mask[..., None], x, float("nan"))
    cache = layer.new_cache(3, 12)
    cos, sin = _rotary(12)
    parts, start = [], 0
    for length in splits:
        at = slice(start, start + length)
        step_mask = None if token_mask is None else token_mask[:, at]
        parts.append(layer(x[:, at], (cos[at], sin[at]), token_mask=step_mask, cache_layer=cache))
        start += length
    wanted = layer(x, (cos, sin), token_mask=token_mask)
    torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("added", [1, 3, 9])
@pytest.mark.parametrize("masked", [False, True])
def test_absorbed_equals_expanded_in_float64(added, masked):
    layer = _layer().double()
    plain, turned = (torch.randn(2, added, H, width, dtype=torch.float64) for width in (P - R, R))
    rows = torch.randn(2, 9, 7 + R, dtype=torch.float64)
    key_mask = torch.rand(2, 9) < 0.6 if masked else None
    got = layer._absorbed(plain, turned, rows.unsqueeze(1), key_mask)
    wanted = layer._expanded(plain, turned, rows, key_mask)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_step_reads_the_cache_as_it_is(monkeypatch):
    """No key or value is made, and what comes first, or is long, makes them once."""
    layer = _layer(kv_rank=40)
    expanded, forward = [], layer.kv_b_proj.forward
    monkeypatch.setattr(layer.kv_b_proj, "forward", lambda x: (expanded.append(x.shape[1]), forward(x))[1])
    cache = layer.new_cache(2, 20)
    cos, sin = _rotary(20)
    for at in (slice(0, 8), slice(8, 9), slice(9, 10), slice(10, 20)):
        layer(torch.randn(2, at.stop - at.start, D), (cos[at], sin[at]), cache_layer=cache)
    assert expanded == [8, 20]


class _Adapted(torch.nn.Linear):
    """As adapters are: the weight is not all there is."""

    def forward(self, x):
        return super().forward(x) + x.sum(-1, keepdim=True)


@pytest.mark.parametrize("adapter", ["hook", "module"])
@torch.no_grad()
def test_a_step_heeds_an_adapter(adapter):
    layer = _layer()
    if adapter == "hook":
        layer.kv_b_proj.register_forward_hook(lambda _, inputs, y: y + inputs[0].sum(-1, keepdim=True))
    else:
        plain = layer.kv_b_proj
        layer.kv_b_proj = _Adapted(plain.in_features, plain.out_features, bias=False)
        layer.kv_b_proj.weight = plain.weight
    x, cache = torch.randn(2, 6, D), layer.new_cache(2, 6)
    cos, sin = _rotary(6)
    steps = [layer(x[:, i : i + 1], (cos[i : i + 1], sin[i : i + 1]), cache_layer=cache) for i in range(6)]
    torch.testing.assert_close(torch.cat(steps, 1), layer(x, (cos, sin)), rtol=1e-4, atol=1e-5)


def test_which_way_costs_less_is_that_of_the_products():
    layer = LatentAttention(8, 3, head_dim=12, rotary_dim=4, kv_rank=16, value_dim=6, device="meta")
    for before in (0, 1, 5, 100):
        for added in (1, 2, 7, 40):
            seen = before + added
            expanded = seen * 16 * (8 + 6) + added * seen * (12 + 6)
            absorbed = added * 16 * (8 + 6) + added * seen * (16 + 4 + 16)
            assert layer._absorbs(before, added) == (absorbed < expanded)


def test_cache_is_the_latent_and_one_rotary_key():
    layer = _layer()
    cache = layer.new_cache(3, 50)
    assert cache.nbytes == 3 * 50 * (7 + R) * 4
    assert layer.new_cache(3, 50, dtype=torch.bfloat16).nbytes == 3 * 50 * (7 + R) * 2
    assert Attention(D, H, head_dim=P).new_cache(3, 50).nbytes == 3 * 50 * (2 * H * P) * 4
    x = torch.randn(3, 6, D)
    place = cache.keys.data_ptr()
    with torch.no_grad():
        layer(x, _rotary(6), token_mask=torch.ones(3, 6, dtype=torch.bool), cache_layer=cache)
        latent = layer.kv_norm(layer.kv_a_proj(x)[..., :7])
    torch.testing.assert_close(cache.keys[:, 0, :6, :7], latent)
    assert (cache.keys.data_ptr(), cache.length) == (place, 6)
    assert cache.nbytes == 3 * 50 * ((7 + R) * 4 + 1)
    with pytest.raises(ValueError, match=r"holds 6 of at most 50 .* 45 more came"), torch.no_grad():
        layer(torch.randn(3, 45, D), _rotary(45), cache_layer=cache)
    with pytest.raises(ValueError, match="no_grad"):
        layer(x, _rotary(6), cache_layer=cache)


# --- laws


@pytest.mark.parametrize("bias", [False, True])
def test_content_of_padding_cannot_matter(bias):
    layer = _layer(query_rank=5, qkv_bias=bias, output_bias=bias)
    x = torch.randn(3, 10, D)
    token_mask = torch.rand(3, 10) < 0.6
    token_mask[0] = False  # a row of nothing but padding
    outputs, gradients = [], []
    for padding in (0.0, 1e4, float("nan")):
        filled = torch.where(token_mask[..., None], x, padding).requires_grad_()
        y = layer(filled, _rotary(10), token_mask=token_mask)
        gradients.append(torch.autograd.grad(y[token_mask].square().sum(), [filled, *layer.parameters()]))
        outputs.append(y)
    assert outputs[0].isfinite().all()
    for y, gradient in zip(outputs[1:], gradients[1:], strict=True):
        assert torch.equal(y, outputs[0])
        assert all(torch.equal(a, b) for a, b in zip(gradient, gradients[0], strict=True))
    assert (gradients[0][0][~token_mask] == 0).all()
    if not bias:
        assert (outputs[0][~token_mask] == 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_equals_its_absence(side):
    layer = _layer()
    x, padding = torch.randn(1, 6, D), torch.randn(1, 5, D)
    parts = (padding, x) if side == "left" else (x, padding)
    token_mask = torch.zeros(1, 11, dtype=torch.bool)
    kept = slice(5, None) if side == "left" else slice(None, 6)
    token_mask[:, kept] = True
    y = layer(torch.cat(parts, 1), _rotary(11), token_mask=token_mask)
    torch.testing.assert_close(y[:, kept], layer(x, _rotary(6)), rtol=1e-4, atol=1e-5)


def test_causal():
    layer = _layer()
    x = torch.randn(1, 8, D)
    changed = x.clone()
    changed[:, 5] += 1
    before, after = layer(x, _rotary(8)), layer(changed, _rotary(8))
    assert torch.equal(before[:, :5], after[:, :5])
    assert ((before - after)[:, 5:].abs().amax(-1) > 1e-4).all()


def test_interleaving_is_an_order_of_rows():
    """Rows of the two projections to rotary channels, permuted, undo it."""
    layer = _layer(qkv_bias=True, rotary_interleaved=True)
    other = _layer(qkv_bias=True)
    order = torch.tensor([0, 2, 1, 3])  # evens, then odds
    state = layer.state_dict()
    queries = state["q_proj.weight"].unflatten(0, (H, P))
    state["q_proj.weight"] = torch.cat((queries[:, :-R], queries[:, -R:][:, order]), 1).flatten(0, 1)
    for name in ("kv_a_proj.weight", "kv_a_proj.bias"):
        state[name] = torch.cat((state[name][:-R], state[name][-R:][order]))
    other.load_state_dict(state)
    x = torch.randn(2, 9, D)
    torch.testing.assert_close(other(x, _rotary(9)), layer(x, _rotary(9)), rtol=1e-5, atol=1e-6)
    assert _error(_layer(qkv_bias=True)(x, _rotary(9)), layer(x, _rotary(9))) > 1e-2


@torch.no_grad()
def test_bf16_against_float32():
    layer = _layer(query_rank=5)
    x = torch.randn(2, 33, D)
    wanted = layer(x, _rotary(33))
    layer.bfloat16()
    got = layer(x.bfloat16(), _rotary(33))
    assert got.dtype == torch.bfloat16
    assert _error(got.float(), wanted) < 1.5e-2
    cache = layer.new_cache(2, 33)
    cos, sin = _rotary(33)
    steps = [layer(x[:, i : i + 1].bfloat16(), (cos[i : i + 1], sin[i : i + 1]), cache_layer=cache) for i in range(33)]
    assert _error(torch.cat(steps, 1).float(), wanted) < 1.5e-2


def test_initial_weights_follow_the_rule():
    layer = LatentAttention(128, 8, head_dim=48, rotary_dim=16, kv_rank=64, query_rank=96, qkv_bias=True)
    layer.reset_parameters(0.03, 0.01)
    for name, parameter in layer.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            wanted = 0.01 if "o_proj" in name else 0.03
            assert abs(parameter.std().item() / wanted - 1) < 5 / (2 * parameter.numel()) ** 0.5, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotary_dim": 3}, "rotary_dim must be even, positive and less than head_dim = 10, got 3"),
        ({"rotary_dim": 10}, "rotary_dim .* got 10"),
        ({"rotary_dim": 0}, "rotary_dim .* got 0"),
        ({"kv_rank": 0}, "kv_rank must be at least 1, got 0"),
        ({"query_rank": 0}, "query_rank must be at least 1, got 0"),
        ({"value_dim": -1}, "value_dim must be at least 1, got -1"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        _layer(**options)


def test_a_rotary_of_another_width_is_named():
    with pytest.raises(ValueError, match="rotary must be of rotary_dim = 4 channels, got 10"):
        _layer()(torch.randn(1, 3, D), RotaryEmbedding(P)(torch.arange(3)))
