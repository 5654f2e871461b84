"""A matrix state, edited once per token: every linear attention is one rule with other arguments.

S_t = D_t S_{t−1} + k_t (z_t − e_tᵀ D_t S_{t−1})ᵀ,  o_t = scale · S_tᵀ q_t,  D_t = diag(exp g_t).

The state S [P, V] maps keys to values. What it holds at e_t is read, and the difference to z_t is written at k_t. With
e = βk and z = βv this is the gated delta rule (Yang 2024, arXiv:2412.06464), KDA with one decay per channel
(arXiv:2510.26692), DeltaNet without decay (arXiv:2406.06484); with e = 0 nothing is erased: linear attention, RetNet,
GLA, Mamba-2. `coterie.ops.linear_attention` has them by name.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from coterie.ops import _delta_rule_chunks as chunks
from coterie.ops import _delta_rule_triton
from coterie.ops._arguments import check_tensor, choose_impl
from coterie.ops._delta_rule_chunks import Inputs

# Sequences up to this long go token by token: a chunk would be mostly padding.
_FEW_TOKENS = 4


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    erase: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_mask: Tensor | None = None,
    chunk_size: int = 64,
    return_state: bool = True,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Every token's output, and the state after the last one.

    Args:
        q: [B, L, H', P]. H' may divide H: head h of q and k serves heads h·H/H' and on of v.
        k: [B, L, H', P].
        v: [B, L, H, V], what is written.
        g: log decay, at most 0: [B, L, H], or [B, L, H, P] for one per channel. None: nothing decays.
        erase: [B, L, H' or H, P], where the state is read before it is written. With neither erase nor beta nothing is
            erased.
        beta: [B, L, H]: erase is then beta · k, and beta · v is written.
        scale: of q; None is P^-0.5.
        initial_state: [B, H, P, V], packed: one per sequence; None: zeros.
        cu_seqlens: [number of sequences + 1] int64, the bounds of sequences packed into L; B must be 1. An accelerator
            is waited for, for them.
        token_mask: [B, L] bool; False is padding, whatever it contains: it changes no state, and its output is 0.
        chunk_size: how many tokens impl="torch" takes at once, 16 · a power of two.
        return_state: whether the state is wanted.
        impl: "reference" (token by token, any dtype, twice differentiable) | "torch" (chunk by chunk) | "triton" (the
            same in kernels, float16, bfloat16 and float32, P up to 256). None: triton on a GPU, else torch.

    Returns:
        o [B, L, H, V] in v's dtype, and the state [B, H, P, V] (packed: one per sequence) in float32, float64 for
        float64; or None. Sums run in that dtype. Gradients to every tensor, the initial state included.

    Raises:
        ValueError: a shape or a setting is wrong; on a CPU also a decay above 0.
        TypeError: a dtype is.
    """
    check_tensor("q", q, (None, None, None, None), "[B, L, H', P]")
    impl = choose_impl(impl, q)
    _check(q, k, v, g, erase, beta, initial_state, cu_seqlens, token_mask, chunk_size)
    batch, length, _, key_width = q.shape
    heads, value_width = v.shape[2:]
    if token_mask is not None:
        q, k, v, g, erase, beta = (t if t is None else _masked(t, token_mask) for t in (q, k, v, g, erase, beta))
    bounds = _bounds(batch, length, cu_seqlens)
    if initial_state is None:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        initial_state = q.new_zeros(len(bounds), heads, key_width, value_width, dtype=dtype)
    elif initial_state.dtype != torch.float64:
        initial_state = initial_state.float()
    scale = key_width**-0.5 if scale is None else float(scale)
    flat = Inputs(*(t if t is None else t.flatten(0, 1) for t in (q, k, v, g, erase, beta)))
    if impl == "triton":
        o, state, *_ = _delta_rule_triton.delta_rule(*flat, initial_state.float(), cu_seqlens, scale)
        return o.unflatten(0, (batch, length)), state if return_state else None
    few = cu_seqlens is None and length <= _FEW_TOKENS
    if impl == "reference" or few:
        o, state = _recurrent(flat, initial_state, bounds, scale)
    else:
        ends = torch.tensor(bounds, dtype=torch.int64).view(-1, 2)
        o, state, _ = _op(*flat, initial_state, ends, scale, chunk_size)
    return o.unflatten(0, (batch, length)), state if return_state else None


def _recurrent(
    inputs: Inputs, states: Tensor, bounds: Sequence[tuple[int, int]], scale: float
) -> tuple[Tensor, Tensor]:
    """The rule as it stands above; sequences of equal length side by side."""
    lengths = {stop - start for start, stop in bounds}
    if len(lengths) > 1:
        parts = [
            _recurrent(_slice(inputs, *b), states[i : i + 1], [(0, b[1] - b[0])], scale) for i, b in enumerate(bounds)
        ]
        return torch.cat([o for o, _ in parts]), torch.cat([state for _, state in parts])
    batch, heads = len(bounds), inputs.v.shape[1]
    dtype, state = states.dtype, states
    q, k, v, g, erase, beta = (
        t if t is None else t.to(dtype).unflatten(0, (batch, -1)).transpose(0, 1) for t in inputs
    )  # [L, B, H, ..]
    q, k, erase = (
        t if t is None or t.shape[2] == heads else t.repeat_interleave(heads // t.shape[2], 2) for t in (q, k, erase)
    )
    if beta is not None:
        erase, v = beta.unsqueeze(-1) * k, beta.unsqueeze(-1) * v
    outputs = []
    for t in range(len(v)):
        if g is not None:
            decay = g[t].exp()
            state = state * (decay.unsqueeze(-1) if decay.dim() == 3 else decay[..., None, None])
        change = v[t]
        if erase is not None:
            change = change - (erase[t].unsqueeze(-2) @ state).squeeze(-2)
        state = state + k[t].unsqueeze(-1) * change.unsqueeze(-2)
        outputs.append((q[t].unsqueeze(-2) @ state).squeeze(-2) * scale)
    o = torch.stack(outputs, 1).flatten(0, 1) if outputs else inputs.v.clone()
    return o.to(inputs.v.dtype), state


def _slice(inputs: Inputs, start: int, stop: int) -> Inputs:
    return Inputs(*(t if t is None else t[start:stop] for t in inputs))


@torch.library.custom_op("coterie::delta_rule", mutates_args=())
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    erase: Tensor | None,
    beta: Tensor | None,
    states: Tensor,
    bounds: Tensor,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the states at the ends of the sequences, and what backward keeps of those in between."""
    with torch.autocast(q.device.type, enabled=False):
        plan = chunks.make_plan(bounds.tolist(), chunk, q.device)
        return chunks.forward(Inputs(q, k, v, g, erase, beta), states, plan, scale)


@torch.library.custom_op("coterie::delta_rule_backward", mutates_args=())
def _op_backward(
    grad: Tensor,
    grad_states: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    erase: Tensor | None,
    beta: Tensor | None,
    kept: Tensor,
    bounds: Tensor,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to q, k, v, g, erase, beta (empty for None) and to the states."""
    with torch.autocast(q.device.type, enabled=False):
        plan = chunks.make_plan(bounds.tolist(), chunk, q.device)
        grads, grad_initial = chunks.backward(grad, grad_states, Inputs(q, k, v, g, erase, beta), kept, plan, scale)
        return *(q.new_empty(0) if t is None else t for t in grads), grad_initial


@_op.register_fake
def _(q, k, v, g, erase, beta, states, bounds, scale, chunk):
    kept = torch.library.get_ctx().new_dynamic_size()
    return v.new_empty(v.shape), states.new_empty(states.shape), states.new_empty(kept, *states.shape[1:])


@_op_backward.register_fake
def _(grad, grad_states, q, k, v, g, erase, beta, kept, bounds, scale, chunk):
    grads = (q.new_empty(0 if t is None else t.shape) for t in (q, k, v, g, erase, beta))
    return *grads, grad_states.new_empty(grad_states.shape)


def _setup_context(ctx, inputs, output):
    *tensors, _, bounds, ctx.scale, ctx.chunk = inputs
    _, states, kept = output
    ctx.save_for_backward(*tensors, kept, bounds)
    ctx.states = states.shape, states.dtype


def _backward(ctx, grad, grad_states, _):
    *tensors, kept, bounds = ctx.saved_tensors
    shape, dtype = ctx.states
    if grad is None:
        grad = torch.zeros_like(tensors[2])
    if grad_states is None:
        grad_states = grad.new_zeros(shape, dtype=dtype)
    grads = _op_backward(grad, grad_states, *tensors, kept, bounds, ctx.scale, ctx.chunk)
    needed = ctx.needs_input_grad
    return *(g if needed[i] else None for i, g in enumerate(grads)), None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def _masked(t: Tensor, token_mask: Tensor) -> Tensor:
    return t.masked_fill(~token_mask.view(*token_mask.shape, *[1] * (t.dim() - 2)), 0.0)


def _bounds(batch: int, length: int, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    if cu_seqlens is None:
        return [(b * length, (b + 1) * length) for b in range(batch)]
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != length or any(a > b for a, b in pairwise(ends)):
        raise ValueError(f"cu_seqlens must go from 0 to L = {length} and never down, got {ends}")
    return list(pairwise(ends))


def _check(q, k, v, g, erase, beta, initial_state, cu_seqlens, token_mask, chunk_size) -> None:
    batch, length, key_heads, key_width = q.shape
    check_tensor("k", k, tuple(q.shape), "[B, L, H', P]", dtype=q.dtype)
    check_tensor("v", v, (batch, length, None, None), "[B, L, H, V]", dtype=q.dtype)
    heads, value_width = v.shape[2:]
    if min(key_heads, key_width, value_width) < 1 or heads % key_heads:
        raise ValueError(f"v must have a multiple of q's {key_heads} heads, and no width of 0, got {tuple(v.shape)}")
    if g is not None:
        per_channel = isinstance(g, Tensor) and g.dim() == 4
        shape, letters = ((key_width,), ", P") if per_channel else ((), "")
        check_tensor("g", g, (batch, length, heads, *shape), f"[B, L, H{letters}]")
        if g.device.type == "cpu" and not torch.compiler.is_compiling() and g.numel() and (g > 0).any():
            raise ValueError(f"g is the log of a decay and must be at most 0, got {g.max().item()}")
    if erase is not None:
        own = erase.shape[2] if isinstance(erase, Tensor) and erase.dim() == 4 else heads
        check_tensor("erase", erase, (batch, length, own if own == key_heads else heads, key_width), "[B, L, H, P]")
        if beta is not None:
            raise ValueError("erase and beta exclude each other: beta means erase = beta · k")
    if beta is not None:
        check_tensor("beta", beta, (batch, length, heads), "[B, L, H]")
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens, (None,), "[number of sequences + 1]", dtype=torch.int64)
        if batch != 1 or len(cu_seqlens) < 2:
            raise ValueError(
                f"cu_seqlens needs B = 1 and a sequence at least, got B = {batch}, {len(cu_seqlens)} bounds"
            )
    if initial_state is not None:
        sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
        check_tensor("initial_state", initial_state, (sequences, heads, key_width, value_width), "[B, H, P, V]")
    if token_mask is not None:
        check_tensor("token_mask", token_mask, (batch, length), "[B, L]", dtype=torch.bool)
    if chunk_size < 16 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two and at least 16, got {chunk_size}")
