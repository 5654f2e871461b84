"""What `coterie_kernels.tune` measures for linear attention: the delta rule."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from coterie_kernels import delta_rule
from coterie_kernels.delta_rule_tiles import delta_rule_class
from coterie_kernels.tiles import TILES
from coterie_kernels.tune import Layer, Sizes, Task, neighbours, normal

_LENGTH = 1024  # tokens of a sequence
_STATES = 128  # sequences · heads, or more: they keep a GPU busy, and no sequence is cut into segments


@dataclass(frozen=True)
class DeltaRuleLayer(Layer):
    """Heads with a state [P, V] each. Tiles are chosen by P, whatever the length.

    Attributes:
        num_heads, num_key_heads: H, H'.
        key_width, value_width: P, V.
        decay: "none", one for "heads", or for "channels".
        erases: by beta.
    """

    num_heads: int
    num_key_heads: int
    key_width: int
    value_width: int
    decay: str = "heads"
    erases: bool = True
    dtype: torch.dtype = torch.bfloat16

    def tasks(self, target: str) -> Iterator[Task]:
        """The chunk first, which all others depend on; not in float32, where it is as long as rounding permits."""
        key = delta_rule_class(TILES[target], self.dtype, self.key_width)
        by_channel = self.decay == "channels"
        kinds = {} if self.dtype == torch.float32 else {"chunk": "both"}
        if by_channel:
            kinds["prepare_channels"] = "forward"
        elif self.erases or self.decay == "heads":
            kinds["prepare"] = "forward"
        kinds |= {"forward": "forward", "backward": "backward"}
        kinds["channel_gradients" if by_channel else "gradients"] = "backward"
        prefix = "float32 " if self.dtype == torch.float32 else ""
        for kernel, kind in kinds.items():
            yield Task(f"{prefix}delta_{kernel}", key, kind)

    def candidates(self, kernel: str, sizes: Sizes) -> Iterable[Sizes]:
        if kernel == "delta_chunk":  # longer ones are proved nowhere
            return [(chunk,) for chunk in (16, 32, 64) if (chunk,) != sizes]
        if kernel.endswith("delta_channel_gradients"):  # whose width is all of P
            return (other for other in neighbours(sizes) if other[0] == sizes[0])
        return neighbours(sizes)

    def runner(self, task: Task, device: torch.device) -> Callable[[], list[Tensor | None]]:
        """Forward, backward alone, or "both": what is kept in between depends on the chunk."""
        generator = torch.Generator(device).manual_seed(0)
        randn = partial(normal, generator, dtype=self.dtype)
        heads, width = self.num_heads, self.key_width
        sequences = -(-_STATES // heads)
        tokens = sequences * _LENGTH
        q, k = (torch.nn.functional.normalize(randn(tokens, self.num_key_heads, width), dim=2) for _ in range(2))
        v, grad = (randn(tokens, heads, self.value_width) for _ in range(2))
        shape = (tokens, heads, width) if self.decay == "channels" else (tokens, heads)
        g = None if self.decay == "none" else -0.1 * randn(*shape).float().abs()
        beta = randn(tokens, heads).float().sigmoid() if self.erases else None
        before = torch.zeros(sequences, heads, width, self.value_width, dtype=torch.float32, device=device)
        tensors, scale = (q, k, v, g, None, beta, before, None), width**-0.5

        def forward() -> tuple[Tensor, ...]:
            return delta_rule.forward(*tensors, scale)

        def backward(kept: tuple[Tensor, ...]) -> list[Tensor | None]:
            return list(delta_rule.backward(grad, torch.zeros_like(before), *tensors, *kept, scale))

        def both() -> list[Tensor | None]:
            o, after, *kept = forward()
            return [o, after, *backward(kept)]

        if task.kind == "both":
            return both
        if task.kind == "forward":
            return lambda: list(forward()[:2])
        kept = forward()[2:]
        return lambda: backward(kept)
