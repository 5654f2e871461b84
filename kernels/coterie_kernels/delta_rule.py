"""A matrix state edited once per token, chunk by chunk: launchers.

S_t = D_t S_{t−1} + k_t (z_t − e_tᵀ D_t S_{t−1})ᵀ, o_t = scale · S_tᵀ q_t, D_t = diag(exp g_t). With G the cumulative
log decay of a chunk of C tokens and S the state before it (Yang 2024, arXiv:2406.06484, arXiv:2412.06464):

    R = Z − Ẽ S,  Δ = (I + A)⁻¹ R,  O = Q̃ S + M Δ,  S' = diag(exp G_C) S + K̂ᵀ Δ

One launch takes all chunks at once and solves their triangles, one takes the states from chunk to chunk. Backward goes
through the chunks once in each direction, and then takes them all at once. With `beta`, e = βk and z = βv are formed in
the kernels and are never in memory. With a decay for each channel the first launch also forms what the second would
have to decay, and backward begins with it again. Long sequences of few heads are cut into segments, which are worked on
side by side once three launches more, two backward, have found their states. Tensors are [N, heads, ..], contiguous; no
host waits, there are no atomics.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from coterie_kernels.delta_rule_backward import backward_kernel
from coterie_kernels.delta_rule_channel_gradients import channel_gradients_kernel
from coterie_kernels.delta_rule_channels import prepare_channels_kernel
from coterie_kernels.delta_rule_chunks import num_slots, solved_size
from coterie_kernels.delta_rule_forward import forward_kernel
from coterie_kernels.delta_rule_gradients import gradients_kernel
from coterie_kernels.delta_rule_prepare import prepare_kernel
from coterie_kernels.delta_rule_segments import segment_decays, segment_length, through_segments
from coterie_kernels.delta_rule_tiles import DeltaTiles, delta_rule_tiles
from coterie_kernels.target import dot_precision, on_its_device, target_of
from coterie_kernels.tiles import TILES


@dataclass(frozen=True)
class _Prepared:
    """What the scans take.

    Attributes:
        q, k, erase: as given, or decayed: [N, H, P].
        total: G [slots, H, parts, C]; None: no decay, or one for each channel.
        channels: then its G, [slots, H, parts, C, P].
        m: then M, a triangle.
        solved: (I + A)⁻¹, a triangle; None: nothing is erased.
    """

    q: Tensor
    k: Tensor
    erase: Tensor | None
    total: Tensor | None
    channels: Tensor | None
    m: Tensor | None
    solved: Tensor | None


def kept_shapes(
    q: Tensor, v: Tensor, g: Tensor | None, erases: bool, num_sequences: int, packed: bool
) -> tuple[tuple[int, ...], ...]:
    """Of what is kept for backward: cumulative decays, float32; solved triangles, as `solved_dtype` says; and the
    states before segments and their F, float32."""
    tiles = _tiles(q, v)
    chunk, (_, heads, width) = tiles.chunk, v.shape
    slots = num_slots(q.shape[0], num_sequences, packed, chunk)
    has_decay, by_channel = g is not None, g is not None and g.dim() == 3
    total = (slots if has_decay and not by_channel else 0, heads, _parts(q), chunk)
    solved = slots if erases and not by_channel else 0, heads, solved_size(chunk)
    length, segment = _lengths(q, v, num_sequences, packed, tiles)
    segments = 0 if segment is None else num_sequences * -(-length // segment)
    states = segments, heads, q.shape[2]
    return total, solved, (*states, width), (*states, q.shape[2]) if erases else states


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
) -> tuple[Tensor, ...]:
    """Outputs, the states after the last tokens, and what backward wants.

    Args:
        q, k: [N, H', P]. v: [N, H, V]. g: [N, H] or [N, H, P]. erase: [N, H' or H, P]. beta: [N, H].
        before: [number of sequences, H, P, V] float32.
        ends: [number of sequences + 1] int64, the bounds of packed sequences; None: all are of one length.

    Returns:
        o [N, H, V]; after, as before; and four tensors as `kept_shapes` says.
    """
    tiles, num_sequences, erases = _tiles(q, v), before.shape[0], _erases(erase, beta)
    prepared = _prepare(q, k, v, g, erase, beta, num_sequences, ends, tiles)
    length, segment = _lengths(q, v, num_sequences, ends is not None, tiles)
    o, starts, factors = torch.empty_like(v), None, None

    def scan(v: Tensor | None, before: Tensor | None, o: Tensor | None, after: Tensor) -> Tensor:
        forward_kernel[(_state_programs(after, tiles.forward),)](
            prepared.q,
            prepared.k,
            v,
            prepared.erase,
            beta,
            ends,
            prepared.total,
            prepared.channels,
            prepared.m,
            prepared.solved,
            before,
            o,
            after,
            length,
            segment,
            scale,
            V=after.shape[3],
            **_sizes(prepared.q, after, prepared.erase),
            **tiles.forward,
        )
        return after

    shapes = kept_shapes(q, v, g, erases, num_sequences, ends is not None)
    if segment is not None:
        own = scan(v, None, None, before.new_empty(shapes[2]))
        if erases:
            factors = scan(None, None, None, before.new_empty(shapes[3]))
        else:
            factors = segment_decays(g, own, num_sequences, segment)
        starts = through_segments(before, factors, own, dot_precision(before))
        after = (
            scan(v, starts, o, own)
            .unflatten(0, (num_sequences, -1))[:, -1]
            .clone(memory_format=torch.contiguous_format)
        )
    elif before.numel():
        after = scan(v, before, o, torch.empty_like(before))
    else:
        after = torch.empty_like(before)
    kept = prepared.total, prepared.solved, starts, factors
    dtypes = torch.float32, solved_dtype(q), torch.float32, torch.float32
    return (
        o,
        after,
        *(
            t if shape[0] else q.new_empty(shape, dtype=dtype)
            for t, shape, dtype in zip(kept, shapes, dtypes, strict=True)
        ),
    )


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    erase: Tensor | None,
    beta: Tensor | None,
    num_sequences: int,
    ends: Tensor | None,
    tiles: DeltaTiles,
) -> _Prepared:
    heads, by_channel, erases = v.shape[1], g is not None and g.dim() == 3, _erases(erase, beta)
    slots = num_slots(q.shape[0], num_sequences, ends is not None, tiles.chunk)
    triangle = (slots, heads, solved_size(tiles.chunk))
    solved = q.new_empty(triangle, dtype=solved_dtype(q)) if erases else None
    length, sizes = _length(q, num_sequences), _sizes(q, v, erase)
    if not by_channel:
        total = None if g is None else q.new_empty(slots, heads, _parts(q), tiles.chunk, dtype=torch.float32)
        if slots and (g is not None or erases):
            prepare_kernel[(slots * heads,)](
                k, g, erase, beta, ends, total, solved, length, num_sequences, **sizes, **tiles.prepare
            )
        return _Prepared(q, k, erase, total, None, None, solved)
    total = q.new_empty(slots, heads, _parts(q), tiles.chunk, q.shape[2], dtype=torch.float32)
    since_q, until_k = (q.new_empty(q.shape[0], heads, q.shape[2]) for _ in range(2))
    since_erase = torch.empty_like(since_q) if erases else None
    m = q.new_empty(triangle, dtype=torch.float32)
    if slots:
        prepare_channels_kernel[(slots * heads,)](
            q,
            k,
            g,
            erase,
            beta,
            ends,
            total,
            since_q,
            until_k,
            since_erase,
            m,
            solved,
            length,
            num_sequences,
            **sizes,
            **tiles.prepare_channels,
        )
    return _Prepared(since_q, until_k, since_erase, None, total, m, solved)


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
    starts: Tensor,
    factors: Tensor,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Gradients to q, k, v, g, erase, beta and before, from those to o and after."""
    tiles, num_sequences, erases = _tiles(q, v), before.shape[0], _erases(erase, beta)
    by_channel = g is not None and g.dim() == 3
    if by_channel:
        prepared = _prepare(q, k, v, g, erase, beta, num_sequences, ends, tiles)
    else:
        prepared = _Prepared(q, k, erase, _given(total), None, None, _given(solved))
    slots = num_slots(q.shape[0], num_sequences, ends is not None, tiles.chunk)
    states, grad_states = (q.new_empty(slots, *before.shape[1:]) for _ in range(2))
    grad_z = torch.empty_like(v)
    delta = torch.empty_like(v) if erases else None
    length, segment = _lengths(q, v, num_sequences, ends is not None, tiles)

    def scan(grad_after: Tensor | None, before: Tensor | None, grad_before: Tensor, *written: Tensor | None) -> Tensor:
        grad_z, grad_states, delta, states = written or (None,) * 4
        backward_kernel[(_state_programs(grad_before, tiles.backward),)](
            grad,
            grad_after,
            prepared.q,
            prepared.k,
            v,
            prepared.erase,
            beta,
            ends,
            prepared.total,
            prepared.channels,
            prepared.m,
            prepared.solved,
            before,
            grad_z,
            grad_states,
            grad_before,
            delta,
            states,
            length,
            segment,
            scale,
            V=v.shape[2],
            **_sizes(prepared.q, v, prepared.erase),
            **tiles.backward,
        )
        return grad_before

    written = grad_z, grad_states, delta, states
    if segment is not None:
        own = scan(None, None, torch.empty_like(starts))
        grad_ends = through_segments(grad_after, factors, own, dot_precision(before), backward=True)
        grad_before = (
            scan(grad_ends, starts, own, *written)
            .unflatten(0, (num_sequences, -1))[:, 0]
            .clone(memory_format=torch.contiguous_format)
        )
    elif before.numel():
        grad_before = scan(grad_after, before, torch.empty_like(before), *written)
    else:
        grad_before = torch.empty_like(before)
    heads = v.shape[1]
    grad_v = grad_z if beta is None else torch.empty_like(v)
    grad_g = None if g is None else torch.empty_like(g)
    # By channels it is summed up in memory.
    grad_beta = None if beta is None else torch.empty_like(beta, dtype=torch.float32 if by_channel else None)
    grad_q, grad_k, grad_erase = (None if t is None else _by_head(t, heads) for t in (q, k, erase))
    grad_products = ()
    if by_channel:
        triangle = (slots, heads, solved_size(tiles.chunk))
        grad_products = tuple(
            q.new_empty(triangle, dtype=torch.float32) if is_there else None for is_there in (True, erases)
        )
    if slots:
        kernel = channel_gradients_kernel if by_channel else gradients_kernel
        kernel[(slots * heads,)](
            grad,
            q,
            k,
            v,
            g,
            erase,
            beta,
            ends,
            prepared.channels if by_channel else prepared.total,
            grad_z,
            v if delta is None else delta,
            states,
            grad_states,
            *grad_products,
            grad_q,
            grad_k,
            grad_v,
            grad_g,
            grad_erase,
            grad_beta,
            length,
            num_sequences,
            scale,
            V=v.shape[2],
            ERASES=erases,
            **_sizes(q, v, erase),
            **(tiles.channel_gradients if by_channel else tiles.gradients),
        )
    grad_q, grad_k, grad_erase = (
        gradient if like is None else _sum_heads(gradient, like)
        for gradient, like in ((grad_q, q), (grad_k, k), (grad_erase, erase))
    )
    grad_beta = grad_beta if beta is None else grad_beta.to(beta.dtype)
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
        "PARTS": _parts(q),
        "PRECISION": dot_precision(q),
    }


def _length(q: Tensor, num_sequences: int) -> int:
    return q.shape[0] // max(num_sequences, 1)


def _lengths(q: Tensor, v: Tensor, num_sequences: int, packed: bool, tiles: DeltaTiles) -> tuple[int, int | None]:
    """Of the sequences and, where they are cut into such, of the segments. What is packed is many sequences already."""
    length = _length(q, num_sequences)
    programs = num_sequences * v.shape[1] * triton.cdiv(v.shape[2], tiles.forward["COLUMNS"])
    segment = length if packed else segment_length(length, tiles.chunk, programs)
    return length, segment if segment < length else None


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
