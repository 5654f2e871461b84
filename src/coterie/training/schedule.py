"""The learning rate of a step: linear warm-up, then half a cosine."""

import math


def learning_rate(step: int, *, steps: int, lr: float, warmup_steps: int, min_lr_ratio: float) -> float:
    """Learning rate of step `step` = 0 … `steps` - 1.

    It rises linearly over the first `warmup_steps` steps, the last of which has the full `lr`, and falls along half a
    cosine (Loshchilov & Hutter, "SGDR", 2017) to `min_lr_ratio · lr`, which the very last step has.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if step >= steps:
        return lr * min_lr_ratio
    progress = (step + 1 - warmup_steps) / (steps - warmup_steps)
    return lr * (min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
