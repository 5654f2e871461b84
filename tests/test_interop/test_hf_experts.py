"""transformers' own models with coterie's experts inside: the same logits and gradients as with theirs."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

transformers = pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from _check import relative_error  # noqa: E402
from coterie import pack_for_inference, unpack  # noqa: E402
from coterie.interop import register_hf  # noqa: E402
from coterie.modules.packed import Packed  # noqa: E402
from coterie.ops._packed import packable_dtypes  # noqa: E402

transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

needs_bfloat16 = pytest.mark.skipif(
    torch.bfloat16 not in packable_dtypes(), reason="no oneDNN with bfloat16 instructions on this machine"
)

# Whatever of these a family's config has.
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "moe_num_experts": 6,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "shared_expert_intermediate_size": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "n_shared_experts": 1,
    "decoder_sparse_step": 1,
    "moe_layer_start_index": 0,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
    "num_dense_layers": 0,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
    "sliding_window": 8,
}
FAMILIES = [
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",  # transposed, interleaved, with biases and a gate of its own
    "granitemoe",
    "ernie4_5_moe",
    "lfm2_moe",
    "jamba",
    "phimoe",
    "minimax",
    "minimax_m2",
    "dots1",
    "flex_olmo",
    "hunyuan_v1_moe",
    "afmoe",
    "exaone_moe",
    "nemotron_h",  # without a gate
]


def make_model(family, dtype=torch.float32):
    known = AutoConfig.for_model(family)
    fields = {name: value for name, value in SMALL.items() if hasattr(known, name)}
    if family.startswith("deepseek"):
        # Of latent attention: the rotary part; every head has keys of its own.
        fields |= {"head_dim": fields["qk_rope_head_dim"], "num_key_value_heads": fields["num_attention_heads"]}
    if family == "lfm2_moe":
        fields["layer_types"] = ["conv", "full_attention"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields), experts_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.to(dtype)


def experts_of(model):
    return [module for module in model.modules() if hasattr(module, "_is_expert_parallel")]


def results(model, implementation, ids, **settings):
    """Logits and every gradient."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    logits = model(ids, use_cache=False, **settings).logits
    logits.float().square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def _registered():
    register_hf()
    register_hf()  # again is nothing


@pytest.fixture
def ids():
    return torch.randint(3, 64, (2, 9))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_eager(family, ids):
    model = make_model(family)
    assert experts_of(model)
    (wanted, wanted_grads), (got, got_grads) = (results(model, name, ids) for name in ("eager", "coterie"))
    assert relative_error(got, wanted) < 1e-5
    assert got_grads.keys() == wanted_grads.keys()
    for name, gradient in wanted_grads.items():
        assert relative_error(got_grads[name], gradient) < 1e-5, name


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_bfloat16_is_no_worse_than_eager(family, ids):
    exact = make_model(family).to(torch.bfloat16).float()  # the rounded weights, exactly
    truth, truth_grads = results(exact, "eager", ids)
    model = make_model(family, torch.bfloat16)
    (eager, eager_grads), (got, got_grads) = (results(model, name, ids) for name in ("eager", "coterie"))
    assert got.dtype == torch.bfloat16
    assert relative_error(got, truth) < 2 * relative_error(eager, truth)
    for name in ("gate_up_proj", "down_proj"):
        (key,) = [key for key in truth_grads if key.endswith(f"layers.0.mlp.experts.{name}")]
        errors = (relative_error(grads[key], truth_grads[key]) for grads in (got_grads, eager_grads))
        assert next(errors) < 2 * next(errors)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_generates_the_same_tokens(family, ids):
    model = make_model(family).eval()
    tokens = []
    for name in ("eager", "coterie"):
        model.set_experts_implementation(name)
        tokens.append(model.generate(ids, max_new_tokens=8, do_sample=False))
    assert torch.equal(*tokens)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_under_autocast_and_gradient_checkpointing(family, ids):
    model = make_model(family).train()
    _, wanted = results(model, "eager", ids)
    _, plain = results(model, "coterie", ids)
    model.gradient_checkpointing_enable()
    _, checkpointed = results(model, "coterie", ids)
    assert all(torch.equal(checkpointed[name], gradient) for name, gradient in plain.items())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, rounded = results(model, "coterie", ids)
    for name, gradient in wanted.items():
        if "experts" in name:
            assert rounded[name].dtype == torch.float32
            assert relative_error(rounded[name], gradient) < 0.1, name


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_compiles_to_one_graph_for_every_length(family):
    module = experts_of(make_model(family))[0]
    module.config._experts_implementation = "coterie"
    dim, number = module.down_proj.shape[2 if module.is_transposed else 1], module.num_experts
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for tokens in (7, 40, 300):
        x, weights = torch.randn(tokens, dim, requires_grad=True), torch.rand(tokens, 2)
        ids = torch.rand(tokens, number).topk(2).indices
        for t in (x, weights, ids):
            torch._dynamo.mark_dynamic(t, 0)
        got, wanted = compiled(x, ids, weights), module(x, ids, weights)
        assert relative_error(got, wanted) < 1e-5
        assert relative_error(*(torch.autograd.grad(y.sum(), x)[0] for y in (got, wanted))) < 1e-5
    assert counter.frame_count == 1


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_slots_of_other_ranks_are_not_computed(family):
    module = experts_of(make_model(family))[0]
    module.config._experts_implementation = "coterie"
    x, weights = torch.randn(20, 32), torch.rand(20, 2)
    ids = torch.rand(20, 6).topk(2).indices
    wanted = module(x, ids, torch.stack((weights[:, 0], torch.zeros(20)), 1))
    module._is_expert_parallel = True
    got = module(x, torch.stack((ids[:, 0], torch.full((20,), 6)), 1), weights)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_served_is_refused_by_name():
    module = experts_of(make_model("mixtral"))[0]
    module.config._experts_implementation = "coterie"
    inputs = (torch.randn(3, 32), torch.zeros(3, 2).long(), torch.rand(3, 2))
    module.down_proj = torch.nn.Parameter(module.down_proj.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"cannot serve MixtralExperts: its down_proj .* got torch.int8 \(6, 32, 48\)"):
        module(*inputs)
    del module.gate_up_proj
    with pytest.raises(ValueError, match=r"cannot serve MixtralExperts: its gate_up_proj .* got NoneType"):
        module(*inputs)


@needs_bfloat16
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_no_worse_and_unpacks_to_what_it_was(family, ids):
    model, exact = make_model(family, torch.bfloat16).eval(), make_model(family).to(torch.bfloat16).float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    module, exact_module = (experts_of(m)[0] for m in (model, exact))
    dim, number = module.down_proj.shape[2 if module.is_transposed else 1], module.num_experts
    inputs = []
    for tokens in (1, 40):  # row by row, and sorted
        x, weights = torch.randn(tokens, dim).bfloat16(), torch.rand(tokens, 2).bfloat16()
        inputs.append((x, torch.rand(tokens, number).topk(2).indices, weights))
    with torch.no_grad():
        wanted = [exact_module(x.float(), ids, weights.float()) for x, ids, weights in inputs]
        eager = [module(*each) for each in inputs]
        model.set_experts_implementation("coterie")
        pack_for_inference(model)
        got = [module(*each) for each in inputs]
        assert torch.equal(*(model(ids, use_cache=False).logits for _ in range(2)))
    assert all(isinstance(each, Packed) for each in experts_of(model))
    for y, theirs, right in zip(got, eager, wanted, strict=True):
        assert relative_error(y, right) < 1.5 * relative_error(theirs, right)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    unpack(model)
    assert not any(isinstance(each, Packed) for each in model.modules())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert torch.equal(parameter, before[name])


@pytest.mark.skipif(torch.float32 not in packable_dtypes(), reason="float32 is not packed on this machine")
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_packed_generates_the_same_tokens(family, ids):
    model = make_model(family).eval()
    wanted = model.generate(ids, max_new_tokens=8, do_sample=False)
    model.set_experts_implementation("coterie")
    assert torch.equal(pack_for_inference(model).generate(ids, max_new_tokens=8, do_sample=False), wanted)


@needs_bfloat16
def test_a_packed_model_saves_its_plain_weights(tmp_path, ids):
    model = make_model("qwen3_moe", torch.bfloat16).eval()
    model.set_experts_implementation("coterie")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pack_for_inference(model).save_pretrained(tmp_path)
    after = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@needs_bfloat16
def test_packing_asks_for_the_implementation():
    model = make_model("mixtral", torch.bfloat16)
    with pytest.raises(ValueError, match=r"for experts_implementation 'coterie', got 'eager': call .*register_hf"):
        pack_for_inference(model)
    assert not any(isinstance(module, Packed) for module in model.modules())
