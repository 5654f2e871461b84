"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values made from one narrow row a position."""

import torch
from torch import Tensor, nn

from coterie.modules._init import init_normal
from coterie.modules._padding import without_padding
from coterie.modules.attention import causal_attention
from coterie.modules.attention_cache import AttentionCache
from coterie.modules.norm import RMSNorm
from coterie.modules.rotary import apply_rotary


class LatentAttention(nn.Module):
    """Attention that remembers `kv_rank + rotary_dim` numbers a position, for all its H heads together.

    1. q = a projection of x, through norm(a narrower projection) with `query_rank`, split into H heads of width P; the
       last `rotary_dim` channels of each are turned by the rotary embedding
    2. latent, rotary key = a projection of x, split into `kv_rank` and `rotary_dim` channels; norm(latent), rotary(key)
    3. with a cache: append latent and rotary key to it, and read back all there are so far
    4. k[h], v[h] = a projection of the latent; the rotary key, the same for every head, stands beside k[h]
    5. y[h] = softmax(scale · q[h] · k[h]ᵀ, over positions that are not later and not padding) · v[h]
    6. output projection of the heads side by side

    Over a cache, steps 4 and 5 are done without keys and values where that multiplies less, as it does for one new
    position: k[h] = U[h] · latent is linear, so q[h] · k[h] = (U[h]ᵀ · q[h]) · latent, and v[h] likewise is made after
    the softmax, from its mean of latents. All heads then read the same narrow rows of the cache, and nothing else.

    Args:
        dim: D.
        num_heads: H.
        head_dim: P, the width of a query and a key: their rotary channels and others.
        rotary_dim: the channels that carry the position, even and less than P.
        kv_rank: the latent's width.
        query_rank: the width that queries are compressed to; None: they are not.
        value_dim: V; None: P - rotary_dim, as in DeepSeek's models.
        qkv_bias: on the projections of x to what is compressed: of keys and values, and of queries with `query_rank`.
        output_bias: on the output projection.
        scale: None: P^-0.5.
        rotary_interleaved: the rotary embedding turns pairs of neighbouring channels, as in DeepSeek's checkpoints.
        norm_eps: of the norms of what is compressed.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int,
        rotary_dim: int,
        kv_rank: int,
        query_rank: int | None = None,
        value_dim: int | None = None,
        qkv_bias: bool = False,
        output_bias: bool = False,
        scale: float | None = None,
        rotary_interleaved: bool = False,
        norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 < rotary_dim < head_dim or rotary_dim % 2:
            raise ValueError(f"rotary_dim must be even, positive and less than head_dim = {head_dim}, got {rotary_dim}")
        if value_dim is None:
            value_dim = head_dim - rotary_dim
        sizes = {"num_heads": num_heads, "kv_rank": kv_rank, "query_rank": query_rank, "value_dim": value_dim}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.rotary_dim = rotary_dim
        self.kv_rank = kv_rank
        self.query_rank = query_rank
        self.value_dim = value_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.rotary_interleaved = rotary_interleaved
        place = {"device": device, "dtype": dtype}
        self.q_proj = self.q_a_proj = self.q_norm = self.q_b_proj = None
        if query_rank is None:
            self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=False, **place)
        else:
            self.q_a_proj = nn.Linear(dim, query_rank, bias=qkv_bias, **place)
            self.q_norm = RMSNorm(query_rank, norm_eps, **place)
            self.q_b_proj = nn.Linear(query_rank, num_heads * head_dim, bias=False, **place)
        self.kv_a_proj = nn.Linear(dim, kv_rank + rotary_dim, bias=qkv_bias, **place)
        self.kv_norm = RMSNorm(kv_rank, norm_eps, **place)
        self.kv_b_proj = nn.Linear(kv_rank, num_heads * (head_dim - rotary_dim + value_dim), bias=False, **place)
        self.o_proj = nn.Linear(num_heads * value_dim, dim, bias=output_bias, **place)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, output_std: float | None = None) -> None:
        """Weights normal(0, std), the output projection's normal(0, output_std or std), biases 0, norms 1."""
        for part in self.children():
            if isinstance(part, RMSNorm):
                part.reset_parameters()
                continue
            init_normal(part.weight, output_std if part is self.o_proj and output_std is not None else std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)

    keeps_plain = ("kv_b_proj",)  # by `pack_for_inference`: absorbed, it is no linear layer

    def new_cache(
        self,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> AttentionCache:
        """An empty cache for this layer, on its weights' device and in their dtype unless told otherwise.

        It has one head, whose keys are latent and rotary key side by side, and whose values are the latent in them.
        """
        weight = self.kv_a_proj.weight
        shape = (batch_size, 1, max_length, self.kv_rank + self.rotary_dim)
        return AttentionCache(*shape, value_dim=0, device=device or weight.device, dtype=dtype or weight.dtype)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        *,
        token_mask: Tensor | None = None,
        cache_layer: AttentionCache | None = None,
    ) -> Tensor:
        """[B, L, D] → [B, L, D].

        Args:
            x: [B, L, D].
            rotary: (cos, sin) of the L positions, from `RotaryEmbedding(rotary_dim)`: each [L, rotary_dim/2] or
                [B, L, rotary_dim/2].
            token_mask: [B, L] bool, False = padding, anywhere in a sequence. Nothing attends to padding, whatever it
                contains, NaN included; what a padding position attends to is zero.
            cache_layer: what came before x, to which x's latents are appended. No gradients through it.
        """
        if (got := 2 * rotary[0].shape[-1]) != self.rotary_dim:
            raise ValueError(f"rotary must be of rotary_dim = {self.rotary_dim} channels, got {got}")
        if token_mask is not None:
            x = without_padding(x, token_mask)
        queries = self.q_proj(x) if self.query_rank is None else self.q_b_proj(self.q_norm(self.q_a_proj(x)))
        queries = queries.unflatten(-1, (self.num_heads, self.head_dim))
        plain, turned = queries.split((self.head_dim - self.rotary_dim, self.rotary_dim), dim=-1)
        turned = apply_rotary(turned, rotary, self.rotary_interleaved)  # [B, L, H, rotary_dim]

        latent, key = self.kv_a_proj(x).split((self.kv_rank, self.rotary_dim), dim=-1)
        key = apply_rotary(key.unsqueeze(2), rotary, self.rotary_interleaved).squeeze(2)
        rows, key_mask = torch.cat((self.kv_norm(latent), key), dim=-1).unsqueeze(1), token_mask  # [B, 1, L, ..]
        if cache_layer is not None:
            rows, _, key_mask = cache_layer.append(rows, rows[..., :0], token_mask)
        if cache_layer is not None and self._absorbs(rows.shape[2] - x.shape[1], x.shape[1]):
            y = self._absorbed(plain, turned, rows, key_mask)
        else:
            y = self._expanded(plain, turned, rows.squeeze(1), key_mask)
        return self.o_proj(y.flatten(2))

    def _absorbs(self, before: int, added: int) -> bool:
        """Whether `added` positions after `before` cost fewer products over latents than over keys and values."""
        up = self.kv_b_proj
        if type(up) is not nn.Linear or up._forward_hooks or up._forward_pre_hooks:
            return False  # an adapter, whose product is not with the weight alone
        width = self.head_dim - self.rotary_dim + self.value_dim
        return before * self.kv_rank * width > (before + added) * added * (2 * self.kv_rank - width)

    def _expanded(self, plain: Tensor, turned: Tensor, rows: Tensor, key_mask: Tensor | None) -> Tensor:
        """Queries [B, L, H, ..] over rows [B, S, kv_rank + rotary_dim], by their keys and values → [B, L, H, V]."""
        latent, key = rows.split((self.kv_rank, self.rotary_dim), dim=-1)
        keys, values = (
            self.kv_b_proj(latent)
            .unflatten(-1, (self.num_heads, -1))
            .split((self.head_dim - self.rotary_dim, self.value_dim), dim=-1)
        )  # [B, S, H, ..]
        keys = torch.cat((keys, key.unsqueeze(2).expand(-1, -1, self.num_heads, -1)), dim=-1)
        queries = torch.cat((plain, turned), dim=-1)
        queries, keys, values = (t.transpose(1, 2) for t in (queries, keys, values))
        return causal_attention(queries, keys, values, key_mask, self.scale).transpose(1, 2)

    def _absorbed(self, plain: Tensor, turned: Tensor, rows: Tensor, key_mask: Tensor | None) -> Tensor:
        """The same over rows [B, 1, S, kv_rank + rotary_dim], which are every head's keys, and values within them."""
        up_keys, up_values = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1)).split(
            (self.head_dim - self.rotary_dim, self.value_dim), dim=1
        )  # [H, .., kv_rank]
        queries = torch.cat((torch.einsum("blhp,hpr->bhlr", plain, up_keys), turned.transpose(1, 2)), dim=-1)
        # The whole rows as values: a few products more, but no copy of them.
        means = causal_attention(queries, rows, rows, key_mask, self.scale)[..., : self.kv_rank]
        return torch.einsum("bhlr,hvr->blhv", means, up_values)
