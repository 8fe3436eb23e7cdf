"""The optical linear on a GPU, but for its products: what is made of each tensor, in one visit.

Legend: x (M, K), the weight (N, K), grad (M, N) of the output; a program works on [ROWS, BLOCK] of
one of them, or on [BLOCK] elements. `used` are the ranges to work with, rows 0 and 1 the input's
and the weight's. A comment gives the shape of a value, [] of a number.
"""

# triton's types say that a jit function returns nothing
# pyright: reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from aixsim_kernels.common.triton_launch import launch
from aixsim_kernels.optical.linear.cpu import code_dtype
from aixsim_kernels.optical.triton_grid import grid, grid_of, inside, position, shown
from aixsim_kernels.optical.triton_ranges import (
    Findings,
    candidates,
    settled,
    store_partial,
)

# rows that a program codes, that it sums, and that it makes of a weight
_ROWS = 8
_SUMMED = 32
_WEIGHT_ROWS = 8
# elements of an element-wise one
_FLAT = 4096


def code_programs(x: Tensor) -> int:
    """How many programs look at the input."""
    return triton.cdiv(len(x), _ROWS) if x.shape[1] else 0  # pyright: ignore[reportReturnType]


def code(x: Tensor, findings: Findings, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (M, K), packed bits of what is inside the range, row sums of c (NaN where x is).

    And what is found out about x, the first tensor of the call.
    """
    codes = torch.empty(x.shape, dtype=code_dtype(levels), device=x.device)
    bits = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=x.device)
    sums = torch.empty(len(x), dtype=torch.float32, device=x.device)
    in_rows = x.shape[1] % 8 == 0
    findings.look(
        _code_kernel,
        0,
        x_ptr=x,
        code_ptr=codes,
        bits_ptr=bits if in_rows else None,
        sum_ptr=sums,
        n_rows=len(x),
        depth=x.shape[1],
        LEVELS=levels,
        ROWS=_ROWS,
        BLOCK=256,
    )
    if not x.numel():
        sums.zero_()
    elif not in_rows:
        programs: Any = triton.cdiv(x.numel(), _FLAT)
        arguments = {"x_ptr": x, "bits_ptr": bits, "used_ptr": findings.at}
        launch(_pack_kernel, programs, **arguments, n=x.numel(), BLOCK=_FLAT)
    return codes, bits, sums


def sums_and_operand(
    grad: Tensor, codes: Tensor, used: Tensor, levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What the backward takes of the output's gradient and the input's codes, in one visit each.

    Args:
        grad: (M, N), contiguous, not empty.
        codes: (M, K), contiguous.
        used: float32 (n, 2); the first is the input's range.
        levels: number of levels.

    Returns:
        Row sums of grad, float32 (M,); its column sums over each of P blocks of rows, float32
        (P, N); c of the codes, (M, K) in the type of grad.
    """
    (rows, columns), depth = grad.shape, codes.shape[1]
    programs: int = triton.cdiv(rows, _SUMMED)  # pyright: ignore[reportAssignmentType]
    by_row = grad.new_empty(rows, dtype=torch.float32)
    by_column = grad.new_empty(programs, columns, dtype=torch.float32)
    operand = torch.empty(codes.shape, dtype=grad.dtype, device=grad.device)
    launch(
        _backward_kernel,
        programs,
        grad_ptr=grad,
        code_ptr=codes,
        used_ptr=used,
        by_row_ptr=by_row,
        by_column_ptr=by_column,
        operand_ptr=operand,
        n_rows=rows,
        columns=columns,
        depth=depth,
        LEVELS=levels,
        ROWS=_SUMMED,
        BLOCK=64,
    )
    return by_row, by_column, operand


def weight_grad_and_operand(
    product: Tensor,
    partial: Tensor,
    weight: Tensor,
    used: Tensor,
    levels: int,
    lut_min: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the backward makes of the weight, in one visit.

    Its gradient from the product of the output's gradient with the input's c, and its own c.

    Args:
        product: (N, K), contiguous.
        partial: float32 (P, N), column sums of P parts of the output's gradient.
        weight: (N, K), contiguous.
        used: float32 (n, 2); rows 0 and 1 are the operands'.
        levels: number of levels.
        lut_min: floor of its modulator as a share of the range, 0 for none.
        dtype: of c.

    Returns:
        Gradient (N, K) in the weight's type; column sums of the whole, float32 (N,); c (N, K).
    """
    out, operand = torch.empty_like(weight), torch.empty_like(weight, dtype=dtype)
    total = partial.new_empty(len(weight))
    programs: Any = triton.cdiv(len(weight), _WEIGHT_ROWS)
    launch(
        _weight_grad_kernel,
        programs,
        product_ptr=product,
        partial_ptr=partial,
        weight_ptr=weight,
        used_ptr=used,
        out_ptr=out,
        total_ptr=total,
        operand_ptr=operand,
        n_partial=len(partial),
        n_rows=len(weight),
        depth=weight.shape[1],
        floor=lut_min or None,
        LEVELS=levels,
        ROWS=_WEIGHT_ROWS,
        PARTS=128,
        BLOCK=256,
    )
    return out, total, operand


def finish_input_grad(
    product: Tensor, total: Tensor, kept: Tensor, used: Tensor, levels: int, dtype: torch.dtype
) -> Tensor:
    """Gradient of the input from the product of the output's gradient with the weight's c.

    Args:
        product: (M, K), contiguous.
        total: float32 (M,), row sums of the output's gradient.
        kept: packed bits of where the gradient passes, uint8 (ceil(M * K / 8),): `pack_inside`.
        used: float32 (n, 2); rows 0 and 1 are the operands'.
        levels: number of levels.
        dtype: of the result.

    Returns:
        (M, K) in `dtype`.
    """
    out = torch.empty(product.shape, dtype=dtype, device=product.device)
    programs: Any = triton.cdiv(out.numel(), _FLAT)
    launch(
        _input_grad_kernel,
        programs,
        product_ptr=product,
        total_ptr=total,
        kept_ptr=kept,
        used_ptr=used,
        out_ptr=out,
        n=out.numel(),
        columns=out.shape[1],
        LEVELS=levels,
        BLOCK=_FLAT,
    )
    return out


@triton.jit
def _backward_kernel(
    grad_ptr,
    code_ptr,
    used_ptr,
    by_row_ptr,
    by_column_ptr,
    operand_ptr,
    n_rows,
    columns,
    depth,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    by_column_ptr += tl.program_id(0).to(tl.int64) * columns
    for start in range(0, columns, BLOCK):
        places = start + tl.arange(0, BLOCK)
        mask = (rows[:, None] < n_rows) & (places[None, :] < columns)
        offsets = rows[:, None] * columns + places[None, :]
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        total += tl.sum(grad, 1)
        tl.store(by_column_ptr + places, tl.sum(grad, 0), mask=places < columns)  # [BLOCK]
    tl.store(by_row_ptr + rows, total, mask=rows < n_rows)  # [ROWS]
    _, _, _, centre = grid(used_ptr, 0, LEVELS)
    for start in range(0, depth, BLOCK):
        places = start + tl.arange(0, BLOCK)
        mask = (rows[:, None] < n_rows) & (places[None, :] < depth)
        offsets = rows[:, None] * depth + places[None, :]
        code = tl.load(code_ptr + offsets, mask=mask, other=0).to(tl.float32)  # [ROWS, BLOCK]
        operand = (code - centre).to(operand_ptr.dtype.element_ty)
        tl.store(operand_ptr + offsets, operand, mask=mask)  # [ROWS, BLOCK]


@triton.jit(do_not_specialize=["n_partial"])
def _code_kernel(
    x_ptr,
    code_ptr,
    bits_ptr,
    sum_ptr,
    partial_ptr,
    n_partial,
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
    lo, hi = tl.load(ranges_ptr), tl.load(ranges_ptr + 1)  # [], []
    if SECOND:
        if lo <= hi:
            return
        lo, hi = settled(partial_ptr, n_partial, ranges_ptr, used_ptr, 0, tl.program_id(0))
    lo, _, per_level, centre = grid_of(lo, hi, LEVELS)
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
        count = tl.where(rows < n_rows, depth, 0).to(tl.float32)
        beyond = tl.where(is_set, beyond, 0.0)
        low, high = tl.min(low, 1), tl.max(high, 1)
        store_partial(partial_ptr, tl.program_id(0), low, high, beyond, count)


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


@triton.jit(do_not_specialize=["n_partial"])
def _weight_grad_kernel(
    product_ptr,
    partial_ptr,
    weight_ptr,
    used_ptr,
    out_ptr,
    total_ptr,
    operand_ptr,
    n_partial,
    n_rows,
    depth,
    floor,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lo, step, _, centre = grid(used_ptr, 0, LEVELS)
    offset = lo + centre * step
    first, own_step, per_level, own_centre = grid(used_ptr, 1, LEVELS)
    last = tl.load(used_ptr + 3)  # []
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, n_partial, PARTS):
        parts = start + tl.arange(0, PARTS)
        mask = (parts[:, None] < n_partial) & (rows[None, :] < n_rows)
        places = partial_ptr + parts[:, None].to(tl.int64) * n_rows + rows[None, :]
        total += tl.sum(tl.load(places, mask=mask, other=0.0), 0)  # [PARTS, ROWS]
    tl.store(total_ptr + rows, total, mask=rows < n_rows)  # [ROWS]
    for start in range(0, depth, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = (rows[:, None] < n_rows) & (columns[None, :] < depth)
        offsets = rows[:, None] * depth + columns[None, :]
        grad = tl.load(product_ptr + offsets, mask=mask, other=0.0)  # [ROWS, BLOCK]
        weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        c = shown(weight, first, last, own_step, per_level, own_centre, floor, LEVELS)
        # [ROWS, BLOCK]
        tl.store(operand_ptr + offsets, c.to(operand_ptr.dtype.element_ty), mask=mask)
        grad = step * grad + offset * total[:, None]
        grad *= inside(weight, first, last).to(tl.float32)
        # [ROWS, BLOCK]
        tl.store(out_ptr + offsets, grad.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _input_grad_kernel(
    product_ptr,
    total_ptr,
    kept_ptr,
    used_ptr,
    out_ptr,
    n,
    columns,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lo, step, _, centre = grid(used_ptr, 1, LEVELS)
    offset = lo + centre * step
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    grad = tl.load(product_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    # [BLOCK]
    grad = step * grad + offset * tl.load(total_ptr + offsets // columns, mask=mask, other=0.0)
    bits = tl.load(kept_ptr + offsets // 8, mask=mask, other=0).to(tl.int32)  # [BLOCK]
    passes = (bits >> (offsets % 8).to(tl.int32)) & 1
    # a product with 0, not a choice: NaN stays NaN
    grad *= passes.to(tl.float32)
    tl.store(out_ptr + offsets, grad.to(out_ptr.dtype.element_ty), mask=mask)  # [BLOCK]
