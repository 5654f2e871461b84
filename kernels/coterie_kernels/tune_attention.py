"""What `coterie_kernels.tune` measures for sparse and window attention."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from coterie_kernels import sparse_attention
from coterie_kernels.sparse_attention_tiles import attention_class
from coterie_kernels.tiles import TILES
from coterie_kernels.tune import Layer, Task, normal

_LENGTH = 4096  # tokens of a sequence, at least
_UNITS = 8  # sequences · heads of keys, or more, which keep a GPU busy


@dataclass(frozen=True)
class AttentionLayer(Layer):
    """Attention to windows, sinks and selected blocks. Tiles are chosen by P, whatever the length.

    Attributes:
        num_heads, num_kv_heads: H, G.
        head_dim: P, and V.
        window: the last keys that a query sees; 0: none; None: all.
        sinks: the first ones that it sees besides.
        block_size, num_blocks: of the blocks that are selected; no blocks: none are.
        sink_logits: each head has one.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    sinks: int = 0
    block_size: int = 1
    num_blocks: int = 0
    sink_logits: bool = False
    dtype: torch.dtype = torch.bfloat16

    def tasks(self, target: str) -> Iterator[Task]:
        """Those of runs of keys if there are any, those of blocks if any are selected."""
        kinds = {}
        if self.window != 0 or self.sinks:
            kinds |= {"forward": "forward", "query_gradients": "backward"}
        if self.num_blocks:
            kinds |= {"selected": "forward", "selected_gradients": "backward"}
        kinds["key_gradients"] = "backward"
        prefix = "float32 " if self.dtype == torch.float32 else ""
        for kernel, kind in kinds.items():
            name = f"{prefix}attention_{kernel}"
            yield Task(name, attention_class(TILES[target][name], self.head_dim), kind)

    def runner(self, task: Task, device: torch.device) -> Callable[[], list[Tensor | None]]:
        """Forward, or backward alone."""
        generator = torch.Generator(device).manual_seed(0)
        randn = partial(normal, generator, dtype=self.dtype)
        batch, length = -(-_UNITS // self.num_kv_heads), max(_LENGTH, 4 * self.block_size)
        q, grad = (randn(batch, length, self.num_heads, self.head_dim) for _ in range(2))
        k, v = (randn(batch, length, self.num_kv_heads, self.head_dim) for _ in range(2))
        ids = self._block_ids(batch, length, generator) if self.num_blocks else None
        logits = randn(self.num_heads) if self.sink_logits else None
        tensors = q, k, v, ids, logits, None, None
        window = length if self.window is None else self.window
        seen = sparse_attention.Seen(window, self.sinks, self.block_size, True, self.head_dim**-0.5, None)

        def forward() -> tuple[Tensor, Tensor]:
            return sparse_attention.forward(*tensors, seen)

        if task.kind == "forward":
            return lambda: list(forward())
        o, lse = forward()
        grad_lse = torch.zeros_like(lse)
        return lambda: list(sparse_attention.backward(grad, grad_lse, *tensors, o, lse, seen))

    def _block_ids(self, batch: int, length: int, generator: torch.Generator) -> Tensor:
        """[B, L, G, S]: any blocks that end before their query, each once; −1 where there are no more."""
        blocks = length // self.block_size
        scores = torch.rand(batch, length, self.num_kv_heads, blocks, device=generator.device, generator=generator)
        position = torch.arange(length, device=generator.device)
        ends = (torch.arange(blocks, device=generator.device) + 1) * self.block_size
        best = scores.masked_fill_((ends > position[:, None])[:, None], -1).topk(min(self.num_blocks, blocks))
        return best.indices.masked_fill(best.values < 0, -1)
