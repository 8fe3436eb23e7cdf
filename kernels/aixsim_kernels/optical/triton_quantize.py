"""The equations of `quantize.py` inside Triton kernels, and the passes that every operation makes.

A value is `offset + step * c` with an integer c, counted from the level nearest to zero: c is
exact in 16 bits, so that products run on tensor cores and accumulate in float32. Values lifted by
the lookup-table floor lie between levels, and are the only ones that 16 bits round (to 2^-9 of a
level). With float32 results, or more than 256 levels, c is a float32 and nothing is rounded.
"""

# triton's types say that a jit function returns nothing
# pyright: reportGeneralTypeIssues=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from aixsim_kernels.common.triton_noise import uniform_pairs

# elements a program of an element-wise kernel works on
FLAT = 4096
# programs that share the reduction of a tensor
_REDUCERS = 256


def operand_type(out_dtype: torch.dtype, levels: int) -> torch.dtype:
    """Type of c for a result of this type: c is an integer whatever type the inputs have."""
    return torch.float32 if out_dtype == torch.float32 or levels > 256 else torch.float16


class Found(NamedTuple):
    """What a call finds out about the tensors that it quantises, n of them.

    Args:
        observed: float32 (n, 2), their extremes.
        clipped: float32 (n,), shares beyond the range that was set.
        used: float32 (n, 2), the range that was set, or the extremes.
    """

    observed: Tensor
    clipped: Tensor
    used: Tensor


def new_found(ranges: Tensor) -> Found:
    """Room for what a call with these ranges (n, 2) finds out."""
    return Found(torch.empty_like(ranges), ranges.new_empty(len(ranges)), torch.empty_like(ranges))


def new_partial(programs: int, device: torch.device) -> Tensor:
    """Room for what each program finds out: float32 (programs, 4); see `store_partial`."""
    partial = torch.empty(max(programs, 1), 4, device=device)
    if not programs:
        # filled, not copied from the host
        partial.zero_()
        partial[:, 0], partial[:, 1] = torch.inf, -torch.inf
    return partial


def extremes(x: Tensor, ranges: Tensor, index: int) -> Tensor:
    """What programs find out about a contiguous tensor with the range `ranges[index]`: (n, 4)."""
    blocks = triton.cdiv(x.numel(), FLAT)
    count = max(1, min(blocks, _REDUCERS))
    partial = new_partial(count, x.device)  # pyright: ignore[reportArgumentType]
    launch: Any = _extremes_kernel[(count,)]
    launch(x, partial, ranges, index, x.numel(), BLOCK=FLAT)
    return partial


def settle(partial: Tensor, ranges: Tensor, found: Found, index: int) -> None:
    """Reduce what programs found out to row `index` of `found`, and find the range to use."""
    launch: Any = _settle_kernel[(1,)]
    launch(partial, ranges, *found, index, len(partial), BLOCK=1024)


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
            x,
            c,
            sums,
            used,
            index,
            sums.numel(),
            x.shape[-1],
            lut_min,
            LEVELS=levels,
            FLOOR=lut_min > 0,
            ROWS=16,
            BLOCK=256,
        )
    return c, sums


def finish_grad(
    product: Tensor,
    total: Tensor,
    kept: Tensor,
    used: Tensor,
    own: int,
    levels: int,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of an operand from the product of the output's gradient with the other's c.

    Args:
        product: (M, K), contiguous.
        total: float32 (M,), sums of what c was multiplied by.
        kept: where the gradient passes: the operand itself (M, K), contiguous, to be compared with
            its range, or the packed bits of `pack_inside`, uint8 (ceil(M * K / 8),).
        used: float32 (n, 2); rows 0 and 1 are the operands'.
        own: row of this operand; the other's step and offset are applied.
        levels: number of levels.
        dtype: of the result.

    Returns:
        (M, K) in `dtype`.
    """
    out = torch.empty(product.shape, dtype=dtype, device=product.device)
    if out.numel():
        launch: Any = _grad_kernel[(triton.cdiv(out.numel(), FLAT),)]
        launch(
            product,
            total,
            kept,
            used,
            out,
            own,
            out.numel(),
            out.shape[1],
            LEVELS=levels,
            PACKED=kept.dtype == torch.uint8,
            BLOCK=FLAT,
        )
    return out


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
    lo = tl.load(used_ptr + 2 * index)
    hi = tl.load(used_ptr + 2 * index + 1)
    step, per_level = steps(lo, hi, LEVELS)
    centre = nearest(tl.minimum(tl.maximum(-lo * per_level, 0.0), LEVELS - 1.0))
    return lo, step, per_level, centre


@triton.jit
def position(x, lo, per_level, LEVELS: tl.constexpr):
    """The code of values, as a float."""
    return nearest(tl.minimum(tl.maximum((x - lo) * per_level, 0.0), LEVELS - 1.0))


@triton.jit
def inside(x, lo, hi):
    """Where the modulator did not clip: `quantize.inside`."""
    return (x - lo >= 0) & (hi - x >= 0)


@triton.jit
def clips(ranges_ptr, index):
    """Between which values nothing is clipped: the range, or all where it was never set."""
    lo, hi = tl.load(ranges_ptr + 2 * index), tl.load(ranges_ptr + 2 * index + 1)
    is_set = lo <= hi
    return tl.where(is_set, lo, float("-inf")), tl.where(is_set, hi, float("inf"))


@triton.jit
def _extremes_kernel(x_ptr, partial_ptr, ranges_ptr, index, n, BLOCK: tl.constexpr):
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    beyond = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    lo, hi = clips(ranges_ptr, index)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, n, stride):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < n
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # (BLOCK,)
        # a NaN is no extreme, but must not be forgotten
        least, most = candidates(x, mask)
        low, high = tl.minimum(low, least), tl.maximum(high, most)
        beyond += tl.where((least < lo) | (most > hi), 1.0, 0.0)
        count += mask.to(tl.float32)
    store_partial(partial_ptr, low, high, beyond, count)


@triton.jit
def _settle_kernel(
    partial_ptr,
    ranges_ptr,
    observed_ptr,
    clipped_ptr,
    used_ptr,
    index,
    n,
    BLOCK: tl.constexpr,
):
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    beyond = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        programs = start + tl.arange(0, BLOCK)
        mask = programs < n
        one = partial_ptr + 4 * programs  # (BLOCK,)
        low = tl.minimum(low, tl.load(one, mask, other=float("inf")))
        high = tl.maximum(high, tl.load(one + 1, mask, other=float("-inf")))
        beyond += tl.load(one + 2, mask, other=0.0)
        count += tl.load(one + 3, mask, other=0.0)
    lo = tl.min(low, 0)
    hi = tl.max(high, 0)
    is_finite = (lo > float("-inf")) & (hi < float("inf"))  # pyright: ignore[reportOperatorIssue]
    lo = tl.where(is_finite, lo, float("inf"))
    hi = tl.where(is_finite, hi, float("-inf"))
    tl.store(observed_ptr + 2 * index, lo)
    tl.store(observed_ptr + 2 * index + 1, hi)
    # rows of NaN are clipped, but attend to nothing
    share = tl.minimum(tl.sum(beyond, 0) / tl.maximum(tl.sum(count, 0), 1.0), 1.0)
    tl.store(clipped_ptr + index, share)
    set_lo, set_hi = tl.load(ranges_ptr + 2 * index), tl.load(ranges_ptr + 2 * index + 1)
    unset = set_lo > set_hi
    tl.store(used_ptr + 2 * index, tl.where(unset, lo, set_lo))
    tl.store(used_ptr + 2 * index + 1, tl.where(unset, hi, set_hi))


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
    hi = tl.load(used_ptr + 2 * index + 1)
    tiny = 2.384185791015625e-07 * tl.maximum(tl.abs(lo), tl.abs(hi))
    offset = lo + centre * step
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, depth, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = (rows[:, None] < n_rows) & (columns[None, :] < depth)
        offsets = rows[:, None] * depth + columns[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
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
        tl.store(operand_ptr + offsets, operand, mask=mask)
        total += tl.sum(tl.where(mask, operand.to(tl.float32), 0.0), 1)
    tl.store(sum_ptr + rows, total, mask=rows < n_rows)


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
def candidates(acc, mask):
    """What each element says the extremes are: itself; NaN -inf and inf; (inf, -inf) if masked."""
    good = acc == acc
    low = tl.where(mask, tl.where(good, acc, float("-inf")), float("inf"))
    high = tl.where(mask, tl.where(good, acc, float("inf")), float("-inf"))
    return low, high


@triton.jit
def row_extremes(acc, mask):
    """Extremes of each row where the mask lets through; (-inf, inf) where there is a NaN."""
    low, high = candidates(acc, mask)
    return tl.min(low, 1), tl.max(high, 1)


@triton.jit
def are_clipped(low, high, ranges_ptr, index):
    """1 where a range does not hold these extremes, 0 where it does or was never set."""
    lo, hi = clips(ranges_ptr, index)
    return tl.where((low < lo) | (high > hi), 1.0, 0.0)


@triton.jit
def store_partial(partial_ptr, low, high, beyond, count):
    """Store a program's extremes and how many are clipped, of how many, from those of its rows."""
    partial_ptr += 4 * tl.program_id(0)
    tl.store(partial_ptr, tl.min(low, 0))
    tl.store(partial_ptr + 1, tl.max(high, 0))
    tl.store(partial_ptr + 2, tl.sum(beyond, 0))
    tl.store(partial_ptr + 3, tl.sum(count, 0))


@triton.jit
def _grad_kernel(
    product_ptr,
    total_ptr,
    kept_ptr,
    used_ptr,
    out_ptr,
    own,
    n,
    columns,
    LEVELS: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lo, step, _, centre = grid(used_ptr, 1 - own, LEVELS)
    offset = lo + centre * step
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    grad = tl.load(product_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    grad = step * grad + offset * tl.load(total_ptr + offsets // columns, mask=mask, other=0.0)
    if PACKED:
        bits = tl.load(kept_ptr + offsets // 8, mask=mask, other=0).to(tl.int32)
        passes = ((bits >> (offsets % 8).to(tl.int32)) & 1) != 0
    else:
        own_lo, own_hi = tl.load(used_ptr + 2 * own), tl.load(used_ptr + 2 * own + 1)
        value = tl.load(kept_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        passes = inside(value, own_lo, own_hi)
    # a product with 0, not a choice: NaN stays NaN
    grad *= passes.to(tl.float32)
    tl.store(out_ptr + offsets, grad.to(out_ptr.dtype.element_ty), mask=mask)
