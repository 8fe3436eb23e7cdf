"""The optical linear layer on a GPU: what `reference.py` computes, the matmul in one fused pass.

A value is `offset + step * c` with an integer c, counted from the level nearest to zero: c is
exact in 16 bits, so that the products run on tensor cores and accumulate in float32. Values lifted
by the lookup-table floor lie between levels, and are the only ones that 16 bits round (to 2^-9 of a
level). With float32 inputs, or more than 256 levels, c is a float32 and nothing is rounded. With

    acc = step_x step_w (c_x . c_w) + step_x offset_w R_x + offset_x step_w R_w
          + K offset_x offset_w,                     R the row sums of c

the epilogue makes the raw accumulator, its extremes, noise, read-out and bias in registers.

Nothing here waits for the device: whether a range was ever set is decided there. The product's
range decides its read-out, so a first pass finds it and a second reads out; the second does nothing
where the range was set, which is always but in the first step.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from aixsim_kernels.common.noise import seed_word
from aixsim_kernels.common.triton_noise import row_keys, uniform_pairs
from aixsim_kernels.optical.linear.launch import FLAT, Tile, tile_for
from aixsim_kernels.optical.linear.reference import code_dtype
from aixsim_kernels.optical.quantize import mask_clipped_, mask_packed_

# programs that share the reduction of a tensor
_REDUCERS = 256


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ranges: Tensor,
    key: Tensor,
    stream: int,
    levels: int,
    lut_min: float,
    noise: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `reference.forward`, with ranges by the extremes."""
    (rows, depth), columns = x.shape, weight.shape[0]
    x, weight = x.contiguous(), weight.contiguous()
    observed, used = torch.empty_like(ranges), torch.empty_like(ranges)
    _settle(_extremes(x), ranges, observed, used, 0)
    _settle(_extremes(weight), ranges, observed, used, 1)
    x_code, x_inside, x_sum = _code(x, used, levels)
    operand_type = _operand_type(x.dtype, levels)
    w_operand, w_sum = _operand(weight, used, levels, lut_min, operand_type)
    y = x.new_empty(rows, columns, dtype=out_dtype)
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
    tile = tile_for(capability, rows, columns, operand_type == torch.float32)
    grid = (triton.cdiv(rows, tile.m) * triton.cdiv(columns, tile.n),)
    partial = x.new_empty(max(grid[0], 1), 2, dtype=torch.float32)
    if not grid[0]:
        partial[:, 0], partial[:, 1] = torch.inf, -torch.inf
    seed = seed_word(stream, 0)
    operands = (x_code, w_operand, x_sum, w_sum, bias, y, partial, ranges, used, key, seed)
    for second in (False, True):
        if grid[0]:
            launch: Any = _product[grid]
            launch(
                *operands,
                rows,
                columns,
                depth,
                LEVELS=levels,
                NOISE=noise,
                SECOND=second,
                EVEN=depth % tile.k == 0,
                **_parameters(tile),
            )
        if not second:
            _settle(partial, ranges, observed, used, 2)
    return y, observed, used, x_code, x_inside


def backward(
    grad: Tensor,
    x_code: Tensor,
    x_inside: Tensor,
    weight: Tensor,
    used: Tensor,
    levels: int,
    lut_min: float,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.backward`.

    The products are the vendor library's, in the gradient's own type, on the integers c, which that
    type holds exactly; steps and offsets are applied to their results.
    """
    operand_type = grad.dtype if levels <= 256 else torch.float32
    w_operand, _ = _operand(weight.contiguous(), used, levels, lut_min, operand_type)
    steps, offsets, centres = _grids(used, levels)
    g = grad.to(operand_type)
    total = grad.sum(1, dtype=torch.float32)
    grad_x = (g @ w_operand).float().mul_(steps[1]).add_((offsets[1] * total)[:, None])
    mask_packed_(grad_x, x_inside)
    x_operand = (x_code.float() - centres[0]).to(operand_type)
    grad_b = grad.sum(0, dtype=torch.float32)
    grad_w = (g.T @ x_operand).float().mul_(steps[0]).add_((offsets[0] * grad_b)[:, None])
    mask_clipped_(grad_w, weight, used[1])
    return grad_x.to(x_dtype), grad_w.to(weight.dtype), grad_b


def _operand_type(dtype: torch.dtype, levels: int) -> torch.dtype:
    return torch.float16 if dtype != torch.float32 and levels <= 256 else torch.float32


def _parameters(tile: Tile) -> dict[str, Any]:
    return {
        # the read-out is rounded where the reference rounds it
        "enable_fp_fusion": False,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _extremes(x: Tensor) -> Tensor:
    """Partial extremes of a tensor: float32 (n, 2), (-inf, …) where there is a NaN."""
    blocks = triton.cdiv(x.numel(), FLAT)
    partial = x.new_empty(max(1, min(blocks, _REDUCERS)), 2, dtype=torch.float32)
    launch: Any = _extremes_kernel[(len(partial),)]
    launch(x, partial, x.numel(), BLOCK=FLAT)
    return partial


def _settle(partial: Tensor, ranges: Tensor, observed: Tensor, used: Tensor, index: int) -> None:
    """Reduce partial extremes to `observed[index]`, and find the range to use."""
    launch: Any = _settle_kernel[(1,)]
    launch(partial, ranges, observed, used, index, len(partial), BLOCK=1024)


def _code(x: Tensor, used: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (M, K), packed bits of what is inside the range, row sums of c (NaN where x is)."""
    codes = torch.empty(x.shape, dtype=code_dtype(levels), device=x.device)
    bits = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=x.device)
    if x.numel():
        launch: Any = _code_kernel[(triton.cdiv(x.numel(), FLAT),)]
        launch(x, codes, bits, used, x.numel(), LEVELS=levels, BLOCK=FLAT)
    sums = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if len(x):
        launch = _row_sums_kernel[(triton.cdiv(len(x), 16),)]
        launch(x, codes, sums, used, *x.shape, LEVELS=levels, ROWS=16, BLOCK=256)
    return codes, bits, sums


def _operand(
    weight: Tensor, used: Tensor, levels: int, lut_min: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """c of the weight's values, floor included, (N, K), and its row sums (N,)."""
    operand = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    sums = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    if len(weight):
        launch: Any = _operand_kernel[(triton.cdiv(len(weight), 16),)]
        launch(
            weight,
            operand,
            sums,
            used,
            *weight.shape,
            lut_min,
            LEVELS=levels,
            FLOOR=lut_min > 0,
            ROWS=16,
            BLOCK=256,
        )
    return operand, sums


def _grids(used: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Step, offset and centre of each range, as `_grid` has them."""
    lo, hi = used.unbind(1)
    per_level = (levels - 1) / (hi - lo)
    flat = per_level.isinf()
    step = torch.where(flat, 0.0, (hi - lo) / (levels - 1))
    per_level = torch.where(flat, 1.0, per_level)
    centre = (-lo * per_level).clamp(0, levels - 1).round()
    return step, lo + centre * step, centre


@triton.jit
def _round(x):
    """To the nearest integer, ties to even, for |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _steps(lo, hi, LEVELS: tl.constexpr):
    """step and 1 / step: of a range without width 0 and 1. Rounded as torch rounds them."""
    one = lo * 0.0 + 1.0
    per_level = tl.div_rn(one, hi - lo) * (LEVELS - 1)
    flat = tl.abs(per_level) == float("inf")
    step = tl.div_rn(hi - lo, one * (LEVELS - 1))
    return tl.where(flat, 0.0, step), tl.where(flat, 1.0, per_level)


@triton.jit
def _grid(used_ptr, index, LEVELS: tl.constexpr):
    """lo, step, 1 / step, centre of a range."""
    lo = tl.load(used_ptr + 2 * index)
    hi = tl.load(used_ptr + 2 * index + 1)
    step, per_level = _steps(lo, hi, LEVELS)
    centre = _round(tl.minimum(tl.maximum(-lo * per_level, 0.0), LEVELS - 1.0))
    return lo, step, per_level, centre


@triton.jit
def _position(x, lo, per_level, LEVELS: tl.constexpr):
    """The code of values, as a float."""
    return _round(tl.minimum(tl.maximum((x - lo) * per_level, 0.0), LEVELS - 1.0))


@triton.jit
def _extremes_kernel(x_ptr, partial_ptr, n, BLOCK: tl.constexpr):
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, n, stride):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < n
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        # a NaN is no extreme, but must not be forgotten
        low = tl.where(mask, tl.minimum(low, tl.where(x == x, x, float("-inf"))), low)
        high = tl.where(mask, tl.maximum(high, tl.where(x == x, x, float("inf"))), high)
    tl.store(partial_ptr + 2 * tl.program_id(0), tl.min(low, 0))
    tl.store(partial_ptr + 2 * tl.program_id(0) + 1, tl.max(high, 0))


@triton.jit
def _settle_kernel(partial_ptr, ranges_ptr, observed_ptr, used_ptr, index, n, BLOCK: tl.constexpr):
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, n, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < n
        low = tl.minimum(low, tl.load(partial_ptr + 2 * offsets, mask, other=float("inf")))
        high = tl.maximum(high, tl.load(partial_ptr + 2 * offsets + 1, mask, other=float("-inf")))
    lo: Any = tl.min(low, 0)
    hi: Any = tl.max(high, 0)
    is_finite = (lo > float("-inf")) & (hi < float("inf"))
    lo = tl.where(is_finite, lo, float("inf"))
    hi = tl.where(is_finite, hi, float("-inf"))
    tl.store(observed_ptr + 2 * index, lo)
    tl.store(observed_ptr + 2 * index + 1, hi)
    set_lo, set_hi = tl.load(ranges_ptr + 2 * index), tl.load(ranges_ptr + 2 * index + 1)
    unset = set_lo > set_hi
    tl.store(used_ptr + 2 * index, tl.where(unset, lo, set_lo))
    tl.store(used_ptr + 2 * index + 1, tl.where(unset, hi, set_hi))


@triton.jit
def _code_kernel(x_ptr, code_ptr, bits_ptr, used_ptr, n, LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    lo, _, per_level, _ = _grid(used_ptr, 0, LEVELS)
    hi = tl.load(used_ptr + 1)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = first + tl.arange(0, BLOCK)
    mask = offsets < n
    # what lies behind the end is not inside
    x = tl.load(x_ptr + offsets, mask=mask, other=float("nan")).to(tl.float32)
    inside = (x - lo >= 0) & (hi - x >= 0)
    code = _position(tl.where(x == x, x, lo), lo, per_level, LEVELS)
    tl.store(code_ptr + offsets, code.to(tl.int32).to(code_ptr.dtype.element_ty), mask=mask)
    weights = tl.full((8,), 1, tl.int32) << tl.arange(0, 8)
    packed = tl.sum(tl.reshape(inside.to(tl.int32), (BLOCK // 8, 8)) * weights[None, :], 1)
    places = first // 8 + tl.arange(0, BLOCK // 8)
    tl.store(bits_ptr + places, packed.to(tl.uint8), mask=places < (n + 7) // 8)


@triton.jit
def _row_sums_kernel(
    x_ptr,
    code_ptr,
    sum_ptr,
    used_ptr,
    n_rows,
    depth,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _, _, _, centre = _grid(used_ptr, 0, LEVELS)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, depth, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = (rows[:, None] < n_rows) & (columns[None, :] < depth)
        offsets = rows[:, None] * depth + columns[None, :]
        code = tl.load(code_ptr + offsets, mask=mask, other=0).to(tl.float32)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        # a code cannot say NaN; the sum of its row does
        total += tl.sum(tl.where(mask, tl.where(x == x, code - centre, x), 0.0), 1)
    tl.store(sum_ptr + rows, total, mask=rows < n_rows)


@triton.jit
def _operand_kernel(
    w_ptr,
    operand_ptr,
    sum_ptr,
    used_ptr,
    n_rows,
    depth,
    lut_min,
    LEVELS: tl.constexpr,
    FLOOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lo, step, per_level, centre = _grid(used_ptr, 1, LEVELS)
    hi = tl.load(used_ptr + 3)
    tiny = 2.384185791015625e-07 * tl.maximum(tl.abs(lo), tl.abs(hi))
    offset = lo + centre * step
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, depth, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = (rows[:, None] < n_rows) & (columns[None, :] < depth)
        offsets = rows[:, None] * depth + columns[None, :]
        w = tl.load(w_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        code = tl.where(w == w, _position(w, lo, per_level, LEVELS), w)
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


# the seed is another number for every layer, which must not compile the kernel anew
@triton.jit(do_not_specialize=["seed"])
def _product(
    code_ptr,
    w_ptr,
    x_sum_ptr,
    w_sum_ptr,
    bias_ptr,
    y_ptr,
    partial_ptr,
    ranges_ptr,
    used_ptr,
    key_ptr,
    seed,
    M,
    N,
    K,
    LEVELS: tl.constexpr,
    NOISE: tl.constexpr,
    SECOND: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    depth = K
    if SECOND:
        unset = tl.load(ranges_ptr + 4) > tl.load(ranges_ptr + 5)
        # nothing is left to do: no step of the loop, no store
        depth = tl.where(unset, K, 0)
        M = tl.where(unset, M, 0)
    n_tiles = tl.cdiv(N, BLOCK_N)
    m_first = (tl.program_id(0) // n_tiles) * BLOCK_M
    n_first = (tl.program_id(0) % n_tiles) * BLOCK_N
    rows = m_first.to(tl.int64) + tl.arange(0, BLOCK_M)
    columns = n_first.to(tl.int64) + tl.arange(0, BLOCK_N)
    _, x_step, _, x_centre = _grid(used_ptr, 0, LEVELS)
    element = w_ptr.dtype.element_ty
    centre = x_centre.to(element)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x_mask = rows[:, None] < M
        w_mask = columns[None, :] < N
        if not EVEN:
            x_mask = x_mask & (inner[None, :] < K)
            w_mask = w_mask & (inner[:, None] < K)
        code = tl.load(code_ptr + rows[:, None] * K + inner[None, :], mask=x_mask, other=0)
        # behind the end both operands would have to be 0: the weight's is
        w = tl.load(w_ptr + columns[None, :] * K + inner[:, None], mask=w_mask, other=0.0)
        acc = tl.dot(code.to(element) - centre, w, acc, input_precision="ieee")

    _, w_step, _, w_centre = _grid(used_ptr, 1, LEVELS)
    x_offset = tl.load(used_ptr) + x_centre * x_step
    w_offset = tl.load(used_ptr + 2) + w_centre * w_step
    row_mask, column_mask = rows < M, columns < N
    mask = row_mask[:, None] & column_mask[None, :]
    x_sum = tl.load(x_sum_ptr + rows, mask=row_mask, other=0.0)
    w_sum = tl.load(w_sum_ptr + columns, mask=column_mask, other=0.0)
    by_row = x_step * w_offset * x_sum + K * x_offset * w_offset
    acc = x_step * w_step * acc + by_row[:, None] + (x_offset * w_step * w_sum)[None, :]

    if not SECOND:
        good = acc == acc
        low = tl.min(tl.min(tl.where(mask, tl.where(good, acc, float("-inf")), float("inf")), 1), 0)
        high = tl.max(
            tl.max(tl.where(mask, tl.where(good, acc, float("inf")), float("-inf")), 1), 0
        )
        tl.store(partial_ptr + 2 * tl.program_id(0), low)
        tl.store(partial_ptr + 2 * tl.program_id(0) + 1, high)
        lo, hi = tl.load(ranges_ptr + 4), tl.load(ranges_ptr + 5)
    else:
        lo, hi = tl.load(used_ptr + 4), tl.load(used_ptr + 5)
    step, per_level = _steps(lo, hi, LEVELS)
    read = (acc - lo) * per_level
    if NOISE:
        keys = row_keys(rows, tl.load(key_ptr), seed)
        read += uniform_pairs(keys, n_first // 2 + tl.arange(0, BLOCK_N // 2))
    # clamped first, which rounding to whole levels allows: it is exact below 2^22 alone
    clamped = tl.minimum(tl.maximum(read, 0.0), LEVELS - 1.0)
    y = lo + step * _round(tl.where(read == read, clamped, read))
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    y_offsets = rows[:, None] * N + columns[None, :]
    tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
