"""`Experts`: weights laid out as the ecosystem has them, one call into `expert_mlp`."""

import pytest
import torch

from coterie.modules import Experts
from coterie.ops import Routing, expert_mlp


def _routing(tokens, experts, top_k):
    ids = torch.rand(tokens, experts).topk(top_k).indices
    return Routing(ids, torch.rand(tokens, top_k), torch.zeros(tokens, experts), experts)


@pytest.mark.parametrize(
    "settings", [{}, {"bias": True, "recompute": True}, {"activation": "relu2", "impl": "reference"}]
)
def test_is_expert_mlp_on_its_weights(settings):
    experts = Experts(5, 8, 6, **settings)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    x, routing = torch.randn(20, 8), _routing(20, 5, 2)
    biases = {"gate_up_bias": experts.gate_up_bias, "down_bias": experts.down_bias}
    wanted = expert_mlp(
        x,
        routing.expert_ids,
        routing.weights,
        experts.gate_up_proj,
        experts.down_proj,
        activation=settings.get("activation", "swiglu"),
        **biases,
    )
    torch.testing.assert_close(experts(x, routing), wanted, rtol=1e-5, atol=1e-5)


def test_recompute_keeps_less():
    x, routing = torch.randn(20, 8), _routing(20, 5, 2)
    kept = {}
    for recompute in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            Experts(5, 8, 6, recompute=recompute)(x, routing)
        kept[recompute] = sum(sizes)
    assert kept[False] - kept[True] == 20 * 2 * 12  # N · 2F


def test_layout():
    experts = Experts(5, 8, 6, bias=True)
    shapes = {name: tuple(p.shape) for name, p in experts.named_parameters()}
    assert shapes == {
        "gate_up_proj": (5, 12, 8),
        "down_proj": (5, 8, 6),
        "gate_up_bias": (5, 12),
        "down_bias": (5, 8),
    }
    assert Experts(5, 8, 6, activation="gelu").gate_up_proj.shape == (5, 6, 8)


def test_loads_the_experts_of_transformers():
    """Same names, same layout: their state dict is ours."""
    pytest.importorskip("transformers")
    from types import SimpleNamespace

    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = SimpleNamespace(num_experts=5, hidden_size=8, moe_intermediate_size=6, hidden_act="silu")
    theirs = Qwen3MoeExperts(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ours = Experts(5, 8, 6)
    ours.load_state_dict(theirs.state_dict())
    x, routing = torch.randn(20, 8), _routing(20, 5, 2)
    wanted = Qwen3MoeExperts.forward.__wrapped__(theirs, x, routing.expert_ids, routing.weights)
    torch.testing.assert_close(ours(x, routing), wanted, rtol=1e-5, atol=1e-5)


def test_init():
    experts = Experts(8, 50, 40, bias=True)
    experts.reset_parameters(0.5, down_std=0.1)
    assert experts.gate_up_proj.std().item() == pytest.approx(0.5, rel=0.02)
    assert experts.down_proj.std().item() == pytest.approx(0.1, rel=0.02)
    assert not experts.gate_up_bias.any()
    assert not experts.down_bias.any()
    per_expert = experts.gate_up_proj.detach().flatten(1)
    assert torch.corrcoef(per_expert).fill_diagonal_(0).abs().max() < 0.1  # no two alike


def test_unknown_activation():
    with pytest.raises(ValueError, match="activation must be one of"):
        Experts(4, 8, 6, activation="swish")
