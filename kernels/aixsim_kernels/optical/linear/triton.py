"""The optical linear layer on a GPU: what `cpu.py` computes, the matmul in one fused pass.

Operands are the integers c of `triton_grid.py`. With R the row sums of c,

    acc = step_x step_w (c_x . c_w) + step_x offset_w R_x + offset_x step_w R_w
          + K offset_x offset_w

is the raw accumulator; the epilogue makes it, its extremes, noise, read-out and bias in registers.

Nothing here waits for the device: whether a range was ever set is decided there. The input's range
decides its codes, the product's its read-out, so a first pass finds it and a second codes or reads
out; the second does nothing where the range was set, which is always but in the first step.

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
from aixsim_kernels.common.triton_noise import global_rows, row_keys
from aixsim_kernels.optical.linear.cpu import code_dtype
from aixsim_kernels.optical.settings import Settings
from aixsim_kernels.optical.tiles import LinearTile, linear_tile
from aixsim_kernels.optical.triton_clipping import finish_grad, inside
from aixsim_kernels.optical.triton_grid import (
    grid,
    in_levels,
    level,
    operand,
    operand_type,
    out_of_levels,
    position,
    readout,
    steps,
)
from aixsim_kernels.optical.triton_ranges import (
    FLAT,
    Found,
    candidates,
    extremes,
    new_found,
    new_partial,
    row_extremes,
    settle,
    store_partial,
)

# of the input that a program codes
_ROWS = 8


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ranges: Tensor,
    key: Tensor,
    settings: Settings,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `cpu.forward`, with ranges by the extremes."""
    (rows, depth), columns, levels = x.shape, weight.shape[0], settings.levels
    x, weight = x.contiguous(), weight.contiguous()
    found = new_found(ranges)
    used = found.used
    x_code, x_inside, x_sum = _code(x, ranges, found, levels)
    settle(extremes(weight, ranges, 1), ranges, found, 1)
    kind = operand_type(out_dtype, levels)
    w_operand, w_sum, _ = operand(weight, used, 1, levels, settings.lut_min, kind)
    y = x.new_empty(rows, columns, dtype=out_dtype)
    tile = linear_tile(x.device, rows, columns, kind == torch.float32)
    programs = triton.cdiv(rows, tile.m) * triton.cdiv(columns, tile.n)
    partial = new_partial(programs, x.device)  # pyright: ignore[reportArgumentType]
    for second in (False, True):
        if programs:
            launch: Any = _product[(programs,)]
            launch(
                code_ptr=x_code,
                w_ptr=w_operand,
                x_sum_ptr=x_sum,
                w_sum_ptr=w_sum,
                bias_ptr=bias,
                y_ptr=y,
                partial_ptr=partial,
                ranges_ptr=ranges,
                used_ptr=used,
                key_ptr=key,
                seed=seed_word(settings.stream, 0),
                M=rows,
                N=columns,
                K=depth,
                LEVELS=levels,
                NOISE=settings.noise,
                PLACED=key.dim() > 0,
                SECOND=second,
                EVEN=depth % tile.k == 0,
                WHOLE=rows % tile.m == 0 and columns % tile.n == 0,
                **_parameters(tile),
            )
        if not second:
            settle(partial, ranges, found, 2)
    return y, found.observed, found.clipped, used, x_code, x_inside


def backward(
    grad: Tensor,
    x_code: Tensor,
    x_inside: Tensor,
    weight: Tensor,
    used: Tensor,
    settings: Settings,
    x_dtype: torch.dtype,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cpu.backward`.

    The products are the vendor library's, on the integers c, which the gradient's type holds
    exactly; steps and offsets are applied to their results.
    """
    levels = settings.levels
    kind = grad.dtype if levels <= 256 else torch.float32
    grad, weight = grad.to(kind), weight.contiguous()
    w_operand = operand(weight, used, 1, levels, settings.lut_min, kind).c
    total = grad.sum(1, dtype=torch.float32)
    grad_x = finish_grad(_matmul(grad, w_operand), total, x_inside, used, 0, levels, x_dtype)
    del w_operand
    by_column = grad.sum(0, dtype=torch.float32)
    x_operand = _centred(x_code, used, levels, kind)
    grad_w = _matmul(grad.T, x_operand)
    grad_w = finish_grad(grad_w, by_column, weight, used, 1, levels, weight.dtype)
    return grad_x, grad_w, by_column if wants_bias else by_column.new_empty(0)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32: in float16, sums of c would overflow."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _parameters(tile: LinearTile) -> dict[str, Any]:
    return {
        # the read-out is rounded where `cpu.py` rounds it
        "enable_fp_fusion": False,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _code(x: Tensor, ranges: Tensor, found: Found, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (M, K), packed bits of what is inside the range, row sums of c (NaN where x is).

    And what is found out about x: row 0 of `found`.
    """
    codes = torch.empty(x.shape, dtype=code_dtype(levels), device=x.device)
    bits = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=x.device)
    sums = torch.empty(len(x), dtype=torch.float32, device=x.device)
    programs = triton.cdiv(len(x), _ROWS) if x.shape[1] else 0
    partial = new_partial(programs, x.device)  # pyright: ignore[reportArgumentType]
    in_rows = x.shape[1] % 8 == 0
    for second in (False, True):
        if programs:
            launch: Any = _code_kernel[(programs,)]
            launch(
                x_ptr=x,
                code_ptr=codes,
                bits_ptr=bits if in_rows else None,
                sum_ptr=sums,
                partial_ptr=partial,
                ranges_ptr=ranges,
                used_ptr=found.used,
                n_rows=len(x),
                depth=x.shape[1],
                LEVELS=levels,
                SECOND=second,
                ROWS=_ROWS,
                BLOCK=256,
            )
        if not second:
            settle(partial, ranges, found, 0)
    if not programs:
        sums.zero_()
    elif not in_rows:
        launch = _pack_kernel[(triton.cdiv(x.numel(), FLAT),)]
        launch(x_ptr=x, bits_ptr=bits, used_ptr=found.used, n=x.numel(), BLOCK=FLAT)
    return codes, bits, sums


def _centred(codes: Tensor, used: Tensor, levels: int, dtype: torch.dtype) -> Tensor:
    """c of an input's codes."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if codes.numel():
        launch: Any = _centred_kernel[(triton.cdiv(codes.numel(), FLAT),)]
        launch(
            code_ptr=codes, out_ptr=out, used_ptr=used, n=codes.numel(), LEVELS=levels, BLOCK=FLAT
        )
    return out


@triton.jit
def _code_kernel(
    x_ptr,
    code_ptr,
    bits_ptr,
    sum_ptr,
    partial_ptr,
    ranges_ptr,
    used_ptr,
    n_rows,
    depth,
    LEVELS: tl.constexpr,
    SECOND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All that is made of x, in one visit; a second launch where its range was never set."""
    if SECOND:
        if tl.load(ranges_ptr) <= tl.load(ranges_ptr + 1):  # [], []
            return
        bounds_ptr = used_ptr
    else:
        bounds_ptr = ranges_ptr
    lo, _, per_level, centre = grid(bounds_ptr, 0, LEVELS)
    hi = tl.load(bounds_ptr + 1)  # []
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    beyond = tl.zeros((ROWS,), tl.float32)
    low = tl.full((ROWS, BLOCK), float("inf"), tl.float32)
    high = tl.full((ROWS, BLOCK), float("-inf"), tl.float32)
    for start in range(0, depth, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = (rows[:, None] < n_rows) & (columns[None, :] < depth)
        offsets = rows[:, None] * depth + columns[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        least, most = candidates(x, mask)
        low, high = tl.minimum(low, least), tl.maximum(high, most)
        is_inside = inside(x, lo, hi) & mask
        beyond += tl.sum((mask & ~is_inside).to(tl.float32), 1)
        code = position(tl.where(x == x, x, lo), lo, per_level, LEVELS)
        # [ROWS, BLOCK]
        tl.store(code_ptr + offsets, code.to(tl.int32).to(code_ptr.dtype.element_ty), mask=mask)
        # a code cannot say NaN; the sum of its row does
        total += tl.sum(tl.where(mask, tl.where(x == x, code - centre, x), 0.0), 1)
        if bits_ptr is not None:
            eights = tl.reshape(is_inside.to(tl.int32), (ROWS, BLOCK // 8, 8))
            packed = tl.sum(eights << tl.arange(0, 8)[None, None, :], 2)
            octets = start // 8 + tl.arange(0, BLOCK // 8)
            places = rows[:, None] * (depth // 8) + octets[None, :]
            here = (rows[:, None] < n_rows) & (octets[None, :] < depth // 8)
            tl.store(bits_ptr + places, packed.to(tl.uint8), mask=here)  # [ROWS, BLOCK / 8]
    tl.store(sum_ptr + rows, total, mask=rows < n_rows)  # [ROWS]
    if not SECOND:
        is_set = lo <= hi
        count = tl.where(rows < n_rows, depth.to(tl.float32), 0.0)
        beyond = tl.where(is_set, beyond, 0.0)
        store_partial(partial_ptr, tl.min(low, 1), tl.max(high, 1), beyond, count)


@triton.jit
def _pack_kernel(x_ptr, bits_ptr, used_ptr, n, BLOCK: tl.constexpr):
    """The bits of rows whose length 8 does not divide."""
    lo, hi = tl.load(used_ptr), tl.load(used_ptr + 1)  # [], []
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = first + tl.arange(0, BLOCK)
    # what lies behind the end is not inside; [BLOCK]
    x = tl.load(x_ptr + offsets, mask=offsets < n, other=float("nan")).to(tl.float32)
    eights = tl.reshape(inside(x, lo, hi).to(tl.int32), (BLOCK // 8, 8))
    packed = tl.sum(eights << tl.arange(0, 8)[None, :], 1)
    places = first // 8 + tl.arange(0, BLOCK // 8)
    # [BLOCK / 8]
    tl.store(bits_ptr + places, packed.to(tl.uint8), mask=places < (n + 7) // 8)


@triton.jit
def _centred_kernel(code_ptr, out_ptr, used_ptr, n, LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    _, _, _, centre = grid(used_ptr, 0, LEVELS)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    code = tl.load(code_ptr + offsets, mask=mask, other=0).to(tl.float32)  # [BLOCK]
    # [BLOCK]
    tl.store(out_ptr + offsets, (code - centre).to(out_ptr.dtype.element_ty), mask=mask)


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
    PLACED: tl.constexpr,
    SECOND: tl.constexpr,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    if SECOND:  # noqa: SIM102 (a constant, which Triton decides on as it compiles)
        # the first launch had its range, and has read out
        if tl.load(ranges_ptr + 4) <= tl.load(ranges_ptr + 5):  # [], []
            return
    n_tiles = tl.cdiv(N, BLOCK_N)
    m_first = (tl.program_id(0) // n_tiles) * BLOCK_M
    n_first = (tl.program_id(0) % n_tiles) * BLOCK_N
    rows = m_first.to(tl.int64) + tl.arange(0, BLOCK_M)
    columns = n_first.to(tl.int64) + tl.arange(0, BLOCK_N)
    _, x_step, _, x_centre = grid(used_ptr, 0, LEVELS)
    element = w_ptr.dtype.element_ty
    centre = x_centre.to(element)
    if element == tl.float16:
        # a code becomes the lowest digits of 1024, as a conversion is slow (`triton_noise.signed`)
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
    bounds_ptr = used_ptr if SECOND else ranges_ptr
    lo, hi = tl.load(bounds_ptr + 4), tl.load(bounds_ptr + 5)  # [], []
    step, per_level = steps(lo, hi, LEVELS)
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
        low, high = acc, acc
        if not WHOLE:
            low = tl.where(mask, acc, float("inf"))
            high = tl.where(mask, acc, float("-inf"))
        # a NaN is beyond too
        first, last = (lo, hi) if EXACT else (-origin, LEVELS - 1.0 - origin)
        beyond = tl.where((low >= first) & (high <= last), 0.0, 1.0)
        count = tl.where(row_mask, tl.minimum(N - n_first, BLOCK_N).to(tl.float32), 0.0)
        low, high = row_extremes(low, high)
        if not EXACT:
            low = out_of_levels(low, lo, hi, step, origin)
            high = out_of_levels(high, lo, hi, step, origin)
        low, _ = candidates(low, row_mask)
        _, high = candidates(high, row_mask)
        beyond = tl.where(lo <= hi, tl.sum(beyond, 1), 0.0)
        store_partial(partial_ptr, low, high, beyond, count)
    of_whole, column = rows, n_first
    if PLACED:
        here = tl.load(key_ptr + 1)  # []
        of_whole = global_rows(key_ptr, rows // here, rows % here, 1, here, PLACED)
        column = n_first + tl.load(key_ptr + 6).to(tl.int32)  # []
    keys = row_keys(of_whole, tl.load(key_ptr), seed)  # [BLOCK_M], of the key []
    # [BLOCK_M, BLOCK_N]
    if EXACT:
        y = readout(acc, lo, step, per_level, keys, column, LEVELS, NOISE)
    else:
        y = tl.fma(level(acc, keys, column, LEVELS, NOISE), step, lo)
    if bias_ptr is not None:
        # [1, BLOCK_N]
        y += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    y_offsets = rows[:, None] * N + columns[None, :]
    tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)  # [BLOCK_M, BLOCK_N]
