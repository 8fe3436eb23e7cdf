"""Tiles of scores inside Triton kernels: `scores.py`, and how tiles come and go.

Legend: M queries, L keys, D head dimension; a tile of scores is [BLOCK_M, BLOCK_N], a tile of an
operand [rows, BLOCK]. A comment gives the shape of a value, [] of a number.
"""

# triton's types say that a jit function returns nothing
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from aixsim_kernels.common.triton_noise import (
    add_uniform,
    digits,
    digits_of_pairs,
    global_rows,
    row_keys,
    uniform,
)
from aixsim_kernels.optical.triton_grid import (
    grid,
    in_levels,
    inside,
    level,
    readout,
    scale_of,
    shot,
    steps,
    whole,
)

# exponents of 2 in those of e
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tile(ptr, first, rows, n_rows, width, BLOCK: tl.constexpr):
    """Rows of a contiguous matrix whose first row is `first`, 0 behind its ends."""
    columns = tl.arange(0, BLOCK)
    mask = (rows[:, None] < n_rows) & (columns[None, :] < width)
    # [rows, BLOCK]
    return tl.load(ptr + (first + rows[:, None]) * width + columns[None, :], mask=mask, other=0.0)


@triton.jit
def step_and_offset(used_ptr, index, LEVELS: tl.constexpr):
    """step and offset of an operand's range."""
    lo, step, _, centre = grid(used_ptr, index, LEVELS)
    return step, lo + centre * step


@triton.jit
def used_detector(
    used_ptr, lamp_ptr, D, scale, LEVELS: tl.constexpr, LEVELS_OUT, NOISE: tl.constexpr, EXACT
):
    """`detector` and `lamp_of` with the range that the first pass worked with."""
    lo, hi = tl.load(used_ptr + 4), tl.load(used_ptr + 5)  # [], []
    at = detector(lo, hi, used_ptr, D, scale, LEVELS, LEVELS_OUT, NOISE, EXACT)
    return at, lamp_of(lamp_ptr, lo, hi, used_ptr, LEVELS, LEVELS_OUT, NOISE, EXACT)


@triton.jit
def detector(
    lo, hi, used_ptr, D, scale, LEVELS: tl.constexpr, LEVELS_OUT, NOISE: tl.constexpr, EXACT
):
    """What makes detected scores of products, for `raw_and_detected` and what follows it.

    Returns nine numbers: factors of the product, of q's sums and of k's sums, what is added to all;
    lo, step and 1 / step; factor of a score in the exponent; and what a raw score counts from.
    With 16-bit operands raw scores are in levels of the detector, and exponents are those of 2.
    """
    step, per_level = steps(lo, hi, LEVELS_OUT)
    q_step, q_offset = step_and_offset(used_ptr, 0, LEVELS)
    k_step, k_offset = step_and_offset(used_ptr, 1, LEVELS)
    product, of_q, of_k = q_step * k_step, q_step * k_offset, q_offset * k_step
    added = D * q_offset * k_offset
    origin = 0.0
    exponent = scale
    if not EXACT:
        product, of_q, of_k, added, origin = in_levels(
            product, of_q, of_k, added, lo, hi, per_level, NOISE
        )
        exponent = step * scale * LOG2_E
    return product, of_q, of_k, added, lo, step, per_level, exponent, origin


@triton.jit
def light_unit(used_ptr, index, LEVELS: tl.constexpr, NOISE: tl.constexpr):
    """How `as_light` makes light of an operand's c, in what unit: the unit, a factor, a summand."""
    lo, step, _, centre = grid(used_ptr, index, LEVELS)
    # of a range without width all light is in the summand
    unit = tl.where(step == 0, 1.0, step)
    dark = lo if NOISE == 3 else lo * 0.0
    return unit, step / unit, (lo + centre * step - dark) / unit


@triton.jit
def as_light(c, factor, summand, width, NOISE: tl.constexpr):
    """Light of a tile (rows, BLOCK) of c, 0 behind its `width` columns, in the type of c."""
    light = tl.fma(c.to(tl.float32), factor, summand)
    if NOISE == 2:
        light = tl.abs(light)
    columns = tl.arange(0, c.shape[1])
    return tl.where(columns[None, :] < width, light, 0.0).to(c.dtype)


@triton.jit
def lamp_of(
    lamp_ptr, lo, hi, used_ptr, LEVELS: tl.constexpr, LEVELS_OUT, NOISE: tl.constexpr, EXACT
):
    """What makes noise of the light on scores.

    Returns eight numbers: what an electron is worth and the variance of reads, in levels of the
    scores' detector; factor and summand of q's light, and of k's; the unit of their products, and
    that in levels.
    """
    electron, of_reads = lo * 0.0, lo * 0.0
    _, per_level = steps(lo, hi, LEVELS_OUT)
    per = scale_of(lo, hi, per_level, EXACT)
    q_unit, q_factor, q_summand = light_unit(used_ptr, 0, LEVELS, NOISE)
    k_unit, k_factor, k_summand = light_unit(used_ptr, 1, LEVELS, NOISE)
    if NOISE >= 2:
        electron = tl.load(lamp_ptr) * per  # []
        of_reads = tl.load(lamp_ptr + 1) * per * per  # []
    unit = q_unit * k_unit
    return electron, of_reads, q_factor, q_summand, k_factor, k_summand, unit, unit * per


@triton.jit
def raw_and_detected(q, k, k_sum, by_row, at, lit, keys, start, D, LEVELS_OUT, NOISE, EXACT):
    """A tile's raw scores, those that the detector reads, values or levels, and what light made
    these, in the unit of `lit`."""
    product, _, of_k, _, lo, step, per_level, _, _ = at
    # [BLOCK_M, BLOCK_D] @ [BLOCK_D, BLOCK_N] -> [BLOCK_M, BLOCK_N]
    acc = tl.dot(q, tl.trans(k), input_precision="ieee")
    if EXACT:
        raw = product * acc + by_row[:, None] + (of_k * k_sum)[None, :]
    else:
        raw = tl.fma(acc, product, by_row[:, None] + (of_k * k_sum)[None, :])
    if NOISE >= 2:
        electron, of_reads, q_factor, q_summand, k_factor, k_summand, _, unit = lit
        q_light = as_light(q, q_factor, q_summand, D, NOISE)
        k_light = as_light(k, k_factor, k_summand, D, NOISE)
        # [BLOCK_M, BLOCK_D] @ [BLOCK_D, BLOCK_N] -> [BLOCK_M, BLOCK_N]
        light = tl.dot(q_light, tl.trans(k_light), input_precision="ieee")
        found = digits_of_pairs(keys, start // 2 + tl.arange(0, acc.shape[1] // 2))
        noise = shot(light * unit, electron, of_reads, found)
        if EXACT:
            return raw, lo + step * whole((raw - lo) * per_level + noise, LEVELS_OUT), light
        return raw, whole(raw + noise, LEVELS_OUT), light
    if EXACT:
        return raw, readout(raw, lo, step, per_level, keys, start, LEVELS_OUT, NOISE), raw
    return raw, level(raw, keys, start, LEVELS_OUT, NOISE), raw


@triton.jit
def detected(q, k, k_sum, by_row, at, lit, keys, start, D, LEVELS_OUT, NOISE, EXACT):
    """What the detector reads of a tile's scores: values, or levels."""
    _, read, _ = raw_and_detected(
        q, k, k_sum, by_row, at, lit, keys, start, D, LEVELS_OUT, NOISE, EXACT
    )
    return read


@triton.jit
def detected_by_key(
    q, k, by_row, by_column, at, lit, keys, columns, D, LEVELS_OUT, NOISE: tl.constexpr, EXACT
):
    """`detected` of a tile whose rows are keys."""
    product, _, _, _, lo, step, per_level, _, _ = at
    # [BLOCK_N, BLOCK_D] @ [BLOCK_D, BLOCK_M] -> [BLOCK_N, BLOCK_M]
    acc = tl.dot(k, tl.trans(q), input_precision="ieee")
    if EXACT:
        read = (product * acc + by_row[None, :] + by_column[:, None] - lo) * per_level
    else:
        read = tl.fma(acc, product, by_row[None, :] + by_column[:, None])
    if NOISE >= 2:
        electron, of_reads, q_factor, q_summand, k_factor, k_summand, _, unit = lit
        q_light = as_light(q, q_factor, q_summand, D, NOISE)
        k_light = as_light(k, k_factor, k_summand, D, NOISE)
        # [BLOCK_N, BLOCK_D] @ [BLOCK_D, BLOCK_M] -> [BLOCK_N, BLOCK_M]
        light = tl.dot(k_light, tl.trans(q_light), input_precision="ieee")
        found = digits(keys[None, :], columns[:, None])
        read += shot(light * unit, electron, of_reads, found)
    if NOISE == 1:
        found = digits(keys[None, :], columns[:, None])
        read = read + uniform(found) if EXACT else add_uniform(read, found)
    return lo + step * whole(read, LEVELS_OUT) if EXACT else whole(read, LEVELS_OUT)


@triton.jit
def power(exponent, EXACT: tl.constexpr):
    """e or, of 16-bit operands, 2 to the exponent."""
    return tl.exp(exponent) if EXACT else tl.exp2(exponent)


@triton.jit
def place(
    heads,
    M,
    L,
    stride_b,
    stride_h,
    REPEATS: tl.constexpr,
    key_ptr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    PLACED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What a program works on: head, its key-value head, its mask, its queries, how many keys all
    of them see, in whole tiles, end of its keys, and how many lie before the first query's."""
    tiles = tl.cdiv(M, BLOCK_M)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    kv_head = (head // heads) * (heads // REPEATS) + (head % heads) // REPEATS
    mask_offset = (head // heads) * stride_b + (head % heads) * stride_h
    first = (tl.program_id(0) % tiles) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    end = L
    free = L if MASK == 0 else 0
    later = keys_before(key_ptr, M, L, PLACED)
    if CAUSAL:
        end = tl.minimum(L, first + BLOCK_M + later)
        free = tl.minimum(free, tl.maximum(first + later + 1, 0))
    return head, kv_head, mask_offset, rows, free // BLOCK_N * BLOCK_N, end, later


@triton.jit
def keys_before(key_ptr, M, L, PLACED: tl.constexpr):
    """How many keys lie before that of the first query: `Scores.later`."""
    if PLACED:
        # [], []
        return L - (tl.load(key_ptr + 2) - tl.load(key_ptr + 3)).to(tl.int32)
    return L - M


@triton.jit
def visible(
    mask_ptr,
    mask_offset,
    rows,
    columns,
    stride_m,
    stride_l,
    shut,
    M,
    L,
    later,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
):
    """Which keys a query sees, and what an additive mask adds to its scores.

    Rows and columns have two dimensions; the result has what they broadcast to.
    """
    sees = (rows < M) & (columns < L)
    if CAUSAL:
        sees = sees & (columns <= rows + later)
    added = tl.zeros(sees.shape, tl.float32)
    if MASK != 0:
        offsets = rows.to(tl.int64) * stride_m + columns.to(tl.int64) * stride_l
        offsets += mask_offset
        value = tl.load(mask_ptr + offsets, mask=sees, other=0)  # [rows, columns]
        if MASK == 1:
            sees = sees & (value != 0)
        else:
            added = value.to(tl.float32)
            sees = sees & (added > shut)
    return sees, added


@triton.jit
def in_exponent(detected, added, at, MASK: tl.constexpr, EXACT: tl.constexpr):
    """Detected scores as exponents of `power`; a mask of the kind 2 adds to them."""
    _, _, _, _, _, _, _, exponent, _ = at
    score = detected * exponent
    if MASK == 2:
        score += added if EXACT else added * LOG2_E
    return score


@triton.jit
def exponentials(
    detected, sees, added, shift, at, MASKED: tl.constexpr, MASK: tl.constexpr, EXACT: tl.constexpr
):
    """exp(score - shift) of detected scores, 0 where the mask shuts.

    The shift of a query has two dimensions.
    """
    _, _, _, _, _, _, _, exponent, _ = at
    if EXACT or MASK == 2:
        # rounded as `row_pass` rounds it: next to a large mask that is all a score is
        weights = power(in_exponent(detected, added, at, MASK, EXACT) - shift, EXACT)
    else:
        weights = power(tl.fma(detected, exponent, -shift), EXACT)
    return tl.where(sees, weights, 0.0) if MASKED else weights


@triton.jit
def with_total(peak, total, ROWMAX: tl.constexpr, MASK: tl.constexpr, EXACT: tl.constexpr):
    """What is taken off the exponents of rows: their largest and, in 16 bits, the sum too.

    Not where the largest are wanted as they are, nor beside a mask that a logarithm is lost in;
    `probabilities` divides there.
    """
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    if not (EXACT or ROWMAX or MASK == 2):
        # probabilities of a row with nothing to attend to are 0
        shift += tl.where(total == 0, float("inf"), tl.log2(tl.where(total == 0, 1.0, total)))
    return shift


@triton.jit
def probabilities(weights, share, ROWMAX: tl.constexpr, MASK: tl.constexpr, EXACT: tl.constexpr):
    """Probabilities of exponentials less `with_total`; the share of a query has two dimensions."""
    return weights * share if EXACT or ROWMAX or MASK == 2 else weights


@triton.jit
def load_queries(
    q_ptr, q_sum_ptr, head, rows, heads, M, D, at, key_ptr, seed, PLACED: tl.constexpr, BLOCK_D
):
    """Queries, what each adds to its raw scores, its row in the whole, and its noise key."""
    _, of_q, _, added_to_all, _, _, _, _, _ = at
    q = load_tile(q_ptr, head * M, rows, M, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    q_sum = tl.load(q_sum_ptr + head * M + rows, mask=rows < M, other=0.0)  # [BLOCK_M]
    of_whole = global_rows(key_ptr, head, rows, heads, M, PLACED)
    keys = row_keys(of_whole, tl.load(key_ptr), seed)  # [BLOCK_M], of the key []
    return q, of_q * q_sum + added_to_all, of_whole, keys


@triton.jit
def load_left_behind(by_row_ptr, delta_ptr, noise_ptr, offsets, mask):
    """What `query_grad_pass` leaves behind of rows: part of the raw scores, delta, noise key."""
    by_row = tl.load(by_row_ptr + offsets, mask=mask, other=0.0)  # [rows]
    delta = tl.load(delta_ptr + offsets, mask=mask, other=0.0)  # [rows]
    keys = tl.load(noise_ptr + offsets, mask=mask, other=0)  # [rows]
    return by_row, delta, keys.to(tl.uint32, bitcast=True)


@triton.jit
def load_softmax(shift_ptr, total_ptr, offsets, mask):
    """What is taken off the exponents of rows, and the largest probability of each."""
    shift = tl.load(shift_ptr + offsets, mask=mask, other=float("inf"))  # [rows]
    return shift, largest_share(tl.load(total_ptr + offsets, mask=mask, other=0.0))  # [rows]


@triton.jit
def largest_share(total):
    """1 / total, the largest probability of a row; 0 for a row with nothing to attend to."""
    # torch rounds a quotient; on a GPU the plain one is an approximation
    quotient = tl.div_rn(total * 0.0 + 1.0, tl.where(total >= 1, total, 1.0))
    # not 0 but NaN for a row with a score that is NaN
    return tl.where(total > 0, quotient, total * 0.0)


@triton.jit
def store_inside(
    grad, value_ptr, strides, out_ptr, range_ptr, head, heads, rows, n_rows, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the gradient of an operand, 0 where it was clipped.

    Args:
        grad: float32 (rows, BLOCK).
        value_ptr: the operand, of any strides of batch, head and row.
        strides: these.
        out_ptr: where the gradient goes, contiguous.
        range_ptr: the operand's range.
        head: which one of all heads of all batches.
        heads: how many a batch has.
        rows: of the head.
    """
    columns = tl.arange(0, BLOCK)
    mask = (rows[:, None] < n_rows) & (columns[None, :] < width)
    stride_b, stride_h, stride_l = strides
    value_ptr += head // heads * stride_b + head % heads * stride_h
    value_ptr += (rows.to(tl.int64) * stride_l)[:, None] + columns[None, :]
    value = tl.load(value_ptr, mask=mask, other=0.0).to(tl.float32)  # [rows, BLOCK]
    # [rows, BLOCK], of ends []
    grad *= inside(value, tl.load(range_ptr), tl.load(range_ptr + 1)).to(tl.float32)
    offsets = (head * n_rows + rows[:, None]) * width + columns[None, :]
    tl.store(out_ptr + offsets, grad.to(out_ptr.dtype.element_ty), mask=mask)  # [rows, BLOCK]
