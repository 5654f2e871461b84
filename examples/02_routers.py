"""Routers of well-known models are settings of one function.

python examples/02_routers.py
"""

import torch

import coterie

torch.manual_seed(0)
logits, bias = torch.randn(1000, 16), 0.1 * torch.randn(16)

families = {
    "mixtral, qwen3_moe": {"normalize": True},
    "olmoe": {"normalize": False},
    "deepseek_v2": {"scale": 16.0, "num_groups": 4, "top_groups": 2},
    "deepseek_v3": {
        "score": "sigmoid",
        "normalize": True,
        "scale": 2.5,
        "selection_bias": bias,
        "num_groups": 4,
        "top_groups": 2,
        "group_score": "top2_sum",
    },
    "gpt_oss, granitemoe": {"order": "after"},
    "ernie4_5_moe": {"normalize": True, "selection_bias": bias},
    "llama4": {"score": "sigmoid", "order": "after"},
}
print(f"{'family':20} {'weights of the first token':38} balance loss")
for family, settings in families.items():
    routing = coterie.route_topk(logits, top_k=4, **settings)
    weights = "  ".join(f"{weight:7.3f}" for weight in routing.weights[0].tolist())
    print(f"{family:20} {weights:38} {coterie.balance_loss(routing).item():.3f}")
