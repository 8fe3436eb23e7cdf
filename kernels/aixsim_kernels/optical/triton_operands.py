"""What modulators make of tensors on a GPU: the integers c of `triton_grid.py`, and their row sums.

Legend: a program makes [ROWS, BLOCK] of one tensor (..., K) after the other; what is a tuple has an
entry for each tensor. A comment gives the shape of a value, [] of a number.
"""

# triton's types say that a jit function returns nothing
# pyright: reportGeneralTypeIssues=false

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from aixsim_kernels.common.triton_launch import launch
from aixsim_kernels.optical.triton_grid import grid_of, shown
from aixsim_kernels.optical.triton_ranges import (
    Findings,
    candidates,
    clips,
    settled,
    store_partial,
)

# rows that a program makes c of
_ROWS = 16


class Modulated(NamedTuple):
    """A tensor that a modulator is to show.

    Args:
        x: (N, K) or (B, H, L, K), any strides.
        index: which of the call's ranges is the modulator's.
        floor: of the look-up table, as a share of the range; 0 for none.
        dtype: of c.
        other: another type that c is wanted in, or None.
    """

    x: Tensor
    index: int
    floor: float
    dtype: torch.dtype
    other: torch.dtype | None = None


class Operand(NamedTuple):
    """c of a modulator's values, floor included.

    Args:
        c: (..., K), contiguous.
        sums: float32 (...), over the last dimension.
        other: c in another type, or None.
    """

    c: Tensor
    sums: Tensor
    other: Tensor | None


def operand_programs(x: Tensor) -> int:
    """How many programs make an operand of x, and look at it."""
    rows = x.shape[:-1].numel() if x.shape[-1] else 0
    return triton.cdiv(rows, _ROWS)  # pyright: ignore[reportReturnType]


def row_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and row of (B, H, L, K)."""
    return x.stride(0), x.stride(1), x.stride(2)


def by_rows(x: Tensor) -> Tensor:
    """x with rows that are contiguous, itself if they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def operands(
    tensors: Sequence[Modulated], used: Tensor | Findings, levels: int
) -> Sequence[Operand]:
    """What modulators make of tensors, in one launch.

    Args:
        tensors: whose rows are contiguous, see `by_rows`.
        used: float32 (n, 2), the ranges to work with; or the findings of a call that is still to
            look at these tensors.
        levels: number of levels.
    """
    made, layout = [], []
    for x, _, _, dtype, other in tensors:
        c = torch.empty(x.shape, dtype=dtype, device=x.device)
        c_of_other = None if other in (None, dtype) else torch.empty_like(c, dtype=other)
        sums = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        if not x.numel():
            sums.zero_()
        made.append(Operand(c, sums, c_of_other))
        batched = x if x.dim() == 4 else x[None, None]
        layout.append((sums.numel(), x.shape[-1], *batched.shape[1:3], *row_strides(batched)))
    arguments: dict[str, Any] = {
        "x_ptr": tuple(one.x for one in tensors),
        "operand_ptr": tuple(one.c for one in made),
        "other_ptr": tuple(one.other for one in made),
        "sum_ptr": tuple(one.sums for one in made),
        "index": tuple(one.index for one in tensors),
        "layout": tuple(layout),
        "floor": tuple(one.floor or None for one in tensors),
        "LEVELS": levels,
        "ROWS": _ROWS,
        "BLOCK": 256,
    }
    if isinstance(used, Findings):
        used.look(_operand_kernel, tuple(one.index for one in tensors), **arguments)
        return made
    programs = [operand_programs(one.x) for one in tensors]
    launch(
        _operand_kernel,
        sum(programs),
        partial_ptr=tuple(None for _ in tensors),
        n_partial=tuple(programs),
        ranges_ptr=None,
        used_ptr=used,
        **arguments,
        SECOND=False,
    )
    return made


@triton.jit
def _operand_kernel(
    x_ptr,
    operand_ptr,
    other_ptr,
    sum_ptr,
    partial_ptr,
    n_partial,
    ranges_ptr,
    used_ptr,
    index,
    layout,
    floor,
    LEVELS: tl.constexpr,
    SECOND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first n_partial[0] programs make the first operand, and so on."""
    first = 0
    for i in tl.static_range(len(x_ptr)):
        program = tl.program_id(0) - first
        if (program >= 0) & (program < n_partial[i]):
            _make_operand(
                x_ptr[i], operand_ptr[i], other_ptr[i], sum_ptr[i], partial_ptr[i], n_partial[i],
                ranges_ptr, used_ptr, index[i], layout[i], floor[i], program,
                LEVELS, SECOND, ROWS, BLOCK,
            )  # fmt: skip
        first += n_partial[i]


@triton.jit
def _make_operand(
    x_ptr,
    operand_ptr,
    other_ptr,
    sum_ptr,
    partial_ptr,
    n_partial,
    ranges_ptr,
    used_ptr,
    index,
    layout,
    floor,
    program,
    LEVELS: tl.constexpr,
    SECOND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """In one visit, which also looks at x where there is a `partial_ptr`; see `Findings.look`."""
    LOOKS: tl.constexpr = (partial_ptr is not None) & (not SECOND)  # pyright: ignore[reportAssignmentType]
    n_rows, depth, heads, length, stride_b, stride_h, stride_l = layout
    if partial_ptr is None:
        lo, hi = tl.load(used_ptr + 2 * index), tl.load(used_ptr + 2 * index + 1)  # [], []
    else:
        lo, hi = tl.load(ranges_ptr + 2 * index), tl.load(ranges_ptr + 2 * index + 1)  # [], []
        if SECOND:
            if lo <= hi:
                return
            lo, hi = settled(partial_ptr, n_partial, ranges_ptr, used_ptr, index, program)
    rows = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    if LOOKS:
        first, last = clips(ranges_ptr, index)
        low = tl.full((ROWS, BLOCK), float("inf"), tl.float32)
        high = tl.full((ROWS, BLOCK), float("-inf"), tl.float32)
        beyond = tl.zeros((ROWS,), tl.float32)
    lo, step, per_level, centre = grid_of(lo, hi, LEVELS)
    row, head = rows % length, rows // length
    x_ptr += (head // heads * stride_b + head % heads * stride_h + row * stride_l)[:, None]
    for start in range(0, depth, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = (rows[:, None] < n_rows) & (columns[None, :] < depth)
        x = tl.load(x_ptr + columns[None, :], mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        if LOOKS:
            least, most = candidates(x, mask)
            low, high = tl.minimum(low, least), tl.maximum(high, most)
            beyond += tl.sum(tl.where((least < first) | (most > last), 1.0, 0.0), 1)
        c = shown(x, lo, hi, step, per_level, centre, floor, LEVELS)
        offsets = rows[:, None] * depth + columns[None, :]
        operand = c.to(operand_ptr.dtype.element_ty)
        tl.store(operand_ptr + offsets, operand, mask=mask)  # [ROWS, BLOCK]
        if other_ptr is not None:
            # [ROWS, BLOCK]
            tl.store(other_ptr + offsets, operand.to(other_ptr.dtype.element_ty), mask=mask)
        total += tl.sum(tl.where(mask, operand.to(tl.float32), 0.0), 1)
    tl.store(sum_ptr + rows, total, mask=rows < n_rows)  # [ROWS]
    if LOOKS:
        count = tl.where(rows < n_rows, depth, 0).to(tl.float32)
        store_partial(partial_ptr, program, tl.min(low, 1), tl.max(high, 1), beyond, count)
