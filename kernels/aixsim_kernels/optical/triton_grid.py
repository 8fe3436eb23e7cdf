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

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from aixsim_kernels.common.triton_noise import uniform_pairs


def operand_type(out_dtype: torch.dtype, levels: int) -> torch.dtype:
    """Type of c for a result of this type: c is an integer whatever type the inputs have."""
    return torch.float32 if out_dtype == torch.float32 or levels > 256 else torch.float16


def operand(
    x: Tensor, used: Tensor, index: int, levels: int, lut_min: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """c of a modulator's values, floor included, and its sums over the last dimension.

    Args:
        x: (..., K), contiguous.
        used: float32 (n, 2).
        index: which of these ranges is the modulator's.
        levels: number of levels.
        lut_min: floor as a share of the range, 0 for none.
        dtype: of c.

    Returns:
        c (..., K) and float32 (...).
    """
    c = torch.empty(x.shape, dtype=dtype, device=x.device)
    sums = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if sums.numel():
        launch: Any = _operand_kernel[(triton.cdiv(sums.numel(), 16),)]
        launch(
            x_ptr=x,
            operand_ptr=c,
            sum_ptr=sums,
            used_ptr=used,
            index=index,
            n_rows=sums.numel(),
            depth=x.shape[-1],
            lut_min=lut_min,
            LEVELS=levels,
            FLOOR=lut_min > 0,
            ROWS=16,
            BLOCK=256,
        )
    return c, sums


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
    lo = tl.load(used_ptr + 2 * index)  # []
    hi = tl.load(used_ptr + 2 * index + 1)  # []
    step, per_level = steps(lo, hi, LEVELS)
    centre = nearest(tl.minimum(tl.maximum(-lo * per_level, 0.0), LEVELS - 1.0))
    return lo, step, per_level, centre


@triton.jit
def position(x, lo, per_level, LEVELS: tl.constexpr):
    """The code of values, as a float."""
    return nearest(tl.minimum(tl.maximum((x - lo) * per_level, 0.0), LEVELS - 1.0))


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
    if NOISE:
        PAIRS: tl.constexpr = acc.shape[1] // 2
        read += uniform_pairs(keys, first // 2 + tl.arange(0, PAIRS))
    # clamped first, which rounding to whole levels allows: it is exact below 2^22 alone
    clamped = tl.minimum(tl.maximum(read, 0.0), LEVELS - 1.0)
    return lo + step * nearest(tl.where(read == read, clamped, read))


@triton.jit
def _operand_kernel(
    x_ptr,
    operand_ptr,
    sum_ptr,
    used_ptr,
    index,
    n_rows,
    depth,
    lut_min,
    LEVELS: tl.constexpr,
    FLOOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lo, step, per_level, centre = grid(used_ptr, index, LEVELS)
    hi = tl.load(used_ptr + 2 * index + 1)  # []
    tiny = 2.384185791015625e-07 * tl.maximum(tl.abs(lo), tl.abs(hi))
    offset = lo + centre * step
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, depth, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = (rows[:, None] < n_rows) & (columns[None, :] < depth)
        offsets = rows[:, None] * depth + columns[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        code = tl.where(x == x, position(x, lo, per_level, LEVELS), x)
        c = code - centre
        if FLOOR:
            value = lo + code * step
            # only what the floor moves leaves the grid
            lifted = (tl.maximum(value, lut_min * hi) - offset) * per_level
            lowered = (tl.minimum(value, -lut_min * tl.abs(lo)) - offset) * per_level
            c = tl.where((value > tiny) & (value < lut_min * hi), lifted, c)
            c = tl.where((value < -tiny) & (value > -lut_min * tl.abs(lo)), lowered, c)
        operand = c.to(operand_ptr.dtype.element_ty)
        tl.store(operand_ptr + offsets, operand, mask=mask)  # [ROWS, BLOCK]
        total += tl.sum(tl.where(mask, operand.to(tl.float32), 0.0), 1)
    tl.store(sum_ptr + rows, total, mask=rows < n_rows)  # [ROWS]
