"""`MoE`: the laws of DESIGN.md, on every implementation."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from _check import relative_error
from coterie.modules import GatedMLP, MoE, TopKRouter
from coterie.ops import Routing, balance_loss, z_loss

IMPLS = ["reference", "torch"]


def make_moe(dim=12, hidden=10, experts=6, top_k=2, **settings):
    """Weights of a size at which every part matters."""
    moe = MoE(dim, hidden, experts, top_k, **settings)
    moe.reset_parameters(0.4)
    return moe


def gradients(moe, x, y, direction):
    return torch.autograd.grad(y, (x, *moe.parameters()), direction, allow_unused=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", ["swiglu", "geglu", "relu2"])
@pytest.mark.parametrize("tokens", [3, 700])
@pytest.mark.parametrize("bias", [False, True])
def test_one_expert_is_a_gated_mlp(impl, activation, tokens, bias):
    moe = make_moe(experts=1, top_k=1, activation=activation, bias=bias, impl=impl)
    mlp = GatedMLP(12, 10, activation=activation, bias=bias)
    with torch.no_grad():
        for ours, theirs in ((mlp.gate_up_proj, "gate_up"), (mlp.down_proj, "down")):
            ours.weight.copy_(getattr(moe.experts, f"{theirs}_proj")[0])
            if bias:
                getattr(moe.experts, f"{theirs}_bias").normal_()
                ours.bias.copy_(getattr(moe.experts, f"{theirs}_bias")[0])
    x = torch.randn(tokens, 12, requires_grad=True)
    y, routing = moe(x)
    wanted = mlp(x)
    assert torch.equal(routing.weights, torch.ones(tokens, 1))
    assert relative_error(y, wanted) < 1e-6
    direction = torch.randn_like(y)
    got = gradients(moe.experts, x, y, direction)
    right = gradients(mlp, x, wanted, direction)
    names = ["x", *(name for name, _ in moe.experts.named_parameters())]
    got = dict(zip(names, got, strict=True))
    right = dict(zip(["x", *(name for name, _ in mlp.named_parameters())], right, strict=True))
    pairs = {"x": "x", "gate_up_proj": "gate_up_proj.weight", "down_proj": "down_proj.weight"}
    pairs |= {"gate_up_bias": "gate_up_proj.bias", "down_bias": "down_proj.bias"} if bias else {}
    assert pairs.keys() == got.keys()
    for ours, theirs in pairs.items():
        assert relative_error(got[ours].view_as(right[theirs]), right[theirs]) < 1e-5, ours


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tokens", [30, 400])
def test_permuting_tokens_permutes_outputs(impl, tokens):
    moe = make_moe(shared_hidden_dim=7, shared_gate=True, impl=impl)
    x, direction = torch.randn(tokens, 12, requires_grad=True), torch.randn(tokens, 12)
    order = torch.randperm(tokens)
    y, routing = moe(x)
    permuted, permuted_routing = moe(x[order])
    torch.testing.assert_close(permuted, y[order], rtol=1e-5, atol=1e-5)
    assert torch.equal(permuted_routing.expert_ids, routing.expert_ids[order])
    assert torch.equal(permuted_routing.counts(), routing.counts())
    torch.testing.assert_close(balance_loss(permuted_routing), balance_loss(routing))
    for a, b in zip(gradients(moe, x, y, direction), gradients(moe, x, permuted, direction[order]), strict=True):
        assert relative_error(b, a) < 1e-5


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(3, 8), (4, 100)])
@pytest.mark.parametrize("shared", [{}, {"shared_hidden_dim": 5, "shared_gate": True}], ids=["plain", "shared"])
def test_content_of_padding_cannot_matter(impl, shape, shared):
    """Real outputs, every parameter's gradient, losses and counts, to the bit; NaN included."""
    moe = make_moe(bias=True, impl=impl, **shared)
    mask = torch.arange(shape[1]) < torch.randint(1, shape[1], (shape[0], 1))
    mask[0] = False
    clean = torch.randn(*shape, 12)
    results = []
    for filler in (clean, *(torch.full_like(clean, value) for value in (1e6, 0.0, torch.nan, torch.inf))):
        x = torch.where(mask[..., None], clean, filler).requires_grad_()
        y, routing = moe(x, mask)
        assert not y[~mask].any()  # no expert computes it, the shared one computes 0
        loss = y.square().sum() + balance_loss(routing) + z_loss(routing)
        grad_x, *rest = torch.autograd.grad(loss, (x, *moe.parameters()))
        assert not grad_x[~mask].any()
        results.append((y[mask], routing.counts(), loss, grad_x[mask], *rest))
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            assert torch.equal(a, b)
    # And it is as if there were no padding at all.
    x = clean[mask].requires_grad_()
    y, routing = moe(x)
    torch.testing.assert_close(y, results[0][0], rtol=1e-5, atol=1e-5)
    assert torch.equal(routing.counts(), results[0][1])
    loss = y.square().sum() + balance_loss(routing) + z_loss(routing)
    for a, b in zip(torch.autograd.grad(loss, (x, *moe.parameters())), results[0][3:], strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("part", ["moe", "router"])
def test_a_wrong_mask_is_named(part):
    module = make_moe() if part == "moe" else make_moe().router
    with pytest.raises(ValueError, match=r"token_mask must have x's shape without D, \(2, 3\), got \(3,\)"):
        module(torch.zeros(2, 3, 12), torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"token_mask must be bool \(False = padding\), got torch.int64"):
        module(torch.zeros(2, 3, 12), torch.ones(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("impl", IMPLS)
def test_is_the_block_of_qwen2_moe(impl):
    """Shared expert, its sigmoid gate, router and experts: values and every gradient."""
    pytest.importorskip("transformers")
    from transformers.models.qwen2_moe import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    config = Qwen2MoeConfig(
        hidden_size=12,
        moe_intermediate_size=10,
        shared_expert_intermediate_size=7,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=False,
    )
    config._experts_implementation = "eager"
    theirs = Qwen2MoeSparseMoeBlock(config)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    router = TopKRouter(12, 6, 2, normalize=False)
    ours = make_moe(shared_hidden_dim=7, shared_gate=True, router=router, impl=impl)
    state = theirs.state_dict()
    gate_up = torch.cat((state["shared_expert.gate_proj.weight"], state["shared_expert.up_proj.weight"]))
    ours.load_state_dict(
        {
            "router.weight": state["gate.weight"],
            "experts.gate_up_proj": state["experts.gate_up_proj"],
            "experts.down_proj": state["experts.down_proj"],
            "shared_expert.gate_up_proj.weight": gate_up,
            "shared_expert.down_proj.weight": state["shared_expert.down_proj.weight"],
            "shared_gate.weight": state["shared_expert_gate.weight"],
        }
    )
    x = torch.randn(3, 7, 12, requires_grad=True)
    y, _ = ours(x)
    wanted = theirs(x)
    assert relative_error(y, wanted) < 1e-6
    direction = torch.randn_like(y)
    got = dict(zip(["x", *dict(ours.named_parameters())], gradients(ours, x, y, direction), strict=True))
    right = dict(zip(["x", *dict(theirs.named_parameters())], gradients(theirs, x, wanted, direction), strict=True))
    right["gate_up"] = torch.cat((right["shared_expert.gate_proj.weight"], right["shared_expert.up_proj.weight"]))
    for name, other in (
        ("x", "x"),
        ("router.weight", "gate.weight"),
        ("experts.gate_up_proj", "experts.gate_up_proj"),
        ("experts.down_proj", "experts.down_proj"),
        ("shared_expert.gate_up_proj.weight", "gate_up"),
        ("shared_expert.down_proj.weight", "shared_expert.down_proj.weight"),
        ("shared_gate.weight", "shared_expert_gate.weight"),
    ):
        assert relative_error(got[name], right[other]) < 1e-5, name


def test_implementations_agree():
    reference = make_moe(bias=True, shared_hidden_dim=7, impl="reference")
    moe = copy.deepcopy(reference)
    moe.experts.impl = "torch"
    x = torch.randn(2, 300, 12, requires_grad=True)
    (y, routing), (wanted, reference_routing) = moe(x), reference(x)
    assert torch.equal(routing.expert_ids, reference_routing.expert_ids)
    assert relative_error(y, wanted) < 1e-6
    direction = torch.randn_like(y)
    for a, b in zip(gradients(moe, x, y, direction), gradients(reference, x, wanted, direction), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("tokens", [20, 400])
@pytest.mark.parametrize("recompute", [False, True])
def test_activation_checkpointing_is_bit_equal_and_counts_once(tokens, recompute):
    moe = make_moe(shared_hidden_dim=7, recompute=recompute)
    x = torch.randn(tokens, 12, requires_grad=True)
    runs, chosen = [], []
    moe.router.register_forward_hook(lambda module, args, routing: chosen.append(routing.expert_ids))
    for run in (moe, lambda x: checkpoint(moe, x, use_reentrant=False)):
        chosen.clear()
        y, routing = run(x)
        counts = routing.counts()
        loss = y.square().sum() + balance_loss(routing) + z_loss(routing)
        runs.append((y, loss, counts, *torch.autograd.grad(loss, (x, *moe.parameters()))))
        assert counts.sum() == 2 * tokens
        assert all(torch.equal(ids, routing.expert_ids) for ids in chosen)
    assert len(chosen) == 2  # recomputed, and chosen alike
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_forward_leaves_no_trace():
    """No hidden state: modules and buffers are as they were, selection bias included."""
    router = TopKRouter(12, 6, 2, score="sigmoid", selection_bias=True)
    moe = make_moe(router=router)
    before = {name: t.clone() for name, t in moe.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in moe.named_modules()}
    for _ in range(3):
        y, _ = moe(torch.randn(20, 12))
        y.sum().backward()
    assert all(torch.equal(t, before[name]) for name, t in moe.state_dict().items())
    assert {name: set(vars(module)) for name, module in moe.named_modules()} == attributes


def test_a_selection_bias_changes_the_choice_not_the_weights():
    router = TopKRouter(12, 6, 2, score="sigmoid", selection_bias=True)
    moe = make_moe(router=router)
    x = torch.randn(100, 12)
    counts = moe(x)[1].counts()
    for _ in range(300):
        router.update_selection_bias(moe(x)[1].counts(), 0.01)
    routing = moe(x)[1]
    assert routing.counts().max() - routing.counts().min() < counts.max() - counts.min()
    plain = routing.logits.sigmoid().gather(1, routing.expert_ids)
    torch.testing.assert_close(routing.weights, plain / plain.sum(1, keepdim=True))


@pytest.mark.parametrize("tokens", [20, 400])
def test_bf16(tokens):
    moe = make_moe(64, 48, 6, 2, shared_hidden_dim=24, shared_gate=True).bfloat16()
    exact = copy.deepcopy(moe).double()
    exact.experts.impl = "reference"
    x = torch.randn(tokens, 64).bfloat16().requires_grad_()
    y, routing = moe(x)
    exact_x = x.detach().double().requires_grad_()
    exact_y, exact_routing = exact(exact_x)
    assert y.dtype == torch.bfloat16
    assert routing.weights.dtype == torch.float32
    assert torch.equal(routing.expert_ids, exact_routing.expert_ids)
    assert relative_error(y, exact_y) < 6e-3  # a sum of two results more
    direction = torch.randn(tokens, 64).bfloat16()
    got = gradients(moe, x, y, direction)
    for (name, _), a, b in zip(
        [("x", x), *moe.named_parameters()], got, gradients(exact, exact_x, exact_y, direction.double()), strict=True
    ):
        assert a.dtype == torch.bfloat16
        assert relative_error(a, b) < 1e-2, name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tokens", [20, 400])
def test_under_autocast(impl, tokens):
    moe = make_moe(64, 48, 6, 2, shared_hidden_dim=24, impl=impl)
    x = torch.randn(tokens, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, routing = moe(x)
    plain, plain_routing = moe(x)
    assert y.dtype == torch.bfloat16
    assert routing.logits.dtype == torch.float32
    assert torch.equal(routing.expert_ids, plain_routing.expert_ids)
    assert relative_error(y, plain) < 1e-2  # weights and inputs rounded as well
    y.square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in moe.parameters())
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("shape", [(12,), (1, 12), (0, 12), (2, 0, 12), (2, 3, 4, 12)])
def test_any_leading_sizes(shape):
    moe = make_moe(shared_hidden_dim=7, shared_gate=True)
    x = torch.randn(shape, requires_grad=True)
    y, routing = moe(x)
    assert y.shape == shape
    rows = x.reshape(-1, 12)
    assert routing.expert_ids.shape == (len(rows), 2)
    torch.testing.assert_close(y.reshape(-1, 12), moe(rows)[0])
    (y.sum() + balance_loss(routing)).backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in moe.parameters())


def test_memory_of_any_order():
    moe = make_moe()
    x = torch.randn(12, 5, 4).permute(2, 1, 0)
    torch.testing.assert_close(moe(x)[0], moe(x.contiguous())[0])


def test_trains():
    """A few steps of Adam on a target of three kinds of tokens."""
    moe = make_moe(experts=4, top_k=1)
    x = torch.randn(300, 12)
    target = torch.where(x[:, :1] > 0.5, x.flip(1), torch.where(x[:, 1:2] > 0, -x, x.roll(3, 1)))
    optimizer = torch.optim.Adam(moe.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        y, routing = moe(x)
        loss = (y - target).square().mean()
        optimizer.zero_grad()
        (loss + 0.01 * balance_loss(routing)).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("impl", [None, "torch"])
def test_on_the_meta_device(impl):
    moe = MoE(12, 10, 6, 2, bias=True, shared_hidden_dim=7, shared_gate=True, impl=impl, device="meta")
    assert all(p.device.type == "meta" for p in moe.parameters())
    x = torch.empty(2, 5, 12, device="meta", requires_grad=True)
    mask = torch.ones(2, 5, dtype=torch.bool, device="meta")
    y, routing = moe(x, mask)
    assert (y.shape, y.device.type, routing.weights.shape) == (x.shape, "meta", (10, 2))
    (y.sum() + balance_loss(routing) + z_loss(routing)).backward()
    assert all(p.grad.shape == p.shape for p in moe.parameters())


def test_a_router_of_ones_own():
    """Anything that takes (x, token_mask) and returns a Routing."""

    class Hash(nn.Module):
        def forward(self, x, token_mask=None):
            logits = torch.zeros(x.flatten(0, -2).shape[0], 6)
            ids = (torch.arange(len(logits)) % 6).unsqueeze(1)
            return Routing(ids, torch.ones(len(logits), 1), logits, 6, token_mask)

        def reset_parameters(self, std=0.02):
            pass

    moe = make_moe(router=Hash(), top_k=1)
    y, routing = moe(torch.randn(18, 12))
    assert routing.counts().tolist() == [3] * 6
    assert y.isfinite().all()


def test_settings():
    with pytest.raises(ValueError, match="shared_gate needs a shared expert: give shared_hidden_dim > 0"):
        MoE(12, 10, 6, 2, shared_gate=True)
    with pytest.raises(ValueError, match="token_mask must have x's shape"):
        make_moe()(torch.randn(2, 5, 12), torch.ones(2, 4, dtype=torch.bool))
    moe = MoE(200, 100, 6, 2, shared_hidden_dim=150, shared_gate=True)
    moe.reset_parameters(0.3, down_std=0.1)
    for name, parameter in moe.named_parameters():
        wanted = 0.1 if "down" in name else 0.3
        assert parameter.std().item() == pytest.approx(wanted, rel=0.15), name
