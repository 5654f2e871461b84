"""The router: one linear layer in float32, then `route_topk`."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coterie.modules._init import init_normal
from coterie.modules._padding import without_padding
from coterie.ops._autocast import autocast_dtype
from coterie.ops.balance import selection_bias_update
from coterie.ops.routing import Routing, route_topk


class TopKRouter(nn.Module):
    """Chooses `top_k` of `num_experts` experts for every token; `route_topk` documents the settings.

    Its arithmetic is float32 whatever the dtype of x, of its weight, or of autocast: a rounded logit is another
    expert.

    Args:
        dim: D.
        num_experts: E.
        top_k: K.
        score, order, normalize, scale, num_groups, top_groups, group_score: as in `route_topk`.
        bias: a learned bias on the logits (gpt-oss).
        selection_bias: a float32 buffer [E] that balances the load without a loss; it starts at zero and changes
            only in `update_selection_bias` (DeepSeek-V3).
        impl: which implementation of `route_topk`; None chooses.

    Shapes: x [..., D], token_mask [...] bool (False = padding) → Routing over T = the product of the leading sizes.

    Raises:
        ValueError: a setting is out of range, or token_mask is of another shape than x without D.
        TypeError: token_mask is not bool.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        score: str = "softmax",
        order: str = "before",
        normalize: bool = True,
        scale: float = 1.0,
        num_groups: int = 1,
        top_groups: int = 1,
        group_score: str = "max",
        bias: bool = False,
        selection_bias: bool = False,
        impl: str | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.score, self.order, self.normalize, self.scale = score, order, normalize, scale
        self.num_groups, self.top_groups, self.group_score = num_groups, top_groups, group_score
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        # float32 whatever the model's dtype: steps of 1e-3 would drown in bfloat16.
        zeros = torch.zeros(num_experts, device=device, dtype=torch.float32) if selection_bias else None
        self.register_buffer("selection_bias", zeros)
        self.impl = None
        self._route(torch.zeros(0, num_experts, device="cpu"), None, None)  # refuses wrong settings now
        self.impl = impl
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """A normal weight of deviation `std`, zero biases."""
        init_normal(self.weight, std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.selection_bias is not None:
            nn.init.zeros_(self.selection_bias)

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Routing:
        if token_mask is not None:
            x = without_padding(x, token_mask)
        with torch.autocast(x.device.type, enabled=False) if autocast_dtype(x.device.type) else nullcontext():
            bias = None if self.bias is None else self.bias.float()
            logits = F.linear(x.reshape(-1, x.shape[-1]).float(), self.weight.float(), bias)  # [T, E]
            return self._route(logits, self.selection_bias, None if token_mask is None else token_mask.flatten())

    def _route(self, logits: Tensor, selection_bias: Tensor | None, token_mask: Tensor | None) -> Routing:
        return route_topk(
            logits,
            self.top_k,
            score=self.score,
            order=self.order,
            normalize=self.normalize,
            scale=self.scale,
            selection_bias=selection_bias,
            num_groups=self.num_groups,
            top_groups=self.top_groups,
            group_score=self.group_score,
            token_mask=token_mask,
            impl=self.impl,
        )

    def _apply(self, fn, recurse: bool = True):
        """Behind `to`, `bfloat16` and the like, which would round the selection bias with the weights."""
        bias = self.selection_bias
        super()._apply(fn, recurse)
        if bias is not None and self.selection_bias.dtype != torch.float32:
            self.selection_bias = bias.to(self.selection_bias.device)
        return self

    @torch.no_grad()
    def update_selection_bias(self, counts: Tensor, rate: float = 1e-3) -> None:
        """One step towards equal load; call it once per optimizer step.

        Args:
            counts: [E], the step's `Routing.counts()`, summed over micro-batches and ranks.
        """
        if self.selection_bias is None:
            raise ValueError("this router has no selection bias: build it with selection_bias=True")
        self.selection_bias.copy_(selection_bias_update(self.selection_bias, counts, rate))

    def extra_repr(self) -> str:
        text = f"num_experts={self.num_experts}, top_k={self.top_k}, score={self.score!r}, order={self.order!r}"
        return text + f", normalize={self.normalize}, scale={self.scale}"
