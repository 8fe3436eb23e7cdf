"""What is clipped has no gradient: `clipping.py` inside Triton kernels.

Legend: `used` are the ranges to work with, rows 0 and 1 the two operands', row `own` that of the
operand whose gradient it is. A comment gives the shape of a value, [] of a number.
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


@triton.jit
def inside(x, lo, hi):
    """Where the modulator did not clip: `clipping.inside`."""
    return (x - lo >= 0) & (hi - x >= 0)


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
            product_ptr=product,
            total_ptr=total,
            kept_ptr=kept,
            used_ptr=used,
            out_ptr=out,
            own=own,
            n=out.numel(),
            columns=out.shape[1],
            LEVELS=levels,
            PACKED=kept.dtype == torch.uint8,
            BLOCK=FLAT,
        )
    return out


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
    grad = tl.load(product_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    # [BLOCK]
    grad = step * grad + offset * tl.load(total_ptr + offsets // columns, mask=mask, other=0.0)
    if PACKED:
        bits = tl.load(kept_ptr + offsets // 8, mask=mask, other=0).to(tl.int32)  # [BLOCK]
        passes = ((bits >> (offsets % 8).to(tl.int32)) & 1) != 0
    else:
        own_lo, own_hi = tl.load(used_ptr + 2 * own), tl.load(used_ptr + 2 * own + 1)  # [], []
        value = tl.load(kept_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
        passes = inside(value, own_lo, own_hi)
    # a product with 0, not a choice: NaN stays NaN
    grad *= passes.to(tl.float32)
    tl.store(out_ptr + offsets, grad.to(out_ptr.dtype.element_ty), mask=mask)  # [BLOCK]
