"""What the kernels of `delta_rule` share: where a chunk lies, its decay, and products with its solved triangle.

A sequence's chunks have slots of their own in what is kept of each chunk. Packed sequence s begins at slot
start_s div C + s: no two sequences meet there, however long they are, and nobody has to sum up lengths.
"""

import triton
import triton.language as tl

BLOCK = tl.constexpr(16)  # rows by which a triangle is solved, and within which a decay per channel is explicit
LEAST_DECAY = tl.constexpr(-60.0)  # log; exp of less is nothing beside 1, and −∞ − (−∞) would be NaN


def num_slots(num_tokens: int, num_sequences: int, packed: bool, chunk: int) -> int:
    """How many slots there are for chunks of sequences of equal length, or of packed ones."""
    if packed:
        return num_tokens // chunk + num_sequences
    return num_sequences * -(-(num_tokens // max(num_sequences, 1)) // chunk)


def solved_size(chunk: int) -> int:
    """Elements of a lower triangle [C, C] kept by blocks of 16: row block b has 16 · (b + 1) columns."""
    blocks = chunk // BLOCK.value
    return BLOCK.value**2 * blocks * (blocks + 1) // 2


@triton.jit
def sequence_bounds(ends_ptr, sequence, length, CHUNK: tl.constexpr):
    """(first token, past the last token, first slot) in int64; ends_ptr: None where all sequences have that length."""
    return segment_bounds(ends_ptr, sequence, length, None, CHUNK)


@triton.jit
def segment_bounds(ends_ptr, sequence, length, segment, CHUNK: tl.constexpr):
    """The same of a segment of so many tokens, or what is left, if that is not None: then `sequence` counts segments.

    A segment's chunks have the slots that they have in the sequence, of which it is a multiple of C.
    """
    sequence = sequence.to(tl.int64)
    if segment is not None:
        segments = tl.cdiv(length, segment)
        part = sequence % segments
        start, stop, first_slot = segment_bounds(ends_ptr, sequence // segments, length, None, CHUNK)
        first = start + part * segment
        return first, tl.minimum(first + segment, stop), first_slot + part * (segment // CHUNK)
    elif ends_ptr is None:
        return sequence * length, (sequence + 1) * length, sequence * tl.cdiv(length, CHUNK)
    else:
        start = tl.load(ends_ptr + sequence)
        return start, tl.load(ends_ptr + sequence + 1), start // CHUNK + sequence


@triton.jit
def sequence_of(ends_ptr, slot, length, num_sequences, CHUNK: tl.constexpr):
    """The sequence that a slot belongs to: the last one that begins at it or before."""
    if ends_ptr is None:
        return slot // tl.cdiv(length, CHUNK)
    else:
        low = slot * 0
        high = low + num_sequences
        while high - low > 1:
            middle = (low + high) // 2
            begins = tl.load(ends_ptr + middle) // CHUNK + middle <= slot
            low = tl.where(begins, middle, low)
            high = tl.where(begins, high, middle)
        return low


@triton.jit
def slot_tokens(ends_ptr, slot, length, num_sequences, CHUNK: tl.constexpr):
    """(the chunk's first token, past the sequence's last): nothing is left where the first is not below the second."""
    sequence = sequence_of(ends_ptr, slot, length, num_sequences, CHUNK)
    start, stop, first_slot = sequence_bounds(ends_ptr, sequence, length, CHUNK)
    return start + (slot - first_slot) * CHUNK, stop


@triton.jit
def load_rows(ptr, token, is_token, head, column, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """[tokens, columns] of one head of [N, HEADS, WIDTH]; 0 where there is no such token or column."""
    place = ptr + (token[:, None] * HEADS + head) * WIDTH + column[None, :]
    return tl.load(place, mask=is_token[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, rows, token, is_token, head, column, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    place = ptr + (token[:, None] * HEADS + head) * WIDTH + column[None, :]
    tl.store(place, rows.to(ptr.dtype.element_ty), mask=is_token[:, None] & (column < WIDTH)[None, :])


@triton.jit
def load_state(ptr, state, row, column, P: tl.constexpr, V: tl.constexpr):
    """[rows, columns] of one state of [.., P, V]."""
    place = ptr + state * (P * V) + row[:, None] * V + column[None, :]
    return tl.load(place, mask=(row < P)[:, None] & (column < V)[None, :], other=0.0)


@triton.jit
def store_state(ptr, values, state, row, column, P: tl.constexpr, V: tl.constexpr):
    place = ptr + state * (P * V) + row[:, None] * V + column[None, :]
    tl.store(place, values.to(ptr.dtype.element_ty), mask=(row < P)[:, None] & (column < V)[None, :])


@triton.jit
def load_total(total_ptr, place, row, CHUNK: tl.constexpr, PARTS: tl.constexpr):
    """The cumulative log decay at rows of a chunk, in two numbers: float32 alone where PARTS is 1.

    The difference of two large sums is what counts, so for float32 a second number holds what the first rounds off.
    """
    ptr = total_ptr + place * (PARTS * CHUNK) + row
    high = tl.load(ptr)
    if PARTS == 1:
        return high, high * 0
    else:
        return high, tl.load(ptr + CHUNK)


@triton.jit
def decay_since_start(total_ptr, place, CHUNK: tl.constexpr, PARTS: tl.constexpr):
    """exp G [C]: what becomes of the state before the chunk until each token."""
    high, low = load_total(total_ptr, place, tl.arange(0, CHUNK), CHUNK, PARTS)
    return tl.exp(high + low)


@triton.jit
def decay_until_end(total_ptr, place, CHUNK: tl.constexpr, PARTS: tl.constexpr):
    """exp(G_C − G) [C], and exp G_C."""
    high, low = load_total(total_ptr, place, tl.arange(0, CHUNK), CHUNK, PARTS)
    last_high, last_low = load_total(total_ptr, place, CHUNK - 1, CHUNK, PARTS)
    return tl.exp((last_high - high) + (last_low - low)), tl.exp(last_high + last_low)


@triton.jit
def decay_between(
    total_ptr,
    place,
    first_row,
    first_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    TRANSPOSED: tl.constexpr = False,
):
    """exp(G_i − G_j) of rows i and columns j where i ≥ j, else 0: never more than 1; total_ptr None: no decay.

    TRANSPOSED: of rows j and columns i.
    """
    row, column = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    SIGN: tl.constexpr = -1.0 if TRANSPOSED else 1.0
    is_later = row[:, None] <= column[None, :] if TRANSPOSED else row[:, None] >= column[None, :]
    if total_ptr is None:
        return tl.where(is_later, 1.0, 0.0)
    else:
        high_row, low_row = load_total(total_ptr, place, row, CHUNK, PARTS)
        high_column, low_column = load_total(total_ptr, place, column, CHUNK, PARTS)
        between = (high_row[:, None] - high_column[None, :]) + (low_row[:, None] - low_column[None, :])
        return tl.exp(tl.where(is_later, SIGN * between, float("-inf")))


@triton.jit
def solved_place(ptr, place, i, j, CHUNK: tl.constexpr):
    """Where element (i, j), of a block on or below the diagonal, of a kept triangle is."""
    BLOCKS: tl.constexpr = CHUNK // BLOCK
    block = i // BLOCK
    row_start = (BLOCK * BLOCK // 2) * block * (block + 1) + (i % BLOCK) * (BLOCK * (block + 1))
    return ptr + place * (BLOCK * BLOCK * BLOCKS * (BLOCKS + 1) // 2) + row_start + j


@triton.jit
def load_triangle(ptr, place, CHUNK: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """[C, C], 0 above the diagonal's blocks; below, if TRANSPOSED."""
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    if TRANSPOSED:
        i, j = tl.arange(0, CHUNK)[None, :], tl.arange(0, CHUNK)[:, None]
    return tl.load(solved_place(ptr, place, i, j, CHUNK), mask=j < (i // BLOCK + 1) * BLOCK, other=0.0)


@triton.jit
def dot_solved(solved, rows, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """solved [C, C] · rows [C, n] float32, in float32, for inputs of `dtype`.

    A triangle of 16-bit inputs is float16 whatever they are: where keys are alike its rounding is what errs, and it
    has 11 bits instead of 8.
    """
    if solved.dtype == tl.float32:
        return tl.dot(solved, rows, input_precision=PRECISION)
    else:
        scaled, peak = scaled_by_peak(rows, 0)
        nothing = tl.zeros([solved.shape[0], rows.shape[1]], tl.float32)
        return add_dot(solved, scaled, nothing, dtype == tl.float16, PRECISION) * peak[None, :]


@triton.jit
def dot_finely(left, right, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """left · right, float32 both and the result, with operands of 11 bits where `dtype` is one of 16 bits."""
    if dtype == tl.float32:
        return tl.dot(left, right, input_precision=PRECISION)
    else:
        left, row_peak = scaled_by_peak(left, 1)
        right, column_peak = scaled_by_peak(right, 0)
        return tl.dot(left.to(tl.float16), right.to(tl.float16)) * row_peak[:, None] * column_peak[None, :]


@triton.jit
def scaled_by_peak(values, AXIS: tl.constexpr):
    """values = scaled · peak, the largest along the axis: float16 has the bits that are wanted, but not the range."""
    peak = tl.max(tl.abs(values), AXIS)
    peak = tl.where(peak > 0, peak, 1.0)
    return values / tl.expand_dims(peak, AXIS), peak


@triton.jit
def add_dot(left, right, total, FINELY: tl.constexpr, PRECISION: tl.constexpr):
    """total + left · right, right and total float32; FINELY: what left's dtype rounds off of right is multiplied too.

    What is written to a state and mostly erased again leaves its roundings there.
    """
    high = right.to(left.dtype)
    total = tl.dot(left, high, total, input_precision=PRECISION)
    if FINELY and left.dtype != tl.float32:
        low = (right - high.to(tl.float32)).to(left.dtype)
        total = tl.dot(left, low, total, input_precision=PRECISION)
    return total
