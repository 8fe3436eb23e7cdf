"""What is clipped has no gradient: `clipping.py` inside Triton kernels.

Legend: `used` are the ranges to work with, rows 0 and 1 the input's and the weight's. A comment
gives the shape of a value, [] of a number.
"""

# triton's types say that a jit function returns nothing
# pyright: reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from aixsim_kernels.optical.triton_grid import grid
from aixsim_kernels.optical.triton_ranges import FLAT

# rows of a weight that a program works on
_ROWS = 8


@triton.jit
def inside(x, lo, hi):
    """Where the modulator did not clip: `clipping.inside`."""
    return (x - lo >= 0) & (hi - x >= 0)


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
    if out.numel():
        launch: Any = _input_grad_kernel[(triton.cdiv(out.numel(), FLAT),)]
        launch(
            product_ptr=product,
            total_ptr=total,
            kept_ptr=kept,
            used_ptr=used,
            out_ptr=out,
            n=out.numel(),
            columns=out.shape[1],
            LEVELS=levels,
            BLOCK=FLAT,
        )
    return out


def finish_weight_grad(
    product: Tensor, partial: Tensor, weight: Tensor, used: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """Gradient of the weight from the product of the output's gradient with the input's c.

    Args:
        product: (N, K), contiguous.
        partial: float32 (P, N), column sums of P parts of the output's gradient.
        weight: (N, K), contiguous.
        used: float32 (n, 2); rows 0 and 1 are the operands'.
        levels: number of levels.

    Returns:
        (N, K) in the weight's type; column sums of the whole, float32 (N,).
    """
    out = torch.empty_like(weight)
    total = partial.new_empty(len(weight))
    launch: Any = _weight_grad_kernel[(triton.cdiv(len(weight), _ROWS),)]
    launch(
        product_ptr=product,
        partial_ptr=partial,
        weight_ptr=weight,
        used_ptr=used,
        out_ptr=out,
        total_ptr=total,
        n_partial=len(partial),
        n_rows=len(weight),
        depth=weight.shape[1],
        LEVELS=levels,
        ROWS=_ROWS,
        PARTS=128,
        BLOCK=256,
    )
    return out, total


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


@triton.jit(do_not_specialize=["n_partial"])
def _weight_grad_kernel(
    product_ptr,
    partial_ptr,
    weight_ptr,
    used_ptr,
    out_ptr,
    total_ptr,
    n_partial,
    n_rows,
    depth,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lo, step, _, centre = grid(used_ptr, 0, LEVELS)
    offset = lo + centre * step
    first, last = tl.load(used_ptr + 2), tl.load(used_ptr + 3)  # [], []
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
        grad = step * grad + offset * total[:, None]
        grad *= inside(weight, first, last).to(tl.float32)
        # [ROWS, BLOCK]
        tl.store(out_ptr + offsets, grad.to(out_ptr.dtype.element_ty), mask=mask)
