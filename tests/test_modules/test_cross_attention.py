import pytest
import torch

from coterie.modules.cross_attention import CrossAttention

D, C, H, P = 20, 12, 4, 6  # C: the context's width
OPTIONS = [
    {},
    {"num_kv_heads": 2, "qk_norm": "head"},
    {"num_kv_heads": 1, "qk_norm": "all", "gated": False, "scale": 0.7},
]


def _layer(**options):
    torch.manual_seed(0)
    layer = CrossAttention(D, H, **{"context_dim": C, "head_dim": P, **options})
    layer.reset_parameters(std=0.4)
    for name, parameter in layer.named_parameters():
        if name == "gate" or "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return layer


def _norm(x, weight):
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def _plain(layer, x, context, context_mask, token_mask, scale=P**-0.5):
    """The docstring's steps for one sequence, one head and one position after another, in float64."""
    w = {name: parameter.double() for name, parameter in layer.named_parameters()}
    rows = []
    for each, seen, own in zip(context, context_mask, x, strict=True):
        queries = own @ w["q_proj.weight"].T
        keys, values = (each[seen] @ w[f"{name}.weight"].T for name in ("k_proj", "v_proj"))
        if layer.qk_norm == "all":
            queries, keys = _norm(queries, w["q_norm.weight"]), _norm(keys, w["k_norm.weight"])
        heads = []
        for h in range(H):
            g = h * layer.num_kv_heads // H
            q, k, v = queries[:, h * P : (h + 1) * P], *(t[:, g * P : (g + 1) * P] for t in (keys, values))
            if layer.qk_norm == "head":
                q, k = _norm(q, w["q_norm.weight"]), _norm(k, w["k_norm.weight"])
            heads.append(torch.stack([(scale * k @ one).softmax(0) @ v for one in q]))
        rows.append(torch.cat(heads, -1) @ w["o_proj.weight"].T)
    y = torch.stack(rows).masked_fill(~token_mask.unsqueeze(-1), 0)
    return y * w["gate"].tanh() if "gate" in w else y


def _error(got, wanted):
    return (got - wanted).norm() / wanted.norm()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_is_a_loop_over_heads_and_positions_values_and_gradients(options, length, masked, dtype, tolerance):
    layer = _layer(**options).to(dtype)
    x = torch.randn(3, length, D, dtype=dtype, requires_grad=True)
    context = torch.randn(3, 9, C, dtype=dtype, requires_grad=True)
    context_mask, token_mask = (torch.rand(3, n) < (0.6 if masked else 2) for n in (9, length))
    context_mask[:, 4], token_mask[:, 0] = True, True  # something to see, something to give
    masks = {"context_mask": context_mask, "token_mask": token_mask} if masked else {}
    got = layer(x, context, **masks)
    own = x.double(), context.double(), context_mask, token_mask
    wanted = _plain(layer, *own, options.get("scale", P**-0.5))
    assert got.dtype == dtype
    assert _error(got, wanted) < tolerance
    leaves = {"x": x, "context": context, **dict(layer.named_parameters())}
    grad = torch.randn_like(got)
    gradients = torch.autograd.grad(got, leaves.values(), grad)
    right = torch.autograd.grad(wanted, leaves.values(), grad.double())
    for name, a, b in zip(leaves, gradients, right, strict=True):
        assert _error(a, b) < tolerance, name


def test_gradcheck():
    layer = _layer(num_kv_heads=2, qk_norm="head").double()
    x, context = (torch.randn(2, 3, n, dtype=torch.float64, requires_grad=True) for n in (D, C))
    masks = {"context_mask": torch.tensor([[True, False, True], [False] * 3])}
    torch.autograd.gradcheck(lambda x, context: layer(x, context, **masks), (x, context))


def test_bf16_against_float32():
    layer = _layer(qk_norm="head")
    x, context = torch.randn(2, 33, D), torch.randn(2, 50, C)
    wanted = layer(x, context)
    got = layer.bfloat16()(x.bfloat16(), context.bfloat16())
    assert got.dtype == torch.bfloat16
    assert _error(got.float(), wanted) < 1.5e-2


def test_a_model_is_unchanged_until_the_gate_moves():
    layer = CrossAttention(D, H, context_dim=C, head_dim=P)
    x, context = torch.randn(2, 5, D), torch.randn(2, 9, C)
    y = layer(x, context)
    assert torch.equal(x + y, x)
    gradients = dict(zip(dict(layer.named_parameters()), torch.autograd.grad(y.sum(), layer.parameters()), strict=True))
    assert gradients.pop("gate").abs() > 0
    assert all((gradient == 0).all() for gradient in gradients.values())
    with torch.no_grad():
        layer.gate.fill_(0.1)
    gradients = torch.autograd.grad(layer(x, context).square().sum(), layer.parameters())
    assert all((gradient != 0).any() for gradient in gradients)


# --- the context


@pytest.mark.parametrize("options", OPTIONS)
def test_order_of_the_context_does_not_matter(options):
    layer = _layer(**options)
    x, context, order = torch.randn(2, 5, D), torch.randn(2, 9, C), torch.randperm(9)
    context_mask = torch.rand(2, 9) < 0.6
    y, turned = (
        layer(x, context, context_mask=context_mask),
        layer(x, context[:, order], context_mask=context_mask[:, order]),
    )
    torch.testing.assert_close(turned, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_padding_is_as_if_it_were_not_there(options):
    layer = _layer(**options)
    x, context = torch.randn(1, 5, D), torch.randn(1, 9, C)
    context_mask = torch.tensor([[True, False, False, True, True, False, True, True, False]])
    y = layer(x, context, context_mask=context_mask)
    torch.testing.assert_close(y, layer(x, context[context_mask][None]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_content_of_padding_cannot_matter(options):
    layer = _layer(**options)
    x, context = torch.randn(3, 5, D), torch.randn(3, 9, C)
    context_mask, token_mask = torch.rand(3, 9) < 0.6, torch.rand(3, 5) < 0.7
    context_mask[0], token_mask[1] = False, False  # nothing to see, nobody who sees
    results = []
    for padding in (0.0, 1e4, float("nan")):
        leaves = [
            torch.where(mask[..., None], t, padding).requires_grad_()
            for mask, t in ((token_mask, x), (context_mask, context))
        ]
        y = layer(*leaves, context_mask=context_mask, token_mask=token_mask)
        results.append([y, *torch.autograd.grad(y.square().sum(), [*leaves, *layer.parameters()])])
    assert all(t.isfinite().all() for t in results[0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))
    y, of_x, of_context, *_ = results[0]
    assert (y[0] == 0).all()
    assert (y[~token_mask] == 0).all()
    assert (y[2][token_mask[2]] != 0).any()
    assert (of_x[0] == 0).all()
    assert (of_x[~token_mask] == 0).all()
    assert (of_context[~context_mask] == 0).all()


def test_an_empty_context_gives_nothing():
    layer = _layer()
    x = torch.randn(2, 5, D, requires_grad=True)
    y = layer(x, torch.randn(2, 0, C))
    assert y.shape == x.shape
    assert (y == 0).all()
    gradients = torch.autograd.grad(y.sum(), layer.parameters(), allow_unused=True)
    assert all(gradient is None or (gradient == 0).all() for gradient in gradients)


# --- the cache


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_projected_once_equals_projected_every_time(options, masked):
    layer = _layer(**options)
    x, context = torch.randn(2, 6, D), torch.randn(2, 9, C, requires_grad=True)
    context_mask = torch.rand(2, 9) < 0.6 if masked else None
    wanted = layer(x, context, context_mask=context_mask)
    cache = layer.new_cache(context, context_mask)
    snapshot, calls = cache.snapshot(), []
    layer.k_proj.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):  # a guess, and again
        steps = [layer(x[:, i : i + 1], cache_layer=cache) for i in range(6)]
        cache.rollback(snapshot)
    y = torch.cat(steps, 1)
    assert not calls
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)
    grad = torch.randn_like(y)
    gradients = (torch.autograd.grad(each, (context, *layer.parameters()), grad) for each in (y, wanted))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert cache.nbytes == 2 * (2 * layer.num_kv_heads * 9 * P * 4) + 2 * 9 * masked


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"dim": 30}, "head_dim"),
        ({"context_dim": 0}, "context_dim"),
        ({"qk_norm": "both"}, "qk_norm"),
    ],
)
def test_wrong_arguments_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        CrossAttention(**{"dim": 32, "num_heads": 4, **options})


def test_wrong_inputs_are_named():
    layer = _layer()
    x, context = torch.randn(2, 5, D), torch.randn(2, 9, C)
    cache = layer.new_cache(context)
    with pytest.raises(ValueError, match="one of context and cache_layer"):
        layer(x)
    with pytest.raises(ValueError, match="one of context and cache_layer"):
        layer(x, context, cache_layer=cache)
    with pytest.raises(ValueError, match="context_mask is in cache_layer"):
        layer(x, context_mask=torch.ones(2, 9, dtype=torch.bool), cache_layer=cache)
    with pytest.raises(ValueError, match=r"context .*\[B, Lc, context_dim\]"):
        layer(x, x)
    with pytest.raises(ValueError, match=r"context_mask .*\[B, Lc\]"):
        layer(x, context, context_mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(TypeError, match="context_mask"):
        layer(x, context, context_mask=torch.ones(2, 9))
    with pytest.raises(ValueError, match="batch of 2, got 1"):
        layer(x[:1], cache_layer=cache)


# --- other people's


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_transformers_mllama(num_kv_heads, masked):
    config_of = pytest.importorskip("transformers.models.mllama.configuration_mllama").MllamaTextConfig
    theirs = pytest.importorskip("transformers.models.mllama.modeling_mllama")
    config = config_of(
        hidden_size=24,
        intermediate_size=8,
        num_attention_heads=H,
        num_key_value_heads=num_kv_heads,
        num_hidden_layers=1,
        cross_attention_layers=[0],
        attn_implementation="eager",
    )
    block = theirs.MllamaCrossAttentionDecoderLayer(config, 0)  # its MLP is behind a gate of 0
    ours = CrossAttention(24, H, num_kv_heads=num_kv_heads, qk_norm="head", norm_eps=config.rms_norm_eps)
    ours.reset_parameters(std=0.3)
    for norm in (ours.q_norm, ours.k_norm):
        torch.nn.init.normal_(norm.weight, mean=1.0, std=0.2)
    torch.nn.init.constant_(ours.gate, 0.7)
    state = ours.state_dict()
    block.cross_attn_attn_gate.data.copy_(state.pop("gate"))
    block.cross_attn.load_state_dict(state)
    x, context = torch.randn(2, 13, 24), torch.randn(2, 10, 24)
    context_mask = torch.rand(2, 10) < (0.6 if masked else 2)
    hidden = torch.zeros(2, 1, 1, 10).masked_fill(~context_mask[:, None, None], -torch.inf)

    def their_forward(x, context):
        return block(x, context, hidden, None, None)

    def our_forward(x, context):
        return x + ours(block.input_layernorm(x), context, context_mask=context_mask if masked else None)

    results = []
    for forward in (our_forward, their_forward):
        leaves = x.clone().requires_grad_(), context.clone().requires_grad_()
        y = forward(*leaves)
        y.square().sum().backward()
        results.append((y, *(leaf.grad for leaf in leaves)))
    for a, b in zip(*results, strict=True):
        assert _error(a, b) < 1e-5
    assert _error(ours.gate.grad, block.cross_attn_attn_gate.grad) < 1e-5
    gradients = dict(block.cross_attn.named_parameters())
    for name, parameter in ours.named_parameters():
        if name != "gate":
            assert _error(parameter.grad, gradients[name].grad) < 1e-5, name
