import pytest
import torch

from coterie.modules.attention import Attention, causal_attention
from coterie.modules.attention_cache import AttentionCache
from coterie.modules.rotary import RotaryEmbedding

HEADS = [(4, 4), (4, 2), (6, 1)]


def _plain(queries, keys, values, key_mask=None):
    """Softmax attention by its formula, in float64; a query that stands on padding gives zeros."""
    groups = queries.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(groups, 1) for x in (keys, values))
    scores = queries.double() @ keys.mT / queries.shape[-1] ** 0.5
    num_queries, num_keys = scores.shape[-2:]
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, :]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    y = weights @ values
    if key_mask is not None:
        y = y * key_mask[:, None, -num_queries:, None]
    return y


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
@pytest.mark.parametrize(("num_queries", "num_keys"), [(7, 7), (1, 9), (3, 9), (1, 1), (70, 70)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("value_dim", [8, 5, 11])
def test_is_softmax_attention_values_and_gradients(num_heads, num_kv_heads, num_queries, num_keys, masked, value_dim):
    queries = torch.randn(3, num_heads, num_queries, 8, requires_grad=True)
    keys = torch.randn(3, num_kv_heads, num_keys, 8, requires_grad=True)
    values = torch.randn(3, num_kv_heads, num_keys, value_dim, requires_grad=True)
    key_mask = torch.rand(3, num_keys) < 0.6 if masked else None
    got = causal_attention(queries, keys, values, key_mask)
    wanted = _plain(queries, keys, values, key_mask)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(got)
    gradients = torch.autograd.grad(got, (queries, keys, values), grad)
    right = torch.autograd.grad(wanted, (queries, keys, values), grad.double())
    for a, b in zip(gradients, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def _error(got, wanted):
    return (got - wanted).norm() / wanted.norm()


def _layer(**options):
    torch.manual_seed(0)
    layer = Attention(24, 4, **{"num_kv_heads": 2, "head_dim": 8, **options})
    layer.reset_parameters(std=0.3)
    return layer


def _rotary(*shape):
    return RotaryEmbedding(8)(torch.arange(shape[-1]))


@pytest.mark.parametrize("qk_norm", [None, "head", "all"])
def test_output_gate_weighs_what_every_head_reads(qk_norm):
    gated = _layer(output_gate=True, qk_norm=qk_norm, qkv_bias=True)
    torch.nn.init.normal_(gated.q_proj.bias)
    plain = _layer(qk_norm=qk_norm, qkv_bias=True)
    plain.o_proj = torch.nn.Identity()
    state, gate = gated.state_dict(), {}
    for part in ("weight", "bias"):
        rows = state[f"q_proj.{part}"].unflatten(0, (4, 2, 8))  # of every head, queries and then gates
        state[f"q_proj.{part}"], gate[part] = rows[:, 0].flatten(0, 1), rows[:, 1].flatten(0, 1)
    plain.load_state_dict(state, strict=False)
    x = torch.randn(2, 9, 24)
    token_mask = torch.rand(2, 9) < 0.8
    heads = plain(x, _rotary(9), token_mask=token_mask)
    kept = x.masked_fill(~token_mask.unsqueeze(-1), 0)
    wanted = gated.o_proj(heads * (kept @ gate["weight"].T + gate["bias"]).sigmoid())
    torch.testing.assert_close(gated(x, _rotary(9), token_mask=token_mask), wanted, rtol=1e-5, atol=1e-6)
    cos, sin = _rotary(9)
    with torch.no_grad():
        cache = gated.new_cache(2, 9)
        steps = [
            gated(
                x[:, i : i + 1],
                (cos[i : i + 1], sin[i : i + 1]),
                token_mask=token_mask[:, i : i + 1],
                cache_layer=cache,
            )
            for i in range(9)
        ]
    torch.testing.assert_close(torch.cat(steps, 1), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("qk_norm", [None, "head"])
def test_grouped_heads_equal_repeated_heads(qk_norm):
    grouped = _layer(qk_norm=qk_norm)
    whole = _layer(qk_norm=qk_norm, num_kv_heads=4)
    state = grouped.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        state[name] = state[name].unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    whole.load_state_dict(state)
    x = torch.randn(2, 11, 24)
    torch.testing.assert_close(grouped(x, _rotary(11)), whole(x, _rotary(11)), rtol=1e-5, atol=1e-6)


def test_neighbouring_pairs_are_an_order_of_rows():
    layer, other = _layer(rotary_interleaved=True), _layer()
    order = torch.arange(8).reshape(4, 2).T.flatten()  # evens, then odds
    state = layer.state_dict()
    for name in ("q_proj.weight", "k_proj.weight"):
        state[name] = state[name].unflatten(0, (-1, 8))[:, order].flatten(0, 1)
    other.load_state_dict(state)
    x = torch.randn(2, 11, 24)
    torch.testing.assert_close(layer(x, _rotary(11)), other(x, _rotary(11)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_content_of_padding_cannot_matter(bias):
    layer = _layer(qk_norm="head", qkv_bias=bias, output_bias=bias)
    if bias:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            torch.nn.init.normal_(getattr(layer, name).bias)
    x = torch.randn(3, 10, 24)
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
    x = torch.randn(1, 6, 24)
    padding = torch.randn(1, 5, 24)
    parts = (padding, x) if side == "left" else (x, padding)
    token_mask = torch.zeros(1, 11, dtype=torch.bool)
    kept = slice(5, None) if side == "left" else slice(None, 6)
    token_mask[:, kept] = True
    y = layer(torch.cat(parts, 1), _rotary(11), token_mask=token_mask)
    torch.testing.assert_close(y[:, kept], layer(x, _rotary(6)), rtol=1e-4, atol=1e-5)


def test_causal():
    layer = _layer()
    x = torch.randn(1, 8, 24)
    changed = x.clone()
    changed[:, 5] += 1
    before, after = layer(x, _rotary(8)), layer(changed, _rotary(8))
    assert torch.equal(before[:, :5], after[:, :5])
    assert ((before - after)[:, 5:].abs().amax(-1) > 1e-4).all()


def test_bf16_against_float32():
    layer = _layer(qk_norm="head")
    x = torch.randn(2, 33, 24)
    wanted = layer(x, _rotary(33))
    got = layer.bfloat16()(x.bfloat16(), _rotary(33))
    assert got.dtype == torch.bfloat16
    assert _error(got.float(), wanted) < 1.5e-2


@pytest.mark.parametrize("splits", [(12,), (1,) * 12, (5, 1, 1, 3, 2)])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_cached_equals_whole(splits, masked):
    layer = _layer(qk_norm="head")
    x = torch.randn(2, 12, 24)
    token_mask = torch.rand(2, 12) < 0.7 if masked else None
    cache = layer.new_cache(2, 12)
    cos, sin = _rotary(12)
    parts, start = [], 0
    for length in splits:
        at = slice(start, start + length)
        step_mask = None if token_mask is None else token_mask[:, at]
        parts.append(layer(x[:, at], (cos[at], sin[at]), token_mask=step_mask, cache_layer=cache))
        start += length
    wanted = layer(x, (cos, sin), token_mask=token_mask)
    torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=1e-4, atol=1e-5)


def test_cache_counts_its_bytes_and_says_when_it_is_full():
    cache = AttentionCache(2, 3, 10, 8)
    assert cache.nbytes == 2 * (2 * 3 * 10 * 8 * 4)
    rows = torch.randn(2, 3, 7, 8)
    keys, _, token_mask = cache.append(rows, rows)
    assert torch.equal(keys, rows)
    assert token_mask is None
    with pytest.raises(ValueError, match=r"holds 7 of at most 10 .* 4 more .*max_length"):
        cache.append(rows[:, :, :4], rows[:, :, :4])
    assert cache.length == 7
    with pytest.raises(ValueError, match="batch of 2, got 1"):
        cache.append(rows[:1], rows[:1])
    with pytest.raises(ValueError, match="no_grad"):
        cache.append(rows[:, :, :1].requires_grad_(), rows[:, :, :1])


@pytest.mark.parametrize(
    ("options", "named"),
    [({"num_kv_heads": 3}, "num_kv_heads"), ({"num_kv_heads": 0}, "num_kv_heads"), ({"dim": 30}, "head_dim")],
)
def test_wrong_arguments_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        Attention(**{"dim": 32, "num_heads": 4, **options})


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_equals_transformers_attention(family):
    transformers = pytest.importorskip("transformers")
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    name = {"llama": "Llama", "qwen3": "Qwen3"}[family]
    config = getattr(transformers, f"{name}Config")(
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_hidden_layers=1,
        attn_implementation="eager",
    )
    theirs = getattr(module, f"{name}Attention")(config, 0)
    ours = _layer(qk_norm="head" if family == "qwen3" else None, norm_eps=config.rms_norm_eps)
    for norm in (ours.q_norm, ours.k_norm):
        if norm is not None:
            torch.nn.init.normal_(norm.weight, mean=1.0, std=0.2)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 13, 24)
    results = []
    their_rotary = getattr(module, f"{name}RotaryEmbedding")(config)(x, torch.arange(13)[None])
    hidden = torch.full((13, 13), -torch.inf).triu(1)[None, None]
    for forward in (
        lambda x: ours(x, _rotary(13)),
        lambda x: theirs(x, position_embeddings=their_rotary, attention_mask=hidden)[0],
    ):
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        y.square().sum().backward()
        results.append((y, leaf.grad))
    for a, b in zip(*results, strict=True):
        assert _error(a, b) < 1e-5
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert _error(parameter.grad, gradients[name].grad) < 1e-5, name
