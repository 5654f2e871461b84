"""Which blocks of keys a query is to see: a key for every block, the best blocks by a score, and how good they were.

Scores are anyone's; `coterie.SparseAttention` has those of MoBA (arXiv:2502.13189), NSA (arXiv:2502.11089) and DSA
(arXiv:2512.02556). The blocks go to `coterie.sparse_attention`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.ops import _sparse_attention_tiles as tiles
from coterie.ops import _sparse_attention_triton
from coterie.ops._arguments import check_tensor, choose_impl
from coterie.ops._autocast import no_autocast


class Selection(NamedTuple):
    """The blocks that the queries of a layer saw; other layers may see the same.

    Attributes:
        block_ids: [B, L, G, S] int64, −1 where there are fewer.
        scores: [B, L, S] of those blocks, with a gradient; −∞ for those that were not chosen by their score. None:
            nothing is to be learned from them.
        mass: [B, L, S] the attention that the blocks got, summed over heads; without a gradient.
    """

    block_ids: Tensor
    scores: Tensor | None = None
    mass: Tensor | None = None


def add_to_blocks(
    blocks: Tensor, x: Tensor, weights: Tensor, positions: int | Tensor, token_mask: Tensor | None = None
) -> None:
    """blocks[p // Q] += weights[p mod Q] · x of every token, p its position: keys that stand for blocks, in place.

    Args:
        blocks: [B, n, G, P], to which nothing was added that is to be seen by a gradient.
        x: [B, L, G, P].
        weights: [Q, G or 1, P or 1]; all 1/Q make means.
        positions: [B, L], or the first one, from which on they are.
        token_mask: [B, L] bool; False = padding, not added.
    """
    size, weights = len(weights), weights.to(blocks.dtype)
    if isinstance(positions, Tensor):
        x = x * weights[positions % size]
        if token_mask is not None:
            x = x.masked_fill(~token_mask[..., None, None], 0)
        row = torch.arange(len(blocks), device=x.device).unsqueeze(-1) * blocks.shape[1]
        rows, index, x = blocks.view(-1, *blocks.shape[2:]), (row + positions // size).flatten(), x.flatten(0, 1)
        if x.is_cuda:  # in a fixed order, which index_add_ has on a CPU alone
            rows.index_put_((index,), x, accumulate=True)
        else:
            rows.index_add_(0, index, x)
        return
    first, shift = positions // size, positions % size
    x = F.pad(x, (0, 0, 0, 0, shift, -(shift + x.shape[1]) % size)).unflatten(1, (-1, size))
    blocks[:, first : first + x.shape[1]] += (x * weights).sum(2)


def select_blocks(
    scores: Tensor,
    positions: int | Tensor,
    num_blocks: int,
    block_size: int,
    *,
    window: int = 0,
    first: int = 0,
    local: int,
) -> Tensor:
    """The best of the blocks that a query has wholly behind it; the lower one of two that are as good.

    Args:
        scores: [B, L, G, n] of blocks 0 .. n-1. A query's own block may be the n-th.
        positions: [B, L] int64, of the queries; or that of the first, from which on they are.
        num_blocks: S.
        block_size: Q.
        window: blocks that lie within the last so many keys are not for choice: a query sees those anyway.
        first: so many blocks are always chosen, as far as they are there.
        local: so many blocks up to the query's own likewise.

    Returns:
        block_ids [B, L, G, S] int64, −1 where a query has fewer.
    """
    check_tensor("scores", scores, (None, None, None, None), "[B, L, G, n]")
    if num_blocks < 1 or first + local > num_blocks:
        raise ValueError(
            f"num_blocks must be at least 1 and first + local = {first + local}, which are always among them, "
            f"got {num_blocks}"
        )
    if scores.shape[1] == 1 and not isinstance(positions, Tensor):
        return _select_for_one(scores, positions, num_blocks, block_size, window, first, local)
    if not isinstance(positions, Tensor):
        positions = torch.arange(positions, positions + scores.shape[1], device=scores.device).unsqueeze(0)
    n = scores.shape[-1] + 1
    at = positions[..., None, None]
    block = torch.arange(n, device=scores.device)
    behind = (block + 1) * block_size <= at + 1
    if window:
        behind = behind & (block * block_size <= at - window)
    own = at // block_size
    always = (block < min(first, n)) & (block <= own) | (block > own - local) & (block <= own)
    if n <= num_blocks:
        ids = torch.where(behind | always, block, -1).expand(*scores.shape[:3], n)
        return F.pad(ids, (0, num_blocks - n), value=-1)
    keys = _sortable(F.pad(scores, (0, 1)))
    keys = torch.where(behind, keys, _NEVER).masked_fill(always, _ALWAYS) + (n - 1 - block)
    best = keys.topk(num_blocks, -1).values
    return torch.where(best < _NEVER + n, -1, n - 1 - (best & 0xFFFFFFFF))


# Before the keys of all scores, and behind them.
_NEVER, _ALWAYS = -(2**31) << 32, (2**31 - 1) << 32


def _sortable(scores: Tensor) -> Tensor:
    """int64 that order as the scores do, with room for 32 bits: those that are equal order by what is put there.

    So the same blocks are chosen on every device, and for one query as for many.
    """
    bits = (scores.detach().float() + 0.0).view(torch.int32)  # −0 is 0
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 32


def _select_for_one(
    scores: Tensor, position: int, num_blocks: int, block_size: int, window: int, first: int, local: int
) -> Tensor:
    """The same of a single query at a known position, in fewer operations: decoding."""
    own, stop = position // block_size, (position + 1) // block_size
    if window:
        stop = min(stop, (position - window) // block_size + 1)
    start, stop = min(first, own + 1), min(stop, own - local + 1)
    near = torch.arange(max(own - local + 1, start), own + 1, device=scores.device)
    n, wanted = max(stop - start, 0), num_blocks - start - len(near)
    block = torch.arange(start, start + n, device=scores.device)
    if n > wanted:
        best = (_sortable(scores[..., start:stop]) - block).topk(wanted, -1).values
        chosen = -best & 0xFFFFFFFF
    else:
        chosen = block.expand(*scores.shape[:3], n)
    first_ones = torch.arange(start, device=scores.device)
    ids = torch.cat([t.expand(*scores.shape[:3], -1) for t in (first_ones, near, chosen)], -1)
    return F.pad(ids, (0, num_blocks - ids.shape[-1]), value=-1)


def selected_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block_ids: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    token_mask: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """How much of its attention a query gives to each block: Σ exp(scale · q · k − log Z) over its keys and a group.

    Work grows with what is selected. Not differentiable.

    Args:
        q: [B, L, H, P]; the last query stands at the last key.
        k: [B, Lk, G, P].
        lse: log Z [B, L, H], of `sparse_attention`.
        block_ids: [B, L, G, S] int64; what is repeated or not there gets nothing.
        block_size: Q.
        scale: None: P^-0.5.
        token_mask: [B, Lk] bool; False is padding.
        impl: "torch" | "triton", as `sparse_attention`'s; None: triton on a GPU, else torch.

    Returns:
        [B, L, G, S] float32 (float64 for float64).
    """
    impl = choose_impl(impl, q, ("torch", "triton"))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    op = _sparse_attention_triton.selected_mass if impl == "triton" else _mass_op
    with torch.no_grad():
        return op(q, k, lse, block_ids, token_mask, min(block_size, max(k.shape[1], 1)), scale)


@torch.library.custom_op("coterie::selected_mass", mutates_args=())
def _mass_op(
    q: Tensor, k: Tensor, lse: Tensor, block_ids: Tensor, token_mask: Tensor | None, block_size: int, scale: float
) -> Tensor:
    seen = tiles.Seen(0, 0, block_size, True, scale, None)
    with no_autocast(q.device.type):
        if token_mask is None:
            return tiles.selected_mass(q, k, lse, block_ids, seen)
        mass = lse.new_zeros(block_ids.shape)
        for row, is_token in enumerate(token_mask):
            queries = is_token[k.shape[1] - q.shape[1] :]
            own = (
                t[row : row + 1, at] for t, at in ((q, queries), (k, is_token), (lse, queries), (block_ids, queries))
            )
            mass[row, queries] = tiles.selected_mass(*own, seen)[0]
        return mass


@_mass_op.register_fake
def _(q, k, lse, block_ids, *settings):
    return lse.new_empty(block_ids.shape)


def indexer_loss(selection: Selection, token_mask: Tensor | None = None) -> Tensor:
    """KL(attention that the chosen blocks got ‖ softmax of their scores), the mean over queries that had a choice.

    Its gradient goes to the scores alone; it is what trains DSA's indexer. With as many blocks as there are, that is
    its warm-up, the divergence from full attention.

    Args:
        selection: of a layer that scores with an indexer, in training.
        token_mask: [B, L] bool; False = padding, not counted.
    """
    if selection.scores is None:
        raise ValueError("selection must have scores: only an indexer's, from a forward in training mode, has")
    chosen = selection.scores > -torch.inf
    if token_mask is not None:
        chosen = chosen & token_mask.unsqueeze(-1)
    mass = selection.mass.masked_fill(~chosen, 0)
    wanted = mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
    # Finite everywhere: of queries without a choice no NaN in a gradient.
    scores = selection.scores.masked_fill(~chosen, torch.finfo(selection.scores.dtype).min / 2)
    had = chosen.any(-1)
    loss = torch.xlogy(wanted, wanted) - wanted * scores.log_softmax(-1)
    return loss.sum(-1).masked_fill(~had, 0).sum() / had.sum().clamp(min=1)
