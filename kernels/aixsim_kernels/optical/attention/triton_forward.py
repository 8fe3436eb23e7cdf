"""The two passes of the forward over the scores; `triton.py` explains them.

Legend: M queries, L keys, D and DV the head dimensions of q, k and of v; a tile of scores is
[BLOCK_M, BLOCK_N], a tile of an operand [rows, BLOCK_D or BLOCK_V]. `total` is a row's sum of
exponentials, `shift` what was taken off their exponents, `share` is 1 / total. A comment gives the
shape of a value, [] of a number.
"""

# triton's types say that a jit function returns nothing
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from aixsim_kernels.common.triton_noise import digits_of_pairs, row_keys
from aixsim_kernels.optical.attention.triton_scores import (
    as_light,
    detected,
    detector,
    exponentials,
    in_exponent,
    lamp_of,
    light_unit,
    load_queries,
    load_softmax,
    load_tile,
    place,
    power,
    probabilities,
    raw_and_detected,
    step_and_offset,
    used_detector,
    visible,
    with_total,
)
from aixsim_kernels.optical.triton_grid import nearest, readout, row_values, shot, steps, whole
from aixsim_kernels.optical.triton_ranges import (
    are_clipped,
    candidates,
    least,
    most,
    row_extremes,
    settled,
    store_partial,
)


# the seeds are other numbers for every layer; 32 bits of one compile the kernel twice, no more
@triton.jit(do_not_specialize=["seed", "n_partial"])
def row_pass(
    q_ptr,
    q_sum_ptr,
    k_ptr,
    k_sum_ptr,
    v_ptr,
    mask_ptr,
    shift_ptr,
    total_ptr,
    partial_ptr,
    n_partial,
    ranges_ptr,
    used_ptr,
    lamp_ptr,
    light_ptr,
    key_ptr,
    seed,
    stride_b,
    stride_h,
    stride_m,
    stride_l,
    shut,
    scale,
    heads,
    M,
    L,
    D,
    DV,
    REPEATS: tl.constexpr,
    LEVELS: tl.constexpr,
    LEVELS_OUT: tl.constexpr,
    NOISE: tl.constexpr,
    PLACED: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWMAX: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SECOND: tl.constexpr,
):
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    head, kv_head, mask_offset, rows, free, end, later = place(
        heads, M, L, stride_b, stride_h, REPEATS, key_ptr, CAUSAL, MASK, PLACED, BLOCK_M, BLOCK_N
    )
    lo, hi = tl.load(ranges_ptr + 4), tl.load(ranges_ptr + 5)  # [], []
    if SECOND:
        # the first launch had its range, and has done it all
        if lo <= hi:
            return
        lo, hi = settled(partial_ptr, n_partial, ranges_ptr, used_ptr, 2, tl.program_id(0))
    at = detector(lo, hi, used_ptr, D, scale, LEVELS, LEVELS_OUT, NOISE, EXACT)
    lit = lamp_of(lamp_ptr, lo, hi, used_ptr, LEVELS, LEVELS_OUT, NOISE, EXACT)
    _, _, _, _, _, step, _, _, origin = at
    q, by_row, _, keys = load_queries(
        q_ptr, q_sum_ptr, head, rows, heads, M, D, at, key_ptr, seed, PLACED, BLOCK_D
    )
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    low = tl.full((BLOCK_M,), float("inf"), tl.float32)
    high = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    light, pairs = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    # tiles that are seen whole, where there can be any, and then the others
    for MASKED in tl.static_range(1 if MASK != 0 else 0, 2):
        for start in range(free if MASKED else 0, end if MASKED else free, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            k = load_tile(k_ptr, kv_head * L, columns, L, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            # [BLOCK_N]
            k_sum = tl.load(k_sum_ptr + kv_head * L + columns, mask=columns < L, other=0.0)
            sees, added = visible(
                mask_ptr, mask_offset, rows[:, None], columns[None, :], stride_m, stride_l, shut,
                M, L, later, CAUSAL, MASK,
            )  # fmt: skip
            raw, score, lit_tile = raw_and_detected(
                q, k, k_sum, by_row, at, lit, keys, start, D, LEVELS_OUT, NOISE, EXACT
            )  # [BLOCK_M, BLOCK_N], three times
            if light_ptr is not None:
                light += tl.sum(tl.where(sees, lit_tile, 0.0), 1)
                pairs += tl.sum(tl.where(sees, 1.0, 0.0), 1)
            score = in_exponent(score, added, at, MASK, EXACT)
            raw_low, raw_high = raw, raw
            if MASKED:
                score = tl.where(sees, score, float("-inf"))
                raw_low = tl.where(sees, raw, float("inf"))
                raw_high = tl.where(sees, raw, float("-inf"))
            tile_low, tile_high = row_extremes(raw_low, raw_high)
            low, high = least(low, tile_low), most(high, tile_high)
            # a NaN is no maximum, and comes into the sum below
            higher = tl.maximum(peak, tl.max(score, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            weights = power(score - shift[:, None], EXACT)
            total = total * power(peak - shift, EXACT) + tl.sum(weights, 1)
            peak = higher
    mask = rows < M
    shift = with_total(peak, total, ROWMAX, MASK, EXACT)
    tl.store(shift_ptr + head * M + rows, shift, mask=mask)  # [BLOCK_M]
    tl.store(total_ptr + head * M + rows, total, mask=mask)  # [BLOCK_M]
    if not SECOND:
        low, high = row_values(low, high, mask, lo, hi, step, origin, EXACT)
        clipped = are_clipped(low, high, ranges_ptr, 2)
        attending = (mask & (total > 0)).to(tl.float32)
        store_partial(partial_ptr, tl.program_id(0), low, high, clipped, attending)
    if light_ptr is not None:
        _, _, _, _, _, _, unit, _ = lit
        tl.store(light_ptr + 2 * tl.program_id(0), tl.sum(light, 0) * unit)  # []
        tl.store(light_ptr + 2 * tl.program_id(0) + 1, tl.sum(pairs, 0))  # []


@triton.jit
def _with_light(acc, light, lamp_ptr, lo, step, per_level, keys, LEVELS_OUT: tl.constexpr):
    """`readout` of outputs that get this light, in their unit."""
    electron = tl.load(lamp_ptr) * per_level  # []
    of_reads = tl.load(lamp_ptr + 1) * per_level * per_level  # []
    found = digits_of_pairs(keys, tl.arange(0, acc.shape[1] // 2))
    noise = shot(light * per_level, electron, of_reads, found)
    return lo + step * whole((acc - lo) * per_level + noise, LEVELS_OUT)


@triton.jit(do_not_specialize=["seed", "output_seed", "n_partial"])
def value_pass(
    q_ptr,
    q_sum_ptr,
    k_ptr,
    k_sum_ptr,
    v_ptr,
    mask_ptr,
    shift_ptr,
    total_ptr,
    out_ptr,
    smooth_ptr,
    mass_ptr,
    partial_ptr,
    n_partial,
    ranges_ptr,
    used_ptr,
    lamp_ptr,
    own_lamp_ptr,
    light_ptr,
    key_ptr,
    seed,
    output_seed,
    stride_b,
    stride_h,
    stride_m,
    stride_l,
    shut,
    scale,
    heads,
    M,
    L,
    D,
    DV,
    REPEATS: tl.constexpr,
    LEVELS: tl.constexpr,
    LEVELS_OUT: tl.constexpr,
    NOISE: tl.constexpr,
    PLACED: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWMAX: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SECOND: tl.constexpr,
):
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    head, kv_head, mask_offset, rows, free, end, later = place(
        heads, M, L, stride_b, stride_h, REPEATS, key_ptr, CAUSAL, MASK, PLACED, BLOCK_M, BLOCK_N
    )
    lo, hi = tl.load(ranges_ptr + 8), tl.load(ranges_ptr + 9)  # [], []
    if SECOND:
        if lo <= hi:
            return
        lo, hi = settled(partial_ptr, n_partial, ranges_ptr, used_ptr, 4, tl.program_id(0))
    step, per_level = steps(lo, hi, LEVELS_OUT)
    at, lit = used_detector(used_ptr, lamp_ptr, D, scale, LEVELS, LEVELS_OUT, NOISE, EXACT)
    v_unit, v_factor, v_summand = light_unit(used_ptr, 3, LEVELS, NOISE)
    q, by_row, of_whole, keys = load_queries(
        q_ptr, q_sum_ptr, head, rows, heads, M, D, at, key_ptr, seed, PLACED, BLOCK_D
    )
    shift, share = load_softmax(shift_ptr, total_ptr, head * M + rows, rows < M)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    smooth, light = acc, acc
    count, sum_p = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for MASKED in tl.static_range(1 if MASK != 0 else 0, 2):
        for start in range(free if MASKED else 0, end if MASKED else free, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            k = load_tile(k_ptr, kv_head * L, columns, L, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            v = load_tile(v_ptr, kv_head * L, columns, L, DV, BLOCK_V)  # [BLOCK_N, BLOCK_V]
            # [BLOCK_N]
            k_sum = tl.load(k_sum_ptr + kv_head * L + columns, mask=columns < L, other=0.0)
            sees, added = visible(
                mask_ptr, mask_offset, rows[:, None], columns[None, :], stride_m, stride_l, shut,
                M, L, later, CAUSAL, MASK,
            )  # fmt: skip
            score = detected(q, k, k_sum, by_row, at, lit, keys, start, D, LEVELS_OUT, NOISE, EXACT)
            weights = exponentials(score, sees, added, shift[:, None], at, MASKED, MASK, EXACT)
            p = probabilities(weights, share[:, None], ROWMAX, MASK, EXACT)
            code = nearest((weights if ROWMAX else p) * (LEVELS - 1))
            count += tl.sum(code, 1)
            sum_p += tl.sum(p, 1)
            # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_V] -> [BLOCK_M, BLOCK_V]
            acc = tl.dot(code.to(v.dtype), v, acc, input_precision="ieee")
            # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_V] -> [BLOCK_M, BLOCK_V]
            smooth = tl.dot(p.to(v.dtype), v, smooth, input_precision="ieee")
            if light_ptr is not None:
                v_light = as_light(v, v_factor, v_summand, DV, NOISE)
                # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_V] -> [BLOCK_M, BLOCK_V]
                light = tl.dot(code.to(v.dtype), v_light, light, input_precision="ieee")
    v_step, v_offset = step_and_offset(used_ptr, 3, LEVELS)
    acc = (v_step * acc + v_offset * count[:, None]) * (1.0 / (LEVELS - 1))
    smooth = v_step * smooth + v_offset * sum_p[:, None]
    values = tl.arange(0, BLOCK_V)
    mask = (rows[:, None] < M) & (values[None, :] < DV)
    if not SECOND:
        low, high = row_extremes(*candidates(acc, mask))
        clipped = are_clipped(low, high, ranges_ptr, 4)
        here = (rows < M).to(tl.float32)
        store_partial(partial_ptr, tl.program_id(0), low, high, clipped, here)
    factor = share if ROWMAX else (share > 0).to(tl.float32)
    keys = row_keys(of_whole, tl.load(key_ptr), output_seed)  # [BLOCK_M], of the key []
    if light_ptr is not None:
        light *= v_unit * (1.0 / (LEVELS - 1))
        tl.store(light_ptr + tl.program_id(0), tl.sum(tl.where(mask, light, 0.0)))  # []
        out = _with_light(acc, light, own_lamp_ptr, lo, step, per_level, keys, LEVELS_OUT)
    else:
        out = readout(acc, lo, step, per_level, keys, 0, LEVELS_OUT, NOISE)
    out *= factor[:, None]
    offsets = (head * M + rows[:, None]) * DV + values[None, :]
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)  # [BLOCK_M, BLOCK_V]
    # [BLOCK_M, BLOCK_V]
    tl.store(smooth_ptr + offsets, smooth.to(smooth_ptr.dtype.element_ty), mask=mask)
    if not SECOND:
        kept = tl.where(rows < M, count * factor * (1.0 / (LEVELS - 1)), 0.0)
        mass_ptr += 2 * tl.program_id(0)
        tl.store(mass_ptr, tl.sum(kept, 0))  # []
        # rows that are not there have no share
        tl.store(mass_ptr + 1, tl.sum((share > 0).to(tl.float32), 0))  # []
