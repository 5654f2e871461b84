"""Causal attention on a CPU that multiplies bfloat16 by AVX-512: torch's own takes about twice as long there.

A block of queries at a time against all the keys it may see, as batched products that oneDNN is fast at, of so many
heads that the scores stay in cache. Scores are rounded to bfloat16 after the row's largest is taken off, inside the
product, so that those which count are near zero and exact; weights are formed again in backward. So what is kept is
O(L), and the work half the square.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from coterie.ops._products import multiplies_natively

_QUERIES = 128  # positions of a block
_SCORES = 2**20  # numbers of a block of scores: 2 MB
_LARGE = 2**13
_SPLIT = 2**14  # so many keys are read by all threads
_KEYS = 1024  # more than these, and torch's own, which walks through keys as well, is as fast


def is_faster(queries: Tensor, keys: Tensor) -> bool:
    """Whether this beats torch's `scaled_dot_product_attention`, which with AMX has fast products too."""
    return (
        queries.device.type == "cpu"
        and queries.dtype == torch.bfloat16
        and keys.shape[2] <= _KEYS
        and multiplies_natively(torch.bfloat16)
        and torch.cpu._is_avx512_bf16_supported()
        and not torch.cpu._is_amx_tile_supported()
    )


def causal_attention(
    queries: Tensor, keys: Tensor, values: Tensor, key_mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """[B, H, L, P], [B, G, S, P], [B, G, S, V] → [B, H, L, V]; the last query stands at the last key.

    Args:
        queries, keys, values: bfloat16; S ≥ L, G divides H.
        key_mask: [B, S] bool, False: seen by no token. A query that stands there sees what is before it, padding too.
        scale: None: P^-0.5.
    """
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    return _forward_op(queries, keys, values, key_mask, scale)[0]


def is_split(keys: Tensor) -> bool:
    """Whether `split_attention` reads so many keys faster than torch, which gives them all to one thread."""
    alone = keys.shape[0] * keys.shape[1] == 1 and keys.device.type == "cpu" and not torch.is_grad_enabled()
    return alone and keys.shape[2] >= _SPLIT and torch.get_num_threads() > 1


def split_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
    """[1, 1, R, P] queries that see all keys [1, 1, S, P] and values: a part of the keys for each thread."""
    threads, count = torch.get_num_threads(), keys.shape[2]
    size = count // threads
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    parts = [[t[0, :, : threads * size].unflatten(1, (threads, size)) for t in (keys, values)]]
    if threads * size < count:
        parts.append([t[:, :, threads * size :] for t in (keys, values)])
    found = [flash(queries.expand(-1, own[0].shape[1], -1, -1), *own, scale=scale) for own in parts]
    o, lse = (torch.cat(each, 1) for each in zip(*found, strict=True))  # [1, parts, R, P], [1, parts, R]
    shares = lse.softmax(1).unsqueeze(-1)
    return (o * shares).sum(1, keepdim=True).to(queries.dtype)


def continues(queries: Tensor, values: Tensor) -> bool:
    """Whether `continued_attention` can take these, behind which more keys than queries stand."""
    narrow = values.shape[3] <= queries.shape[3]
    return queries.device.type == "cpu" and not torch.is_grad_enabled() and queries.numel() > 0 and narrow


def continued_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
    """The same where many keys come before the first query, without gradients: those, and the queries' own, apart.

    torch would make a mask of L × S for both together; that takes twice as long.
    """
    length, groups, before = queries.shape[2], keys.shape[1], keys.shape[2] - queries.shape[2]
    repeats = queries.shape[1] // groups
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which takes channels to be side by side
    queries, keys, values = (t if t.stride(3) == 1 else t.contiguous() for t in (queries, keys, values))
    all_see = [t[:, :, :before] for t in (keys, values)]
    far, far_lse = flash(queries.unflatten(1, (groups, repeats)).flatten(2, 3), *all_see, scale=scale)
    own = [t[:, :, before:].repeat_interleave(repeats, 1) for t in (keys, values)]
    near, near_lse = flash(queries, *own, is_causal=True, scale=scale)
    far, far_lse = (t.unflatten(2, (repeats, length)).flatten(1, 2) for t in (far, far_lse))
    share = (far_lse - near_lse).sigmoid().unsqueeze(-1)
    return near.to(share.dtype).lerp(far.to(share.dtype), share).to(near.dtype)


@torch.library.custom_op("coterie::causal_attention_cpu", mutates_args=())
def _forward_op(
    queries: Tensor, keys: Tensor, values: Tensor, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y and, for backward, minus the rows' largest scores and 1 / Σ exp(score - largest): both [B·G, H/G, L, 1]."""
    y = queries.new_empty(*queries.shape[:3], values.shape[-1])
    rows = _grouped(y, keys)
    lowered = queries.new_empty(*rows.shape[:3], 1)
    inverse = torch.empty_like(lowered, dtype=torch.float32)
    for block in _blocks(queries, keys, values, key_mask, scale):
        block.put(lowered, block.scores().amax(-1, keepdim=True).neg_())
        weights = block.weights(lowered)
        one_over_sum = weights.sum(-1, keepdim=True, dtype=torch.float32).reciprocal_()
        block.put(inverse, one_over_sum)
        block.put(rows, torch.bmm(weights, block.values).mul_(one_over_sum))
    return y, lowered, inverse


@_forward_op.register_fake
def _(queries, keys, values, key_mask, scale):
    batch, heads, length, _ = queries.shape
    groups = keys.shape[1]
    lowered = queries.new_empty(batch * groups, heads // groups, length, 1)
    return queries.new_empty(batch, heads, length, values.shape[-1]), lowered, lowered.float()


@torch.library.custom_op("coterie::causal_attention_cpu_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    key_mask: Tensor | None,
    lowered: Tensor,
    inverse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad = _grouped(grad, keys)  # [B·G, H/G, L, V]
    grad_queries = torch.empty_like(queries, memory_format=torch.contiguous_format)
    grad_rows = _grouped(grad_queries, keys)
    # A key's gradient is a sum over blocks of queries.
    grad_keys, grad_values = (torch.zeros(t.shape, dtype=torch.float32).flatten(0, 1) for t in (keys, values))
    for block in _blocks(queries, keys, values, key_mask, scale):
        weights, block_grad = block.weights(lowered).mul_(block.take(inverse)), block.take(grad)
        grad_weights = torch.bmm(block_grad, block.values.mT)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        block.put(grad_rows, torch.bmm(grad_scores, block.keys).mul_(scale))
        grad_keys[block.heads, : block.seen] += torch.bmm(grad_scores.mT, block.queries)
        grad_values[block.heads, : block.seen] += torch.bmm(weights.mT, block_grad)
    grad_keys = grad_keys.mul_(scale).to(keys.dtype)
    return grad_queries, grad_keys.view(keys.shape), grad_values.to(values.dtype).view(values.shape)


@_backward_op.register_fake
def _(grad, queries, keys, values, key_mask, lowered, inverse, scale):
    return tuple(t.new_empty(t.shape) for t in (queries, keys, values))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx, grad, *_):
    return *_backward_op(grad, *ctx.saved_tensors, ctx.scale), None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _grouped(x: Tensor, keys: Tensor) -> Tensor:
    """[B, H, L, ..] → [B·G, H/G, L, ..]: a view, if x is contiguous."""
    batch, groups = keys.shape[:2]
    return x.reshape(batch * groups, x.shape[1] // groups, *x.shape[2:])


def _blocks(queries: Tensor, keys: Tensor, values: Tensor, key_mask: Tensor | None, scale: float) -> Iterator["_Block"]:
    queries, groups = _grouped(queries, keys), keys.shape[1]
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    _, shared, length, _ = queries.shape
    size, offset = min(_QUERIES, length), keys.shape[1] - length
    # Added, for filling by a mask is not vectorized.
    later = torch.full((size, size), -torch.inf, dtype=queries.dtype).triu_(1)
    heads = max(1, _SCORES // (shared * size * keys.shape[1]))
    for first in range(0, len(keys), heads):
        which = slice(first, min(first + heads, len(keys)))
        for start in range(0, length, size):
            end = min(start + size, length)
            hidden = None
            if key_mask is not None:
                batch = torch.arange(which.start, which.stop) // groups
                here = key_mask[batch, offset + start : offset + end, None]
                hidden = (~key_mask[batch, None, : offset + end] & here).unsqueeze(1)  # [g, 1, n, seen]
            yield _Block(
                queries[which, :, start:end].flatten(1, 2),
                keys[which, : offset + end],
                values[which, : offset + end],
                later[: end - start, : end - start],
                hidden,
                scale,
                which,
                slice(start, end),
            )


class _Block:
    """n positions' queries of all heads of g groups, as rows of one matrix for each group, and the keys they see."""

    def __init__(self, queries, keys, values, later, hidden, scale, heads, positions) -> None:
        self.queries, self.keys, self.values = queries, keys, values  # [g, H/G · n, P], [g, seen, P], [g, seen, V]
        self.later, self.hidden, self.scale = later, hidden, scale
        self.heads, self.positions = heads, positions
        self.seen = keys.shape[1]

    def take(self, x: Tensor) -> Tensor:
        """[B·G, H/G, L, ..] → this block's [g, H/G · n, ..]."""
        return x[self.heads, :, self.positions].flatten(1, 2)

    def put(self, x: Tensor, rows: Tensor) -> None:
        """Writes `rows` [g, H/G · n, ..] where `take` reads."""
        x[self.heads, :, self.positions] = rows.unflatten(1, (-1, len(self.later)))

    def scores(self, lowered: Tensor | None = None) -> Tensor:
        """[g, H/G · n, seen]: scale · q · kᵀ (+ lowered), -inf where a query may not look."""
        if lowered is None:
            scores = torch.bmm(self.queries, self.keys.mT).mul_(self.scale)
        else:
            scores = torch.baddbmm(self.take(lowered), self.queries, self.keys.mT, alpha=self.scale)
        by_head = scores.unflatten(1, (-1, len(self.later)))
        by_head[..., self.seen - len(self.later) :] += self.later
        if self.hidden is not None:
            by_head.masked_fill_(self.hidden, -torch.inf)
        return scores

    def weights(self, lowered: Tensor) -> Tensor:
        """[g, H/G · n, seen]: what each query takes of each value, times its row's sum."""
        scores = self.scores(lowered)
        # So large, a rounded largest is off by more than exp can bear.
        if lowered[self.heads, :, self.positions].abs().max() > _LARGE:
            scores -= scores.amax(-1, keepdim=True)
        return scores.exp_()
