"""Arguments of `sparse_attention` for tests of all its implementations."""

import torch

from coterie.ops import sparse_attention


def make_inputs(
    batch=2, length=37, num_keys=None, heads=4, groups=2, width=8, values=6, *, dtype=torch.float32, by=1.0
):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return (torch.randn(*shape, generator=generator) * by).to(dtype).requires_grad_()

    num_keys = length if num_keys is None else num_keys
    return (
        randn(batch, length, heads, width),
        randn(batch, num_keys, groups, width),
        randn(batch, num_keys, groups, values),
        randn(heads),
    )


def make_ids(batch, length, groups, selected, blocks, seed=1):
    """Some of them repeated, none, or beyond the keys."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, blocks + 1, (batch, length, groups, selected), generator=generator)


def op(q, k, v, sink_logits, settings, impl):
    o, lse = sparse_attention(q, k, v, sink_logits=sink_logits, return_lse=True, impl=impl, **settings)
    return o, lse.masked_fill(lse == -torch.inf, 0)
