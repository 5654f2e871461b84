"""Attention to the last few keys and to blocks of keys chosen for every query, by one of several scorers."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coterie.modules._init import init_normal
from coterie.modules._padding import without_padding
from coterie.modules.attention import Attention
from coterie.modules.attention_cache import BlockCache, WindowCache
from coterie.modules.norm import RMSNorm
from coterie.modules.rotary import apply_rotary
from coterie.ops import Selection, add_to_blocks, select_blocks, selected_mass, sparse_attention
from coterie.ops._autocast import no_autocast

SCORERS = ("window", "moba", "nsa", "indexer")
COMPRESSIONS = ("mean", "learned")
# Of queries and blocks at a time: on a CPU they stay in its cache, elsewhere they do not fill the memory.
_SCORES, _SCORES_ELSEWHERE = 2**19, 2**25


class SparseAttention(Attention):
    """Every position attends to the window of its last keys, and to the best blocks of those before it.

    | scorer | score of a block for a query and a head of keys | what is attended to | source |
    |---|---|---|---|
    | "window" | none | the window and the first `sinks` keys | StreamingLLM, arXiv:2309.17453 |
    | "moba" | Σ over the group's queries of q · mean of the block's keys | window, sinks, blocks | arXiv:2502.13189 |
    | "nsa" | Σ over the group's queries of softmax(q · compressed keys) | three gated branches: compressed keys and \
values of all blocks, blocks, window | arXiv:2502.11089 |
    | "indexer" | Σ_j w_j ReLU(q'_j · mean of the block's k'), small projections | window, sinks, blocks | DSA, \
arXiv:2512.02556 |
    | None | none: the blocks are given to `forward` | window, sinks, blocks | |

    Only blocks that lie wholly before a query are scored; without a window its own block is always among the chosen. So
    are, with "nsa", the first block and the one before its own. A gradient goes through the keys that are attended to
    and, with "nsa", the compressed ones; the indexer learns from `coterie.ops.indexer_loss` of the selection alone, its
    input is detached. Decoding reads the window, the chosen blocks, and one key for every block before.

    As MoBA chooses head by head, it is MoBA's own where num_kv_heads = num_heads, window = 0. As fla's NSA, the
    branches share their keys and values, and blocks are compressed without overlap; "learned" compression is a weight
    of every channel of every place in a block, at first 1/Q: the mean.

    Args:
        dim, num_heads: D, H.
        scorer: of the table.
        window: W, the last keys that a query sees, its own included; 0: none.
        sinks: how many of the first keys it sees besides; of "nsa" none.
        block_size: Q.
        num_blocks: S, the blocks of a query, those included that are always chosen.
        compression: of "nsa", "mean" or "learned".
        indexer_heads, indexer_dim: of the indexer's queries; None: 4 heads, of P.
        others: as `Attention` has them: num_kv_heads, head_dim, qk_norm, qkv_bias, output_bias, output_gate,
            sink_logits (not with "nsa"), scale, rotary_interleaved, norm_eps, norm_zero_centered, device, dtype.

    Raises:
        ValueError: a setting is out of range, or not the scorer's.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        scorer: str | None = "moba",
        window: int = 512,
        sinks: int = 0,
        block_size: int = 64,
        num_blocks: int = 16,
        compression: str = "mean",
        indexer_heads: int | None = None,
        indexer_dim: int | None = None,
        **others,
    ) -> None:
        if scorer not in (None, *SCORERS):
            raise ValueError(f"scorer must be None or one of {', '.join(map(repr, SCORERS))}, got {scorer!r}")
        if compression not in COMPRESSIONS or (compression == "learned" and scorer != "nsa"):
            raise ValueError(
                f"compression must be one of {', '.join(map(repr, COMPRESSIONS))}, and 'mean' but for 'nsa', "
                f"got {compression!r} for {scorer!r}"
            )
        for name, value in (("indexer_heads", indexer_heads), ("indexer_dim", indexer_dim)):
            if value is not None and (value < 1 or scorer != "indexer"):
                raise ValueError(f"{name} must be at least 1, and None but for 'indexer', got {value} for {scorer!r}")
        least = {"nsa": 3, "window": 0}.get(scorer, 1)
        for name, value, minimum in (
            ("window", window, 1 if scorer in ("nsa", "window") else 0),
            ("sinks", sinks, 0),
            ("block_size", block_size, 1),
            ("num_blocks", num_blocks, least),
        ):
            if value < minimum:
                raise ValueError(f"{name} must be at least {minimum} for {scorer!r}, got {value}")
        if scorer == "nsa" and (sinks or others.get("sink_logits")):
            raise ValueError("sinks and sink_logits are not of 'nsa', which always sees the first block")
        self.scorer = scorer  # before what resets parameters
        self.sinks, self.block_size, self.num_blocks = sinks, block_size, num_blocks
        super().__init__(dim, num_heads, window=window or None, **others)
        self.window = window
        place = {name: others.get(name) for name in ("device", "dtype")}
        self.branch_proj = nn.Linear(dim, 3 * num_heads, bias=False, **place) if scorer == "nsa" else None
        self.compress_weight = None
        if compression == "learned":
            self.compress_weight = nn.Parameter(torch.empty(2, block_size, self.num_kv_heads, self.head_dim, **place))
        self.indexer = None
        if scorer == "indexer":
            self.indexer = Indexer(dim, indexer_heads or 4, indexer_dim or self.head_dim, **place)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, output_std: float | None = None) -> None:
        """As `Attention`'s; the branches' gates and the indexer normal(0, std), compression the mean."""
        super().reset_parameters(std, output_std)
        if getattr(self, "branch_proj", None) is not None:
            init_normal(self.branch_proj.weight, std)
        if getattr(self, "compress_weight", None) is not None:
            nn.init.constant_(self.compress_weight, 1 / self.block_size)
        if getattr(self, "indexer", None) is not None:
            self.indexer.reset_parameters(std)

    def new_cache(
        self,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> BlockCache | WindowCache:
        """An empty cache for this layer, on its weights' device and in their dtype unless told otherwise."""
        weight = self.k_proj.weight
        place = {"device": device or weight.device, "dtype": dtype or weight.dtype}
        if self.scorer == "window" and self.window + self.sinks <= max_length:
            return WindowCache(batch_size, self.num_kv_heads, self.window, self.head_dim, sinks=self.sinks, **place)
        sizes = batch_size, self.num_kv_heads, max_length, self.head_dim
        return BlockCache(*sizes, block_size=self.block_size, blocks=self.block_shapes, **place)

    @property
    def block_shapes(self) -> list[tuple[int, int]]:
        """(heads, width) of each thing that stands for a block of keys in a cache."""
        if self.indexer is not None:
            return [(1, self.indexer.head_dim)]
        keys = (self.num_kv_heads, self.head_dim)
        return {"moba": [keys], "nsa": [keys, keys]}.get(self.scorer, [])

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        *,
        token_mask: Tensor | None = None,
        cache_layer: BlockCache | WindowCache | None = None,
        block_ids: Tensor | None = None,
        return_selection: bool = False,
    ) -> Tensor | tuple[Tensor, Selection | None]:
        """[B, L, D] → [B, L, D].

        Args:
            x: [B, L, D].
            rotary: (cos, sin) of the L positions, from `RotaryEmbedding`: each [L, P/2] or [B, L, P/2]; None: positions
                do not turn.
            token_mask: [B, L] bool, False = padding, anywhere in a sequence; neither window nor blocks count it.
            cache_layer: what came before x, to which x is appended. No gradients through it.
            block_ids: [B, L, G, S] int64 of the blocks to see, for the scorer None, and only for it.
            return_selection: whether the blocks are wanted, for other layers and for `coterie.ops.indexer_loss`.

        Returns:
            y, or with return_selection (y, the selection; None for the scorer "window").
        """
        if (block_ids is None) != (self.scorer is not None):
            raise ValueError(f"block_ids must be given for the scorer None and no other, got {self.scorer!r}")
        if token_mask is not None:
            x = without_padding(x, token_mask)
        queries, keys, values, gate = self._heads(x, rotary)
        new = [t.transpose(1, 2) for t in (keys, values)]
        added, mask, place = x.shape[1], token_mask, 0
        if cache_layer is not None and self.block_shapes:
            place = cache_layer.positions(added, token_mask)
        elif token_mask is not None:
            place = (token_mask.cumsum(-1) - 1).clamp(min=0)
        if cache_layer is not None:
            keys, values, mask = cache_layer.append(keys, values, token_mask)
        q, k, v = (t.transpose(1, 2) for t in (queries, keys, values))
        seen = {"window": self.window, "sinks": self.sinks, "sink_logits": self.sink_logits}
        seen |= {"block_size": self.block_size, "scale": self.scale, "token_mask": mask}
        if self.scorer in (None, "window"):
            selection = None if block_ids is None else Selection(block_ids)
            y = sparse_attention(q, k, v, block_ids=block_ids, **seen)
        else:
            index = None
            if self.indexer is not None:
                index = self.indexer(x.detach(), rotary, self.rotary_interleaved)
                new = [index[1]]
            blocks = cache_layer.blocks if cache_layer is not None else None
            with no_autocast(x.device.type):
                selection, y, index_scores = self._select(q, new, index, blocks, place, token_mask, k.shape[1])
            seen["block_ids"] = selection.block_ids
            if self.scorer == "nsa":
                y = self._branches(x, q, k, v, y, seen)
            elif index_scores is None:
                y = sparse_attention(q, k, v, **seen)
            else:
                y, lse = sparse_attention(q, k, v, return_lse=True, **seen)
                mass = selected_mass(
                    q, k, lse, selection.block_ids, block_size=self.block_size, scale=self.scale, token_mask=mask
                )
                selection = selection._replace(scores=index_scores, mass=mass.sum(2))
        y = self._output(y, gate)
        return (y, selection) if return_selection else y

    def _select(
        self,
        q: Tensor,
        new: list[Tensor],
        index: tuple[Tensor, Tensor, Tensor] | None,
        blocks: tuple[Tensor, ...] | None,
        place: int | Tensor,
        token_mask: Tensor | None,
        num_keys: int,
    ) -> tuple[Selection, Tensor | None, Tensor | None]:
        """The blocks, what the compressed keys and values gave, and the indexer's scores of the blocks in training.

        new: keys and values [B, L, G, P], or the indexer's keys. index: what the indexer gave. blocks: the cache's.
        place: positions of the queries, or the first.
        """
        new = new[: 2 if self.scorer == "nsa" else 1]
        learns = torch.is_grad_enabled() and (self.scorer == "nsa" or (index is not None and self.training))
        with torch.set_grad_enabled(learns):
            wide = torch.promote_types(q.dtype, torch.float32)
            if blocks is None:
                count = -(-num_keys // self.block_size)
                blocks = tuple(t.new_zeros(len(q), count, *t.shape[2:], dtype=wide) for t in new)
            elif learns and any(t.requires_grad for t in (*new, *self.parameters())):
                raise ValueError("a cache carries no gradients: call under torch.no_grad()")
            weights = self.compress_weight
            if weights is None:
                weights = q.new_full((len(new), self.block_size, 1, 1), 1 / self.block_size, dtype=wide)
            for block, t, weight in zip(blocks, new, weights, strict=True):
                add_to_blocks(block, t, weight, place, token_mask)
            heads = {"moba": self.num_kv_heads, "nsa": self.num_heads}.get(self.scorer) or self.indexer.num_heads
            choose = partial(self._choose, q, blocks, index, place)
            on_cpu = q.device.type == "cpu" and not torch.compiler.is_compiling()  # which would unroll the chunks
            most = (_SCORES if on_cpu else _SCORES_ELSEWHERE) // (len(q) * heads)
            ids, o, found = self._by_chunks(choose, most, q.shape[1], place, num_keys // self.block_size)
        if o is not None and token_mask is not None:
            o = o.masked_fill(~token_mask[..., None, None], 0)
        return Selection(ids), o, found

    def _choose(
        self,
        q: Tensor,
        blocks: tuple[Tensor, ...],
        index: tuple[Tensor, ...] | None,
        place: int | Tensor,
        rows: slice,
        count: int,
    ) -> tuple[Tensor | None, ...]:
        """`_select` of some queries, which have no more than so many complete blocks behind them."""
        at = place[:, rows] if isinstance(place, Tensor) else place + rows.start
        q, blocks, nsa, o, found = q[:, rows].to(blocks[0].dtype), [t[:, :count] for t in blocks], False, None, None
        behind = partial(_blocks_behind, at, q.shape[1], block_size=self.block_size, device=q.device)
        if self.scorer == "moba":
            scores = torch.einsum("blgp,bngp->blgn", q.unflatten(2, (self.num_kv_heads, -1)).sum(3), *blocks)
        elif self.scorer == "nsa":
            nsa = True
            o, scores = attend_to_blocks(q, *blocks, behind(count), self.scale)
        else:
            scores = self.indexer.scores(index[0][:, rows], *blocks, index[2][:, rows])
        ids = select_blocks(
            scores,
            at,
            self.num_blocks,
            self.block_size,
            window=0 if nsa else self.window,
            first=1 if nsa else 0,
            local=2 if nsa else int(self.window < self.block_size),
        )
        if torch.is_grad_enabled() and not nsa:
            found = _scores_of(scores, ids, behind(count + 1))
        return ids.expand(-1, -1, self.num_kv_heads, -1), o, found

    def _by_chunks(
        self,
        step: Callable[[slice, int], tuple[Tensor | None, ...]],
        most: int,
        length: int,
        place: int | Tensor,
        blocks: int,
    ) -> list[Tensor | None]:
        """`step` of so many queries at a time that they have no more scores of blocks than `most`, with the number of
        blocks that may be complete before the last."""
        size = max(most // max(blocks, 1), 1)
        parts = []
        for start in range(0, max(length, 1), size):
            rows, count = slice(start, min(start + size, length)), blocks
            if not isinstance(place, Tensor):
                count = (place + rows.stop) // self.block_size
            if torch.is_grad_enabled() and size < length:  # its scores are not kept
                parts.append(checkpoint(step, rows, count, use_reentrant=False))
            else:
                parts.append(step(rows, count))
        return [None if part[0] is None else torch.cat(part, 1) for part in zip(*parts, strict=True)]

    def _branches(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, compressed: Tensor, seen: dict) -> Tensor:
        """NSA's three, [B, L, H, P], gated and added."""
        chosen = sparse_attention(q, k, v, **(seen | {"window": 0}))
        near = sparse_attention(q, k, v, **(seen | {"block_ids": None}))
        gates = self.branch_proj(x).sigmoid().unflatten(-1, (3, -1, 1)).unbind(2)
        return sum(gate * branch.to(gate.dtype) for gate, branch in zip(gates, (compressed, chosen, near), strict=True))

    def extra_repr(self) -> str:
        return f"scorer={self.scorer!r}, window={self.window}, {self.num_blocks} blocks of {self.block_size}"


class Indexer(nn.Module):
    """DSA's lightning indexer, of blocks: small queries of several heads, and one key for all of them.

    Args:
        dim: D.
        num_heads: J.
        head_dim: their width, R.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int, **place) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=False, **place)
        self.k_proj = nn.Linear(dim, head_dim, bias=False, **place)
        self.k_norm = RMSNorm(head_dim, **place)
        self.weight_proj = nn.Linear(dim, num_heads, bias=False, **place)

    def reset_parameters(self, std: float = 0.02) -> None:
        """Weights normal(0, std), the norm 1."""
        for linear in (self.q_proj, self.k_proj, self.weight_proj):
            init_normal(linear.weight, std)
        self.k_norm.reset_parameters()

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, interleaved: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, D] → queries [B, L, J, R], keys [B, L, 1, R] and weights [B, L, J]."""
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_norm(self.k_proj(x)).unsqueeze(2)
        if rotary is not None:
            width = 2 * rotary[0].shape[-1]
            if width > self.head_dim:
                raise ValueError(f"indexer_dim must be at least the {width} channels that turn, got {self.head_dim}")
            q, k = (apply_rotary(t, rotary, interleaved) for t in (q, k))
        return q, k, self.weight_proj(x)

    def scores(self, q: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
        """Of queries [B, L, J, R] for the keys of blocks [B, n, 1, R]: [B, L, 1, n]."""
        scale = (self.num_heads * self.head_dim) ** -0.5
        products = torch.einsum("bljr,bnr->bljn", q.to(keys.dtype), keys.squeeze(2)).relu()
        return torch.einsum("bljn,blj->bln", products, weights.to(keys.dtype) * scale).unsqueeze(2)


def attend_to_blocks(
    q: Tensor, keys: Tensor, values: Tensor, behind: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention to one key and value for every block: what it gives, and how much of it every block got.

    Args:
        q: [B, L, H, P].
        keys, values: [B, n, G, P].
        behind: [B or 1, L, n] bool, which blocks are seen.
        scale: None: P^-0.5.

    Returns:
        o [B, L, H, P], 0 where nothing is seen; weights [B, L, G, n], summed over the heads of a group, detached.
    """
    grouped = q.unflatten(2, (keys.shape[2], -1))
    scores = torch.einsum("blgrp,bngp->blgrn", grouped, keys) * (q.shape[-1] ** -0.5 if scale is None else scale)
    hidden = ~behind[:, :, None, None]
    weights = scores.masked_fill(hidden, torch.finfo(q.dtype).min / 2).softmax(-1).masked_fill(hidden, 0)
    return torch.einsum("blgrn,bngp->blgrp", weights, values).flatten(2, 3), weights.detach().sum(3)


def _blocks_behind(positions: int | Tensor, length: int, count: int, block_size: int, device: torch.device) -> Tensor:
    """[B or 1, L, n] bool: whether a block lies wholly before a query, or ends with it."""
    if not isinstance(positions, Tensor):
        positions = torch.arange(positions, positions + length, device=device).unsqueeze(0)
    return (torch.arange(count, device=device) + 1) * block_size <= positions.unsqueeze(-1) + 1


def _scores_of(scores: Tensor, ids: Tensor, behind: Tensor) -> Tensor:
    """scores [B, L, 1, n] of the blocks ids [B, L, 1, S]: [B, L, S], −∞ where they are not behind [B or 1, L, n+1]."""
    scores, ids = F.pad(scores, (0, 1)).squeeze(2), ids.squeeze(2)
    scores = scores.masked_fill(~behind, -torch.inf)
    return scores.gather(2, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
