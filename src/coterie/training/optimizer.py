"""AdamW, and which parameters decay."""

import torch
from torch import nn

from coterie.training.config import TrainConfig


def decay_groups(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Trainable parameters by name, (with, without) weight decay.

    Decay keeps the scale of the matrices that a norm follows in check. So all matrices decay, those of experts and
    routers too, and what is no such matrix does not: the gains of norms, biases (also of experts, which are
    two-dimensional), and embeddings (as in OLMo 2, arXiv:2501.00656: a shrunken embedding makes the gradients of the
    first norm explode), also where the embedding is the output head.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with_decay, without = {}, {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_bias = name.rpartition(".")[2].endswith("bias")
        plain = parameter.ndim < 2 or is_bias or id(parameter) in embeddings
        (without if plain else with_decay)[name] = parameter
    return with_decay, without


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over `decay_groups(model)`; the learning rate is set anew at every step."""
    with_decay, without = decay_groups(model)
    groups = [
        {"params": list(with_decay.values()), "weight_decay": config.weight_decay},
        {"params": list(without.values()), "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("model: has no parameter that requires a gradient")
    # One kernel for all parameters, on the CPU too; the loop over them takes longer than a tiny model's matmuls.
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
