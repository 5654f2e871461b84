"""What `coterie_kernels.tune` measures for the MLP of experts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from coterie_kernels import expert_mlp
from coterie_kernels.tiles import TILES, column_class, mlp_class
from coterie_kernels.tune import Layer, Task, normal


@dataclass(frozen=True)
class ExpertLayer(Layer):
    """Experts; how many tokens they will see is not asked: tiles are chosen by rows per expert."""

    dim: int
    hidden_dim: int
    num_experts: int
    top_k: int
    dtype: torch.dtype = torch.bfloat16
    activation: expert_mlp.Activation = expert_mlp.Activation("silu", True)  # noqa: RUF009 (frozen)

    def tasks(self, target: str) -> Iterator[Task]:
        for kind in ("forward", "backward", "recompute"):
            kernel, width = mlp_class(target, self.dtype, self.hidden_dim, kind)
            for key in TILES[target][kernel]:
                if width is None or key[0] == width:
                    yield Task(kernel, key, kind, 4 * (key if width is None else key[1]))
        prefix = "float32 " if self.dtype == torch.float32 else ""
        if mlp_class(target, self.dtype, self.hidden_dim, "forward")[1] is None:
            for rows in TILES[target][f"{prefix}multiply_rows"]:
                yield Task(f"{prefix}multiply_rows", rows, "forward", 4 * rows)
        key = column_class(target, self.dtype, min(self.dim, self.hidden_dim))
        yield Task(f"{prefix}multiply_columns", key, "backward", 256)

    def runner(self, task: Task, device: torch.device) -> Callable[[], list[Tensor | None]]:
        """Forward, or backward alone ("backward", "recompute"), of a balanced load."""
        generator = torch.Generator(device).manual_seed(0)
        randn = partial(normal, generator, dtype=self.dtype)
        experts, dim, hidden = self.num_experts, self.dim, self.hidden_dim
        tokens = max(1, task.rows_per_expert * experts // self.top_k)
        ids = torch.rand(tokens, experts, device=device, generator=generator).topk(self.top_k).indices
        weights = torch.rand(tokens, self.top_k, device=device, generator=generator)
        x, grad = randn(tokens, dim), randn(tokens, dim)
        up = randn(experts, (2 if self.activation.gated else 1) * hidden, dim, scale=dim**-0.5)
        down = randn(experts, dim, hidden, scale=hidden**-0.5)
        keeps = task.kind != "recompute"

        def forward() -> tuple[Tensor, ...]:
            return expert_mlp.forward(x, ids, weights, up, down, None, None, None, self.activation, keeps)

        if task.kind == "forward":
            return lambda: [forward()[0]]
        kept = forward()[1:]
        needs = [True] * 4 + [False] * 2
        return lambda: list(expert_mlp.backward(grad, x, weights, up, down, None, None, *kept, self.activation, needs))
