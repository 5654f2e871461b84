"""`route_topk`: against Python's own sort and against the routers of Hugging Face's models."""

import importlib
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from _check import fuzz
from coterie.ops import Routing, route_topk

IMPLS = ["reference", "torch", "triton"]
IN_FLOAT64 = ["reference", "torch"]
INF = float("inf")


def _sorted_ids(selection, top_k, num_groups=1, top_groups=1, group_score="max"):
    """The choice in plain Python: by falling score, then by rising id; groups likewise."""
    chosen = []
    for row in selection.tolist():
        size = len(row) // num_groups
        groups = [row[g * size : (g + 1) * size] for g in range(num_groups)]
        worth = [max(g) if group_score == "max" else sum(sorted(g)[-2:]) for g in groups]
        allowed = sorted(range(num_groups), key=lambda g: (-worth[g], g))[:top_groups]
        experts = [e for e in range(len(row)) if e // size in allowed]
        chosen.append(sorted(experts, key=lambda e: (-row[e], e))[:top_k])
    return torch.tensor(chosen, dtype=torch.int64).view(len(chosen), top_k)


@st.composite
def _logits_with_ties(draw, values):
    num_experts, num_tokens = draw(st.integers(1, 9)), draw(st.integers(0, 5))
    rows = st.lists(st.sampled_from(values), min_size=num_experts, max_size=num_experts)
    rows = draw(st.lists(rows, min_size=num_tokens, max_size=num_tokens))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    return torch.tensor(rows, dtype=dtype).view(num_tokens, num_experts), draw(st.integers(1, num_experts))


@given(_logits_with_ties([-INF, -2.5, -1e-40, -0.0, 0.0, 1e-40, 1.0, 1.0, INF]))
@fuzz
def test_ties_go_to_the_lower_id(case):
    logits, top_k = case
    for score, order in (("softmax", "after"), ("sigmoid", "after"), ("sigmoid", "before")):
        wide = logits if logits.dtype == torch.float64 else logits.float()
        wanted = _sorted_ids(wide.sigmoid() if order == "before" else wide, top_k)
        for impl in IN_FLOAT64 if logits.dtype == torch.float64 else IMPLS:
            routing = route_topk(logits, top_k, score=score, order=order, impl=impl)
            assert torch.equal(routing.expert_ids, wanted)


@given(_logits_with_ties([-1.0, -0.0, 0.0, 0.5]), st.integers(1, 3), st.integers(2, 4), st.data())
@fuzz
def test_groups_and_bias_with_ties(case, top_groups, num_groups, data):
    logits, _ = case
    logits = logits.float().repeat_interleave(num_groups, 1)
    num_experts, top_groups = logits.shape[1], min(top_groups, num_groups)
    size = num_experts // num_groups
    top_k = data.draw(st.integers(1, top_groups * size))
    group_score = "max" if size == 1 else data.draw(st.sampled_from(["max", "top2_sum"]))
    # Quarters: exact sums, hence real ties between groups.
    bias = torch.tensor(data.draw(st.lists(st.integers(-2, 2), min_size=num_experts, max_size=num_experts))) / 4
    groups = {"num_groups": num_groups, "top_groups": top_groups, "group_score": group_score}
    wanted = _sorted_ids(logits + bias, top_k, **groups)
    for impl in IMPLS:
        routing = route_topk(logits, top_k, order="after", selection_bias=bias, impl=impl, **groups)
        assert torch.equal(routing.expert_ids, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_implementations_agree_to_the_bit(dtype):
    logits = torch.randn(500, 37, dtype=dtype)
    logits[:100] = logits[:100].round()
    for settings in ({}, {"score": "sigmoid", "normalize": True, "scale": 2.5}, {"order": "after"}):
        one, other = (route_topk(logits, 6, impl=impl, **settings) for impl in IN_FLOAT64)
        assert torch.equal(one.expert_ids, other.expert_ids)
        assert torch.equal(one.weights, other.weights)
        assert one.weights.dtype == one.logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


# ------ transformers' routers: family → (class, its attributes, our settings); E = 12, K = 4 everywhere.
_V3 = {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
_OUR_V3 = {"num_groups": 4, "top_groups": 2, "group_score": "top2_sum", "scale": 2.5, "score": "sigmoid"}
_V2 = {"routed_scaling_factor": 16.0, "n_group": 4, "topk_group": 2}
FAMILIES = {
    "mixtral": ("MixtralTopKRouter", {}, {"normalize": True}),
    "olmoe": ("OlmoeTopKRouter", {"norm_topk_prob": False}, {}),
    "olmoe normalised": ("OlmoeTopKRouter", {"norm_topk_prob": True}, {"normalize": True}),
    "qwen2_moe": ("Qwen2MoeTopKRouter", {"norm_topk_prob": False}, {}),
    "qwen3_moe": ("Qwen3MoeTopKRouter", {"norm_topk_prob": True}, {"normalize": True}),
    "deepseek_v2": (
        "DeepseekV2TopkRouter",
        {**_V2, "topk_method": "group_limited_greedy"},
        {"scale": 16.0, "num_groups": 4, "top_groups": 2},
    ),
    "deepseek_v2 greedy": ("DeepseekV2TopkRouter", {**_V2, "topk_method": "greedy"}, {"scale": 16.0}),
    "deepseek_v3": ("DeepseekV3TopkRouter", _V3, {**_OUR_V3, "normalize": True}),
    "deepseek_v3 as they are": ("DeepseekV3TopkRouter", {**_V3, "norm_topk_prob": False}, _OUR_V3),
    "glm4_moe": (
        "Glm4MoeTopkRouter",
        {**_V3, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
        {"score": "sigmoid", "normalize": True},
    ),
    "gpt_oss": ("GptOssTopKRouter", {}, {"order": "after"}),
    "granitemoe": ("GraniteMoeTopKRouter", {}, {"order": "after"}),
    "ernie4_5_moe": ("Ernie4_5_MoeTopKRouter", {"moe_norm_min": 1e-12}, {"normalize": True}),
    "lfm2_moe": (
        "Lfm2MoeTopKRouter",
        {"norm_topk_prob": True, "routed_scaling_factor": 1.5, "use_expert_bias": True},
        {"score": "sigmoid", "normalize": True, "scale": 1.5},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("impl", IMPLS)
def test_is_the_router_of_transformers(family, impl):
    pytest.importorskip("transformers")
    class_name, attributes, settings = FAMILIES[family]
    name = family.split()[0]
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    num_tokens, num_experts, top_k = 50, 12, 4
    config = SimpleNamespace(
        hidden_size=num_tokens,
        num_experts=num_experts,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
        **attributes,
    )
    router = getattr(module, class_name)(config)
    logits = torch.randn(num_tokens, num_experts, requires_grad=True)
    bias = torch.randn(num_experts) / 5  # enough to change the choice
    with torch.no_grad():
        router.weight.copy_(logits.t())  # the identity as input makes any logits, and dlogits of the gradient
    more = ()
    if name in ("deepseek_v3", "glm4_moe"):
        router.e_score_correction_bias.copy_(bias)
    elif name == "ernie4_5_moe":
        router.moe_statics.e_score_correction_bias.copy_(bias)
    elif name == "lfm2_moe":
        more = (bias,)
    else:
        bias = None
    _, weights, ids = router(torch.eye(num_tokens), *more)
    routing = route_topk(logits, top_k, selection_bias=bias, impl=impl, **settings)
    assert torch.equal(routing.expert_ids.sort(1).values, ids.sort(1).values)
    if bias is not None:
        unbiased = route_topk(logits, top_k, **settings)
        assert not torch.equal(routing.expert_ids.sort(1).values, unbiased.expert_ids.sort(1).values)

    theirs = torch.zeros(num_tokens, num_experts).scatter(1, ids, weights)
    ours = torch.zeros(num_tokens, num_experts).scatter(1, routing.expert_ids, routing.weights)
    # lfm2_moe adds 1e-6 to the sum it divides by, we 1e-20.
    torch.testing.assert_close(ours, theirs, rtol=2e-6 if name == "lfm2_moe" else 5e-7, atol=0)
    direction = torch.randn_like(ours)
    (wanted,) = torch.autograd.grad((theirs * direction).sum(), router.weight)
    (got,) = torch.autograd.grad((ours * direction).sum(), logits)
    torch.testing.assert_close(got, wanted.t(), rtol=1e-5, atol=2e-6 * wanted.abs().max().item())


def test_llama4_is_the_sigmoid_of_the_chosen_logits():
    logits = torch.randn(20, 8)
    routing = route_topk(logits, 2, score="sigmoid", order="after")
    top = logits.topk(2)
    assert torch.equal(routing.expert_ids, top.indices)
    torch.testing.assert_close(routing.weights, top.values.sigmoid())


# ------ laws


@pytest.mark.parametrize("impl", IN_FLOAT64)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_are_exact(impl, score, order, normalize):
    logits = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, False, True, True])

    def weights(logits):
        settings = {"score": score, "order": order, "normalize": normalize, "scale": 1.7, "token_mask": mask}
        return route_topk(logits, 3, num_groups=4, top_groups=2, impl=impl, **settings).weights

    assert torch.autograd.gradcheck(weights, logits)
    assert torch.autograd.gradgradcheck(weights, logits)


@pytest.mark.parametrize("impl", IMPLS)
def test_padding_is_routed_nowhere_whatever_it_holds(impl):
    mask = torch.rand(30) < 0.6
    clean = torch.randn(30, 7)
    dirty = clean.clone()
    dirty[~mask] = torch.tensor([float("nan"), INF, -INF, 1e38, 0.0, 1.0, 2.0])
    results = []
    for values in (clean, dirty):
        logits = values.clone().requires_grad_()
        routing = route_topk(logits, 3, normalize=True, token_mask=mask, impl=impl)
        assert (routing.expert_ids[~mask] == 7).all()
        assert (routing.weights[~mask] == 0).all()
        assert routing.counts().sum() == 3 * mask.sum()
        routing.weights.square().sum().backward()
        assert (logits.grad[~mask] == 0).all()
        results.append((routing.expert_ids, routing.weights, routing.counts(), logits.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    unmasked = route_topk(clean, 3, normalize=True, impl=impl)
    assert torch.equal(unmasked.expert_ids[mask], results[0][0][mask])
    assert torch.equal(unmasked.weights[mask], results[0][1][mask])


def test_selection_bias_chooses_but_does_not_weigh():
    logits = torch.zeros(4, 5)
    bias = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0])
    routing = route_topk(logits, 2, selection_bias=bias.requires_grad_())
    assert routing.expert_ids.tolist() == [[3, 0]] * 4
    torch.testing.assert_close(routing.weights, torch.full((4, 2), 0.2))
    assert not routing.weights.requires_grad


def test_counts_are_a_plain_count():
    ids = torch.tensor([[0, 2], [2, 4], [1, 2], [4, 4]])
    assert Routing(ids, torch.ones(4, 2), torch.zeros(4, 4), 4).counts().tolist() == [1, 1, 3, 0]
    assert Routing(ids[:0], torch.ones(0, 2), torch.zeros(0, 4), 4).counts().tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_scores_are_shares(score):
    logits = torch.randn(6, 5)
    scores = route_topk(logits, 2, score=score).scores()
    torch.testing.assert_close(scores.sum(1), torch.ones(6))
    plain = logits.softmax(1) if score == "softmax" else logits.sigmoid() / logits.sigmoid().sum(1, keepdim=True)
    torch.testing.assert_close(scores, plain)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens(impl):
    logits = torch.zeros(0, 4, requires_grad=True)
    routing = route_topk(logits, 2, num_groups=2, normalize=True, token_mask=torch.ones(0, dtype=torch.bool), impl=impl)
    assert routing.expert_ids.shape == routing.weights.shape == (0, 2)
    assert routing.top_k == 2
    routing.weights.sum().backward()
    assert logits.grad.shape == (0, 4)


GOOD = {"logits": torch.zeros(6, 8), "top_k": 2}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"logits": [[1.0]]}, TypeError, r"logits must be a tensor \[T, E\], got list"),
        ({"logits": torch.zeros(2, 3, 4)}, ValueError, r"logits must have shape \[T, E\], got \(2, 3, 4\)"),
        ({"top_k": 0}, ValueError, r"top_k must be in 1\.\.8 .* got 0"),
        ({"top_k": 9}, ValueError, r"top_k must be in 1\.\.8 .* got 9"),
        ({"score": "tanh"}, ValueError, r"score must be one of 'softmax', 'sigmoid', got 'tanh'"),
        ({"order": "middle"}, ValueError, r"order must be one of 'before', 'after', got 'middle'"),
        ({"group_score": "sum"}, ValueError, r"group_score must be one of 'max', 'top2_sum', got 'sum'"),
        ({"num_groups": 3}, ValueError, r"num_groups must divide the number of experts, 8, got 3"),
        ({"num_groups": 0}, ValueError, r"num_groups must divide .* got 0"),
        ({"num_groups": 4, "top_groups": 5}, ValueError, r"top_groups must be in 1\.\.4 .* got 5"),
        ({"num_groups": 4, "top_groups": 0}, ValueError, r"top_groups must be in 1\.\.4 .* got 0"),
        ({"num_groups": 8, "top_groups": 1}, ValueError, r"top_k must fit in 1 group\(s\) of 1 experts, got 2"),
        (
            {"num_groups": 8, "top_groups": 2, "group_score": "top2_sum"},
            ValueError,
            r"group_score 'top2_sum' needs two experts a group, got 8 groups of one",
        ),
        ({"selection_bias": torch.zeros(7)}, ValueError, r"selection_bias must have shape \[E\] = \[8\], got \(7,\)"),
        ({"token_mask": torch.zeros(5, dtype=torch.bool)}, ValueError, r"token_mask must have shape \[T\] = \[6\]"),
        ({"token_mask": torch.zeros(6)}, TypeError, r"token_mask must be bool .* got torch.float32"),
        ({"impl": "cuda"}, ValueError, r"impl must be one of 'reference', 'torch', 'triton', got 'cuda'"),
        (
            {"logits": torch.zeros(6, 8, dtype=torch.float64), "impl": "triton"},
            TypeError,
            r"impl='triton' computes in float16, bfloat16, float32, got torch.float64",
        ),
    ],
)
def test_wrong_arguments_are_named(wrong, error, message):
    with pytest.raises(error, match=message):
        route_topk(**{**GOOD, **wrong})


def test_the_score_matters_downstream():
    assert route_topk(**GOOD, score="sigmoid").score == "sigmoid"
    assert route_topk(**GOOD).score == "softmax"
