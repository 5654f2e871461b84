"""`delta_rule` of few heads: long sequences are cut into segments, whose states are found before all else.

After a segment the state is S' = F S + H: H is what it makes of no state, and F [P, P] what it makes of an identity if
it writes nothing. Both come from the kernels that all chunks go through, without outputs; then one launch takes the
states from segment to segment, S ← F S + H, and the segments are on their own. Backward, dS ← Fᵀ dS' + U likewise. As
long as β‖k‖² ≤ 2 nothing grows: ‖F‖ ≤ 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from coterie_kernels.delta_rule_chunks import load_state, store_state

_PROGRAMS = 128  # that keep a GPU busy
_LEAST_SEGMENTS = 4  # of a sequence: chunks are gone through twice or more, so fewer do not pay
_LEAST_CHUNKS = 8  # of a segment


def segment_length(length: int, chunk: int, programs: int) -> int:
    """Tokens of a segment, a multiple of the chunk; the length itself where `programs`, one a state, are enough."""
    chunks = -(-length // chunk)
    segments = min(_PROGRAMS // max(programs, 1), chunks // _LEAST_CHUNKS)
    return length if segments < _LEAST_SEGMENTS else -(-chunks // segments) * chunk


def segment_decays(g: Tensor | None, own: Tensor, num_sequences: int, segment: int) -> Tensor:
    """The diagonal of F where nothing is erased, [segments, H, P] float32.

    g: [N, H] or [N, H, P]; None: nothing decays. own: [segments, H, P, V] float32, H.
    """
    shape = own.shape[:3]
    if g is None:
        return own.new_ones(shape)
    by_token = g.reshape(num_sequences, -1, shape[1], g.shape[2] if g.dim() == 3 else 1)
    padded = torch.nn.functional.pad(by_token, (0, 0, 0, 0, 0, -by_token.shape[1] % segment))
    total = padded.unflatten(1, (-1, segment)).sum(2, dtype=torch.float32).flatten(0, 1)
    return total.exp().expand(shape).contiguous()


def through_segments(first: Tensor, factors: Tensor, own: Tensor, precision: str, *, backward: bool = False) -> Tensor:
    """The states before each segment, from those before the first; backward, the gradients to those after each.

    first: [sequences, H, P, V] float32, backward those after the last; own: [sequences · segments, H, P, V], H or U;
    factors: F [.., H, P, P] or its diagonal [.., H, P].
    """
    states = torch.empty_like(own)
    segments, (_, heads, width, values) = own.shape[0] // first.shape[0], first.shape
    block = max(triton.next_power_of_2(width), 16)
    segments_kernel[(first.shape[0] * heads * triton.cdiv(values, 16),)](
        first,
        factors,
        own,
        states,
        segments,
        HEADS=heads,
        P=width,
        V=values,
        WIDTH=block,
        DEPTH=min(block, 32),
        COLUMNS=16,
        DIAGONAL=factors.dim() == 3,
        BACKWARD=backward,
        PRECISION=precision,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return states


@triton.jit(do_not_specialize=["segments"])
def segments_kernel(
    first_ptr,
    factors_ptr,
    own_ptr,
    states_ptr,
    segments,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A few columns of one state of one sequence, from segment to segment: stored, then S ← F S + H.

    F is read a few columns at a time, and the rows of S that they meet are read back: all of F would not fit.
    """
    TILES: tl.constexpr = tl.cdiv(V, COLUMNS)
    state = (tl.program_id(0) // TILES).to(tl.int64)
    sequence, head = state // HEADS, state % HEADS
    width, column = tl.arange(0, WIDTH), (tl.program_id(0) % TILES) * COLUMNS + tl.arange(0, COLUMNS)
    values = load_state(first_ptr, state, width, column, P, V)
    for step in range(segments):
        segment = segments - 1 - step if BACKWARD else step
        place = (sequence * segments + segment) * HEADS + head
        store_state(states_ptr, values, place, width, column, P, V)
        if DIAGONAL:
            factor = tl.load(factors_ptr + place * P + width, mask=width < P, other=0.0)
            values = values * factor[:, None] + load_state(own_ptr, place, width, column, P, V)
        else:
            tl.debug_barrier()  # other threads stored what is read
            values = load_state(own_ptr, place, width, column, P, V)
            for first in range(0, WIDTH, DEPTH):
                inner = first + tl.arange(0, DEPTH)
                if BACKWARD:
                    factor = tl.trans(load_state(factors_ptr, place, inner, width, P, P))
                else:
                    factor = load_state(factors_ptr, place, width, inner, P, P)
                rows = load_state(states_ptr, place, inner, column, P, V)
                values = tl.dot(factor, rows, values, input_precision=PRECISION)
