"""Arguments of `delta_rule` for tests of all its implementations."""

import torch
import torch.nn.functional as F

from coterie.ops.delta_rule import delta_rule

NAMES = ("q", "k", "v", "g", "erase", "beta", "initial_state")


def make_inputs(
    batch, length, heads, key_heads, key_width, value_width, *, edit="beta", decay="heads", dtype=torch.float32, seed=0
):
    """Arguments in NAMES' order, all requiring gradients: unit keys, β in (0, 2), decays from none to strong."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    def unit(*shape):
        return F.normalize(randn(*shape), dim=-1)

    key = (batch, length, key_heads, key_width)
    value = (batch, length, heads)
    tensors = {
        "q": randn(*key),
        "k": unit(*key),
        "v": randn(*value, value_width),
        "g": {"none": None, "heads": -randn(*value).abs(), "channels": -randn(*value, key_width).abs()}[decay],
        "erase": unit(*value, key_width) if edit == "erase" else None,
        "beta": 2 * torch.rand(*value, generator=generator) if edit == "beta" else None,
    }
    cast = [t if t is None else t.to(dtype).requires_grad_() for t in tensors.values()]
    state = randn(batch, heads, key_width, value_width)
    return [*cast, state.to(torch.promote_types(dtype, torch.float32)).requires_grad_()]


def op(q, k, v, g=None, erase=None, beta=None, initial_state=None, *, impl="torch", chunk_size=16, **settings):
    return delta_rule(
        q, k, v, g, erase=erase, beta=beta, initial_state=initial_state, impl=impl, chunk_size=chunk_size, **settings
    )


EDITS, DECAYS = ("none", "beta", "erase"), ("none", "heads", "channels")
