"""Optical linear layer on a CPU; what `triton.py` is compared with."""

from collections.abc import Iterator

import torch
from torch import Tensor

from aixsim_kernels.common.noise import place_in, seed_word
from aixsim_kernels.optical.blocks import block_size
from aixsim_kernels.optical.native import passes_of
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Forward pass; tensors as in `optical_linear`, with x (M, K).

    Returns:
        y (M, N) in `out_dtype`; what was seen, float32 (3, 3); used ranges, float32 (3, 2); codes
        of x (M, K), uint8 or int32; where x was not clipped, one bit an element, uint8
        (ceil(M * K / 8),).
    """
    passes, quantiles = passes_of(x), settings.quantiles
    ranges_used = x_at, w_at, y_at = passes.ranges(ranges, settings.levels)
    x_at.look(x, quantiles)
    w_at.look(weight, quantiles)
    x_code = x.new_empty(x.shape, dtype=code_dtype(settings.levels))
    x_inside = x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)
    w_hat = passes.modulate(weight, w_at, settings.lut_min)
    acc = w_hat.new_empty(len(x), len(weight))
    for rows in _row_blocks(x):
        bits = x_inside[rows.start * x.shape[1] // 8 : (rows.stop * x.shape[1] + 7) // 8]
        x_hat = passes.modulate(x[rows], x_at, codes=x_code[rows], inside=bits)
        torch.mm(x_hat, w_hat.T, out=acc[rows])
    sizes = x.numel(), weight.numel(), acc.numel()
    y_at.look(acc, quantiles)
    keys, first, place = None, 0, place_in(key)
    if settings.noise:
        keys = passes.row_keys([len(acc)], key, seed_word(settings.stream, 0))
        first = 0 if place is None else place.first_column
    passes.detect_(acc, y_at, keys, first=first)
    if bias is not None:
        acc.add_(bias)
    return acc.to(out_dtype), *passes.results(ranges_used, sizes), x_code, x_inside


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
    """Straight-through gradients.

    Args:
        grad: (M, N), gradient of y.
        x_code: (M, K), codes of x.
        x_inside: uint8 (ceil(M * K / 8),), from the forward.
        weight: (N, K).
        used: float32 (3, 2), the ranges that the forward used.
        settings: as in the forward.
        x_dtype: type of x.
        wants_bias: whether there is a bias that gets a gradient.

    Returns:
        Gradients of x (M, K) in `x_dtype`, of weight (N, K) in its type, of bias float32 (N,); an
        empty one, (0,), unless it is asked for.
    """
    grad, passes = grad.float(), passes_of(grad)
    x_at, w_at, _ = passes.ranges(used, settings.levels)
    grad_x = grad @ passes.modulate(weight, w_at, settings.lut_min)
    passes.mask_packed_(grad_x, x_inside)
    grad_w = grad.new_zeros(weight.shape)
    for rows in _row_blocks(x_code):
        grad_w.addmm_(grad[rows].T, passes.decode(x_code[rows], x_at))
    passes.mask_clipped_(grad_w, weight, w_at)
    grad_b = grad.sum(0) if wants_bias else grad.new_empty(0)
    return grad_x.to(x_dtype), grad_w.to(weight.dtype), grad_b


def _row_blocks(x: Tensor) -> Iterator[slice]:
    """Blocks of the rows of (M, K): what the modulators show of x is never held as a whole.

    Four times of what a cache holds: a product is slower in parts, and reads all of x anyway.
    """
    height = max(128, 4 * block_size() // max(x.shape[1], 1))
    # the bits of a block begin with a byte
    height += -height % 8
    for first in range(0, len(x), height):
        yield slice(first, first + height)
