"""PEFT: its own LoRA on experts runs on coterie's, and computes what coterie's LoRA does from the same factors."""

import pytest
import torch

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from test_hf_experts import make_model  # noqa: E402

from _check import relative_error  # noqa: E402
from coterie.interop import register_hf  # noqa: E402
from coterie.modules import add_lora, merge_lora  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SCALE = 8 / 3


@pytest.fixture(autouse=True)
def _registered():
    register_hf()


@pytest.fixture
def ids():
    return torch.randint(3, 64, (2, 9))


def with_peft(family, implementation, target_modules=()):
    """PEFT's LoRA with factors that have learnt something, the same at every call."""
    model = make_model(family)
    model.set_experts_implementation(implementation)
    config = peft.LoraConfig(r=3, lora_alpha=8, target_modules=list(target_modules), target_parameters=EXPERTS)
    model = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def results(model, ids):
    """Logits and the gradients of whatever trains."""
    logits = model(ids, use_cache=False).logits
    names, trained = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True)
    return logits.detach(), dict(zip(names, torch.autograd.grad(logits.square().mean(), trained), strict=True))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_its_adapters_run_on_coteries_experts(family, ids):
    (got, grads), (wanted, right) = (results(with_peft(family, name), ids) for name in ("coterie", "eager"))
    assert relative_error(got, wanted) < 1e-5
    assert len(grads) >= 4
    assert grads.keys() == right.keys()
    for name, gradient in right.items():
        assert relative_error(grads[name], gradient) < 1e-5, name


def test_it_trains_and_merges_on_coteries_experts(ids):
    models = [with_peft("qwen3_moe", name) for name in ("coterie", "eager")]
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
    beside, wanted = (model(ids, use_cache=False).logits for model in models)
    assert relative_error(beside, wanted) < 1e-4
    merged = models[0].merge_and_unload()
    assert merged.get_experts_implementation()[""] == "coterie"
    assert relative_error(merged(ids, use_cache=False).logits, beside) < 1e-5


def copy_factors(theirs, ours):
    """PEFT has A [E·R, I] expert by expert and B [O, R·E] rank by rank. Gives (ours, theirs, how to read theirs)."""
    pairs = []
    for name, module in theirs.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        low = ours.get_submodule(plain).lora.adapters["default"][getattr(module, "parameter_name", "weight")]
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        number = low.a.shape[0]

        def read_a(t, number=number):
            return t.unflatten(0, (number, -1))

        def read_b(t, number=number):
            return t.unflatten(1, (-1, number)).permute(2, 0, 1)

        with torch.no_grad():
            low.a.copy_(read_a(a))
            low.b.copy_(read_b(b))
        pairs += [(low.a, a, read_a), (low.b, b, read_b)]
    return pairs


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_the_same_factors_give_the_same_logits_and_gradients(family, ids):
    theirs = with_peft(family, "eager", ["q_proj"])
    ours = make_model(family)
    ours.set_experts_implementation("coterie")
    add_lora(ours, 3, 8, targets=["mlp.experts", "q_proj"])
    pairs = copy_factors(theirs, ours)
    assert len(pairs) == 2 * 2 * (2 + 1)  # layers, factors, matrices
    got, wanted = (model(ids, use_cache=False).logits for model in (ours, theirs))
    assert relative_error(got, wanted) < 1e-5
    mine, others, readers = zip(*pairs, strict=True)
    grads = torch.autograd.grad(got.square().mean(), mine), torch.autograd.grad(wanted.square().mean(), others)
    for gradient, right, read in zip(*grads, readers, strict=True):
        assert relative_error(gradient, read(right)) < 1e-5
    merge_lora(ours)
    assert relative_error(ours(ids, use_cache=False).logits, theirs.merge_and_unload()(ids).logits) < 1e-5
