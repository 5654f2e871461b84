"""A matrix state, edited once per token: every linear attention is one rule with other arguments.

S_t = D_t S_{t−1} + k_t (z_t − e_tᵀ D_t S_{t−1})ᵀ,  o_t = scale · S_tᵀ q_t,  D_t = diag(exp g_t).

The state S [P, V] maps keys to values. What it holds at e_t is read, and the difference to z_t is written at k_t. With
e = βk and z = βv this is the gated delta rule (Yang 2024, arXiv:2412.06464), KDA with one decay per channel
(arXiv:2510.26692), DeltaNet without decay (arXiv:2406.06484); with e = 0 nothing is erased: linear attention, RetNet,
GLA, Mamba-2. `coterie.ops.linear_attention` has them by name.
"""

import torch
from torch import Tensor
from torch.nn import Parameter

from coterie.ops import _delta_rule_chunks as chunks
from coterie.ops import _delta_rule_triton
from coterie.ops._arguments import check_cu_seqlens, check_tensor, choose_impl, read_cu_seqlens
from coterie.ops._autocast import no_autocast
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
    chunk_size: int | None = None,
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
        chunk_size: how many tokens impl="torch" takes at once, 16 · a power of two. None: 32 on a CPU, else 64.
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
    is_short = impl != "triton" and cu_seqlens is None and q.shape[1] <= _FEW_TOKENS
    impl = choose_impl(impl, q)
    _check(q, k, v, g, erase, beta, initial_state, cu_seqlens, token_mask, chunk_size)
    batch, length, _, key_width = q.shape
    heads, value_width = v.shape[2:]
    if token_mask is not None:
        q, k, v, g, erase, beta = (t if t is None else _masked(t, token_mask) for t in (q, k, v, g, erase, beta))
    if cu_seqlens is not None:
        bounds = read_cu_seqlens(cu_seqlens, length)
    if initial_state is None:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        initial_state = q.new_zeros(
            batch if cu_seqlens is None else len(bounds), heads, key_width, value_width, dtype=dtype
        )
    elif initial_state.dtype != torch.float64:
        initial_state = initial_state.float()
    scale = key_width**-0.5 if scale is None else float(scale)
    inputs = Inputs(q, k, v, g, erase, beta)
    if impl == "reference" and cu_seqlens is not None:
        parts = [_recurrent(_slice(inputs, *ends), initial_state[i : i + 1], scale) for i, ends in enumerate(bounds)]
        o, state = torch.cat([o for o, _ in parts], 1), torch.cat([state for _, state in parts])
    elif impl == "reference" or is_short:
        o, state = _recurrent(inputs, initial_state, scale)
    else:
        flat = [t if t is None else t.flatten(0, 1) for t in inputs]
        if impl == "triton":
            o, state, *_ = _delta_rule_triton.delta_rule(*flat, initial_state.float(), cu_seqlens, scale)
        else:
            ends = None if cu_seqlens is None else torch.tensor(bounds)
            chunk_size = chunk_size or (32 if q.device.type == "cpu" else 64)
            o, state, _ = _op(*flat, initial_state, ends, scale, chunk_size)
        o = o.unflatten(0, (batch, length))
    return o, state if return_state else None


def _recurrent(inputs: Inputs, states: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The rule as it stands above, of inputs [B, L, ..]."""
    with no_autocast(states.device.type):
        return _steps(inputs, states, scale)


def _steps(inputs: Inputs, states: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, length, heads, value_width = inputs.v.shape
    dtype = states.dtype

    def rows(t: Tensor) -> Tensor:
        """[B, L, H', ..] → [B · H, L, ..]."""
        t = t.to(dtype) if t.shape[2] == heads else t.to(dtype).repeat_interleave(heads // t.shape[2], 2)
        return t.transpose(1, 2).reshape(batch * heads, length, *t.shape[3:])

    q, k, v, g, erase, beta = (t if t is None else rows(t) for t in inputs)
    if beta is not None:
        beta = beta.unsqueeze(-1)
        erase, v = beta * k, beta * v
    if g is not None:
        g = (g.unsqueeze(-1) if g.dim() == 2 else g).exp().unsqueeze(-1)  # [B · H, L, 1 or P, 1]
    state, outputs = states.flatten(0, 1), []
    for t in range(length):
        here = slice(t, t + 1)
        if g is not None:
            state = state * g[:, t]
        change = v[:, here] if erase is None else torch.baddbmm(v[:, here], erase[:, here], state, alpha=-1)
        state = torch.baddbmm(state, k[:, here].mT, change)
        outputs.append(torch.bmm(q[:, here], state))
    o = torch.cat(outputs, 1) * scale if outputs else v
    o = o.view(batch, heads, length, value_width).transpose(1, 2).to(inputs.v.dtype)
    return o, state.view(states.shape)


def _slice(inputs: Inputs, start: int, stop: int) -> Inputs:
    return Inputs(*(t if t is None else t[:, start:stop] for t in inputs))


@torch.library.custom_op("coterie::delta_rule", mutates_args=())
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    erase: Tensor | None,
    beta: Tensor | None,
    states: Tensor,
    ends: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the states at the ends of the sequences, and what backward keeps of those in between.

    ends: [number of sequences, 2], the first token of each and the one after its last; None: all are of one length.
    """
    with no_autocast(q.device.type):
        plan = _plan(ends, len(states), len(q), chunk, q.device)
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
    ends: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to q, k, v, g, erase, beta (empty for None) and to the states."""
    with no_autocast(q.device.type):
        plan = _plan(ends, len(grad_states), len(q), chunk, q.device)
        grads, grad_initial = chunks.backward(grad, grad_states, Inputs(q, k, v, g, erase, beta), kept, plan, scale)
        return *(q.new_empty(0) if t is None else t for t in grads), grad_initial


def _plan(ends: Tensor | None, sequences: int, tokens: int, chunk: int, device: torch.device) -> chunks.Plan:
    if ends is None:
        length = tokens // max(sequences, 1)
        return chunks.make_plan([(b * length, (b + 1) * length) for b in range(sequences)], chunk, device)
    return chunks.make_plan(ends.tolist(), chunk, device)


@_op.register_fake
def _(q, k, v, g, erase, beta, states, ends, scale, chunk):
    sequences, heads = states.shape[:2]
    if ends is None:
        kept = chunks.num_kept(sequences, q.shape[0] // sequences, heads, chunk)
    else:
        kept = torch.library.get_ctx().new_dynamic_size()
    return v.new_empty(v.shape), states.new_empty(states.shape), states.new_empty(kept, *states.shape[2:])


@_op_backward.register_fake
def _(grad, grad_states, q, k, v, g, erase, beta, kept, ends, scale, chunk):
    grads = (q.new_empty(0 if t is None else t.shape) for t in (q, k, v, g, erase, beta))
    return *grads, grad_states.new_empty(grad_states.shape)


def _setup_context(ctx, inputs, output):
    *tensors, _, ends, ctx.scale, ctx.chunk = inputs
    _, states, kept = output
    ctx.save_for_backward(*tensors, kept, ends)
    ctx.states = states.shape, states.dtype


def _backward(ctx, grad, grad_states, _):
    *tensors, kept, ends = ctx.saved_tensors
    shape, dtype = ctx.states
    if grad is None:
        grad = torch.zeros_like(tensors[2])
    if grad_states is None:
        grad_states = grad.new_zeros(shape, dtype=dtype)
    grads = _op_backward(grad, grad_states, *tensors, kept, ends, ctx.scale, ctx.chunk)
    needed = ctx.needs_input_grad
    return *(g if needed[i] else None for i, g in enumerate(grads)), None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def _masked(t: Tensor, token_mask: Tensor) -> Tensor:
    return t.masked_fill(~token_mask.view(*token_mask.shape, *[1] * (t.dim() - 2)), 0.0)


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
        # Of a subclass, a fake tensor among others, there may be no data.
        is_known = type(g) in (Tensor, Parameter) and g.device.type == "cpu" and not torch.compiler.is_compiling()
        if is_known and (g > 0).any():
            raise ValueError(f"g is the log of a decay and must be at most 0, got {g.max().item()}")
    if erase is not None:
        own = erase.shape[2] if isinstance(erase, Tensor) and erase.dim() == 4 else heads
        check_tensor("erase", erase, (batch, length, own if own == key_heads else heads, key_width), "[B, L, H, P]")
        if beta is not None:
            raise ValueError("erase and beta exclude each other: beta means erase = beta · k")
    if beta is not None:
        check_tensor("beta", beta, (batch, length, heads), "[B, L, H]")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch)
    if initial_state is not None:
        sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
        check_tensor("initial_state", initial_state, (sequences, heads, key_width, value_width), "[B, H, P, V]")
    if token_mask is not None:
        check_tensor("token_mask", token_mask, (batch, length), "[B, L]", dtype=torch.bool)
    if chunk_size is not None and (chunk_size < 16 or chunk_size & (chunk_size - 1)):
        raise ValueError(f"chunk_size must be a power of two and at least 16, got {chunk_size}")
