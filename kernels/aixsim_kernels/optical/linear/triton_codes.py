"""What is made of the optical linear's input on a GPU, and the sums of its output's gradient.

Legend: x (M, K) is the input; a program works on [ROWS, BLOCK] of it. A comment gives the shape of
a value, [] of a number.
"""

# triton's types say that a jit function returns nothing
# pyright: reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from aixsim_kernels.optical.linear.cpu import code_dtype
from aixsim_kernels.optical.triton_clipping import inside
from aixsim_kernels.optical.triton_grid import grid, grid_of, position
from aixsim_kernels.optical.triton_ranges import (
    FLAT,
    Findings,
    candidates,
    settled,
    store_partial,
)

# rows that a program codes, and that it sums
_ROWS = 8
_SUMMED = 64


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
        launch: Any = _pack_kernel[(triton.cdiv(x.numel(), FLAT),)]
        launch(x_ptr=x, bits_ptr=bits, used_ptr=findings.at, n=x.numel(), BLOCK=FLAT)
    return codes, bits, sums


def centred(codes: Tensor, used: Tensor, levels: int, dtype: torch.dtype) -> Tensor:
    """c of an input's codes."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if codes.numel():
        launch: Any = _centred_kernel[(triton.cdiv(codes.numel(), FLAT),)]
        launch(
            code_ptr=codes, out_ptr=out, used_ptr=used, n=codes.numel(), LEVELS=levels, BLOCK=FLAT
        )
    return out


def sums(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Row sums of a contiguous (M, N), not empty, and column sums of its parts, in one visit.

    Returns:
        float32 (M,), over N; float32 (P, N), over the rows of each of P parts.
    """
    rows, columns = grad.shape
    programs: int = triton.cdiv(rows, _SUMMED)  # pyright: ignore[reportAssignmentType]
    by_row = grad.new_empty(rows, dtype=torch.float32)
    by_column = grad.new_empty(programs, columns, dtype=torch.float32)
    launch: Any = _sums_kernel[(programs,)]
    launch(
        x_ptr=grad,
        by_row_ptr=by_row,
        by_column_ptr=by_column,
        n_rows=rows,
        columns=columns,
        ROWS=_SUMMED,
        BLOCK=64,
    )
    return by_row, by_column


@triton.jit
def _sums_kernel(
    x_ptr, by_row_ptr, by_column_ptr, n_rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    by_column_ptr += tl.program_id(0).to(tl.int64) * columns
    for start in range(0, columns, BLOCK):
        places = start + tl.arange(0, BLOCK)
        mask = (rows[:, None] < n_rows) & (places[None, :] < columns)
        offsets = rows[:, None] * columns + places[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        total += tl.sum(x, 1)
        tl.store(by_column_ptr + places, tl.sum(x, 0), mask=places < columns)  # [BLOCK]
    tl.store(by_row_ptr + rows, total, mask=rows < n_rows)  # [ROWS]


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
        lo, hi = settled(partial_ptr, n_partial, ranges_ptr, used_ptr, 0)
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
