"""The light on the detectors of an optical linear on a GPU: what `Lit` takes of both operands.

Legend: x (M, K), the weight (N, K); a program works on [ROWS, BLOCK] of the codes of x. A comment
gives the shape of a value, [] of a number.
"""

# triton's types say that a jit function returns nothing
# pyright: reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from aixsim_kernels.common.triton_launch import launch
from aixsim_kernels.optical.grid import Grid, grid
from aixsim_kernels.optical.light import Lamp, margins
from aixsim_kernels.optical.settings import Settings
from aixsim_kernels.optical.triton_grid import grid as grid_at

_ROWS = 8


def light_on(
    lamp: Lamp, codes: Tensor, x_sum: Tensor, weight: Tensor, used: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """What makes the light of an output, float32 (M,) and (N,): their product or, with an offset,
    the accumulator and both; the lamp sees it.

    Args:
        lamp: of the product.
        codes: (M, K), of the input.
        x_sum: float32 (M,), row sums of its c.
        weight: (N, K), c of the weight.
        used: float32 (n, 2); rows 0 and 1 are the operands' ranges.
        settings: of the operation.
    """
    rows, depth = codes.shape
    x_at, w_at = (grid(bounds, settings.levels) for bounds in used[:2])
    shown = (weight.float() + _centre(w_at)).mul_(w_at.step).add_(w_at.lo)
    if settings.offset:
        mean, of_column = (shown - w_at.lo).mean(0), shown.sum(1) * -x_at.lo
    else:
        mean, of_column = margins(shown)
    mean_of_row = codes.new_empty(rows, dtype=torch.float32)
    programs: Any = triton.cdiv(rows, _ROWS)
    launch(
        _row_light_kernel,
        programs,
        code_ptr=codes,
        mean_ptr=mean,
        used_ptr=used,
        out_ptr=mean_of_row,
        n_rows=rows,
        depth=depth,
        LEVELS=settings.levels,
        OFFSET=settings.offset,
        ROWS=_ROWS,
        BLOCK=256,
    )
    # codes do not tell a NaN, sums do
    mean_of_row += x_sum * 0
    lamp.see(mean_of_row.sum(dtype=torch.float64), rows, depth)
    if not settings.offset:
        return mean_of_row, of_column
    offset = x_at.lo + _centre(x_at) * x_at.step
    return (x_sum * x_at.step + depth * (offset - x_at.lo)) * -w_at.lo, of_column


def _centre(at: Grid) -> Tensor:
    """The code that c counts from: `triton_grid.grid_of`."""
    return (-at.lo * at.per_level).clamp(0, at.levels - 1).round()


@triton.jit
def _row_light_kernel(
    code_ptr,
    mean_ptr,
    used_ptr,
    out_ptr,
    n_rows,
    depth,
    LEVELS: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row sums of the light of x times `mean`."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lo, step, _, _ = grid_at(used_ptr, 0, LEVELS)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, depth, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = (rows[:, None] < n_rows) & (columns[None, :] < depth)
        # [ROWS, BLOCK]
        code = tl.load(code_ptr + rows[:, None] * depth + columns[None, :], mask=mask, other=0)
        mean = tl.load(mean_ptr + columns, mask=columns < depth, other=0.0)  # [BLOCK]
        light = code.to(tl.float32) * step
        if not OFFSET:
            light = tl.abs(light + lo)
        total += tl.sum(light * mean[None, :], 1)
    tl.store(out_ptr + rows, total, mask=rows < n_rows)  # [ROWS]
