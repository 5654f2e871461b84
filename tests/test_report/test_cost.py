from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from coterie.models import PRESETS, Transformer, TransformerConfig, dense_twin
from coterie.report import format_cost, model_cost, saved_for_backward
from coterie.report.cost import _parts

L = 12
MIXED = TransformerConfig(
    vocab_size=50,
    dim=24,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    feed_forwards=("mlp", "moe"),
    hidden_dim=40,
    num_experts=8,
    top_k=3,
    expert_hidden_dim=16,
    shared_hidden_dim=20,
    shared_gate=True,
    qk_norm="head",
    tie_embeddings=False,
    max_length=32,
)
TIED = TransformerConfig(
    vocab_size=50, dim=24, num_layers=2, num_heads=2, num_experts=4, top_k=2, expert_hidden_dim=10, max_length=32
)
LATENT = replace(
    MIXED,
    mixers=("latent_attention",),
    num_kv_heads=None,
    qk_norm=None,
    head_dim=10,
    rotary_dim=4,
    kv_rank=7,
    query_rank=9,
    value_dim=5,
)

HYBRID = replace(
    MIXED,
    mixers=("linear_attention", "attention"),
    linear_num_heads=6,
    linear_num_key_heads=3,
    linear_head_dim=5,
    linear_value_dim=7,
    linear_conv=3,
)


def rows(cost):
    return {layer.name: layer for layer in cost.layers}


def test_every_figure_by_hand():
    got = rows(model_cost(MIXED, L))
    attention = 24 * 24 * 2 + 24 * 12 * 2  # q and o; k and v with two of four heads of width 6
    mixer = got["layers.0.mixer"]
    assert (mixer.kind, mixer.params, mixer.active_params) == ("attention", attention + 24 + 6 + 6, attention + 36)
    assert mixer.flops == 2 * attention + 2 * 2 * 24 * (L + 1) / 2
    assert mixer.weight_bytes == 4 * mixer.params
    assert mixer.cache_bytes == 4 * 2 * 12

    mlp = got["layers.0.feed_forward"]
    assert (mlp.kind, mlp.params) == ("mlp", 3 * 24 * 40 + 24)
    assert (mlp.flops, mlp.cache_bytes) == (2 * 3 * 24 * 40, 0)

    moe = got["layers.1.feed_forward"]
    expert, shared, router, gate = 3 * 24 * 16, 3 * 24 * 20, 8 * 24, 24
    assert moe.kind == "moe"
    assert moe.params == 8 * expert + shared + router + gate + 24
    assert moe.active_params == 3 * expert + shared + router + gate + 24
    assert moe.flops == 2 * (3 * expert + shared + router + gate)
    assert moe.weight_bytes == 4 * moe.active_params

    embedding, head = got["embedding"], got["head"]
    assert (embedding.params, embedding.flops, embedding.weight_bytes) == (50 * 24, 0, 4 * 24)
    assert (head.params, head.flops, head.weight_bytes) == (50 * 24 + 24, 2 * 50 * 24, 4 * (50 * 24 + 24))


def test_latent_attention_by_hand():
    mixer = rows(model_cost(LATENT, L))["layers.0.mixer"]
    queries, latent, up, output = 24 * 9 + 9 * 4 * 10, 24 * (7 + 4), 7 * 4 * (6 + 5), 4 * 5 * 24
    matrices = queries + latent + up + output
    assert (mixer.kind, mixer.params) == ("latent_attention", matrices + 24 + 9 + 7)
    assert mixer.flops == 2 * matrices + 2 * 4 * (10 + 5) * (L + 1) / 2
    assert mixer.weight_bytes == 4 * mixer.params
    assert mixer.cache_bytes == 4 * (7 + 4)


def test_a_window_by_hand():
    """5 keys a token, but for the first four tokens; 4 keys, values and whether they are there are kept."""
    config = replace(MIXED, mixers=("window_attention", "attention"), attention_window=5, attention_sink_logits=True)
    got = rows(model_cost(config, L))
    window, full = got["layers.0.mixer"], got["layers.1.mixer"]
    assert (window.kind, window.params, full.params) == ("window_attention", full.params, window.params)
    assert full.flops - window.flops == pytest.approx(2 * 2 * 24 * ((L + 1) / 2 - (5 * L - 10) / L))
    assert (full.cache_bytes, full.state_bytes) == (4 * 2 * 12, 0)
    assert (window.cache_bytes, window.state_bytes) == (0, 4 * 2 * 12 * 4 + 4)
    cost, model = model_cost(config, L), Transformer(config, device="meta")
    for length in (1024, 65536):
        assert length * cost.total.cache_bytes + cost.total.state_bytes == model.new_cache(1, length).nbytes


def test_sparse_attention_by_hand():
    """Blocks of 4, three of them and a window of 5; the second layer sees what the first one chose."""
    sparse = replace(MIXED, mixers=("sparse_attention",), sparse_window=5, sparse_block_size=4, sparse_num_blocks=3)
    plain = 2 * (24 * 24 * 2 + 24 * 12 * 2)

    def keys(most):
        return (most * (most + 1) / 2 + (256 - most) * most) / 256

    blocks, per_key = 257 / 2 / 4, 2 * 2 * 24
    for scorer, attended, scored, added in (
        ("moba", keys(17), 2 * 2 * 6 * blocks, 12),
        ("nsa", keys(5) + keys(12) + blocks, 2 * 24 * 3 * 4, 24),
        ("indexer", keys(17), 2 * 4 * 7 * blocks + 2 * 24 * (4 * 6 + 6 + 4), 6),
    ):
        config = replace(sparse, sparse_scorer=scorer, sparse_share=2)
        cost, model = model_cost(config, 256), Transformer(config, device="meta")
        first, second = rows(cost)["layers.0.mixer"], rows(cost)["layers.1.mixer"]
        assert first.flops == pytest.approx(plain + per_key * attended + scored)
        assert second.flops == pytest.approx(plain + per_key * keys(17))
        assert (first.cache_bytes, second.cache_bytes) == (4 * (2 * 12 + added / 4), 4 * 2 * 12)
        for length in (1024, 65536):
            assert length * cost.total.cache_bytes + cost.total.state_bytes == model.new_cache(1, length).nbytes
        assert cost.full_attention_cache_bytes == 4 * 4 * 2 * 12
    config = replace(sparse, sparse_scorer="window", sparse_sinks=2)
    cost, model = model_cost(config, 256), Transformer(config, device="meta")
    assert (cost.total.cache_bytes, cost.total.state_bytes) == (0, model.new_cache(1, 65536).nbytes)
    assert rows(cost)["layers.0.mixer"].flops == pytest.approx(plain + per_key * keys(7))


@pytest.mark.parametrize(
    ("rule", "own", "products"),
    [
        ("gated_delta", 2 * 24 * 6 + 2 * 6, 3),  # projections of decay and β, A_log and dt_bias; read, correct, write
        ("retention", 0, 2),
        ("gla", 24 * 16 + 16 * 30 + 30, 2),
        ("ssd", 24 * 6 + 3 * 6, 2),
    ],
)
def test_linear_attention_by_hand(rule, own, products):
    mixer = rows(model_cost(replace(HYBRID, linear_rule=rule), L))["layers.0.mixer"]
    channels = 2 * 3 * 5 + 6 * 7
    matrices = 24 * channels + 2 * 24 * 6 * 7  # q, k, v; gate and output
    assert (mixer.kind, mixer.params) == ("linear_attention", matrices + 3 * channels + own + 7 + 24)
    in_matrices = {"gated_delta": 2 * 24 * 6, "gla": 24 * 16 + 16 * 30, "ssd": 24 * 6}.get(rule, 0)
    assert mixer.flops == 2 * (matrices + in_matrices + 3 * channels + products * 6 * 5 * 7)
    assert mixer.weight_bytes == 4 * mixer.params
    assert (mixer.cache_bytes, mixer.state_bytes) == (0, 4 * 6 * 5 * 7 + 4 * 2 * channels)


def test_edits_of_a_delta_product_are_counted_each():
    one, three = (
        rows(model_cost(replace(HYBRID, linear_rule="delta_product", linear_num_edits=n), L))["layers.0.mixer"]
        for n in (1, 3)
    )
    channels = 3 * 5 + 6 * 7  # of k and v
    assert three.params - one.params == 2 * (24 * channels + 3 * channels + 24 * 6)
    assert three.flops - one.flops == 2 * 2 * (24 * channels + 3 * channels + 24 * 6 + 2 * 6 * 5 * 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hybrids_cache_per_token_falls_with_length_to_its_attentions(dtype):
    cost = model_cost(HYBRID, L, dtype=dtype)
    model = Transformer(HYBRID, device="meta", dtype=dtype)
    twin = Transformer(replace(HYBRID, mixers=("attention",)), device="meta", dtype=dtype)
    per_token = []
    for length in (1024, 4096, 65536):
        assert length * cost.total.cache_bytes + cost.total.state_bytes == model.new_cache(1, length).nbytes
        assert length * cost.full_attention_cache_bytes == twin.new_cache(1, length).nbytes
        per_token.append(model.new_cache(1, length).nbytes / length)
    assert per_token == sorted(per_token, reverse=True)
    assert per_token[-1] == pytest.approx(cost.full_attention_cache_bytes / 2, rel=1e-2)


def test_a_tied_head_is_read_and_multiplied_but_counted_once():
    got = rows(model_cost(TIED, L))
    assert got["embedding"].params == 50 * 24
    assert (got["head"].params, got["head"].flops) == (24, 2 * 50 * 24)
    assert got["head"].weight_bytes == 4 * (50 * 24 + 24)


@pytest.mark.parametrize("config", [MIXED, TIED, LATENT, HYBRID, dense_twin(TIED), *PRESETS.values()])
def test_totals_are_those_of_the_model(config):
    cost = model_cost(config, 16)
    model = Transformer(config, device="meta")
    assert cost.total.params == sum(p.numel() for p in model.parameters())
    cache = model.new_cache(1, 640)
    assert 640 * cost.total.cache_bytes + cost.total.state_bytes == sum(layer.nbytes for layer in cache.layers)
    if config.feed_forwards == ("mlp",):
        assert cost.total.active_params == cost.total.params
        assert cost.break_even is None


def test_flops_agree_with_torchs_counter_on_a_dense_model():
    config = replace(dense_twin(MIXED), num_kv_heads=None)
    model = Transformer(config)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, L, dtype=torch.int64))
    # torch counts a causal square as a whole: L keys per token in place of our mean, (L + 1) / 2.
    masked = config.num_layers * 2 * 2 * 24 * (L - (L + 1) / 2)
    assert model_cost(config, L).total.flops == counter.get_total_flops() / L - masked


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (MIXED, torch.float32),
        (TIED, torch.float32),
        (replace(TIED, recompute=True), torch.float32),
        (dense_twin(TIED), torch.float32),
        (TIED, torch.bfloat16),
        (LATENT, torch.float32),
        (HYBRID, torch.float32),
        (replace(HYBRID, linear_rule="gla"), torch.bfloat16),
        (replace(HYBRID, linear_rule="ssd", linear_conv=0), torch.float32),
        (replace(HYBRID, linear_rule="delta_product"), torch.float32),
    ],
    ids=["mixed", "tied", "recompute", "dense", "bf16", "latent", "hybrid", "gla", "ssd", "delta_product"],
)
def test_saved_bytes_are_those_that_a_cpu_run_keeps(config, dtype):
    model = Transformer(config, dtype=dtype)
    parts = {name: modules for name, _, modules in _parts(model)}
    with saved_for_backward(model, parts) as saved:
        output = model(torch.randint(50, (1, L)))
    assert output.logits.requires_grad
    counted = {layer.name: layer.saved_bytes * L for layer in model_cost(config, L, dtype=dtype).layers}
    # The op's expert counts, [E], are a view of E + 1 numbers when it runs.
    assert counted == pytest.approx(saved, abs=8, rel=0)
    assert all(saved.values())


def test_recompute_saves_exactly_the_hidden_layer():
    kept = model_cost(TIED, L).total.saved_bytes
    recomputed = model_cost(replace(TIED, recompute=True), L).total.saved_bytes
    assert kept - recomputed == pytest.approx(TIED.num_layers * TIED.top_k * 2 * TIED.expert_hidden_dim * 4)


def test_saved_bytes_skip_parameters_and_count_a_shared_storage_once():
    linear = torch.nn.Linear(3, 3)
    x = torch.randn(5, 3, requires_grad=True)
    with saved_for_backward(linear, {"first": [], "layer": [linear]}) as saved:
        y = x * x + x[:2].sum() * x  # keeps x, and the product's other factor, one number
        z = linear(y)  # keeps y; the weight is a parameter
    assert z.requires_grad
    assert saved == {"first": 5 * 3 * 4 + 4, "layer": 5 * 3 * 4}


def test_half_precision_halves_weights_and_cache():
    single, half = model_cost(MIXED, L).total, model_cost(MIXED, L, dtype=torch.bfloat16).total
    assert half.weight_bytes * 2 == single.weight_bytes
    assert half.cache_bytes * 2 == single.cache_bytes
    assert half.saved_bytes < 0.75 * single.saved_bytes


def test_break_even_is_that_of_the_dense_twins():
    cost = model_cost(TIED, L)
    assert cost.break_even.equal_flops_hidden_dim == dense_twin(TIED).hidden_dim == 2 * 10
    assert cost.break_even.equal_params_hidden_dim == dense_twin(TIED, "params").hidden_dim == 4 * 10
    moe = rows(cost)["layers.0.feed_forward"].flops
    dense = rows(model_cost(dense_twin(TIED, "params"), L))["layers.0.feed_forward"].flops
    assert cost.break_even.throughput == pytest.approx(moe / dense)


def test_longer_sequences_cost_attention_only():
    short, long = model_cost(TIED, 8), model_cost(TIED, 40)
    difference = {a.name: b.flops - a.flops for a, b in zip(short.layers, long.layers, strict=True)}
    assert {name: value for name, value in difference.items() if value} == {
        f"layers.{i}.mixer": 2 * 2 * 24 * (40 - 8) / 2 for i in range(2)
    }


def test_the_table_groups_equal_layers_and_sums_them():
    lines = format_cost(model_cost(MIXED, L)).splitlines()
    assert [line.split("  ")[0] for line in lines[2:6]] == ["embedding", "attention × 4", "mlp × 2", "moe × 2"]
    assert lines[8].split()[:3] == ["all", "layers", "37.1"]
    assert "hidden width 68" in format_cost(model_cost(MIXED, L))


def test_the_table_of_a_hybrid_says_what_its_cache_comes_to():
    text = format_cost(model_cost(replace(PRESETS["tiny-hybrid"], dim=64), 16, dtype=torch.bfloat16))
    assert "state" in text.splitlines()[0]
    lines = [line.split() for line in text.splitlines()]
    # Two heads of width 32: keys and values of four layers are 4 · 256 bytes, of which 256 stay; states are 3 · 9344.
    assert ["1,024", "283", "KiB", "1.00", "MiB", "0.28", "×"] in lines
    assert ["65,536", "16.0", "MiB", "64.0", "MiB", "0.25", "×"] in lines
    assert "state" not in format_cost(model_cost(TIED, L))


def test_length_must_be_positive():
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        model_cost(TIED, 0)
