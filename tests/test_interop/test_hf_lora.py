"""LoRA on transformers' own models: beside merged weights, and beside PEFT's on the same factors."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from test_hf_experts import experts_of, make_model  # noqa: E402

from _check import relative_error  # noqa: E402
from coterie.interop import register_hf  # noqa: E402
from coterie.modules import add_lora, lora_parameters, merge_lora, set_adapter, unmerge_lora  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "granitemoe"]


@pytest.fixture(autouse=True)
def _registered():
    register_hf()


@pytest.fixture
def ids():
    return torch.randint(3, 64, (3, 8))


def with_lora(family, targets=("experts",), name="default", dtype=torch.float32, **settings):
    model = make_model(family, dtype)
    model.set_experts_implementation("coterie")
    return learnt(model, targets, name, **settings)


def learnt(model, targets=("experts",), name="default", rank=3, **settings):
    add_lora(model, rank, targets=targets, name=name, **settings)
    for factor in lora_parameters(model, name):
        nn.init.normal_(factor, std=0.2)
    return model


def logits(model, ids):
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shared", ["none", "both"])
def test_computes_with_merged_weights(family, shared, ids):
    """Transposed weights, biases, gates of their own and experts without one."""
    model = with_lora(family, ["experts", "q_proj"] if family == "mixtral" else ["experts"], shared=shared)
    assert len(lora_parameters(model)) >= 4 * len(experts_of(model))
    bare = make_model(family)
    bare.set_experts_implementation("coterie")
    beside = logits(model, ids)
    beside.square().mean().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if ".lora." in name
    }
    merge_lora(model)
    assert relative_error(logits(model, ids), beside) < 1e-5
    model.set_experts_implementation("eager")  # and in the weights it works with every implementation
    assert relative_error(logits(model, ids), beside) < 1e-5
    model.set_experts_implementation("coterie")
    unmerge_lora(model)
    set_adapter(model, None)
    without = logits(model, ids)
    assert relative_error(without, logits(bare, ids)) < 1e-5
    assert relative_error(without, beside) > 1e-3


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_gradients_are_those_through_merged_weights(family, ids):
    """eager, with W + s·B·A in the place of W as a function of the factors."""
    model = with_lora(family)
    factors = lora_parameters(model)
    got = torch.autograd.grad(logits(model, ids).square().mean(), factors)
    weights = {}
    for prefix, module in model.named_modules():
        if hasattr(module, "_is_expert_parallel"):
            for matrix, low in module.lora.adapters["default"].items():
                update = 16 / 3 * low.b @ low.a
                weight = getattr(module, matrix).detach()
                weights[f"{prefix}.{matrix}"] = weight + (update.mT if module.is_transposed else update)
    set_adapter(model, None)
    model.set_experts_implementation("eager")
    merged = torch.func.functional_call(model, weights, (ids,), {"use_cache": False}).logits
    for a, b in zip(got, torch.autograd.grad(merged.square().mean(), factors), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_each_sequence_has_its_own_adapter(family, ids):
    model = learnt(with_lora(family, name="one"), ["experts", "q_proj"], "two", rank=2)
    set_adapter(model, ["one", "two"], torch.tensor([1, -1, 0]))
    mixed = logits(model, ids)
    alone = []
    for name in ("two", None, "one"):
        set_adapter(model, name)
        alone.append(logits(model, ids[len(alone) :][:1]))
    assert relative_error(mixed, torch.cat(alone)) < 1e-5


def test_generates_the_same_tokens_as_merged(ids):
    model = with_lora("qwen3_moe").eval()
    beside = model.generate(ids, max_new_tokens=8, do_sample=False)
    merge_lora(model)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), beside)


def test_under_bfloat16_autocast_and_gradient_checkpointing(ids):
    model = with_lora("qwen3_moe").train()
    factors = lora_parameters(model)
    exact = torch.autograd.grad(logits(model, ids).square().mean(), factors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = torch.autograd.grad(logits(model, ids).float().square().mean(), factors)
    model.gradient_checkpointing_enable()
    checkpointed = torch.autograd.grad(logits(model, ids).square().mean(), factors)
    assert all(torch.equal(a, b) for a, b in zip(exact, checkpointed, strict=True))
    for a, b in zip(rounded, exact, strict=True):
        assert relative_error(a, b) < 0.1
    narrow = with_lora("qwen3_moe", dtype=torch.bfloat16)
    loss = logits(narrow, ids).float().square().mean()
    for a, b in zip(torch.autograd.grad(loss, lora_parameters(narrow)), exact, strict=True):
        assert a.dtype == torch.float32
        assert a.shape == b.shape


def test_an_adapter_that_would_be_left_out_is_refused(ids):
    model = make_model("mixtral")
    message = r"an adapter of MixtralExperts needs the experts implementation 'coterie' .*, got 'eager'"
    with pytest.raises(ValueError, match=message):
        add_lora(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.set_experts_implementation("coterie")
    add_lora(model)
    model.set_experts_implementation("eager")
    with pytest.raises(ValueError, match=message):
        logits(model, ids)
    set_adapter(model, None)
    assert logits(model, ids).isfinite().all()


@pytest.mark.parametrize("shape", ["one", "several"])
def test_compiles_to_one_graph(shape):
    model = with_lora("gpt_oss", name="one")
    if shape == "several":
        set_adapter(learnt(model, name="two"), ["one", "two"], torch.tensor([1, 0, -1, 0]))
    module = experts_of(model)[0]
    x, weights = torch.randn(20, 32, requires_grad=True), torch.rand(20, 2)
    ids = torch.rand(20, 6).topk(2).indices
    torch._dynamo.reset()
    got = torch.compile(module, backend="aot_eager", fullgraph=True)(x, ids, weights)
    wanted = module(x, ids, weights)
    assert relative_error(got, wanted) < 1e-5
    assert relative_error(*(torch.autograd.grad(y.sum(), x)[0] for y in (got, wanted))) < 1e-5
