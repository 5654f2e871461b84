"""What `expert_mlp` keeps for backward, repeats and refuses; the contracts of its custom ops."""

import pytest
import torch
from test_expert_mlp import GPT_OSS, PATHS, make_inputs, op, take_path

from coterie.ops import Routing, expert_mlp


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    return request.param, take_path(monkeypatch, request.param)


def _saved_bytes(inputs, **settings):
    """Bytes of the storages that autograd keeps, parameters apart."""
    parameters = {t.untyped_storage().data_ptr() for t in inputs[3:] if t is not None}
    saved = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = (storage.nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = op(*inputs, impl="torch", **settings)
    assert y.requires_grad
    return sum(nbytes for nbytes, _ in saved.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [40, 900])
@pytest.mark.parametrize("bias", [False, True])
def test_bytes_kept_for_backward(dtype, tokens, bias):
    """2TD + 4TKF in bfloat16, 2TD with recompute; and weights, order and counts."""
    dim, hidden, experts, top_k = 24, 16, 5, 2
    inputs = make_inputs(tokens, dim, hidden, experts, top_k, dtype=dtype, bias=bias)
    indices = 4 * tokens * top_k + 8 * tokens * top_k + 8 * (experts + 1)
    size = dtype.itemsize
    kept = size * tokens * dim + size * tokens * top_k * 2 * hidden
    assert _saved_bytes(inputs) == kept + indices
    assert _saved_bytes(inputs, recompute=True) == size * tokens * dim + indices


def test_nothing_is_kept_without_gradients():
    inputs = make_inputs(40, 8, 6, 5, 2)
    with torch.no_grad():
        y = op(*inputs, impl="torch")
    assert not y.requires_grad
    assert y.grad_fn is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_to_the_bit_every_time(dtype, path):
    inputs = make_inputs(300, 17, 9, 6, 3, how="skewed", dtype=dtype, bias=True)
    wanted = [t for t in inputs if t.requires_grad]
    grad = torch.randn(300, 17).to(dtype)
    runs = []
    for _ in range(3):
        y = op(*inputs, impl=path[1])
        runs.append((y, *torch.autograd.grad(y, wanted, grad)))
        torch.empty(10**6)  # other memory for the next run
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_keeping_or_forming_again_is_the_same_to_the_bit(path):
    """float32: the hidden layer is the same product of the same numbers."""
    inputs = make_inputs(300, 17, 9, 6, 3, how="unused", bias=True)
    wanted = [t for t in inputs if t.requires_grad]
    results = []
    for recompute in (False, True):
        y = op(*inputs, impl=path[1], recompute=recompute)
        results.append((y, *torch.autograd.grad(y.square().sum(), wanted)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_or_none_is_the_same_value(path):
    inputs = make_inputs(300, 17, 9, 6, 3, how="unused", bias=True)
    with torch.no_grad():
        plain = op(*inputs, impl=path[1])
    assert torch.equal(plain, op(*inputs, impl=path[1]))


@pytest.mark.parametrize("recompute", [False, True])
def test_twice_in_one_graph(recompute, path):
    """One layer, its weights shared, applied to its own output; and backward through a kept graph twice."""
    x, ids, weights, *matrices = make_inputs(20, 6, 5, 4, 2)
    gate_up, down = matrices[:2]

    def twice(impl, x, weights, gate_up, down):
        y = op(x, ids, weights, gate_up, down, impl=impl, recompute=recompute)
        return op(x + y, ids, weights, gate_up, down, impl=impl, recompute=recompute)

    tensors = (x, weights, gate_up, down)
    exact_inputs = [t.detach().double().requires_grad_() for t in tensors]
    exact = torch.autograd.grad(twice("reference", *exact_inputs).sum(), exact_inputs)
    loss = twice(path[1], *tensors).sum()
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    again = torch.autograd.grad(loss, tensors)
    for a, b, wanted in zip(first, again, exact, strict=True):
        assert torch.equal(a, b)
        assert (a - wanted).norm() / wanted.norm() < 1e-5


def test_gradients_accumulate():
    inputs = make_inputs(30, 6, 5, 4, 2)
    op(*inputs, impl="torch").sum().backward()
    once = inputs[3].grad.clone()
    op(*inputs, impl="torch").sum().backward()
    torch.testing.assert_close(inputs[3].grad, 2 * once)


def test_empty_experts_have_a_gradient_of_zero(path):
    inputs = make_inputs(12, 6, 5, 4, 1, how="one", bias=True)  # everything to expert 2
    op(*inputs, impl=path[1]).sum().backward()
    for t in inputs[3:]:
        assert (t.grad[[0, 1, 3]] == 0).all()
        assert (t.grad[2] != 0).any()


def test_unused_slots_cost_and_change_nothing(path):
    """Whatever else stands in the slots: K slots of which one is used are that one slot."""
    x, ids, weights, gate_up, down, *_ = make_inputs(30, 6, 5, 4, 1)
    wide_ids = torch.cat((torch.full_like(ids, 4), ids, torch.full_like(ids, 4)), 1)
    wide = torch.cat((torch.zeros(30, 1), weights, torch.zeros(30, 1)), 1)
    results = []
    for used, by in ((ids, weights), (wide_ids, wide)):
        y = op(x, used, by, gate_up, down, impl=path[1])
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, weights, gate_up, down))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", ["reference", "torch"])
def test_is_the_experts_of_gpt_oss(which):
    pytest.importorskip("transformers")
    from types import SimpleNamespace

    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = SimpleNamespace(
        intermediate_size=10, num_local_experts=4, hidden_size=12, swiglu_alpha=1.702, swiglu_limit=7.0
    )
    theirs = GptOssExperts(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=2.0)
    x = torch.randn(20, 12)
    routing_ids = torch.rand(20, 4).topk(2).indices
    weights = torch.rand(20, 2)
    # Theirs: transposed, gate and up interleaved. Ours: gate first.
    gate_up = theirs.gate_up_proj.mT.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
    gate_up_bias = theirs.gate_up_proj_bias.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1)
    ours = expert_mlp(
        x,
        routing_ids,
        weights,
        gate_up,
        theirs.down_proj.mT,
        gate_up_bias=gate_up_bias,
        down_bias=theirs.down_proj_bias,
        activation=GPT_OSS,
        impl=which,
    )
    wanted = GptOssExperts.forward.__wrapped__(theirs, x, routing_ids, weights)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    parameters = list(theirs.parameters())
    direction = torch.randn_like(ours)
    for got, want in zip(*(torch.autograd.grad(y, parameters, direction) for y in (ours, wanted)), strict=True):
        assert (got - want).norm() / want.norm() < 1e-5


# ------ contracts of the custom ops


@pytest.mark.parametrize(("tokens", "impl"), [(6, "torch"), (300, "torch"), (6, "triton")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(tokens, dtype, impl):
    x, ids, weights, *matrices = make_inputs(tokens, 6, 5, 4, 2, dtype=dtype, bias=True)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    for keep, these in ((True, matrices), (False, [*matrices[:2], None, None])):
        args = (x, ids, weights, *these, None, "swiglu", keep, impl)
        torch.library.opcheck(torch.ops.coterie.expert_mlp.default, args, **tolerance)
    _, hidden, order, counts = torch.ops.coterie.expert_mlp.default(
        x, ids, weights, *matrices, None, "swiglu", True, impl
    )
    rest = [t.detach() for t in (x, weights, *matrices, hidden, order, counts)]
    rest[4] = rest[4].t().contiguous().t()  # a bias in another order of memory
    for needs in ([True] * 6, [False, False, True, False, False, True], [True, True, False, True, True, False]):
        args = (torch.randn(tokens, 6).to(dtype), *rest, "swiglu", needs, impl)
        torch.library.opcheck(torch.ops.coterie.expert_mlp_backward.default, args, **tolerance)


def test_on_the_meta_device():
    inputs = [t.detach().to("meta").requires_grad_(t.requires_grad) for t in make_inputs(9, 6, 5, 4, 2, bias=True)]
    y = op(*inputs, impl="torch")
    assert (y.device.type, y.shape, y.dtype) == ("meta", (9, 6), torch.float32)
    y.sum().backward()
    assert all(t.grad.shape == t.shape for t in inputs if t.requires_grad)


# ------ wrong arguments


def _good():
    names = ("x", "expert_ids", "weights", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
    return dict(zip(names, make_inputs(5, 4, 3, 6, 2, bias=True), strict=True))


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"x": torch.zeros(5)}, ValueError, r"x must have shape \[T, D\], got \(5,\)"),
        ({"x": [1.0]}, TypeError, r"x must be a tensor \[T, D\], got list"),
        ({"expert_ids": torch.zeros(4, 2).long()}, ValueError, r"expert_ids .* \[T, K\] = \[5, K\], got \(4, 2\)"),
        ({"expert_ids": torch.zeros(5, 2)}, TypeError, r"expert_ids must be torch.int64, got torch.float32"),
        ({"expert_ids": torch.zeros(5, 2).int()}, TypeError, r"expert_ids must be torch.int64, got torch.int32"),
        ({"weights": torch.zeros(5, 3)}, ValueError, r"weights must have shape \[T, K\] = \[5, 2\], got \(5, 3\)"),
        ({"weights": torch.zeros(5, 2).long()}, TypeError, r"weights must be floating point, .* got torch.int64"),
        ({"gate_up_proj": torch.zeros(6, 6, 5)}, ValueError, r"gate_up_proj .* \[E, 2F, 4\], got \(6, 6, 5\)"),
        ({"gate_up_proj": torch.zeros(6, 7, 4)}, ValueError, r"gate_up_proj must have 2F rows .* 'swiglu', got 7"),
        ({"down_proj": torch.zeros(6, 4, 6)}, ValueError, r"down_proj .* = \[6, 4, 3\], got \(6, 4, 6\)"),
        ({"down_proj": torch.zeros(5, 4, 3)}, ValueError, r"down_proj .* = \[6, 4, 3\], got \(5, 4, 3\)"),
        ({"gate_up_bias": torch.zeros(6, 3)}, ValueError, r"gate_up_bias .* = \[6, 6\], got \(6, 3\)"),
        ({"down_bias": torch.zeros(4)}, ValueError, r"down_bias must have shape \[E, D\], got \(4,\)"),
        ({"addend": torch.zeros(5, 3)}, ValueError, r"addend must have shape \[T, D\] = \[5, 4\], got \(5, 3\)"),
        ({"activation": "swish"}, ValueError, r"activation must be one of .*, got 'swish'"),
        ({"activation": "relu2"}, ValueError, r"down_proj .* = \[6, 4, 6\], got \(6, 4, 3\)"),
        (
            {"x": torch.zeros(5, 4).bfloat16()},
            TypeError,
            r"gate_up_proj must have x's dtype, .* torch.float32",
        ),
        (
            {"down_proj": torch.zeros(6, 4, 3).double()},
            TypeError,
            r"down_proj must have x's dtype, .* got torch.float64",
        ),
        (
            {"down_bias": torch.zeros(6, 4).bfloat16()},
            TypeError,
            r"down_bias must have x's dtype, .* got torch.bfloat16",
        ),
        (
            {"expert_ids": torch.zeros(5, 0).long(), "weights": torch.zeros(5, 0)},
            ValueError,
            r"expert_ids must have K of at least 1, got 0",
        ),
        (
            {"gate_up_proj": torch.zeros(6, 0, 4), "gate_up_bias": None, "down_proj": torch.zeros(6, 4, 0)},
            ValueError,
            r"gate_up_proj must have E, 2F, D of at least 1, got 6, 0, 4",
        ),
        ({"impl": "cuda"}, ValueError, r"impl must be one of 'reference', 'torch', 'triton', got 'cuda'"),
    ],
)
def test_wrong_arguments_are_named(impl, wrong, error, message):
    with pytest.raises(error, match=message):
        expert_mlp(**{**_good(), "impl": impl, **wrong})


@pytest.mark.parametrize("wrong", [-1, 7])
@pytest.mark.parametrize("tokens", [5, 300])
def test_an_expert_that_does_not_exist(wrong, tokens):
    """On a CPU; an accelerator would have to wait for its answer."""
    x, ids, weights, *matrices = make_inputs(tokens, 4, 3, 6, 2)
    ids[3, 1] = wrong
    for impl in ("reference", "torch"):
        for grad in (True, False):
            with (
                torch.set_grad_enabled(grad),
                pytest.raises(ValueError, match=f"expert_ids must be in 0..6 .* {wrong}"),
            ):
                op(x, ids, weights, *matrices, impl=impl)


def test_a_routing_is_what_it_takes():
    """The three words of the contract, together: Y[t] = Σ_k weights[t, k] · expert(x[t])."""
    x, ids, weights, gate_up, down, *_ = make_inputs(7, 4, 3, 5, 2)
    routing = Routing(ids, weights, torch.zeros(7, 5), 5)
    wanted = torch.stack(
        [
            sum(
                weights[t, k] * (down[e] @ (torch.nn.functional.silu(gate_up[e, :3] @ x[t]) * (gate_up[e, 3:] @ x[t])))
                for k, e in enumerate(ids[t].tolist())
            )
            for t in range(7)
        ]
    )
    got = expert_mlp(x, routing.expert_ids, routing.weights, gate_up, down)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
