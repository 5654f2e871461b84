"""Causal attention with grouped queries (Ainslie et al., arXiv:2305.13245)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coterie.modules._heads import divide_heads
from coterie.modules._init import init_normal
from coterie.modules._padding import without_padding
from coterie.modules.attention_cache import AttentionCache, WindowCache
from coterie.modules.norm import RMSNorm
from coterie.modules.rotary import apply_rotary
from coterie.ops import _causal_attention_cpu, sparse_attention

QK_NORMS = ("head", "all")


class Attention(nn.Module):
    """Every position attends to itself and to those before it, or to the last few of them.

    1. q, k, v = projections of x, split into H query heads and G key/value heads of width P
    2. q, k = rotary(norm(q)), rotary(norm(k)); the norm only with `qk_norm`, the rotary only if it is given
    3. with a cache: append k and v to it, and read back all there are so far
    4. y[h] = softmax(scale · q[h] · k[g]ᵀ, over positions that are not later, not padding and in the window) · v[g],
       where H/G consecutive query heads share a key/value head; with `sink_logits` exp(s[h]) is in the denominator too
    5. with `output_gate`: y[h] times σ(projection of x)
    6. output projection of the heads side by side

    Args:
        dim: D.
        num_heads: H.
        num_kv_heads: G, which divides H; None: H.
        head_dim: P; None: D / H.
        qk_norm: RMSNorm on queries and keys: of every "head" with one weight [P] for all (qwen3), or of "all" heads
            side by side (olmoe); None: none.
        qkv_bias: on the projections of queries, keys and values.
        output_bias: on the output projection.
        output_gate: gate what every head reads (qwen3_next). The gate's rows stand in q_proj, each head's after its
            queries', and share its bias.
        window: how many positions up to its own each attends to (gpt_oss, Gemma, Mistral); None: all. The cache then
            keeps no more than that.
        sink_logits: a learned score for every head, of a position that is not there: a head may attend to nothing
            (gpt_oss).
        scale: None: P^-0.5.
        rotary_interleaved: the rotary embedding turns pairs of neighbouring channels.
        norm_eps, norm_zero_centered: of the q and k norms; see `RMSNorm`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: str | None = None,
        qkv_bias: bool = False,
        output_bias: bool = False,
        output_gate: bool = False,
        window: int | None = None,
        sink_logits: bool = False,
        scale: float | None = None,
        rotary_interleaved: bool = False,
        norm_eps: float = 1e-6,
        norm_zero_centered: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads, head_dim = divide_heads(dim, num_heads, num_kv_heads, head_dim)
        if qk_norm not in (None, *QK_NORMS):
            raise ValueError(f"qk_norm must be None or one of {', '.join(map(repr, QK_NORMS))}, got {qk_norm!r}")
        if window is not None and window < 1:
            raise ValueError(f"window must be None or at least 1, got {window}")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.qk_norm = qk_norm
        self.output_gate = output_gate
        self.window = window
        self.scale = scale
        self.rotary_interleaved = rotary_interleaved
        kind = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(dim, (2 if output_gate else 1) * num_heads * head_dim, bias=qkv_bias, **kind)
        self.k_proj = nn.Linear(dim, num_kv_heads * head_dim, bias=qkv_bias, **kind)
        self.v_proj = nn.Linear(dim, num_kv_heads * head_dim, bias=qkv_bias, **kind)
        self.o_proj = nn.Linear(num_heads * head_dim, dim, bias=output_bias, **kind)
        self.sink_logits = nn.Parameter(torch.empty(num_heads, **kind)) if sink_logits else None
        heads = (num_heads, num_kv_heads) if qk_norm == "all" else (1, 1)  # that a norm is over
        kind["zero_centered"] = norm_zero_centered
        norms = [RMSNorm(count * head_dim, norm_eps, **kind) if qk_norm else None for count in heads]
        self.q_norm, self.k_norm = norms
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, output_std: float | None = None) -> None:
        """Weights and sink logits normal(0, std), the output projection's normal(0, output_std or std), biases 0; norms
        as new."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            init_normal(linear.weight, std)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if output_std is not None:
            init_normal(self.o_proj.weight, output_std)
        if self.sink_logits is not None:
            init_normal(self.sink_logits, std)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()

    def new_cache(
        self,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> AttentionCache | WindowCache:
        """An empty cache for this layer, on its weights' device and in their dtype unless told otherwise."""
        weight = self.k_proj.weight
        place = {"device": device or weight.device, "dtype": dtype or weight.dtype}
        if self.window is not None and self.window <= max_length:
            return WindowCache(batch_size, self.num_kv_heads, self.window, self.head_dim, **place)
        return AttentionCache(batch_size, self.num_kv_heads, max_length, self.head_dim, **place)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        *,
        token_mask: Tensor | None = None,
        cache_layer: AttentionCache | WindowCache | None = None,
    ) -> Tensor:
        """[B, L, D] → [B, L, D].

        Args:
            x: [B, L, D].
            rotary: (cos, sin) of the L positions, from `RotaryEmbedding`: each [L, P/2] or [B, L, P/2]. None: queries
                and keys are not turned, and nothing tells positions apart but causality (arXiv:2305.19466).
            token_mask: [B, L] bool, False = padding, anywhere in a sequence; a window does not count it. Nothing
                attends to padding, whatever it contains, NaN included; what a padding position attends to is zero.
            cache_layer: what came before x, to which x's keys and values are appended. No gradients through it.
        """
        if token_mask is not None:
            x = without_padding(x, token_mask)
        queries, keys, values, gate = self._heads(x, rotary)
        key_mask = token_mask
        if cache_layer is not None:
            keys, values, key_mask = cache_layer.append(keys, values, token_mask)
        if self.window is None and self.sink_logits is None:
            y = causal_attention(queries, keys, values, key_mask, self.scale).transpose(1, 2)
        else:
            rows = (t.transpose(1, 2) for t in (queries, keys, values))
            settings = {"window": self.window, "sink_logits": self.sink_logits, "scale": self.scale}
            y = sparse_attention(*rows, token_mask=key_mask, **settings)
        return self._output(y, gate)

    def _heads(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries [B, H, L, P], keys and values [B, G, L, P], and what gates the output [B, L, H·P], if anything."""
        queries, keys, values = self._project(x)
        gate = None
        if self.output_gate:
            queries, gate = (t.flatten(2) for t in queries.unflatten(-1, (self.num_heads, -1)).chunk(2, dim=-1))
        if self.qk_norm == "all":
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys, values = (t.unflatten(-1, (-1, self.head_dim)) for t in (queries, keys, values))  # [B, L, .., P]
        if self.qk_norm == "head":
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        if rotary is not None:
            turned = apply_rotary(torch.cat((queries, keys), dim=2), rotary, self.rotary_interleaved)
            queries, keys = turned.split((self.num_heads, self.num_kv_heads), dim=2)
        return *(t.transpose(1, 2) for t in (queries, keys, values)), gate

    def _output(self, y: Tensor, gate: Tensor | None) -> Tensor:
        """What every head read, [B, L, H, P] → [B, L, D]."""
        y = y.flatten(2)
        return self.o_proj(y if gate is None else y * gate.sigmoid())

    def _project(self, x: Tensor) -> Sequence[Tensor]:
        """[B, L, D] → queries [B, L, H·P], with the output's gate [B, L, H·2P]; keys and values [B, L, G·P]."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def causal_attention(
    queries: Tensor, keys: Tensor, values: Tensor, key_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale · q · kᵀ + causal and padding mask) · v, by torch's scaled_dot_product_attention or a faster way.

    The last query stands at the last key's position: with L = S that is the usual square, with L < S a continuation.

    Args:
        queries: [B, H, L, P].
        keys: [B, G, S, P], S ≥ L, G divides H.
        values: [B, G, S, V].
        key_mask: [B, S] bool, False = padding: seen by no query; a query there gives zeros.
        scale: None: P^-0.5.

    Returns:
        [B, H, L, V].
    """
    num_queries, num_keys = queries.shape[2], keys.shape[2]
    if num_queries > 1 and _causal_attention_cpu.is_faster(queries, keys):
        y = _causal_attention_cpu.causal_attention(queries, keys, values, key_mask, scale)
        return y if key_mask is None else y.masked_fill(~key_mask[:, None, num_keys - num_queries :, None], 0)
    value_dim, missing = values.shape[3], queries.shape[3] - values.shape[3]
    if missing > 0:  # without equal widths torch falls back to what keeps all L × S scores for backward
        values = F.pad(values, (0, missing))
    mask = None
    if key_mask is not None:
        query_mask = key_mask[:, None, num_keys - num_queries :, None]  # [B, 1, L, 1]
        # A padding query may see padding, for its softmax must not be over nothing; its result is dropped below.
        mask = key_mask[:, None, None, :] | ~query_mask  # [B, 1, L, S]

    if num_queries == 1:
        # One query sees all keys, so the H/G heads of a group can stand as H/G queries of one head: no mask for
        # causality, and the keys are read once a group. The decoding path; 1.6x the grouped one at S = 1000 on a CPU.
        grouped = queries.reshape(queries.shape[0], keys.shape[1], -1, queries.shape[3])  # [B, G, H/G, P]
        if mask is None and not missing and _causal_attention_cpu.is_split(keys):
            y = _causal_attention_cpu.split_attention(grouped, keys, values, scale)
        else:
            y = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
        y = y.reshape(*queries.shape[:3], -1)
    elif mask is None and num_queries == num_keys:
        grouped = queries.shape[1] != keys.shape[1]
        y = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=grouped)
    elif mask is None and _causal_attention_cpu.continues(queries, values):
        y = _causal_attention_cpu.continued_attention(queries, keys, values, scale)
    else:
        causal = torch.ones(num_queries, num_keys, dtype=torch.bool, device=queries.device)
        causal = causal.tril(num_keys - num_queries)
        mask = causal if mask is None else mask & causal
        grouped = queries.shape[1] != keys.shape[1]
        y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped)
    y = y[..., :value_dim]
    return y if key_mask is None else y.masked_fill(~query_mask, 0)
