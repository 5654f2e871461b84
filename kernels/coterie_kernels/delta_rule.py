"""A matrix state edited once per token, chunk by chunk: launchers.

S_t = D_t S_{t−1} + k_t (z_t − e_tᵀ D_t S_{t−1})ᵀ, o_t = scale · S_tᵀ q_t, D_t = diag(exp g_t). With G the cumulative
log decay of a chunk of C tokens and S the state before it (Yang 2024, arXiv:2406.06484, arXiv:2412.06464):

    R = Z − Ẽ S,  Δ = (I + A)⁻¹ R,  O = Q̃ S + M Δ,  S' = diag(exp G_C) S + K̂ᵀ Δ

One launch takes all chunks at once and solves their triangles, one takes the states from chunk to chunk. Backward goes
through the chunks once in each direction, and then takes them all at once. With `beta`, e = βk and z = βv are formed in
the kernels and are never in memory. Tensors are [N, heads, ..], contiguous; no host waits, there are no atomics.
"""

import torch
import triton
from torch import Tensor

from coterie_kernels.delta_rule_backward import backward_kernel
from coterie_kernels.delta_rule_chunks import num_slots, solved_size
from coterie_kernels.delta_rule_forward import forward_kernel
from coterie_kernels.delta_rule_gradients import gradients_kernel
from coterie_kernels.delta_rule_prepare import prepare_kernel
from coterie_kernels.delta_rule_tiles import DeltaTiles, delta_rule_tiles
from coterie_kernels.target import dot_precision, on_its_device, target_of
from coterie_kernels.tiles import TILES


def kept_shapes(
    q: Tensor, v: Tensor, g: Tensor | None, erases: bool, num_sequences: int, packed: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the cumulative decays (float32) and of the solved triangles (float32, or float16 for 16 bits)."""
    chunk = _tiles(q, v).chunk
    slots, heads = num_slots(q.shape[0], num_sequences, packed, chunk), v.shape[1]
    return (slots if g is not None else 0, heads, _parts(q), chunk), (slots if erases else 0, heads, solved_size(chunk))


def solved_dtype(q: Tensor) -> torch.dtype:
    return torch.float32 if q.dtype == torch.float32 else torch.float16


@on_its_device
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    erase: Tensor | None,
    beta: Tensor | None,
    before: Tensor,
    ends: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs, the states after the last tokens, and what backward wants.

    Args:
        q, k: [N, H', P]. v: [N, H, V]. g, beta: [N, H]. erase: [N, H' or H, P].
        before: [number of sequences, H, P, V] float32.
        ends: [number of sequences + 1] int64, the bounds of packed sequences; None: all are of one length.

    Returns:
        o [N, H, V]; after, as before; total and solved as `kept_shapes` says.
    """
    tiles = _tiles(q, v)
    total_shape, solved_shape = kept_shapes(q, v, g, _erases(erase, beta), before.shape[0], ends is not None)
    total = q.new_empty(total_shape, dtype=torch.float32)
    solved = q.new_empty(solved_shape, dtype=solved_dtype(q))
    o, after = torch.empty_like(v), torch.empty_like(before)
    length, sizes = q.shape[0] // max(before.shape[0], 1), _sizes(q, v, erase)
    programs = max(total_shape[0], solved_shape[0]) * v.shape[1]
    if programs:
        prepare_kernel[(programs,)](
            k,
            g,
            erase,
            beta,
            ends,
            _given(total),
            _given(solved),
            length,
            before.shape[0],
            **{name: size for name, size in sizes.items() if name != "V"},
            **tiles.prepare,
        )
    if before.numel():
        forward_kernel[(_state_programs(before, tiles.forward),)](
            q,
            k,
            v,
            erase,
            beta,
            ends,
            _given(total),
            None,
            None,
            _given(solved),
            before,
            o,
            after,
            length,
            scale,
            **sizes,
            **tiles.forward,
        )
    return o, after, total, solved


@on_its_device
def backward(
    grad: Tensor,
    grad_after: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    erase: Tensor | None,
    beta: Tensor | None,
    before: Tensor,
    ends: Tensor | None,
    total: Tensor,
    solved: Tensor,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Gradients to q, k, v, g, erase, beta and before, from those to o and after."""
    tiles, sizes, heads = _tiles(q, v), _sizes(q, v, erase), v.shape[1]
    num_sequences, erases = before.shape[0], _erases(erase, beta)
    length = q.shape[0] // max(num_sequences, 1)
    slots = num_slots(q.shape[0], num_sequences, ends is not None, tiles.chunk)
    states, grad_states = (q.new_empty(slots, *before.shape[1:]) for _ in range(2))
    grad_z, grad_before = torch.empty_like(v), torch.empty_like(before)
    delta = torch.empty_like(v) if erases else None
    if before.numel():
        backward_kernel[(_state_programs(before, tiles.backward),)](
            grad,
            grad_after,
            q,
            k,
            v,
            erase,
            beta,
            ends,
            _given(total),
            None,
            None,
            _given(solved),
            before,
            grad_z,
            grad_states,
            grad_before,
            delta,
            states,
            length,
            scale,
            **sizes,
            **tiles.backward,
        )
    grad_v = grad_z if beta is None else torch.empty_like(v)
    grad_g, grad_beta = (None if t is None else torch.empty_like(t) for t in (g, beta))
    grad_q, grad_k = (_by_head(t, heads) for t in (q, k))
    grad_erase = None if erase is None else _by_head(erase, heads)
    if slots:
        gradients_kernel[(slots * heads,)](
            grad,
            q,
            k,
            v,
            g,
            erase,
            beta,
            ends,
            _given(total),
            grad_z,
            v if delta is None else delta,
            states,
            grad_states,
            grad_q,
            grad_k,
            grad_v,
            grad_g,
            grad_erase,
            grad_beta,
            length,
            num_sequences,
            scale,
            **sizes,
            ERASES=erases,
            **tiles.gradients,
        )
    grad_q, grad_k, grad_erase = (
        gradient if like is None else _sum_heads(gradient, like)
        for gradient, like in ((grad_q, q), (grad_k, k), (grad_erase, erase))
    )
    return grad_q, grad_k, grad_v, grad_g, grad_erase, grad_beta, grad_before


def _tiles(q: Tensor, v: Tensor) -> DeltaTiles:
    return delta_rule_tiles(TILES[target_of(q)], q.dtype, q.shape[2], v.shape[2])


def _sizes(q: Tensor, v: Tensor, erase: Tensor | None) -> dict[str, int | str]:
    """What all kernels are specialized for."""
    return {
        "HEADS": v.shape[1],
        "KEY_HEADS": q.shape[1],
        "ERASE_HEADS": 1 if erase is None else erase.shape[1],
        "P": q.shape[2],
        "V": v.shape[2],
        "PARTS": _parts(q),
        "PRECISION": dot_precision(q),
    }


def _parts(q: Tensor) -> int:
    """Numbers in which a cumulative decay is kept: 16-bit results do not feel what float32 rounds off."""
    return 2 if q.dtype == torch.float32 else 1


def _erases(erase: Tensor | None, beta: Tensor | None) -> bool:
    return erase is not None or beta is not None


def _given(kept: Tensor) -> Tensor | None:
    return kept if kept.numel() else None


def _state_programs(states: Tensor, tile: dict[str, int | bool]) -> int:
    return states.shape[0] * states.shape[1] * triton.cdiv(states.shape[3], tile["COLUMNS"])


def _by_head(t: Tensor, heads: int) -> Tensor:
    """For a gradient to t [N, H', P]: [N, H, P], float32 if heads of it are to be summed."""
    if t.shape[1] == heads:
        return torch.empty_like(t)
    return t.new_empty(t.shape[0], heads, t.shape[2], dtype=torch.float32)


def _sum_heads(gradient: Tensor, like: Tensor) -> Tensor:
    if gradient.shape[1] == like.shape[1]:
        return gradient
    return gradient.unflatten(1, (like.shape[1], -1)).sum(2).to(like.dtype)
