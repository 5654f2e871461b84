"""`lora_expert_mlp` beside `expert_mlp` of the merged weights W + s·B·A: values and every gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from _check import check_op, fuzz, relative_error
from coterie.ops.expert_mlp import expert_mlp
from coterie.ops.lora import lora_expert_mlp, lora_linear

SCALE = 1.5


def make_args(
    tokens=40, dim=12, hidden=10, experts=6, top_k=2, rank=3, dtype=torch.float32, shared="none", train=False, **more
):
    """x, expert_ids (some unused), weights, both matrices, both biases or None, and a, b of both matrices."""
    width = hidden if more.get("activation") == "relu2" else 2 * hidden

    def normal(*shape, grad=True):
        return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype).requires_grad_(grad)

    def factors(outputs, inputs):
        of_a, of_b = (1 if shared in (letter, "both") else experts for letter in "ab")
        return normal(of_a, rank, inputs), normal(of_b, outputs, rank)

    ids = torch.rand(tokens, experts).topk(top_k).indices
    ids[torch.rand(tokens, top_k) < more.get("unused", 0.1)] = experts
    weights = torch.rand(tokens, top_k, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    weights = weights.masked_fill(ids == experts, 0).requires_grad_()
    biases = [normal(experts, size, grad=train) if more.get("bias") else None for size in (width, dim)]
    x = torch.randn(tokens, dim).to(dtype).requires_grad_()
    matrices = normal(experts, width, dim, grad=train), normal(experts, dim, hidden, grad=train)
    return [x, ids, weights, *matrices, *biases, *factors(width, dim), *factors(dim, hidden)]


def run(activation="swiglu", **settings):
    """The op and, as its reference, the expert MLP of merged weights."""

    def call(x, ids, weights, up, down, up_bias, down_bias, up_a, up_b, down_a, down_b, impl):
        biases = {"gate_up_bias": up_bias, "down_bias": down_bias}
        if impl == "reference":
            up, down = up + SCALE * up_b @ up_a, down + SCALE * down_b @ down_a
            return expert_mlp(x, ids, weights, up, down, **biases, activation=activation, impl=impl)
        factors = (up_a[None], up_b[None]), (down_a[None], down_b[None])
        settings_ = settings | {"impl": impl.removeprefix("composed ") if impl else None, "activation": activation}
        if impl.startswith("composed"):  # ids: another way through
            settings_["adapter_ids"] = torch.zeros(1, dtype=torch.int64)
        return lora_expert_mlp(x, ids, weights, up, down, *factors, [SCALE], **biases, **settings_)

    return call


# In bfloat16 plain torch itself errs by 0.006, for the merged weights are rounded; twice that is the bound.
BFLOAT16 = (1.3e-2, 1.6e-2)
WAYS = ["torch", "composed torch", "composed reference"]


@pytest.mark.parametrize(
    ("way", "dtype"),
    [(way, torch.float64) for way in WAYS]
    + [(way, dtype) for way in WAYS[:2] for dtype in (torch.float32, torch.bfloat16)],
)
@pytest.mark.parametrize("shared", ["none", "a", "b", "both"])
def test_is_the_merged_mlp(way, dtype, shared):
    tolerances = BFLOAT16 if dtype == torch.bfloat16 else None
    check_op(run(), make_args(tokens=300, dim=40, hidden=32, dtype=dtype, shared=shared), way, tolerances=tolerances)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("activation", ["geglu", "relu2", "swiglu(alpha=1.702, limit=7.0, up_offset=1.0)"])
def test_with_biases_and_other_activations(way, activation):
    check_op(run(activation), make_args(bias=True, activation=activation, shared="a"), way)


@pytest.mark.parametrize("way", WAYS)
def test_matrices_that_train_get_their_gradients(way):
    check_op(run(), make_args(train=True, bias=True), way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("recompute", [False, True])
def test_recompute(way, recompute):
    check_op(run(recompute=recompute), make_args(bias=True), way)


@pytest.mark.parametrize("way", WAYS[:2])
def test_under_autocast(way):
    check_op(run(), make_args(tokens=200, dim=40, hidden=32), way, autocast=torch.bfloat16, tolerances=BFLOAT16)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "shape",
    [
        {"tokens": 0},
        {"tokens": 1},
        {"experts": 1, "top_k": 1},
        {"experts": 40, "tokens": 7},
        {"top_k": 6},
        {"unused": 1.0},
        {"rank": 1},
        {"tokens": 2500, "experts": 2, "dim": 5, "hidden": 3},
    ],
    ids=str,
)
def test_odd_sizes(way, shape):
    check_op(run(), make_args(**shape), way)


@fuzz
@given(st.data())
def test_any_shape(data):
    draw = {name: data.draw(st.integers(1, most), name) for name, most in (("dim", 20), ("hidden", 20), ("rank", 9))}
    draw["experts"] = data.draw(st.integers(1, 9), "experts")
    draw["top_k"] = data.draw(st.integers(1, draw["experts"]), "top_k")
    draw["tokens"] = data.draw(st.integers(0, 60), "tokens")
    draw["shared"] = data.draw(st.sampled_from(["none", "a", "b", "both"]), "shared")
    draw["bias"] = data.draw(st.booleans(), "bias")
    torch.manual_seed(0)
    check_op(run(), make_args(**draw, dtype=torch.float64), data.draw(st.sampled_from(WAYS), "way"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shared", ["none", "both"])
def test_gradcheck(way, shared):
    args = make_args(tokens=7, dim=4, hidden=3, experts=4, rank=2, dtype=torch.float64, shared=shared)
    assert torch.autograd.gradcheck(lambda *args: run()(*args, impl=way), args)


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias):
    args = make_args(tokens=9, bias=bias)
    torch.library.opcheck(torch.ops.coterie.lora_expert_mlp.default, (*args, SCALE, "swiglu", True))


def test_what_is_frozen_costs_no_gradient():
    """Backward multiplies by each matrix once; the gradients that it makes are the factors'."""
    args = make_args(tokens=64, dim=48, hidden=40, experts=4, rank=2)
    y = run()(*args, impl="torch")
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as record:
        y.sum().backward()
    assert all(arg is None or arg.grad is None for arg in args[3:7])
    largest = max(event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]")
    assert largest < 4 * args[3].numel()


def test_experts_without_tokens_have_gradient_zero():
    args = make_args()
    args[1] = args[1].clamp(max=2)
    for way in WAYS:
        for factor, gradient in zip(args[7:], torch.autograd.grad(run()(*args, impl=way).sum(), args[7:]), strict=True):
            assert gradient[:3].any(), factor.shape
            assert not gradient[3:].any()


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("shared", ["none", "a", "both"])
def test_adapters_by_sequence_are_each_alone(impl, shared):
    length, adapters = 10, torch.tensor([1, -1, 0, 1])
    x, ids, weights, up, down, up_bias, down_bias, *first = make_args(
        tokens=40, dtype=torch.float64, bias=True, shared=shared
    )
    second = make_args(tokens=40, dtype=torch.float64, shared=shared)[7:]
    both = [torch.stack(pair) for pair in zip(first, second, strict=True)]
    biases = {"gate_up_bias": up_bias, "down_bias": down_bias}
    call = lora_expert_mlp
    scales = [SCALE, 0.3]
    leaves = [x, weights, *first, *second]
    direction = torch.randn_like(x)
    y = call(x, ids, weights, up, down, both[:2], both[2:], scales, adapters, **biases, impl=impl)
    alone = [
        call(x, ids, weights, up, down, [f[None] for f in own[:2]], [f[None] for f in own[2:]], [scale], **biases)
        for own, scale in ((first, SCALE), (second, 0.3))
    ]
    alone.append(expert_mlp(x, ids, weights, up, down, **biases))
    wanted = torch.cat([alone[a][i * length : (i + 1) * length] for i, a in enumerate(adapters)])
    assert relative_error(y, wanted) < 1e-13
    for a, b in zip(*(torch.autograd.grad(out, leaves, direction) for out in (y, wanted)), strict=True):
        assert relative_error(a, b) < 1e-12
    by_token = call(
        x, ids, weights, up, down, both[:2], both[2:], scales, adapters.repeat_interleave(length), **biases, impl=impl
    )
    assert torch.equal(by_token, y)


def test_linear_adapters_by_sequence_are_each_alone():
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    a, b = (torch.randn(2, 1, *shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 8), (6, 3)))
    got = lora_linear(x, (a, b), [2.0, 0.5], torch.tensor([1, -1, 0]))
    alone = [s * x @ (b[m, 0] @ a[m, 0]).T for m, s in enumerate([2.0, 0.5])]
    wanted = torch.stack([alone[1][0], torch.zeros_like(alone[0][1]), alone[0][2]])
    assert relative_error(got, wanted) < 1e-14
    for ours, right in zip(*(torch.autograd.grad(y.square().sum(), (x, a, b)) for y in (got, wanted)), strict=True):
        assert relative_error(ours, right) < 1e-13
    assert relative_error(lora_linear(x, (a[:1], b[:1]), [2.0]), alone[0]) < 1e-14


def test_dropout_drops_what_a_sees_and_keeps_its_mean():
    args = make_args(tokens=200)
    torch.manual_seed(0)
    plain, without = (
        lora_expert_mlp(
            *args[:5], (args[7][None], args[8][None]), None, [SCALE], dropout=p, activation=lambda h: h[:, :10]
        )
        for p in (0.5, 0.0)
    )
    assert relative_error(plain, without) > 0.05  # it does something
    mean = sum(
        lora_expert_mlp(
            *args[:5], (args[7][None], args[8][None]), None, [SCALE], dropout=0.5, activation=lambda h: h[:, :10]
        )
        for _ in range(200)
    )
    assert relative_error(mean / 200, without) < 0.1  # linear in x: right in the mean


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3)}, ValueError, r"x must have shape \[T, D\], got \(3,\)"),
        ({"adapter_ids": torch.tensor([0, 2])}, ValueError, r"adapter_ids must be in -1..0 \(-1 = no adapter\), got 2"),
        ({"adapter_ids": torch.tensor([-2])}, ValueError, "adapter_ids must be in -1..0 .*, got -2"),
        ({"adapter_ids": torch.zeros(7).long()}, ValueError, "one a sequence or one a token, of 40 tokens; got 7 ids"),
        ({"adapter_ids": torch.zeros(2)}, TypeError, "adapter_ids must be torch.int64, got torch.float32"),
        ({"ids": torch.full((40, 2), 7)}, ValueError, r"expert_ids must be in 0\.\.6"),
        ({"impl": "cuda"}, ValueError, "impl must be one of 'reference', 'torch', got 'cuda'"),
        (
            {"up_a": torch.zeros(1, 6, 3, 11)},
            ValueError,
            r"gate_up_lora's A must have shape .*12\], got \(1, 6, 3, 11\)",
        ),
        ({"up_b": torch.zeros(1, 6, 20, 4)}, ValueError, "gate_up_lora's B must have shape"),
        ({"up_a": torch.zeros(1, 5, 3, 12)}, ValueError, "gate_up_lora's A must be of 6 experts or of 1, got 5"),
        ({"up": torch.zeros(6, 20, 12).double()}, TypeError, "gate_up_proj must have x's dtype, torch.float32"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change, error, message):
    x, ids, weights, up, down, _, _, up_a, up_b, down_a, down_b = make_args()
    given = {"x": x, "ids": ids, "up": up, "up_a": up_a[None], "up_b": up_b[None]} | change
    settings = {name: given[name] for name in ("adapter_ids", "impl") if name in given}
    with pytest.raises(error, match=message):
        lora_expert_mlp(
            given["x"],
            given["ids"],
            weights,
            given["up"],
            down,
            (given["up_a"], given["up_b"]),
            (down_a[None], down_b[None]),
            [SCALE],
            **settings,
        )
