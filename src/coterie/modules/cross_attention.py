"""Cross attention to a context, behind a gate that begins closed (Flamingo, arXiv:2204.14198; Llama 3.2 vision)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coterie.modules._heads import divide_heads
from coterie.modules._init import init_normal
from coterie.modules._padding import without_padding
from coterie.modules.attention import QK_NORMS
from coterie.modules.norm import RMSNorm
from coterie.ops._arguments import check_tensor


class CrossAttention(nn.Module):
    """Every position attends to all of a context: an image's patches, an encoder's output, what was looked up.

    1. q = a projection of x, split into H heads of width P; k, v = projections of the context, into G each
    2. q, k = norm(q), norm(k), only with `qk_norm`; nothing is turned, so the context's order is what it contains
    3. y[h] = softmax(scale · q[h] · k[g]ᵀ, over the context but its padding) · v[g], where H/G consecutive query heads
       share a key/value head; 0 where there is nothing to see
    4. tanh(gate) · output projection of the heads side by side

    What it returns is to be added to x. The gate begins at 0: a model is at first as it was without this layer, while
    the gate has a gradient, and once it has moved all the others have.

    Args:
        dim: D.
        num_heads: H.
        context_dim: of the context; None: D.
        num_kv_heads: G, which divides H; None: H.
        head_dim: P; None: D / H.
        qk_norm: RMSNorm on queries and keys: of every "head" with one weight [P] for all (Llama 3.2 vision), or of
            "all" heads side by side; None: none.
        gated: False: no gate, as in an encoder-decoder.
        scale: None: P^-0.5.
        norm_eps: of the q and k norms.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        context_dim: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: str | None = None,
        gated: bool = True,
        scale: float | None = None,
        norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads, head_dim = divide_heads(dim, num_heads, num_kv_heads, head_dim)
        if qk_norm not in (None, *QK_NORMS):
            raise ValueError(f"qk_norm must be None or one of {', '.join(map(repr, QK_NORMS))}, got {qk_norm!r}")
        context_dim = dim if context_dim is None else context_dim
        for name, size in (("context_dim", context_dim), ("head_dim", head_dim)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.context_dim = context_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.qk_norm = qk_norm
        self.scale = scale
        place = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=False, **place)
        self.k_proj = nn.Linear(context_dim, num_kv_heads * head_dim, bias=False, **place)
        self.v_proj = nn.Linear(context_dim, num_kv_heads * head_dim, bias=False, **place)
        self.o_proj = nn.Linear(num_heads * head_dim, dim, bias=False, **place)
        heads = (num_heads, num_kv_heads) if qk_norm == "all" else (1, 1)  # that a norm is over
        norms = [RMSNorm(count * head_dim, norm_eps, **place) if qk_norm else None for count in heads]
        self.q_norm, self.k_norm = norms
        self.gate = nn.Parameter(torch.empty(1, **place)) if gated else None
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, output_std: float | None = None) -> None:
        """Weights normal(0, std), the output projection's normal(0, output_std or std); the gate 0, norms 1."""
        for linear in (self.q_proj, self.k_proj, self.v_proj):
            init_normal(linear.weight, std)
        init_normal(self.o_proj.weight, std if output_std is None else output_std)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()
        if self.gate is not None:
            nn.init.zeros_(self.gate)

    def new_cache(self, context: Tensor, context_mask: Tensor | None = None) -> "CrossAttentionCache":
        """The context's keys and values, made once for any number of calls; gradients go through them.

        Args:
            context: [B, Lc, context_dim].
            context_mask: [B, Lc] bool, False = padding, which nothing sees, whatever it contains, NaN included.
        """
        check_tensor("context", context, (None, None, self.context_dim), "[B, Lc, context_dim]")
        if context_mask is not None:
            check_tensor("context_mask", context_mask, context.shape[:2], "[B, Lc]", dtype=torch.bool)
            context = without_padding(context, context_mask)
        keys = self._split(self.k_proj(context), self.k_norm)
        return CrossAttentionCache(keys, self._split(self.v_proj(context), None), context_mask)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        context_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        cache_layer: "CrossAttentionCache | None" = None,
    ) -> Tensor:
        """[B, L, D] → [B, L, D].

        Args:
            x: [B, L, D].
            context: [B, Lc, context_dim]; Lc may be 0.
            context_mask: [B, Lc] bool, False = padding, which nothing sees, whatever it contains, NaN included.
            token_mask: [B, L] bool, False = padding of x; the output there is zero.
            cache_layer: in place of context and context_mask, from `new_cache`.
        """
        if (context is None) == (cache_layer is None):
            raise ValueError("one of context and cache_layer must be given, and only one")
        if context_mask is not None and cache_layer is not None:
            raise ValueError("context_mask is in cache_layer already: give it to new_cache")
        seen = self.new_cache(context, context_mask) if cache_layer is None else cache_layer
        if len(x) != len(seen.keys):
            raise ValueError(f"x must be of the context's batch of {len(seen.keys)}, got {len(x)}")
        if token_mask is not None:
            x = without_padding(x, token_mask)
        y = self._attend(self._split(self.q_proj(x), self.q_norm), seen)
        if token_mask is not None:
            y = y.masked_fill(~token_mask.unsqueeze(-1), 0)
        y = self.o_proj(y)
        return y if self.gate is None else y * self.gate.tanh().to(y.dtype)

    def _split(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        """[B, L, heads · P] → [B, heads, L, P], normed."""
        if norm is not None and self.qk_norm == "all":
            x = norm(x)
        x = x.unflatten(-1, (-1, self.head_dim))
        return (norm(x) if norm is not None and self.qk_norm == "head" else x).transpose(1, 2)

    def _attend(self, queries: Tensor, seen: "CrossAttentionCache") -> Tensor:
        """Queries [B, H, L, P] → what they see, [B, L, H·P]."""
        keys, values, mask = seen.keys.to(queries.dtype), seen.values.to(queries.dtype), None
        if not keys.shape[2]:
            return torch.zeros_like(queries).transpose(1, 2).flatten(2)
        if seen.context_mask is not None:
            nothing = ~seen.context_mask.any(1).view(-1, 1, 1, 1)
            # A softmax must not be over nothing: who sees nothing sees the padding's zeros, and that is dropped below.
            mask = seen.context_mask[:, None, None] | nothing
        # All queries see the same, so the H/G heads of a group stand as H/G times the queries of one head. Here torch's
        # own attention is faster than `sparse_attention`, which takes padding sequence by sequence.
        grouped = queries.unflatten(1, (self.num_kv_heads, -1)).flatten(2, 3)
        y = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=self.scale)
        if mask is not None:
            y = y.masked_fill(nothing, 0)
        return y.reshape(queries.shape).transpose(1, 2).flatten(2)

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"


@dataclass(frozen=True)
class CrossAttentionCache:
    """A context as one layer sees it; decoding adds nothing to it.

    Attributes:
        keys, values: [B, G, Lc, P].
        context_mask: [B, Lc] bool, False = padding; None: there is none.
    """

    keys: Tensor
    values: Tensor
    context_mask: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (self.keys, self.values, self.context_mask) if t is not None)

    def snapshot(self) -> None:
        """Nothing: there is nothing that changes."""

    def rollback(self, snapshot: None) -> None:
        """Be as at the snapshot: as ever."""
