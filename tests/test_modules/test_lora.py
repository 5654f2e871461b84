"""LoRA on coterie's own modules: beside the same model with merged weights, and everything one does with adapters."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from _check import relative_error
from coterie.models import Transformer, TransformerConfig, generate
from coterie.modules import (
    Experts,
    GatedMLP,
    MoE,
    add_lora,
    lora_parameters,
    merge_lora,
    remove_lora,
    set_adapter,
    unmerge_lora,
)
from coterie.ops import balance_loss

IMPLS = ["reference", "torch"]
TOP = ["experts", "shared_expert"]


def make_moe(dtype=torch.float64, **settings):
    moe = MoE(12, 10, 6, 2, shared_hidden_dim=7, **settings)
    moe.reset_parameters(0.4)
    return moe.to(dtype)


def with_lora(model, *args, std=0.3, **settings):
    """Adds an adapter that has learnt something."""
    add_lora(model, *args, **settings)
    for factor in lora_parameters(model, settings.get("name", "default")):
        nn.init.normal_(factor, std=std)
    return model


def merged_weights(model, scale):
    """By name, W + s·B·A as a function of the factors: what the model is said to compute with."""
    weights = {}
    for prefix, module in model.named_modules():
        lora = getattr(module, "lora", None)
        for matrix, low in lora.adapters["default"].items() if lora is not None else ():
            weight, update = getattr(module, matrix), scale * low.b @ low.a
            weights[f"{prefix}.{matrix}"] = weight + (update if weight.dim() == 3 else update[0])
    return weights


def step(model, x, weights=None, mask=None):
    if weights is None:
        y, routing = model(x, mask)
    else:
        set_adapter(model, None)
        y, routing = torch.func.functional_call(model, weights, (x, mask))
        set_adapter(model, "default")
    return y, y.square().sum() + balance_loss(routing)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shared", ["none", "a", "b", "both"])
@pytest.mark.parametrize("settings", [{}, {"bias": True, "activation": "relu2"}, {"recompute": True}], ids=str)
def test_computes_with_merged_weights(impl, shared, settings):
    moe = with_lora(make_moe(impl=impl, **settings), 3, 6, targets=TOP, shared=shared)
    x = torch.randn(2, 20, 12, dtype=torch.float64, requires_grad=True)
    leaves = [x, *lora_parameters(moe)]
    assert len(leaves) == 1 + 2 * 4
    (y, loss), (wanted, right) = step(moe, x), step(moe, x, merged_weights(moe, 2.0))
    assert relative_error(y, wanted) < 1e-12
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(right, leaves), strict=True):
        assert relative_error(a, b) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_changes_nothing_and_trains_nothing_else(dtype):
    moe = make_moe(dtype)
    x = torch.randn(2, 9, 12, dtype=dtype)
    before = moe(x)[0].detach()
    names = add_lora(moe, 4, targets=TOP)
    assert names == [
        "experts.gate_up_proj",
        "experts.down_proj",
        "shared_expert.gate_up_proj.weight",
        "shared_expert.down_proj.weight",
    ]
    after = moe(x)[0]
    assert torch.equal(after, before)
    assert {id(p) for p in moe.parameters() if p.requires_grad} == {id(p) for p in lora_parameters(moe)}
    assert all(factor.dtype == torch.float32 for factor in lora_parameters(moe))
    after.float().square().sum().backward()
    for name, parameter in moe.named_parameters():
        assert (parameter.grad is not None) == (".lora." in name)
        if name.endswith(".b"):
            assert parameter.grad.any()


def test_training_lowers_the_loss_and_moves_the_factors_alone():
    moe = make_moe(torch.float32)
    frozen = {name: parameter.clone() for name, parameter in moe.named_parameters()}
    add_lora(moe, 4, targets="*", dropout=0.1)
    optimizer = torch.optim.AdamW(lora_parameters(moe), lr=1e-2)
    x, wanted = torch.randn(64, 12), torch.randn(64, 12)
    losses = []
    for _ in range(60):
        loss = (moe(x)[0] - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(moe.get_parameter(name), value) for name, value in frozen.items())


def test_scales():
    for settings, scale in (({}, 2.0), ({"rslora": True}, 4.0)):
        moe = with_lora(make_moe(), 4, 8, **settings)
        x = torch.randn(5, 12, dtype=torch.float64)
        assert relative_error(moe(x)[0], step(moe, x, merged_weights(moe, scale))[0]) < 1e-12


def test_targets():
    model = nn.ModuleDict({"a": make_moe(), "b": make_moe()})

    def updated(*targets):
        names = add_lora(model, 2, targets=targets)
        remove_lora(model)
        return names

    both = ["experts.gate_up_proj", "experts.down_proj"]
    assert updated("experts") == [f"{m}.{name}" for m in "ab" for name in both]
    assert updated("a.experts") == [f"a.{name}" for name in both]
    assert updated("experts.down_proj") == ["a.experts.down_proj", "b.experts.down_proj"]
    assert updated("b.*.down_proj") == ["b.experts.down_proj", "b.shared_expert.down_proj.weight"]
    assert updated("down_proj", "b") == [
        "a.experts.down_proj",
        "a.shared_expert.down_proj.weight",
        "b.experts.gate_up_proj",
        "b.experts.down_proj",
        "b.shared_expert.gate_up_proj.weight",
        "b.shared_expert.down_proj.weight",
    ]
    assert len(updated("*")) == 8


def test_dropout_is_for_training():
    moe = with_lora(make_moe(), 4, dropout=0.5, targets=TOP)
    x = torch.randn(30, 12, dtype=torch.float64)
    right = step(moe, x, merged_weights(moe, 4.0))[0]
    assert relative_error(moe(x)[0], right) > 1e-2
    moe.eval()
    assert relative_error(moe(x)[0], right) < 1e-12
    later = add_lora(moe, 2, dropout=0.5, name="later")
    assert later
    assert torch.equal(moe(x)[0], moe(x)[0])  # a model that evaluates goes on doing so


# --- padding, sizes, modes ---


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shared", ["none", "both"])
def test_content_of_padding_cannot_matter(impl, shared):
    moe = with_lora(make_moe(impl=impl), 3, targets=TOP, shared=shared)
    clean = torch.randn(2, 9, 12, dtype=torch.float64)
    mask = torch.rand(2, 9) < 0.6
    results = []
    for filler in (0.0, torch.nan):
        x = torch.where(mask[..., None], clean, filler).requires_grad_()
        y, loss = step(moe, x, mask=mask)
        assert not y[~mask].any()
        results.append([y[mask], *torch.autograd.grad(loss, lora_parameters(moe))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ids", [None, torch.tensor([0, -1])], ids=["one", "two"])
def test_no_tokens_at_all(impl, ids):
    moe = with_lora(make_moe(impl=impl), 3, targets=TOP)
    if ids is not None:
        set_adapter(moe, ["default"], ids)
    y, loss = step(moe, torch.zeros(2, 0, 12, dtype=torch.float64))
    assert y.shape == (2, 0, 12)
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, lora_parameters(moe)))


@pytest.mark.parametrize("recompute", [False, True])
def test_under_autocast(recompute):
    moe = with_lora(make_moe(torch.float32, recompute=recompute), 3, targets=TOP)
    x = torch.randn(2, 100, 12, requires_grad=True)
    leaves = [x, *lora_parameters(moe)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, loss = step(moe, x)
        assert y.dtype == torch.bfloat16
        got = torch.autograd.grad(loss, leaves)
        _, plain_loss = step(moe, x, merged_weights(moe, 16 / 3))
        plain = torch.autograd.grad(plain_loss, leaves)
    _, loss = step(moe, x)
    for mine, theirs, right in zip(got, plain, torch.autograd.grad(loss, leaves), strict=True):
        assert mine.dtype == torch.float32
        assert relative_error(mine, right) < max(2 * relative_error(theirs, right), 1e-2)


def test_checkpointing_is_exact_dropout_included():
    moe = with_lora(make_moe(torch.float32), 3, targets=TOP, dropout=0.3)
    x = torch.randn(40, 12, requires_grad=True)
    results = []
    for run in (lambda: moe(x)[0], lambda: checkpoint(lambda x: moe(x)[0], x, use_reentrant=False)):
        torch.manual_seed(1)
        y = run()
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *lora_parameters(moe)])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", ["one", "several", "dropout", "trained"])
def test_compiles_to_one_graph_for_every_length(kind):
    moe = with_lora(make_moe(torch.float32), 3, targets=TOP, shared="a", dropout=0.1 if kind == "dropout" else 0.0)
    if kind == "several":
        with_lora(moe, 2, targets=TOP, name="second")
    if kind == "trained":
        moe.requires_grad_(True)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: moe(x)[0], backend=counter, fullgraph=True)
    for length in (7, 40, 300):
        x = torch.randn(4, length, 12, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 1)
        if kind == "several":
            set_adapter(moe, ["default", "second"], torch.randint(-1, 2, (4,)))
        leaves = [x, *lora_parameters(moe, "default")]
        results = []
        for run in (compiled, lambda x: moe(x)[0]):
            torch.manual_seed(0)
            y = run(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        if kind != "dropout":  # compiled, it draws other numbers
            for a, b in zip(*results, strict=True):
                assert relative_error(a, b) < 1e-5
    assert counter.frame_count == 1
    torch._dynamo.reset()


# --- several adapters ---


@pytest.mark.parametrize("impl", IMPLS)
def test_each_sequence_has_its_own_adapter(impl):
    """Of other ranks, scales, sharing and matrices; as if each were alone, gradients too."""
    moe = make_moe(impl=impl)
    with_lora(moe, 3, 6, targets=TOP, name="one")
    with_lora(moe, 5, 2, targets=["experts"], shared="a", name="two")
    with_lora(moe, 2, 2, targets=["experts.down_proj", "shared_expert.gate_up_proj"], shared="b", name="three")
    x = torch.randn(5, 4, 12, dtype=torch.float64, requires_grad=True)
    names, ids = ["three", "one", "two"], torch.tensor([1, -1, 0, 2, 1])
    set_adapter(moe, names, ids)
    y = moe(x)[0]
    grads = torch.autograd.grad(y.square().sum(), [x, *lora_parameters(moe)])
    alone = []
    for i, which in enumerate(ids.tolist()):
        set_adapter(moe, None if which < 0 else names[which])
        alone.append(moe(x[i : i + 1])[0])
    wanted = torch.cat(alone)
    right = torch.autograd.grad(wanted.square().sum(), [x, *lora_parameters(moe)])
    assert relative_error(y, wanted) < 1e-12
    for a, b in zip(grads, right, strict=True):
        assert relative_error(a, b) < 1e-11
    set_adapter(moe, names, ids.repeat_interleave(4))  # one for each token
    assert torch.equal(moe(x)[0], y)
    set_adapter(moe, ["one", "two"], torch.tensor([-1]))
    bare = moe(x)[0]
    remove_lora(moe)
    assert relative_error(bare, moe(x)[0]) < 1e-12


def test_a_new_adapter_applies_and_none_after_it_was_removed():
    moe = with_lora(make_moe(), 3, name="one")
    x = torch.randn(9, 12, dtype=torch.float64)
    one = moe(x)[0]
    with_lora(moe, 2, name="two")
    assert relative_error(moe(x)[0], one) > 0.1
    set_adapter(moe, "one")
    assert torch.equal(moe(x)[0], one)
    assert len(lora_parameters(moe)) == 2 * len(lora_parameters(moe, "two")) == 8
    remove_lora(moe, "two")
    assert torch.equal(moe(x)[0], one)
    remove_lora(moe, "one")
    assert "lora" not in repr(moe).lower()
    assert not moe.experts._forward_hooks


def test_a_copy_has_adapters_of_its_own():
    moe = with_lora(make_moe(), 3, targets=TOP)
    x = torch.randn(9, 12, dtype=torch.float64)
    twin = copy.deepcopy(moe)
    before = moe(x)[0]
    with torch.no_grad():
        for factor in lora_parameters(twin):
            factor.zero_()
    assert torch.equal(moe(x)[0], before)
    remove_lora(twin)
    assert torch.equal(moe(x)[0], before)
    other = make_moe()
    add_lora(other, 3, targets=TOP)
    other.load_state_dict(moe.state_dict())
    assert torch.equal(other(x)[0], before)


# --- merging ---


@pytest.mark.parametrize("shared", ["none", "a", "both"])
def test_merging_is_a_change_of_place(shared):
    moe = with_lora(make_moe(torch.float32), 3, targets=TOP, shared=shared)
    weights = {name: p.clone() for name, p in moe.named_parameters() if "lora" not in name}
    x = torch.randn(50, 12)
    beside = moe(x)[0]
    merge_lora(moe)
    assert relative_error(moe(x)[0], beside) < 1e-6
    unmerge_lora(moe)
    for name, value in weights.items():
        torch.testing.assert_close(moe.get_parameter(name), value, rtol=1e-6, atol=1e-6)
    assert relative_error(moe(x)[0], beside) < 1e-6
    with_lora(moe, 2, name="other")
    merge_lora(moe, "default")
    remove_lora(moe)
    assert relative_error(moe(x)[0], beside) < 1e-6  # it stays in the weights
    assert set(dict(moe.named_parameters())) == set(weights)


def test_merging_into_bfloat16_rounds_once():
    moe = with_lora(make_moe(torch.bfloat16), 3, targets=TOP)
    exact = merged_weights(copy.deepcopy(moe).float(), 16 / 3)
    before = {name: moe.get_parameter(name).clone() for name in exact}
    merge_lora(moe)
    for name, value in exact.items():
        torch.testing.assert_close(moe.get_parameter(name), value.bfloat16(), rtol=2**-7, atol=0)
        assert relative_error(moe.get_parameter(name), value) < 2**-9
    unmerge_lora(moe)
    for name, value in before.items():
        largest = torch.maximum(value.abs(), exact[name].abs())
        assert ((moe.get_parameter(name) - value).abs() <= 2**-7 * largest).all()


# --- in a model ---


@pytest.fixture
def model():
    config = TransformerConfig(
        vocab_size=50, dim=24, num_layers=2, num_heads=4, num_experts=6, top_k=2, expert_hidden_dim=12, max_length=40
    )
    return with_lora(Transformer(config), 3, targets=["experts", "q_proj", "o_proj"], std=0.2)


def test_generates_what_the_merged_model_does(model):
    prompt = torch.randint(0, 50, (3, 6))
    set_adapter(model, ["default"], torch.tensor([0, -1, 0]))
    mixed = generate(model, prompt, max_new_tokens=8, temperature=0)
    set_adapter(model, None)
    bare = generate(model, prompt, max_new_tokens=8, temperature=0)
    merge_lora(model, "default")
    merged = generate(model, prompt, max_new_tokens=8, temperature=0)
    assert not torch.equal(merged, bare)
    assert torch.equal(mixed, torch.stack((merged[0], bare[1], merged[2])))


def test_gradient_checkpointing_of_a_model(model):
    ids = torch.randint(0, 50, (2, 12))
    grads = []
    for on in (False, True):
        model.gradient_checkpointing = on
        loss = model(ids).logits.square().mean()
        grads.append(torch.autograd.grad(loss, lora_parameters(model)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# --- errors ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"rank": 2.5}, r"rank must be an integer of at least 1, got 2\.5"),
        ({"alpha": float("nan")}, "alpha must be finite, got nan"),
        ({"shared": "c"}, "shared must be one of 'none', 'a', 'b', 'both', got 'c'"),
        ({"dropout": 1.0}, r"dropout must be at least 0 and less than 1, got 1\.0"),
        ({"targets": ()}, "targets must name something to update, got none"),
        (
            {"targets": ["experts", "q_prj"]},
            r"targets: 'q_prj' matches nothing that can be updated; there is experts\.gate_up_proj, "
            r"experts\.down_proj, shared_expert\.gate_up_proj, shared_expert\.down_proj$",
        ),
        ({"name": "taken"}, "name must be new, but the model has an adapter 'taken' already"),
        ({"name": "a.b"}, "name must be letters, digits, _ and -, .* got 'a.b'"),
        ({"name": "keys"}, "name must be .* no method of a module, got 'keys'"),
    ],
    ids=str,
)
def test_wrong_settings_are_named_and_change_nothing(settings, message):
    moe = make_moe()
    add_lora(moe, 2, name="taken")
    moe.requires_grad_(True)
    before = repr(moe)
    with pytest.raises(ValueError, match=message):
        add_lora(moe, **settings)
    assert repr(moe) == before
    assert all(parameter.requires_grad for parameter in moe.parameters())


def test_nothing_to_update():
    with pytest.raises(ValueError, match="there is nothing: no experts and no linear layers"):
        add_lora(nn.LayerNorm(3))


def test_wrong_choices_are_named():
    moe = make_moe()
    with pytest.raises(ValueError, match="the model has no adapter 'x', but none at all"):
        set_adapter(moe, "x")
    add_lora(moe, 2, name="a")
    add_lora(moe, 2, name="b", dropout=0.5)
    add_lora(moe, 2, name="c")
    for call, message in (
        (lambda: set_adapter(moe, "x"), "the model has no adapter 'x', but 'a', 'b', 'c'"),
        (lambda: lora_parameters(moe, "x"), "has no adapter 'x'"),
        (lambda: remove_lora(moe, "x"), "has no adapter 'x'"),
        (lambda: merge_lora(moe, "x"), "has no adapter 'x'"),
        (lambda: set_adapter(moe, ["a", "c"]), "adapter_ids must say which of 2 adapters is for which sequence"),
        (lambda: set_adapter(moe, ["a", "a"], torch.zeros(1).long()), "names must be different, got 'a', 'a'"),
        (lambda: set_adapter(moe, ["a", "c"], torch.tensor([2])), r"adapter_ids must be in -1\.\.1 .*, got 2"),
        (lambda: set_adapter(moe, ["a", "c"], torch.tensor([-2])), r"adapter_ids must be in -1\.\.1 .*, got -2"),
        (lambda: set_adapter(moe, ["a", "b"], torch.tensor([0])), r"must have one dropout, got \[0\.0, 0\.5\]"),
        (lambda: unmerge_lora(moe), "no adapter is merged"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"adapter_ids must be torch\.int64, got torch\.float32"):
        set_adapter(moe, ["a"], torch.zeros(2))
    set_adapter(moe, ["a", "c"], torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="one a sequence or one a token, of 5 tokens; got 2 ids"):
        moe(torch.zeros(5, 12).double())
    with pytest.raises(ValueError, match=r"name must say which adapter to merge, for \['a', 'c'\] apply"):
        merge_lora(moe)
    set_adapter(moe, None)
    with pytest.raises(ValueError, match="name must say which adapter to merge, for none apply"):
        merge_lora(moe)


def test_while_one_is_merged_nothing_else_may_change():
    moe = make_moe()
    add_lora(moe, 2, name="a")
    add_lora(moe, 2, name="b")
    merge_lora(moe, "a")
    for call in (
        lambda: set_adapter(moe, "b"),
        lambda: merge_lora(moe, "b"),
        lambda: merge_lora(moe, "a"),
        lambda: add_lora(moe, 2, name="c"),
        lambda: remove_lora(moe, "b"),
    ):
        with pytest.raises(ValueError, match=r"adapter 'a' is merged: call unmerge_lora\(model\) first"):
            call()


def test_tied_and_quantized_weights_are_not_merged_into():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embedding"].weight
    add_lora(model, 2, targets="head")
    with pytest.raises(ValueError, match=r"embedding\.weight is head\.weight too"):
        merge_lora(model)
    mlp = GatedMLP(4, 3)
    add_lora(mlp, 2, targets="*")
    mlp.down_proj.weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"down_proj\.weight must be floating point .*, got torch\.int8"):
        merge_lora(mlp)
    experts = Experts(2, 4, 3)
    experts.down_proj = nn.Parameter(torch.zeros(2, 4, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        ValueError, match=r"down_proj must be \[E, O, I\] in floating point .*got torch\.int8 \(2, 4, 3\)"
    ):
        add_lora(experts, 2, targets="*")
