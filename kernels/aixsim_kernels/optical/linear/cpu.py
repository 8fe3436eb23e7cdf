"""Optical linear layer on a CPU; what `triton.py` is compared with."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from aixsim_kernels.common.noise import place_in, seed_word
from aixsim_kernels.optical.blocks import block_size
from aixsim_kernels.optical.light import Lamp, Lit, lamp_results, lamps_of, margins
from aixsim_kernels.optical.native import passes_of
from aixsim_kernels.optical.passes import Passes, Range
from aixsim_kernels.optical.pixels import brightness, show
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
        y (M, N) in `out_dtype`; what was seen, float32 (n, 3); used ranges, float32 (n, 2); codes
        of x (M, K), uint8 or int32; where x was not clipped, one bit an element, uint8
        (ceil(M * K / 8),).
    """
    passes, quantiles = passes_of(x), settings.quantiles
    ranges_used = x_at, w_at, y_at = _ranges(passes, ranges, settings)
    lamps = lamps_of(ranges[3:], settings)
    x_at.look(x, quantiles)
    w_at.look(weight, quantiles)
    x_code = x.new_empty(x.shape, dtype=code_dtype(settings.levels))
    x_inside = x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)
    w_hat = _shown_weight(passes, weight, w_at, key, settings)
    acc = w_hat.new_empty(len(x), len(weight))
    of_row = w_hat.new_empty(len(x), 1) if lamps else None
    bright, of_column = margins(w_hat) if lamps and not settings.offset else (None, None)
    for rows in _row_blocks(x):
        bits = x_inside[rows.start * x.shape[1] // 8 : (rows.stop * x.shape[1] + 7) // 8]
        x_hat = passes.modulate(x[rows], x_at, codes=x_code[rows], inside=bits)
        torch.mm(x_hat, w_hat.T, out=acc[rows])
        if of_row is not None and bright is not None:
            torch.mv(x_hat.abs_(), bright, out=of_row[rows, 0])
        elif of_row is not None:
            torch.sum(x_hat, 1, keepdim=True, out=of_row[rows])
    sizes = x.numel(), weight.numel(), acc.numel()
    y_at.look(acc, quantiles)
    keys, first, place = None, 0, place_in(key)
    if settings.noise:
        keys = passes.row_keys([len(acc)], key, seed_word(settings.stream, 0))
        first = 0 if place is None else place.first_column
    lit = None
    if of_row is not None:
        if of_column is None:
            # (a - a_lo) (b - b_lo) summed over k, less the accumulator
            of_row.sub_(x.shape[1] * x_at.bounds[0]).mul_(-w_at.bounds[0])
            of_column = w_hat.sum(1).mul_(-x_at.bounds[0])
        lit = _lit(lamps[0], acc, of_row, of_column, x.shape[1])
    passes.detect_(acc, y_at, keys, first=first, lit=lit)
    if bias is not None:
        acc.add_(bias)
    seen, used = lamp_results(lamps, *passes.results(ranges_used, sizes))
    return acc.to(out_dtype), seen, used, x_code, x_inside


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
    """Straight-through gradients.

    Args:
        grad: (M, N), gradient of y.
        x_code: (M, K), codes of x.
        x_inside: uint8 (ceil(M * K / 8),), from the forward.
        weight: (N, K).
        used: float32 (n, 2), the ranges that the forward used.
        key: as in the forward.
        settings: as in the forward.
        x_dtype: type of x.
        wants_bias: whether there is a bias that gets a gradient.

    Returns:
        Gradients of x (M, K) in `x_dtype`, of weight (N, K) in its type, of bias float32 (N,); an
        empty one, (0,), unless it is asked for.
    """
    grad, passes = grad.float(), passes_of(grad)
    x_at, w_at, _ = _ranges(passes, used, settings)
    grad_x = grad @ _shown_weight(passes, weight, w_at, key, settings)
    passes.mask_packed_(grad_x, x_inside)
    grad_w = grad.new_zeros(weight.shape)
    for rows in _row_blocks(x_code):
        grad_w.addmm_(grad[rows].T, passes.decode(x_code[rows], x_at))
    if settings.has_defects:
        grad_w.mul_(brightness(weight, key, settings))
    passes.mask_clipped_(grad_w, weight, w_at)
    grad_b = grad.sum(0) if wants_bias else grad.new_empty(0)
    return grad_x.to(x_dtype), grad_w.to(weight.dtype), grad_b


def _ranges(passes: Passes, ranges: Tensor, settings: Settings) -> Sequence[Range]:
    """Of input, weight and output."""
    return passes.ranges(ranges[:3], (settings.levels, settings.levels, settings.detector_levels))


def _shown_weight(
    passes: Passes, weight: Tensor, at: Range, key: Tensor, settings: Settings
) -> Tensor:
    """What the pixels of the second modulator show: float32 (N, K)."""
    shown = passes.modulate(weight, at, settings.lut_min)
    if not settings.has_defects:
        return shown
    return show(shown, brightness(weight, key, settings), at.bounds[0], settings)


def _lit(lamp: Lamp, acc: Tensor, of_row: Tensor, of_column: Tensor, depth: int) -> Lit:
    """The light on the detectors, see there; the lamp sees it."""
    rows, columns = acc.shape
    light = of_row.sum(dtype=torch.float64) * columns
    if lamp.is_offset:
        light = light + acc.sum(dtype=torch.float64) + rows * of_column.sum(dtype=torch.float64)
    lamp.see(light, rows * columns, depth)
    if not lamp.is_offset:
        # a deviation is then the product of two roots
        of_row, of_column = of_row.sqrt_(), of_column.sqrt()
    return lamp.on(row=of_row, column=of_column)


def _row_blocks(x: Tensor) -> Iterator[slice]:
    """Blocks of the rows of (M, K): what the modulators show of x is never held as a whole.

    Four times of what a cache holds: a product is slower in parts, and reads all of x anyway.
    """
    height = max(128, 4 * block_size() // max(x.shape[1], 1))
    # the bits of a block begin with a byte
    height += -height % 8
    for first in range(0, len(x), height):
        yield slice(first, first + height)
