"""What trains, what an adapter reaches, what is quantized, and which experts were missed."""

import pytest
import torch
from torch import nn

from coterie.models import Transformer, TransformerConfig
from coterie.modules import add_lora, lora_parameters, merge_lora, remove_lora
from coterie.report import check_coverage, coverage, format_coverage

# PEFT's and transformers' own.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning", "ignore::FutureWarning")
GATE_UP, DOWN = (f"layers.*.feed_forward.experts.{name}" for name in ("gate_up_proj", "down_proj"))


@pytest.fixture
def model():
    return Transformer(
        TransformerConfig(
            vocab_size=50, dim=12, num_layers=3, num_heads=2, num_experts=4, top_k=2, expert_hidden_dim=6, max_length=9
        )
    )


def groups(found):
    return {group.name: group for group in found.groups}


def test_a_model_that_trains_as_a_whole(model):
    found = check_coverage(model)
    assert sum(group.params for group in found.groups) == sum(p.numel() for p in model.parameters())
    assert all(group.trained == group.count and not group.frozen + group.adapted for group in found.groups)
    assert groups(found)[GATE_UP].count == 3
    assert groups(found)[GATE_UP].params == 3 * 4 * 12 * 12
    assert groups(found)["embedding.weight"].count == 1
    assert found.adapter_params == 0


def test_an_adapter_that_reaches_experts(model):
    add_lora(model, 2, targets=["experts.gate_up_proj", "q_proj"])
    found = coverage(model)
    by_name = groups(found)
    reached = {name for name, group in by_name.items() if group.adapted}
    assert reached == {GATE_UP, "layers.*.mixer.q_proj.weight"}
    assert all(group.trained == 0 and group.frozen == group.count for group in found.groups)
    assert by_name[GATE_UP].adapted == 3
    assert found.adapter_params == sum(p.numel() for p in lora_parameters(model))
    assert not any("lora" in name for name in by_name)
    missed = tuple(f"layers.{i}.feed_forward.experts.down_proj" for i in range(3))
    assert found.unadapted == missed
    with pytest.raises(
        ValueError,
        match=r"experts were missed: layers\.0\.\S+, layers\.1\S+, layers\.2\S+: frozen and reached by no adapter",
    ):
        check_coverage(model)
    assert check_coverage(model, allow=["layers.*.down_proj"]).unadapted == missed
    with pytest.raises(ValueError, match=r"missed: layers\.1\.feed_forward\.experts\.down_proj: frozen"):
        check_coverage(model, allow=["layers.[02].*"])
    model.layers[1].feed_forward.experts.down_proj.requires_grad_(True)  # trains as it is: covered
    assert coverage(model).unadapted == (missed[0], missed[2])
    assert groups(coverage(model))[DOWN].trained == 1


def test_a_model_where_nothing_trains_has_missed_nothing(model):
    model.requires_grad_(False)
    assert check_coverage(model).unadapted == ()
    add_lora(model, 2)
    merge_lora(model)
    remove_lora(model)
    assert check_coverage(model).unadapted == ()


class PackedBits:
    """As torchao's: a tensor that claims float32 and holds int8."""

    @staticmethod
    def pack(shape):
        class Packed(torch.Tensor):
            @staticmethod
            def __new__(cls, inner):
                return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)

            def __init__(self, inner):
                self.inner = inner

            def __tensor_flatten__(self):
                return ["inner"], None

            @classmethod
            def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
                if func is torch.ops.aten.detach.default:
                    return args[0]
                raise NotImplementedError(func)

        return Packed(torch.zeros(shape, dtype=torch.int8))


@pytest.mark.parametrize("kind", ["int8", "float8", "wrapped", "buffer"])
def test_a_quantizer_that_passes_experts_by(model, kind):
    assert coverage(model).unquantized == ()
    for layer in model.layers:
        linear = layer.mixer.q_proj
        if kind == "buffer":
            del linear.weight
            linear.register_buffer("qweight", torch.zeros(12, 6, dtype=torch.int32))
        elif kind == "wrapped":
            linear.weight = nn.Parameter(PackedBits.pack((12, 12)), requires_grad=False)
        else:
            dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
            linear.weight = nn.Parameter(torch.zeros(12, 12).to(dtype), requires_grad=False)
    found = coverage(model)
    assert len(found.unquantized) == 6
    if kind != "buffer":
        assert groups(found)["layers.*.mixer.q_proj.weight"].quantized == 3
    with pytest.raises(ValueError, match=r"down_proj, .* and 3 more: not quantized, though other weights are"):
        check_coverage(model, allow=["nothing.like.this"])
    for layer in model.layers:
        experts = layer.feed_forward.experts
        for name in ("gate_up_proj", "down_proj"):
            quantized = nn.Parameter(torch.zeros(getattr(experts, name).shape, dtype=torch.int8), requires_grad=False)
            setattr(experts, name, quantized)
    assert coverage(model).unquantized == ()


def test_experts_that_no_token_chose(model):
    name = "layers.1.feed_forward.experts"
    counts = {name: torch.tensor([3, 0, 5, 0]), "layers.0.feed_forward.experts": torch.ones(4)}
    found = coverage(model, counts)
    assert found.unchosen == {name: [1, 3]}
    assert f"Experts that no token chose:\n  {name}: 1, 3" in format_coverage(found)
    with pytest.raises(ValueError, match=r"counts must be by experts module, layers\.0\.\S+, .*; got 'router'"):
        coverage(model, {"router": torch.ones(4)})


def test_the_table(model):
    add_lora(model, 2, targets=["experts.gate_up_proj"])
    model.layers[0].mixer.q_proj.weight.requires_grad_(True)
    lines = {line.split("  ")[0]: line.split() for line in format_coverage(coverage(model)).splitlines() if line}
    assert lines["parameter"] == ["parameter", "params", "train", "frozen", "adapted", "quantized"]
    assert lines[f"{GATE_UP} × 3"][3:] == ["1.73", "k", "–", "all", "all", "–"]
    assert lines["layers.*.mixer.q_proj.weight × 3"][3:] == ["432", "1", "of", "3", "2", "of", "3", "–", "–"]
    assert lines["adapters"] == ["adapters", "576"]
    assert "Frozen experts that no adapter reaches:" in lines


# --- PEFT, on transformers' models ---


@pytest.fixture
def hf_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=16,
        moe_intermediate_size=8,
        num_experts=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=32,
    )
    return transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")


HF_EXPERTS = tuple(f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj"))


def with_peft(model, **settings):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, **settings))


@pytest.mark.parametrize("targets", [["gate_up_proj", "q_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]])
def test_peft_that_passes_experts_by_is_caught(hf_model, targets):
    """A name of the experts' tensors among target_modules finds no module, and no one is told."""
    model = with_peft(hf_model, target_modules=targets)
    found = coverage(model)
    assert found.unadapted == HF_EXPERTS
    assert groups(found)["model.layers.*.self_attn.q_proj.weight"].adapted == 2
    assert found.adapter_params == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj, .* and 1 more: frozen"):
        check_coverage(model)


def test_all_linear_is_reported_as_it_is(hf_model):
    """Some versions of PEFT take experts in, others leave them out."""
    model = with_peft(hf_model, target_modules="all-linear")
    takes_them = any("experts" in name and p.requires_grad for name, p in model.named_parameters())
    assert coverage(model).unadapted == (() if takes_them else HF_EXPERTS)


def test_peft_that_reaches_experts_passes(hf_model):
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = with_peft(hf_model, target_modules=["q_proj"], target_parameters=names)
    found = check_coverage(model)
    by_name = groups(found)
    for name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "self_attn.q_proj.weight"):
        assert by_name[f"model.layers.*.{name}"].adapted == 2
    assert sum(group.adapted for group in found.groups) == 6
    assert found.adapter_params == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_peft_that_reaches_one_of_two_is_caught(hf_model):
    model = with_peft(hf_model, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    assert coverage(model).unadapted == HF_EXPERTS[1::2]


def test_experts_that_peft_trains_a_copy_of_are_reached(hf_model):
    model = with_peft(hf_model, target_modules=["q_proj"], modules_to_save=["experts"])
    assert coverage(model).unadapted == ()


def test_adapters_of_ours_in_a_transformers_model(hf_model):
    from coterie.interop import register_hf

    register_hf()
    hf_model.set_experts_implementation("coterie")
    add_lora(hf_model, 2)
    assert check_coverage(hf_model).unadapted == ()
    remove_lora(hf_model)
    add_lora(hf_model, 2, targets="q_proj")
    assert coverage(hf_model).unadapted == HF_EXPERTS
