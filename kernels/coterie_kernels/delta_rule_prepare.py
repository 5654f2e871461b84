"""`delta_rule`, what chunks need that does not depend on the state: cumulative decays and solved triangles."""

import triton
import triton.language as tl

from coterie_kernels.delta_rule_chunks import (
    BLOCK,
    LEAST_DECAY,
    decay_between,
    load_rows,
    slot_tokens,
    solved_place,
)
from coterie_kernels.expert_mlp_forward import beside


@triton.jit(do_not_specialize=["length", "num_sequences"])
def prepare_kernel(
    k_ptr,
    g_ptr,
    erase_ptr,
    beta_ptr,
    ends_ptr,
    total_ptr,
    solved_ptr,
    length,
    num_sequences,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    ERASE_HEADS: tl.constexpr,
    P: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of one chunk and head: G, if there is a decay, and T = (I + A)⁻¹ by its lower blocks, if something is erased.

    A_ij = e_i · k_j exp(G_i − G_j) for i > j. A decay here is one number a head.
    """
    slot, head = tl.program_id(0).to(tl.int64) // HEADS, tl.program_id(0) % HEADS
    first, stop = slot_tokens(ends_ptr, slot, length, num_sequences, CHUNK)
    if first >= stop:
        return
    place = slot * HEADS + head
    if g_ptr is not None:
        row = tl.arange(0, CHUNK)
        token = first + row
        g = tl.load(g_ptr + token * HEADS + head, mask=token < stop, other=0.0).to(tl.float32)
        store_total(total_ptr + place * (PARTS * CHUNK) + row, tl.maximum(g, LEAST_DECAY), CHUNK, row >= 0, PARTS)
        tl.debug_barrier()  # rows of it are read again as others' threads need them
    if solved_ptr is not None:
        _invert(
            k_ptr, erase_ptr, beta_ptr, total_ptr, solved_ptr, first, stop, place, head, 0, CHUNK,
            HEADS, KEY_HEADS, ERASE_HEADS, P, CHUNK, PARTS, DEPTH, PRECISION,
        )  # fmt: skip


@triton.jit
def store_total(place, g, LOW: tl.constexpr, mask, PARTS: tl.constexpr):
    """The sums of g over the first axis; what float32 rounds off goes LOW elements further on if PARTS is 2."""
    if PARTS == 1:
        tl.store(place, tl.cumsum(g, 0), mask=mask)
    else:
        total = tl.cumsum(g.to(tl.float64), 0)
        high = total.to(tl.float32)
        tl.store(place, high, mask=mask)
        tl.store(place + LOW, (total - high.to(tl.float64)).to(tl.float32), mask=mask)


@triton.jit
def _invert(
    k_ptr,
    erase_ptr,
    beta_ptr,
    total_ptr,
    solved_ptr,
    first,
    stop,
    place,
    head,
    ROW: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    ERASE_HEADS: tl.constexpr,
    P: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Stores the inverse of I + A's diagonal block from ROW on, and returns it [SIZE, SIZE].

    Row by row in a block of 16, then two blocks into one: a series of powers of A would grow without bound where keys
    are alike.
    """
    if SIZE == BLOCK:
        a = _edits_of_keys(
            k_ptr, erase_ptr, beta_ptr, total_ptr, first, stop, place, head, ROW, ROW, SIZE,
            HEADS, KEY_HEADS, ERASE_HEADS, P, CHUNK, PARTS, DEPTH, PRECISION,
        )  # fmt: skip
        i = tl.arange(0, SIZE)
        inverse = invert_block(tl.where(i[:, None] > i[None, :], a, 0.0))
        store_block(solved_ptr, inverse, place, ROW, ROW, CHUNK)
        return inverse
    else:
        HALF: tl.constexpr = SIZE // 2
        upper = _invert(
            k_ptr, erase_ptr, beta_ptr, total_ptr, solved_ptr, first, stop, place, head, ROW, HALF,
            HEADS, KEY_HEADS, ERASE_HEADS, P, CHUNK, PARTS, DEPTH, PRECISION,
        )  # fmt: skip
        lower = _invert(
            k_ptr, erase_ptr, beta_ptr, total_ptr, solved_ptr, first, stop, place, head, ROW + HALF, HALF,
            HEADS, KEY_HEADS, ERASE_HEADS, P, CHUNK, PARTS, DEPTH, PRECISION,
        )  # fmt: skip
        between = _edits_of_keys(
            k_ptr, erase_ptr, beta_ptr, total_ptr, first, stop, place, head, ROW + HALF, ROW, HALF,
            HEADS, KEY_HEADS, ERASE_HEADS, P, CHUNK, PARTS, DEPTH, PRECISION,
        )  # fmt: skip
        corner = -tl.dot(tl.dot(lower, between, input_precision=PRECISION), upper, input_precision=PRECISION)
        store_block(solved_ptr, corner, place, ROW + HALF, ROW, CHUNK)
        return lower_triangle(upper, corner, lower)


@triton.jit
def _edits_of_keys(
    k_ptr,
    erase_ptr,
    beta_ptr,
    total_ptr,
    first,
    stop,
    place,
    head,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    ERASE_HEADS: tl.constexpr,
    P: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """e_i · k_j exp(G_i − G_j) [SIZE, SIZE] for a chunk's rows i from ROW and columns j from COLUMN on, where i ≥ j."""
    row, column = first + ROW + tl.arange(0, SIZE), first + COLUMN + tl.arange(0, SIZE)
    is_row = row < stop
    products = tl.zeros([SIZE, SIZE], tl.float32)
    for start in range(0, P, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        if erase_ptr is None:
            left = load_rows(k_ptr, row, is_row, head // (HEADS // KEY_HEADS), depth, KEY_HEADS, P)
        else:
            left = load_rows(erase_ptr, row, is_row, head // (HEADS // ERASE_HEADS), depth, ERASE_HEADS, P)
        right = load_rows(k_ptr, column, column < stop, head // (HEADS // KEY_HEADS), depth, KEY_HEADS, P)
        products = tl.dot(left.to(right.dtype), tl.trans(right), products, input_precision=PRECISION)
    if beta_ptr is not None:
        beta = tl.load(beta_ptr + row * HEADS + head, mask=is_row, other=0.0).to(tl.float32)
        products = products * beta[:, None]
    return products * decay_between(total_ptr, place, ROW, COLUMN, SIZE, SIZE, CHUNK, PARTS)


@triton.jit
def invert_block(a):
    """(I + A)⁻¹ of strictly lower triangular A [n, n]: each row, once it is final, is taken from those below it."""
    i = tl.arange(0, a.shape[0])
    inverse = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for j in range(a.shape[0] - 1):
        column = tl.sum(tl.where(i[None, :] == j, a, 0.0), 1)
        row = tl.sum(tl.where(i[:, None] == j, inverse, 0.0), 0)
        inverse -= column[:, None] * row[None, :]
    return inverse


@triton.jit
def store_block(ptr, block, place, ROW: tl.constexpr, COLUMN: tl.constexpr, CHUNK: tl.constexpr):
    """A block [n, n] of a kept triangle; what of it lies above the diagonal's blocks has no place."""
    i, j = ROW + tl.arange(0, block.shape[0])[:, None], COLUMN + tl.arange(0, block.shape[1])[None, :]
    is_kept = j < (i // BLOCK + 1) * BLOCK
    tl.store(solved_place(ptr, place, i, j, CHUNK), block.to(ptr.dtype.element_ty), mask=is_kept)


@triton.jit
def lower_triangle(upper, corner, lower):
    """[n, n] each → [[upper, 0], [corner, lower]]."""
    top, bottom = beside(upper, tl.zeros_like(upper)), beside(corner, lower)
    both = tl.permute(tl.join(top, bottom), (2, 0, 1))
    return tl.reshape(both, (2 * top.shape[0], top.shape[1]))
