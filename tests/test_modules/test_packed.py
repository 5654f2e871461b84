"""`pack_for_inference`: the same model, its matrices in another layout, until `unpack`."""

import copy
import dataclasses
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import coterie
from _check import relative_error
from coterie import Experts, Routing, Transformer, TransformerConfig, generate, pack_for_inference, unpack
from coterie.modules import packed as module_under_test
from coterie.modules.packed import PackedExperts, PackedLinear, PackedTiedEmbedding
from coterie.ops import expert_mlp
from coterie.ops._packed import packable_dtypes

DTYPES = [
    pytest.param(
        dtype,
        marks=pytest.mark.skipif(
            dtype not in packable_dtypes(), reason=f"no fast packed {dtype} products on this machine"
        ),
        id=str(dtype).removeprefix("torch."),
    )
    for dtype in (torch.bfloat16, torch.float32)
]
needs_bfloat16 = pytest.mark.skipif(
    torch.bfloat16 not in packable_dtypes(), reason="no oneDNN with bfloat16 instructions on this machine"
)
pytestmark = pytest.mark.skipif(not packable_dtypes(), reason="no oneDNN with bfloat16 instructions on this machine")

CONFIG = TransformerConfig(
    vocab_size=60,
    dim=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    qk_norm="head",
    num_experts=6,
    top_k=2,
    expert_hidden_dim=24,
    shared_hidden_dim=16,
    shared_gate=True,
    feed_forwards=("mlp", "moe"),
    hidden_dim=48,
    init_std=0.2,
)


def _model(dtype=torch.bfloat16, **changes):
    return Transformer(dataclasses.replace(CONFIG, **changes), dtype=dtype).eval()


def _experts(dtype, **settings):
    experts = Experts(7, 32, 24, dtype=dtype, **settings).eval().requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_(std=0.3)
    return experts


def _routing(tokens, experts=7, top_k=3, used=None):
    """Slots of nobody among them; where `used`, the others of so many experts alone."""
    ids = torch.rand(tokens, used or experts).topk(top_k).indices
    unused = torch.rand(tokens, top_k) < 0.2
    weights = torch.rand(tokens, top_k).masked_fill(unused, 0)
    return Routing(ids.masked_fill(unused, experts), weights, torch.zeros(tokens, experts), experts)


def _is_as_exact(got, plain, exact):
    """As the plain product, whose sums another library forms in another order: in float32 that is all there is."""
    bound = 1e-6 if got.dtype == torch.float32 else 1.5 * relative_error(plain, exact)
    assert relative_error(got, exact) <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3), (2, 0), (300,)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(dtype, shape, bias):
    layer = nn.Linear(33, 17, bias=bias, dtype=dtype).eval()
    x = torch.randn(*shape, 33, dtype=dtype)
    exact = copy.deepcopy(layer).double()(x.double())
    with torch.no_grad():
        plain, got = layer(x), pack_for_inference(layer)(x)
    assert type(layer) is PackedLinear
    assert got.dtype == dtype
    assert got.shape == plain.shape
    _is_as_exact(got, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"bias": True}, {"activation": "relu2", "bias": True}, {"activation": "swiglu(alpha=1.7, limit=1.0)"}],
    ids=str,
)
@pytest.mark.parametrize("tokens", [0, 1, 4, 6, 50, 700])
def test_experts(dtype, settings, tokens):
    experts, x = _experts(dtype, **settings), torch.randn(tokens, 32, dtype=dtype)
    routing = _routing(tokens, used=4 if tokens == 50 else None)  # experts 4 to 6 without rows
    wide = {name: p.double() for name, p in experts.named_parameters()}
    exact = expert_mlp(
        x.double(),
        routing.expert_ids,
        routing.weights.double(),
        **wide,
        activation=experts.activation,
        impl="reference",
    )
    plain, got, again = experts(x, routing), pack_for_inference(experts)(x, routing), experts(x, routing)
    assert type(experts) is PackedExperts
    assert got.dtype == dtype
    assert torch.equal(got, again)
    _is_as_exact(got, plain, exact)


@needs_bfloat16
@pytest.mark.parametrize("tokens", [1, 30])
def test_experts_refuse_what_expert_mlp_refuses(tokens):
    experts, routing = pack_for_inference(_experts(torch.bfloat16)), _routing(tokens)
    x = torch.randn(tokens, 32, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"x must have the packed weights' dtype, torch.bfloat16, .* got torch.float32"):
        experts(x.float(), routing)
    with pytest.raises(ValueError, match=r"x must have shape \[T, D\] = \[T, 32\], got"):
        experts(x[:, 1:], routing)
    routing.expert_ids[0, 0] = 8
    with pytest.raises(ValueError, match=r"expert_ids must be in 0\.\.7"):
        experts(x, routing)
    with pytest.raises(ValueError, match="x must have 32 channels, got"):
        pack_for_inference(nn.Linear(32, 3, dtype=torch.bfloat16))(x[:, 1:].detach())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_gives_the_same_logits_and_tokens(dtype, tied):
    model = _model(dtype, tie_embeddings=tied)
    wide, ids = copy.deepcopy(model).double(), torch.randint(60, (2, 9))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :3] = False
    with torch.no_grad():
        exact, plain = (m(ids, token_mask=mask).logits[mask] for m in (wide, model))
        tokens = generate(model, ids, 6, token_mask=mask)
        pack_for_inference(model)
        got = model(ids, token_mask=mask).logits[mask]
        again = generate(model, ids, 6, token_mask=mask)
    assert sum(isinstance(m, PackedExperts) for m in model.modules()) == 2
    assert isinstance(model.embedding, PackedTiedEmbedding) is tied
    assert not any(type(m) in (nn.Linear, Experts) for m in model.modules())
    if dtype == torch.float32:  # in bfloat16 a router's near tie may be another expert
        assert torch.equal(again, tokens)
        _is_as_exact(got, plain, exact)
    else:
        assert relative_error(got, exact) <= 3 * relative_error(plain, exact)


@needs_bfloat16
def test_a_continuation_through_the_cache_is_the_whole():
    model, ids = pack_for_inference(_model(tie_embeddings=True)), torch.randint(60, (1, 12))
    with torch.no_grad():
        whole = model(ids).logits
        cache = model.new_cache(1, 12)
        parts = [model(part, cache=cache).logits for part in (ids[:, :8], *ids[:, 8:].split(1, 1))]
    assert relative_error(torch.cat(parts, 1), whole) < 0.05


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_unpacked_it_is_what_it_was_and_trains(dtype, tied):
    model = _model(dtype, tie_embeddings=tied, num_layers=2)
    model.layers[1].mixer.q_proj.weight.requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    classes = [type(module) for module in model.modules()]
    assert unpack(pack_for_inference(pack_for_inference(model))) is model  # packing twice is packing
    assert [type(module) for module in model.modules()] == classes
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name, (values, requires_grad) in before.items():
        assert type(after[name]) is nn.Parameter
        assert torch.equal(after[name], values), name
        assert after[name].requires_grad == requires_grad
    model.train()(torch.randint(60, (1, 8))).logits.float().square().mean().backward()
    assert model.layers[1].feed_forward.experts.down_proj.grad.any()


@needs_bfloat16
@pytest.mark.parametrize("tied", [True, False])
def test_saves_plain_weights(tied, tmp_path):
    model = _model(tie_embeddings=tied)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pack_for_inference(model)
    state = model.state_dict()
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.items())
    model.save_pretrained(tmp_path)
    loaded = Transformer.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in plain.items())


@needs_bfloat16
def test_copies_and_pickles():
    model, ids = pack_for_inference(_model()), torch.randint(60, (1, 8))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        with torch.no_grad():
            assert torch.equal(other(ids).logits, model(ids).logits)
        unpack(other)
        assert type(other.layers[1].mixer.q_proj) is nn.Linear
    assert type(model.layers[1].mixer.q_proj) is PackedLinear


@needs_bfloat16
def test_what_packed_weights_cannot_do_is_refused_by_name():
    model, ids = pack_for_inference(_model(tie_embeddings=False)), torch.randint(60, (1, 8))
    with pytest.raises(RuntimeError, match=r"call the model under torch.no_grad\(\), or coterie.unpack"):
        model(ids)
    for act in (
        model.train,
        lambda: model.load_state_dict({}),
        lambda: model.to("meta"),
        model.float,
        lambda: setattr(model.head, "weight", nn.Parameter(torch.zeros(60, 32))),
    ):
        with pytest.raises(RuntimeError, match=r"coterie\.unpack\(model\) first"):
            act()
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):  # a copy: it would change nothing
        model.head.weight.zero_()
    assert torch.equal(model.head.weight, unpack(model).head.weight)


@needs_bfloat16
def test_moves_that_move_nothing_are_fine():
    model, ids = pack_for_inference(_model()), torch.randint(60, (1, 8))
    with torch.no_grad():
        assert torch.equal(model.to("cpu", torch.bfloat16).eval()(ids).logits, model.bfloat16()(ids).logits)


@needs_bfloat16
def test_only_what_can_be_packed_is():
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 4, dtype=torch.float16), nn.ReLU())
    pack_for_inference(model)
    assert [type(module) for module in model] == [PackedLinear, nn.Linear, nn.ReLU]
    with pytest.raises(ValueError, match=r"must have linear layers or experts in torch.bfloat16 .* got torch.float16"):
        pack_for_inference(model[1:])
    with pytest.raises(ValueError, match=r"got torch\.bfloat16 on meta"):
        pack_for_inference(nn.Linear(4, 4, dtype=torch.bfloat16, device="meta"))
    with pytest.raises(ValueError, match="got none"):
        pack_for_inference(nn.ReLU())


def test_a_machine_without_the_instructions(monkeypatch):
    monkeypatch.setattr(module_under_test, "packable_dtypes", tuple)
    with pytest.raises(ValueError, match="packing needs a torch with oneDNN and a CPU with bfloat16 instructions"):
        pack_for_inference(_model())


@needs_bfloat16
def test_a_weight_of_two_modules_stays_for_both():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)).bfloat16().eval()
    model[1].weight = model[0].weight
    ids = torch.arange(10)
    with torch.no_grad():
        wanted = model(ids)
        pack_for_inference(model)
        assert relative_error(model(ids), wanted) < 1e-2
    assert model[1].weight is model[0].weight
    unpack(model)
    assert model[1].weight is model[0].weight


@needs_bfloat16
@pytest.mark.parametrize(("bias", "gate"), [(True, False), (False, False), (True, True)])
def test_projections_are_one_product_unless_someone_takes_part(bias, gate):
    settings = {"num_kv_heads": 2, "qkv_bias": bias, "output_gate": gate}
    attention = coterie.Attention(32, 4, **settings, dtype=torch.bfloat16).eval()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, rotary = torch.randn(2, 5, 32, dtype=torch.bfloat16), coterie.RotaryEmbedding(8)(torch.arange(5))
    exact = copy.deepcopy(attention).double()(x.double(), rotary)
    with torch.no_grad():
        plain, got = attention(x, rotary), pack_for_inference(attention)(x, rotary)
        assert relative_error(got, exact) <= 1.5 * relative_error(plain, exact)
        one, wide = attention.k_proj(x), copy.deepcopy(unpack(copy.deepcopy(attention)).k_proj).double()
        assert relative_error(one, wide(x.double())) < 5e-3
        seen = []
        handle = attention.k_proj.register_forward_hook(lambda module, args, y: seen.append(y) or 0 * y)
        halted = attention(x, rotary)
        assert torch.equal(seen[0], one)
        assert not torch.equal(halted, got)
        handle.remove()
        assert torch.equal(attention(x, rotary), got)


@needs_bfloat16
def test_latent_attention_keeps_what_it_absorbs():
    latent = coterie.LatentAttention(32, 4, head_dim=12, rotary_dim=4, kv_rank=8, value_dim=8, dtype=torch.bfloat16)
    pack_for_inference(latent)
    assert type(latent.kv_b_proj) is nn.Linear
    assert type(latent.q_proj) is PackedLinear


@needs_bfloat16
@pytest.mark.parametrize("rule", ["gated_delta", "kda", "delta_product"])
@torch.no_grad()
def test_linear_attention_packs_its_matrices_and_steps_the_same(rule):
    layer = coterie.LinearAttention(32, 4, num_key_heads=2, rule=rule, dtype=torch.bfloat16)
    layer.reset_parameters(std=0.3)
    x = torch.randn(2, 9, 32, dtype=torch.bfloat16)
    exact = copy.deepcopy(layer).double()(x.double())
    plain = layer(x)
    pack_for_inference(layer)
    assert type(layer.q_proj) is PackedLinear
    cache = layer.new_cache(2)
    steps = torch.cat(
        [layer(x[:, :6], cache_layer=cache)] + [layer(x[:, i : i + 1], cache_layer=cache) for i in (6, 7, 8)], 1
    )
    for got in (layer(x), steps):
        assert relative_error(got, exact) <= 1.5 * relative_error(plain, exact)


@needs_bfloat16
def test_adapters_and_packing_exclude_each_other():
    model = _model()
    coterie.modules.add_lora(model, targets=["experts"])
    with pytest.raises(ValueError, match="model has adapters"):
        pack_for_inference(model)
    coterie.modules.remove_lora(model)
    pack_for_inference(model)
    for target in ("experts", "o_proj"):
        with pytest.raises(ValueError, match=r"is packed for inference and takes no adapter: coterie\.unpack"):
            coterie.modules.add_lora(model, targets=[target])


@needs_bfloat16
def test_under_autocast():
    layer = pack_for_inference(nn.Linear(8, 4, dtype=torch.bfloat16))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 8)).dtype == torch.bfloat16


@needs_bfloat16
def test_torch_compile_runs_packed_products_as_they_are():
    torch._dynamo.reset()
    model, ids = pack_for_inference(_model(num_layers=2)), torch.randint(60, (1, 8))
    with torch.no_grad():
        got, wanted = torch.compile(model, backend="aot_eager")(ids).logits, model(ids).logits
        assert relative_error(got, wanted) < 0.05
        torch._dynamo.reset()
        with pytest.raises(Exception, match="packed weights cannot be compiled"):
            torch.compile(model, backend="aot_eager", fullgraph=True)(ids)


@needs_bfloat16
def test_nothing_is_held_twice():
    """In a process of its own: memory that earlier tests freed would hide what is taken."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc to read the process's memory from")
    probe = """
import gc
import torch
from coterie.modules import Experts, pack_for_inference
def resident():
    gc.collect()
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) * 1024
before = resident()
experts = Experts(64, 512, 512, dtype=torch.bfloat16)  # 100 MB, by 1 MB and 0.5 MB
size, plain = sum(p.nbytes for p in experts.parameters()), resident()
pack_for_inference(experts)
print(before, size, plain, resident())
"""
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    before, size, plain, packed = map(int, run.stdout.split())
    assert packed - plain < 0.2 * size
    assert plain - before > 0.8 * size
