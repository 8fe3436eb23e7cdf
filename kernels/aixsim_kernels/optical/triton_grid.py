"""Modulators and detectors inside Triton kernels: `grid.py` on the integers that a GPU multiplies.

A value is `offset + step * c` with an integer c, counted from the level nearest to zero: c is
exact in 16 bits, so that products run on tensor cores and accumulate in float32. Values lifted by
the lookup-table floor lie between levels, and are the only ones that 16 bits round (to 2^-9 of a
level). With float32 results, or more than 256 levels, c is a float32 and nothing is rounded.

Legend: `used` are the ranges to work with, (n, 2), row `index` the one at hand; `centre` is the
code that c counts from. A comment gives the shape of a value, [] of a number.
"""

# triton's types say that a jit function returns nothing
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl

from aixsim_kernels.common.triton_noise import (
    ORIGIN,
    add_uniform,
    digits_of_pairs,
    normal,
    uniform,
)
from aixsim_kernels.optical.settings import Settings
from aixsim_kernels.optical.triton_ranges import candidates

# what a kernel's NOISE says: that of a level or, from _SHOT on, of light with or without an offset
_SILENT, _DITHER, _SHOT, _SHOT_OFFSET = range(4)


def noise_kind(settings: Settings) -> int:
    """What a kernel's NOISE is."""
    if settings.has_light:
        return _SHOT_OFFSET if settings.offset else _SHOT
    return _DITHER if settings.noise else _SILENT


def operand_type(out_dtype: torch.dtype, levels: int) -> torch.dtype:
    """Type of c for a result of this type: c is an integer whatever type the inputs have."""
    return torch.float32 if out_dtype == torch.float32 or levels > 256 else torch.float16


@triton.jit
def nearest(x):
    """To the nearest integer, ties to even, for |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def steps(lo, hi, LEVELS: tl.constexpr):
    """step and 1 / step: of a range without width 0 and 1. Rounded as torch rounds them."""
    one = lo * 0.0 + 1.0
    per_level = tl.div_rn(one, hi - lo) * (LEVELS - 1)
    flat = tl.abs(per_level) == float("inf")
    step = tl.div_rn(hi - lo, one * (LEVELS - 1))
    return tl.where(flat, 0.0, step), tl.where(flat, 1.0, per_level)


@triton.jit
def grid(used_ptr, index, LEVELS: tl.constexpr):
    """lo, step, 1 / step, centre of a range."""
    # [], []
    return grid_of(tl.load(used_ptr + 2 * index), tl.load(used_ptr + 2 * index + 1), LEVELS)


@triton.jit
def grid_of(lo, hi, LEVELS: tl.constexpr):
    """`grid` of a range by its ends."""
    step, per_level = steps(lo, hi, LEVELS)
    centre = nearest(tl.minimum(tl.maximum(-lo * per_level, 0.0), LEVELS - 1.0))
    return lo, step, per_level, centre


@triton.jit
def position(x, lo, per_level, LEVELS: tl.constexpr):
    """The code of values, as a float."""
    return nearest(tl.minimum(tl.maximum((x - lo) * per_level, 0.0), LEVELS - 1.0))


@triton.jit
def shown(x, lo, hi, step, per_level, centre, floor, LEVELS: tl.constexpr):
    """c of what the modulator shows of values, as a float; NaN stays NaN.

    `floor` is that of its look-up table, as a share of the range, or None.
    """
    code = tl.where(x == x, position(x, lo, per_level, LEVELS), x)
    c = code - centre
    if floor is not None:
        tiny = 2.384185791015625e-07 * tl.maximum(tl.abs(lo), tl.abs(hi))
        offset = lo + centre * step
        value = lo + code * step
        # only what the floor moves leaves the grid
        lifted = (tl.maximum(value, floor * hi) - offset) * per_level
        lowered = (tl.minimum(value, -floor * tl.abs(lo)) - offset) * per_level
        c = tl.where((value > tiny) & (value < floor * hi), lifted, c)
        c = tl.where((value < -tiny) & (value > -floor * tl.abs(lo)), lowered, c)
    return c


@triton.jit
def inside(x, lo, hi):
    """Where the modulator did not clip: `clipping.inside`."""
    return (x - lo >= 0) & (hi - x >= 0)


@triton.jit
def readout(acc, lo, step, per_level, keys, first, LEVELS: tl.constexpr, NOISE: tl.constexpr):
    """What the detector reads: `detect_`.

    Args:
        acc: float32 (rows, columns).
        lo: of the detector's range.
        step: of a level.
        per_level: its inverse.
        keys: uint32 (rows,), from `row_keys`.
        first: index of the first column, even.
    """
    read = (acc - lo) * per_level
    if NOISE == 1:
        PAIRS: tl.constexpr = acc.shape[1] // 2
        read += uniform(digits_of_pairs(keys, first // 2 + tl.arange(0, PAIRS)))
    return lo + step * whole(read, LEVELS)


@triton.jit
def shot(lit, electron, of_reads, digits):
    """The noise of light, `Lit.deviation` times normal numbers.

    Args:
        lit: float32 (...), light on detectors, in levels.
        electron: what one is worth, in levels.
        of_reads: variance of the reads, in levels squared.
        digits: of the noise, of the same shape.
    """
    deviation = tl.sqrt(tl.fma(tl.maximum(lit, 0.0), electron, of_reads))
    return normal(digits) * deviation


@triton.jit
def scale_of(lo, hi, per_level, EXACT: tl.constexpr):
    """Levels of an accumulator's unit: where `in_levels` left values what they are, 1."""
    return per_level if EXACT else tl.where(lo < hi, per_level, 1.0)


@triton.jit
def whole(read, LEVELS: tl.constexpr):
    """The level that a detector shows; NaN stays NaN."""
    # clamped first, which rounding to whole levels allows: it is exact below 2^22 alone
    read = tl.maximum(read, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return nearest(tl.minimum(read, LEVELS - 1.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def in_levels(product, by_row, by_column, added, lo, hi, per_level, NOISE: tl.constexpr):
    """The factors of a raw accumulator, and what is added to it, in levels of its detector.

    Returns the four, and what the result counts from: `raw = lo + (it + origin) * step`. Where a
    range was never set, or has no width, values stay what they are.
    """
    is_set = lo < hi
    per_level = tl.where(is_set, per_level, 1.0)
    origin = tl.where(is_set, ORIGIN if NOISE == 1 else 0.0, 0.0)
    added = (added - tl.where(is_set, lo, 0.0)) * per_level - origin
    return product * per_level, by_row * per_level, by_column * per_level, added, origin


@triton.jit
def row_values(low, high, mask, lo, hi, step, origin, EXACT: tl.constexpr):
    """Extremes of rows as values again, if `in_levels` made levels of them; see `candidates`."""
    if not EXACT:
        is_set = lo < hi
        first = tl.where(is_set, lo, 0.0)
        # too narrow a range has the step 0, and counts in ones
        step = tl.where(is_set & (step != 0), step, 1.0)
        low, high = first + step * (low + origin), first + step * (high + origin)
    low, _ = candidates(low, mask)
    _, high = candidates(high, mask)
    return low, high


@triton.jit
def level(x, keys, first, LEVELS: tl.constexpr, NOISE: tl.constexpr):
    """`readout` of what `in_levels` made, as a level; NaN stays NaN."""
    if NOISE == 1:
        PAIRS: tl.constexpr = x.shape[1] // 2
        x = add_uniform(x, digits_of_pairs(keys, first // 2 + tl.arange(0, PAIRS)))
    return whole(x, LEVELS)
