"""The optical linear layer on a GPU: what `cpu.py` computes, the matmul in one fused pass.

Operands are the integers c of `triton_grid.py`. With R the row sums of c,

    acc = step_x step_w (c_x . c_w) + step_x offset_w R_x + offset_x step_w R_w
          + K offset_x offset_w

is the raw accumulator; the epilogue makes it, its extremes, noise, read-out and bias in registers.

Nothing here waits for the device. The input's range decides its codes, the product's its read-out.
Where the host does not know that these were ever set, what works in them is launched twice: the
second works in the range that the first found, or returns at once.

Legend: x (M, K), w (N, K), y (M, N); a program makes a tile [BLOCK_M, BLOCK_N] of y. `code` is that
of x, `x_sum` and `w_sum` are the R above; `ranges` those that were set, `used` those to work with;
`partial` what a program finds out. A comment gives the shape of a value, [] of a number.
"""

# triton's types say that a jit function returns nothing
# pyright: reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from aixsim_kernels.common.noise import seed_word
from aixsim_kernels.common.triton_noise import digits_of_pairs, global_rows, row_keys
from aixsim_kernels.optical.light import lamp_results, lamps_of
from aixsim_kernels.optical.linear.triton_light import light_on
from aixsim_kernels.optical.linear.triton_passes import (
    code,
    code_programs,
    finish_input_grad,
    sums_and_operand,
    weight_grad_and_operand,
)
from aixsim_kernels.optical.settings import Settings
from aixsim_kernels.optical.tiles import LinearTile, linear_tile
from aixsim_kernels.optical.triton_grid import (
    grid,
    in_levels,
    level,
    noise_kind,
    operand_type,
    readout,
    row_values,
    scale_of,
    shot,
    steps,
    whole,
)
from aixsim_kernels.optical.triton_operands import Modulated, by_rows, operand_programs, operands
from aixsim_kernels.optical.triton_ranges import (
    Findings,
    of_operands,
    row_extremes,
    settled,
    store_partial,
)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ranges: Tensor,
    key: Tensor,
    settings: Settings,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `cpu.forward`, with ranges by the extremes."""
    (rows, depth), columns, levels = x.shape, weight.shape[0], settings.levels
    x, weight = x.contiguous(), by_rows(weight)
    kind = operand_type(out_dtype, levels)
    tile = linear_tile(x.device, rows, columns, kind == torch.float32, settings.has_light)
    tiles: Any = triton.cdiv(rows, tile.m) * triton.cdiv(columns, tile.n)
    own = of_operands(ranges, 3)
    findings = Findings(own, [code_programs(x), operand_programs(weight), tiles])
    x_code, x_inside, x_sum = code(x, findings, levels)
    shown = Modulated(weight, 1, settings.lut_min, kind)
    ((w_operand, w_sum, _),) = operands([shown], findings, levels)
    y = x.new_empty(rows, columns, dtype=out_dtype)
    lamps = lamps_of(ranges[3:], settings)
    of_row, of_column = None, None
    for lamp in lamps:
        of_row, of_column = light_on(lamp, x_code, x_sum, w_operand, findings.at, settings)
    findings.look(
        _product,
        2,
        lit_row_ptr=of_row,
        lit_column_ptr=of_column,
        lamp_ptr=lamps[0].of_kernels(settings) if lamps else None,
        code_ptr=x_code,
        w_ptr=w_operand,
        x_sum_ptr=x_sum,
        w_sum_ptr=w_sum,
        bias_ptr=bias,
        y_ptr=y,
        key_ptr=key,
        seed=seed_word(settings.stream, 0),
        M=rows,
        N=columns,
        K=depth,
        LEVELS=levels,
        LEVELS_OUT=settings.detector_levels,
        NOISE=noise_kind(settings),
        PLACED=key.dim() > 0,
        EVEN=depth % tile.k == 0,
        WHOLE=rows % tile.m == 0 and columns % tile.n == 0,
        **_parameters(tile),
    )
    findings.settle()
    seen, used = lamp_results(lamps, findings.seen, findings.used)
    return y, seen, used, x_code, x_inside


def backward(
    grad: Tensor,
    x_code: Tensor,
    x_inside: Tensor,
    weight: Tensor,
    used: Tensor,
    key: Tensor,
    settings: Settings,
    x_dtype: torch.dtype,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cpu.backward`, of pixels that are all alike.

    The products are the vendor library's, on the integers c, which the gradient's type holds
    exactly; steps and offsets are applied to their results.
    """
    levels = settings.levels
    if not grad.numel():
        # ranges that were never set have no step, and nothing times that is no number
        by_column = torch.zeros(len(weight) if wants_bias else 0, device=grad.device)
        return x_code.new_zeros(x_code.shape, dtype=x_dtype), torch.zeros_like(weight), by_column
    kind = grad.dtype if levels <= 256 else torch.float32
    grad, weight = grad.to(kind).contiguous(), weight.contiguous()
    by_row, partial, x_operand = sums_and_operand(grad, x_code, used, levels)
    grad_w = _matmul(grad.T, x_operand, torch.float32)
    del x_operand
    grad_w, by_column, w_operand = weight_grad_and_operand(
        grad_w, partial, weight, used, levels, settings.lut_min, kind
    )
    # the input's gradient is rounded to 16 bits in the end, and may be on the way; in float16, sums
    # of c would overflow
    between = torch.bfloat16 if kind == x_dtype == torch.bfloat16 else torch.float32
    grad_x = _matmul(grad, w_operand, between)
    grad_x = finish_input_grad(grad_x, by_row, x_inside, used, levels, x_dtype)
    return grad_x, grad_w, by_column if wants_bias else by_column.new_empty(0)


def _matmul(a: Tensor, b: Tensor, out: torch.dtype) -> Tensor:
    """a @ b, in the type `out`."""
    if out == a.dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out)
    return a.float() @ b.float()


def _parameters(tile: LinearTile) -> dict[str, Any]:
    return {
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


@triton.jit
def _found(
    acc, row_mask, mask, lo, hi, step, origin, LEVELS_OUT: tl.constexpr, EXACT, WHOLE: tl.constexpr
):
    """Extremes of each row of a tile, and how many of it lie beyond the range, if it was set."""
    low, high = acc, acc
    if not WHOLE:
        low = tl.where(mask, acc, float("inf"))
        high = tl.where(mask, acc, float("-inf"))
    first, last = lo, hi
    if not EXACT:
        first = tl.where(lo < hi, -origin, lo)
        last = tl.where(lo < hi, LEVELS_OUT - 1.0 - origin, hi)
    # a NaN is beyond too
    beyond = tl.sum(tl.where((low >= first) & (high <= last), 0.0, 1.0), 1)
    low, high = row_extremes(low, high)
    low, high = row_values(low, high, row_mask, lo, hi, step, origin, EXACT)
    return low, high, tl.where(lo <= hi, beyond, 0.0)


@triton.jit
def _noise(acc, row, column, lamp_ptr, lo, hi, per_level, keys, first, NOISE: tl.constexpr, EXACT):
    """Of the light on a tile, in levels; row and column, [rows] and [columns], are `light_on`'s."""
    row, column = row[:, None], column[None, :]
    digits = digits_of_pairs(keys, first // 2 + tl.arange(0, acc.shape[1] // 2))
    per = scale_of(lo, hi, per_level, EXACT)
    electron = tl.load(lamp_ptr) * per  # []
    of_reads = tl.load(lamp_ptr + 1) * per * per  # []
    if NOISE == 2:
        lit = row * per * column
    elif EXACT:
        lit = (acc + row + column) * per
    else:
        # levels count from the detector's lowest
        lit = acc + (row + tl.where(lo < hi, lo, 0.0)) * per + column * per
    return shot(lit, electron, of_reads, digits)


# the seed is another number for every layer; 32 bits of it compile the kernel twice, no more
@triton.jit(do_not_specialize=["seed", "n_partial"])
def _product(
    code_ptr,
    w_ptr,
    x_sum_ptr,
    w_sum_ptr,
    bias_ptr,
    y_ptr,
    partial_ptr,
    n_partial,
    ranges_ptr,
    used_ptr,
    lit_row_ptr,
    lit_column_ptr,
    lamp_ptr,
    key_ptr,
    seed,
    M,
    N,
    K,
    LEVELS: tl.constexpr,
    LEVELS_OUT: tl.constexpr,
    NOISE: tl.constexpr,
    PLACED: tl.constexpr,
    SECOND: tl.constexpr,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    lo, hi = tl.load(ranges_ptr + 4), tl.load(ranges_ptr + 5)  # [], []
    if SECOND:
        # the first launch had its range, and has read out
        if lo <= hi:
            return
        lo, hi = settled(partial_ptr, n_partial, ranges_ptr, used_ptr, 2, tl.program_id(0))
    n_tiles = tl.cdiv(N, BLOCK_N)
    m_first = (tl.program_id(0) // n_tiles) * BLOCK_M
    n_first = (tl.program_id(0) % n_tiles) * BLOCK_N
    rows = m_first.to(tl.int64) + tl.arange(0, BLOCK_M)
    columns = n_first.to(tl.int64) + tl.arange(0, BLOCK_N)
    _, x_step, _, x_centre = grid(used_ptr, 0, LEVELS)
    element = w_ptr.dtype.element_ty
    centre = x_centre.to(element)
    if element == tl.float16:
        # a code becomes the lowest digits of 1024, as a conversion is slow (`as_digits`)
        centre += 1024
    EXACT: tl.constexpr = element == tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x_mask = rows[:, None] < M
        w_mask = columns[None, :] < N
        if not EVEN:
            x_mask = x_mask & (inner[None, :] < K)
            w_mask = w_mask & (inner[:, None] < K)
        # [BLOCK_M, BLOCK_K]
        code = tl.load(code_ptr + rows[:, None] * K + inner[None, :], mask=x_mask, other=0)
        # behind the end both operands would have to be 0: the weight's is; [BLOCK_K, BLOCK_N]
        w = tl.load(w_ptr + columns[None, :] * K + inner[:, None], mask=w_mask, other=0.0)
        if element == tl.float16:
            number = (code.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
        else:
            number = code.to(element)
        # [BLOCK_M, BLOCK_K] @ [BLOCK_K, BLOCK_N] -> [BLOCK_M, BLOCK_N]
        acc = tl.dot(number - centre, w, acc, input_precision="ieee")

    _, w_step, _, w_centre = grid(used_ptr, 1, LEVELS)
    x_offset = tl.load(used_ptr) + x_centre * x_step  # []
    w_offset = tl.load(used_ptr + 2) + w_centre * w_step  # []
    row_mask, column_mask = rows < M, columns < N
    mask = row_mask[:, None] & column_mask[None, :]
    x_sum = tl.load(x_sum_ptr + rows, mask=row_mask, other=0.0)  # [BLOCK_M]
    w_sum = tl.load(w_sum_ptr + columns, mask=column_mask, other=0.0)  # [BLOCK_N]
    step, per_level = steps(lo, hi, LEVELS_OUT)
    product, of_row, of_column = x_step * w_step, x_step * w_offset, x_offset * w_step
    of_all = K * x_offset * w_offset
    origin = 0.0
    if not EXACT:
        product, of_row, of_column, of_all, origin = in_levels(
            product, of_row, of_column, of_all, lo, hi, per_level, NOISE
        )
    by_row = of_row * x_sum + of_all  # [BLOCK_M]
    by_column = of_column * w_sum  # [BLOCK_N]
    # [BLOCK_M, BLOCK_N]
    if EXACT:
        acc = product * acc + by_row[:, None] + by_column[None, :]
    else:
        acc = tl.fma(acc, product, by_row[:, None] + by_column[None, :])

    if not SECOND:
        low, high, beyond = _found(
            acc, row_mask, mask, lo, hi, step, origin, LEVELS_OUT, EXACT, WHOLE
        )
        count = tl.where(row_mask, tl.minimum(N - n_first, BLOCK_N).to(tl.float32), 0.0)
        store_partial(partial_ptr, tl.program_id(0), low, high, beyond, count)
    of_whole, column = rows, n_first
    if PLACED:
        here = tl.load(key_ptr + 1)  # []
        of_whole = global_rows(key_ptr, rows // here, rows % here, 1, here, PLACED)
        column = n_first + tl.load(key_ptr + 6).to(tl.int32)  # []
    keys = row_keys(of_whole, tl.load(key_ptr), seed)  # [BLOCK_M], of the key []
    # [BLOCK_M, BLOCK_N]
    if NOISE >= 2:
        lit_row = tl.load(lit_row_ptr + rows, mask=row_mask, other=0.0)  # [BLOCK_M]
        lit_column = tl.load(lit_column_ptr + columns, mask=column_mask, other=0.0)  # [BLOCK_N]
        noise = _noise(
            acc, lit_row, lit_column, lamp_ptr, lo, hi, per_level, keys, column, NOISE, EXACT
        )
        acc = ((acc - lo) * per_level if EXACT else acc) + noise
        y = tl.fma(whole(acc, LEVELS_OUT), step, lo)
    elif EXACT:
        y = readout(acc, lo, step, per_level, keys, column, LEVELS_OUT, NOISE)
    else:
        y = tl.fma(level(acc, keys, column, LEVELS_OUT, NOISE), step, lo)
    if bias_ptr is not None:
        # [1, BLOCK_N]
        y += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    y_offsets = rows[:, None] * N + columns[None, :]
    tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)  # [BLOCK_M, BLOCK_N]
