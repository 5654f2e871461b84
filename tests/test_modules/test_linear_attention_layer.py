"""The layer; its ops are tested by their own names in test_ops."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from coterie.modules.attention import Attention
from coterie.modules.linear_attention import RULES, LinearAttention
from coterie.modules.rotary import RotaryEmbedding

D, H, G, P, V, W = 24, 4, 2, 6, 5, 4  # G: heads of queries and keys
OPTIONS = [
    *({"rule": rule} for rule in RULES),
    {"rule": "gated_delta", "short_conv": 0, "output_gate": False},
    {"rule": "gated_delta", "short_conv": 1, "num_key_heads": H, "allow_negative_eigenvalues": True},
    {"rule": "kda", "short_conv": 2, "qk_norm": False},
    {"rule": "linear", "qk_norm": True},
    {"rule": "delta_product", "num_edits": 3, "allow_negative_eigenvalues": True},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ", ".join(map(str, o.values())))


def _layer(**options):
    torch.manual_seed(0)
    layer = LinearAttention(D, H, **{"head_dim": P, "value_dim": V, "num_key_heads": G, **options})
    layer.reset_parameters(std=0.4)
    for name, parameter in layer.named_parameters():
        if name.endswith((".bias", "skip")) or "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return layer


def _error(got, wanted):
    return (got - wanted).norm() / wanted.norm()


def _decay(layer, w, x):
    """exp g of one token's x [D], [H, P]."""
    if layer.rule in ("linear", "delta"):
        return x.new_ones(H, P)
    if layer.rule == "retention":
        return (1 - 2.0 ** (-5 - torch.arange(H, dtype=x.dtype)))[:, None].expand(H, P)
    if layer.rule == "gla":
        return torch.sigmoid(w["decay.proj.1.weight"] @ w["decay.proj.0.weight"] @ x + w["decay.proj.1.bias"]).view(
            H, P
        ) ** (1 / 16)
    low_rank = layer.rule == "kda"
    a = w["decay.proj.1.weight"] @ w["decay.proj.0.weight"] @ x if low_rank else w["decay.proj.weight"] @ x
    step = (1 + (a + w["decay.dt_bias"]).exp()).log().view(H, -1)
    return torch.exp(-w["decay.A_log"].exp()[:, None] * step).expand(H, P)


def _plain(layer, x, token_mask=None):
    """The table's equations for one token and head after another, in float64; padding is left out."""
    w = {name: parameter.double() for name, parameter in layer.named_parameters()}
    rule, edits, key_heads = layer.rule, layer.num_edits, layer.num_key_heads
    rows = []
    for b in range(len(x)):
        kept = torch.arange(x.shape[1]) if token_mask is None else token_mask[b].nonzero().squeeze(-1)
        tokens, states = x[b, kept], [x.new_zeros(P, V) for _ in range(H)]
        projected = torch.cat([tokens @ w[f"{name}_proj.weight"].T for name in "qkv"], -1)
        if "conv_weight" in w:
            width = w["conv_weight"].shape[-1]
            padded = torch.cat((x.new_zeros(width - 1, projected.shape[1]), projected))
            windows = torch.stack([padded[i : i + len(tokens)] for i in range(width)], -1)
            projected = F.silu((windows * w["conv_weight"][:, 0]).sum(-1))
        outputs = []
        for t, row in enumerate(projected):
            q, k, v = row.split([key_heads * P, edits * key_heads * P, edits * H * V])
            q, k, v = q.view(key_heads, P), k.view(edits, key_heads, P), v.view(edits, H, V)
            if layer.qk_norm:
                q, k = (u / (u.square().sum(-1, keepdim=True) + 1e-6).sqrt() for u in (q, k))
            if rule == "linear":
                q, k = (torch.where(u > 0, u + 1, u.exp()) for u in (q, k))
            decay = _decay(layer, w, tokens[t])
            if "beta_proj.weight" in w:
                beta = torch.sigmoid(w["beta_proj.weight"] @ tokens[t]).view(edits, H)
                beta = 2 * beta if layer.allow_negative_eigenvalues else beta
            heads = []
            for h in range(H):
                state, group = decay[h][:, None] * states[h], h // (H // key_heads)
                for e in range(edits):
                    key, value = k[e, group], v[e, h]
                    if rule == "ssd":
                        value = (
                            1 + (w["decay.proj.weight"][h] @ tokens[t] + w["decay.dt_bias"][h]).exp()
                        ).log() * value
                    if "beta_proj.weight" in w:
                        value = beta[e, h] * (value - state.T @ key)
                    state = state + torch.outer(key, value)
                states[h] = state
                y = state.T @ q[group] * (1 if rule == "ssd" else P**-0.5)
                if rule == "ssd":
                    y = y + w["skip"][h] * v[0, h]
                y = y / (y.square().mean() + 1e-6).sqrt() * w["norm.weight"]
                if "gate_proj.weight" in w:
                    gate = w["gate_proj.weight"][h * V : (h + 1) * V] @ tokens[t]
                    y = y * (torch.sigmoid(gate) if rule == "kda" else F.silu(gate))
                heads.append(y)
            outputs.append(w["o_proj.weight"] @ torch.cat(heads))
        zeros = x.new_zeros(x.shape[1], D)
        rows.append(zeros.index_copy(0, kept, torch.stack(outputs)) if outputs else zeros)
    return torch.stack(rows)


# --- the mathematics


@every_option
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_is_the_tables_equations_values_and_gradients(options, masked, dtype, tolerance):
    layer = _layer(**options).to(dtype)
    x = torch.randn(2, 9, D, dtype=dtype, requires_grad=True)
    token_mask = torch.tensor([[True] * 9, [False, True, True, False, False, True, True, True, False]])
    token_mask = token_mask if masked else None
    got = layer(x, token_mask=token_mask)
    wanted = _plain(layer, x.double(), token_mask)
    assert _error(got, wanted) < tolerance
    grad = torch.randn_like(got)
    leaves = {"x": x, **dict(layer.named_parameters())}
    gradients = torch.autograd.grad(got, leaves.values(), grad)
    right = torch.autograd.grad(wanted, leaves.values(), grad.double())
    for name, a, b in zip(leaves, gradients, right, strict=True):
        # As `check_op`: a statement about many roundings, and some of these have four numbers, sums that nearly cancel.
        assert _error(a, b) < tolerance * max(1, 16 / b.numel() ** 0.5), name


@pytest.mark.parametrize("rule", RULES)
def test_gradcheck(rule):
    layer = _layer(rule=rule).double()
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    token_mask = torch.tensor([[True] * 5, [False, True, True, False, True]])
    torch.autograd.gradcheck(lambda x: layer(x, token_mask=token_mask), (x,))


def test_whole_chunks_are_the_equations_too():
    layer = _layer().double()
    x = torch.randn(1, 150, D, dtype=torch.float64)
    assert _error(layer(x), _plain(layer, x)) < 1e-12


def test_delta_product_with_one_edit_is_the_gated_delta_rule():
    one, other = _layer(rule="delta_product", num_edits=1), _layer(rule="gated_delta")
    one.load_state_dict(other.state_dict())
    x = torch.randn(2, 9, D)
    assert torch.equal(one(x), other(x))


def test_negative_eigenvalues_turn_a_direction_round():
    """β = 2 at the same unit key: what stands there changes its sign, so that two writes of 0 undo each other."""
    layer = _layer(rule="delta", allow_negative_eigenvalues=True).double()
    with torch.no_grad():
        layer.beta_proj.weight.zero_()  # β = 2 · σ(0) = 1: forgets at once
        layer.v_proj.weight.zero_()
        cache = layer.new_cache(1)
        cache.state.normal_()
        layer.conv_weight.zero_()[..., -1] = 1
        x = torch.randn(1, 1, D, dtype=torch.float64)
        layer(x, cache_layer=cache)
        k = F.normalize(F.silu(layer.k_proj(x)).view(G, P), dim=-1).repeat_interleave(H // G, 0)
        read = torch.einsum("hp,hpv->hv", k, cache.state[0])
        assert read.abs().max() < 1e-5  # the norm's eps
        before = cache.state.normal_().clone()
        layer.beta_proj.weight.copy_(50 * x[0].expand(H, D))  # β = 2
        layer(x, cache_layer=cache)
        turned = torch.einsum("hp,hpv->hv", k, cache.state[0])
    torch.testing.assert_close(turned, -torch.einsum("hp,hpv->hv", k, before[0]), rtol=1e-5, atol=1e-5)


# --- the cache


@every_option
@pytest.mark.parametrize("splits", [(12,), (1,) * 12, (5, 0, 1, 1, 3, 2), (7, 5)])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_cached_equals_whole(options, splits, masked):
    layer = _layer(**options).double()
    x = torch.randn(3, 12, D, dtype=torch.float64)
    token_mask = torch.rand(3, 12) < 0.7 if masked else None
    if masked:
        token_mask[0, :9] = False
        x = torch.where(token_mask[..., None], x, float("nan"))
    cache = layer.new_cache(3)
    parts, start = [], 0
    for length in splits:
        at = slice(start, start + length)
        step_mask = None if token_mask is None else token_mask[:, at]
        parts.append(layer(x[:, at], token_mask=step_mask, cache_layer=cache))
        start += length
    assert _error(torch.cat(parts, 1), layer(x, token_mask=token_mask)) < 1e-12


@torch.no_grad()
def test_cache_is_of_one_size_and_stays_where_it_is():
    layer = _layer()
    channels = 2 * G * P + H * V
    wanted = 3 * (H * P * V * 4 + (W - 1) * channels * 4)
    cache = layer.new_cache(3, 50)
    assert cache.nbytes == layer.new_cache(3, 5000).nbytes == wanted
    assert layer.new_cache(3, dtype=torch.bfloat16).nbytes == wanted - 3 * (W - 1) * channels * 2
    assert _layer().bfloat16().new_cache(1).state.dtype == torch.float32
    assert _layer(short_conv=0).new_cache(3).nbytes == 3 * H * P * V * 4
    places = cache.state.data_ptr(), cache.tail.data_ptr()
    for length in (6, 1, 70):
        layer(torch.randn(3, length, D), cache_layer=cache)
    assert (cache.state.data_ptr(), cache.tail.data_ptr()) == places
    assert cache.nbytes == wanted


@every_option
@torch.no_grad()
def test_rollback_is_as_if_nothing_had_come(options):
    layer = _layer(**options)
    cache = layer.new_cache(2)
    x = torch.randn(2, 9, D)
    layer(x[:, :4], cache_layer=cache)
    snapshot = cache.snapshot()
    wanted = layer(x[:, 4:], cache_layer=cache)
    cache.rollback(snapshot)
    layer(torch.randn(2, 3, D), cache_layer=cache)
    cache.rollback(snapshot)
    assert torch.equal(layer(x[:, 4:], cache_layer=cache), wanted)


def test_a_cache_refuses_to_cut_gradients_and_other_batches():
    layer = _layer()
    with pytest.raises(ValueError, match="no_grad"):
        layer(torch.randn(2, 3, D), cache_layer=layer.new_cache(2))
    with pytest.raises(ValueError, match="batch of 2, got 1"):
        layer(torch.randn(1, 3, D), cache_layer=layer.new_cache(2))
    with pytest.raises(ValueError, match="batch_size ≥ 1, got 0"):
        layer.new_cache(0)
    with pytest.raises(ValueError, match="cu_seqlens and cache_layer exclude each other"):
        layer(torch.randn(1, 3, D), cache_layer=layer.new_cache(1), cu_seqlens=torch.tensor([0, 3]))


# --- laws


@every_option
def test_content_of_padding_cannot_matter(options):
    layer = _layer(**options)
    x = torch.randn(3, 10, D)
    token_mask = torch.rand(3, 10) < 0.6
    token_mask[0] = False  # a row of nothing but padding
    outputs, gradients = [], []
    for padding in (0.0, 1e4, float("nan")):
        filled = torch.where(token_mask[..., None], x, padding).requires_grad_()
        y = layer(filled, token_mask=token_mask)
        gradients.append(torch.autograd.grad(y[token_mask].square().sum(), [filled, *layer.parameters()]))
        outputs.append(y)
    assert outputs[0].isfinite().all()
    for y, gradient in zip(outputs[1:], gradients[1:], strict=True):
        assert torch.equal(y, outputs[0])
        assert all(torch.equal(a, b) for a, b in zip(gradient, gradients[0], strict=True))
    assert (gradients[0][0][~token_mask] == 0).all()
    assert (outputs[0][~token_mask] == 0).all()


@every_option
@torch.no_grad()
def test_packed_equals_separate(options):
    layer = _layer(**options).double()
    x, bounds = torch.randn(1, 14, D, dtype=torch.float64), [0, 5, 6, 14]
    y = layer(x, cu_seqlens=torch.tensor(bounds))
    wanted = torch.cat([layer(x[:, start:stop]) for start, stop in pairwise(bounds)], 1)
    assert _error(y, wanted) < 1e-12


@every_option
@torch.no_grad()
def test_causal(options):
    layer = _layer(**options)
    x = torch.randn(1, 8, D)
    changed = x.clone()
    changed[:, 5] += 1
    before, after = layer(x), layer(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=1e-5, atol=1e-6)
    assert ((before - after)[:, 5:].abs().amax(-1) > 1e-5).all()


def test_is_called_as_attention_is():
    layer, x, rotary = _layer(), torch.randn(2, 5, D), RotaryEmbedding(P)(torch.arange(5))
    assert torch.equal(layer(x, rotary, token_mask=None, cache_layer=None), layer(x))
    assert Attention(D, H, head_dim=P)(x, rotary, token_mask=None, cache_layer=None).shape == layer(x).shape


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_bf16_against_float32(rule):
    layer = _layer(rule=rule)
    x = torch.randn(2, 33, D)
    layer.bfloat16()
    got = layer(x.bfloat16())
    assert got.dtype == torch.bfloat16
    wanted = layer.float()(x.bfloat16().float())
    assert _error(got.float(), wanted) < 1.5e-2


@pytest.mark.parametrize("rule", RULES)
def test_autocast_is_close_and_gives_float32_gradients(rule):
    layer, x = _layer(rule=rule), torch.randn(2, 20, D)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert _error(y.float(), layer(x)) < 2e-2
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("rule", RULES)
def test_compiles_in_one_piece(rule):
    layer = _layer(rule=rule)
    x = torch.randn(2, 20, D, requires_grad=True)
    token_mask = torch.rand(2, 20) < 0.7
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    leaves = x, *layer.parameters()
    got, wanted = (fn(x, token_mask=token_mask) for fn in (compiled, layer))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    grad = torch.randn_like(wanted)
    for a, b in zip(*(torch.autograd.grad(y, leaves, grad) for y in (got, wanted)), strict=True):
        assert _error(a, b) < 1e-5


# --- the rest


@pytest.mark.parametrize("rule", RULES)
def test_initial_weights_follow_the_rule(rule):
    torch.manual_seed(0)
    layer = LinearAttention(128, 64, head_dim=16, value_dim=24, rule=rule)
    layer.reset_parameters(0.03, 0.01)
    for name, parameter in layer.named_parameters():
        part = name.rpartition(".")[2]
        if "norm" in name or name == "skip":
            assert (parameter == 1).all(), name
        elif part == "A_log":
            assert 0 <= parameter.min() < 0.7, name
            assert 2.5 < parameter.max() <= math.log(16), name
        elif part == "dt_bias":
            steps = F.softplus(parameter)
            assert 0.999e-3 < steps.min() < 2e-3, name
            assert 5e-2 < steps.max() < 1.001e-1, name
            assert abs(steps.log().mean() - math.log(1e-2)) < 0.5, name
        elif part == "bias":
            assert (parameter == 0).all(), name
        elif name == "conv_weight":
            assert parameter.abs().max() <= 0.5, name
            assert abs(parameter.std() - 0.5 / 3**0.5) < 0.01, name
        else:
            wanted = 0.01 if name == "o_proj.weight" else 0.03
            assert abs(parameter.std().item() / wanted - 1) < 5 / (2 * parameter.numel()) ** 0.5, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "mamba"}, "rule must be one of 'linear', 'retention', .* got 'mamba'"),
        ({"num_key_heads": 3}, "num_key_heads must divide num_heads = 4, got 3"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"value_dim": 0}, "value_dim must be at least 1, got 0"),
        ({"short_conv": -1}, "short_conv must be at least 1, or 0 for none, got -1"),
        ({"num_edits": 2}, "num_edits is of 'delta_product' alone, got 2 for 'gated_delta'"),
        ({"rule": "delta_product", "num_edits": 0}, "num_edits must be at least 1, got 0"),
        (
            {"rule": "gla", "allow_negative_eigenvalues": True},
            "allow_negative_eigenvalues is of rules that erase, 'delta', 'gated_delta', 'kda', .* got 'gla'",
        ),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        _layer(**options)
    with pytest.raises(ValueError, match="head_dim must be given where num_heads = 5 does not divide 24"):
        LinearAttention(24, 5)
