"""Optical linear layer on a CPU; what `triton.py` is compared with."""

from collections.abc import Iterator

import torch
from torch import Tensor

from aixsim_kernels.common.noise import row_keys, seed_word
from aixsim_kernels.optical.blocks import block_size
from aixsim_kernels.optical.clipping import (
    clipped_share,
    mask_clipped_,
    mask_packed_,
    pack_inside,
    packed_share,
)
from aixsim_kernels.optical.grid import decode, detect_, grid, modulate
from aixsim_kernels.optical.ranges import calibrate, observe
from aixsim_kernels.optical.settings import Settings


def code_dtype(levels: int) -> torch.dtype:
    """Smallest integer type that holds every code."""
    return torch.uint8 if levels <= 256 else torch.int32


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ranges: Tensor,
    key: Tensor,
    settings: Settings,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Forward pass; tensors as in `optical_linear`, with x (M, K).

    Returns:
        y (M, N) in `out_dtype`; observed ranges, float32 (3, 2); clipped shares, float32 (3,); used
        ranges, float32 (3, 2); codes of x (M, K), uint8 or int32; where x was not clipped, one bit
        an element, uint8 (ceil(M * K / 8),).
    """
    levels, lut_min, quantiles = settings.levels, settings.lut_min, settings.quantiles
    seen_x, seen_w = observe(x, quantiles), observe(weight, quantiles)
    x_bounds, w_bounds = calibrate(ranges[0], seen_x), calibrate(ranges[1], seen_w)
    x_code = x.new_empty(x.shape, dtype=code_dtype(levels))
    w_hat = modulate(weight, grid(w_bounds, levels), lut_min)
    x_grid = grid(x_bounds, levels)
    acc = w_hat.new_empty(len(x), len(weight))
    for rows in _row_blocks(x):
        torch.mm(modulate(x[rows], x_grid, codes=x_code[rows]), w_hat.T, out=acc[rows])
    seen_y = observe(acc, quantiles)
    y_bounds = calibrate(ranges[2], seen_y)
    observed, used = [seen_x, seen_w, seen_y], [x_bounds, w_bounds, y_bounds]
    x_inside = pack_inside(x, x_bounds)
    # before the detector, which works in place; quantiles do not tell whether all is held
    extremes = (seen_w, seen_y) if quantiles is None else (None, None)
    clipped = [
        packed_share(x_inside, x.numel(), x_bounds),
        clipped_share(weight, w_bounds, extremes[0]),
        clipped_share(acc, y_bounds, extremes[1]),
    ]
    keys = None
    if settings.noise:
        index = torch.arange(len(acc), device=acc.device)
        keys = row_keys(index, key, seed_word(settings.stream, 0))
    y = detect_(acc, grid(y_bounds, levels), keys)
    if bias is not None:
        y.add_(bias)
    return (
        y.to(out_dtype),
        torch.stack(observed),
        torch.stack(clipped),
        torch.stack(used),
        x_code,
        x_inside,
    )


def backward(
    grad: Tensor,
    x_code: Tensor,
    x_inside: Tensor,
    weight: Tensor,
    used: Tensor,
    settings: Settings,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Straight-through gradients.

    Args:
        grad: (M, N), gradient of y.
        x_code: (M, K), codes of x.
        x_inside: uint8 (ceil(M * K / 8),), from the forward.
        weight: (N, K).
        used: float32 (3, 2), the ranges that the forward used.
        settings: as in the forward.
        x_dtype: type of x.

    Returns:
        Gradients of x (M, K) in `x_dtype`, of weight (N, K) in its type, of bias float32 (N,).
    """
    grad, levels = grad.float(), settings.levels
    x_bounds, w_bounds, _ = used.unbind()
    grad_x = grad @ modulate(weight, grid(w_bounds, levels), settings.lut_min)
    mask_packed_(grad_x, x_inside)
    grad_w = grad.new_zeros(weight.shape)
    x_grid = grid(x_bounds, levels)
    for rows in _row_blocks(x_code):
        grad_w.addmm_(grad[rows].T, decode(x_code[rows], x_grid))
    mask_clipped_(grad_w, weight, w_bounds)
    return grad_x.to(x_dtype), grad_w.to(weight.dtype), grad.sum(0)


def _row_blocks(x: Tensor) -> Iterator[slice]:
    """Blocks of the rows of (M, K): what the modulators show of x is never held as a whole."""
    height = max(128, block_size() // max(x.shape[1], 1))
    for first in range(0, len(x), height):
        yield slice(first, first + height)
