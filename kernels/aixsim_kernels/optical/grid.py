"""Modulators and detectors in float32, block by block: range -> code -> value, floor, read-out.

`definition.py` says what they do. Arithmetic is float32 whatever the storage type: bfloat16 cannot
hold 256 levels of an arbitrary range.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from aixsim_kernels.common.noise import normal, random_int16
from aixsim_kernels.optical.blocks import block_size
from aixsim_kernels.optical.light import Lit


class Grid(NamedTuple):
    """The levels of a modulator or detector: lo + step * code, 0 <= code < levels.

    lo, hi, step and `per_level` = 1 / step are float32 0-d.
    """

    lo: Tensor
    hi: Tensor
    step: Tensor
    per_level: Tensor
    levels: int


def grid(bounds: Tensor, levels: int) -> Grid:
    """Quantisation grid of a range.

    Where the range has no width (or too little for float32) the step is 0 and its inverse 1: every
    code then stands for lo and nothing becomes NaN.

    Args:
        bounds: float32 (2,), lo and hi.
        levels: number of levels, at least 2.
    """
    lo, hi = bounds.unbind()
    per_level = (levels - 1) / (hi - lo)
    # an empty range has the width -inf and stays undefined: its values are NaN
    flat = per_level.isinf()
    step = ((hi - lo) / (levels - 1)).masked_fill_(flat, 0.0)
    return Grid(lo, hi, step, per_level.masked_fill_(flat, 1.0), levels)


def modulate(x: Tensor, at: Grid, lut_min: float = 0.0, codes: Tensor | None = None) -> Tensor:
    """What a modulator shows of an operand.

    Args:
        x: (...), any floating type and strides.
        at: the modulator's levels.
        lut_min: smallest magnitude it can show as a share of its range, 0 for none; see `floor_`.
        codes: integer tensor with the elements of `x`, contiguous; filled with the codes.

    Returns:
        float32 (...), contiguous. NaN stays NaN.
    """
    value = x.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    size = block_size()
    blocks = value.view(-1).split(size)
    code_blocks = [None] * len(blocks) if codes is None else codes.view(-1).split(size)
    for block, code in zip(blocks, code_blocks, strict=True):
        block.sub_(at.lo).mul_(at.per_level).clamp_(0, at.levels - 1).round_()
        if code is not None:
            # by way of int32: torch has no fast conversion from float to unsigned bytes
            code.copy_(block.to(torch.int32))
        block.mul_(at.step).add_(at.lo)
        if lut_min:
            floor_(block, at, lut_min)
    return value


def decode(codes: Tensor, at: Grid) -> Tensor:
    """Values that integer codes stand for, without the floor: (...) -> float32 (...)."""
    return codes.float().mul_(at.step).add_(at.lo)


def floor_(value: Tensor, at: Grid, lut_min: float) -> Tensor:
    """Lifts values to the smallest magnitude the second operand's modulator can show, in place.

    Positive values below `lut_min * hi` become that, negative ones above `-lut_min * |lo|` become
    that, 0 stays 0. What is 0 up to float32 rounding counts as 0.

    Args:
        value: float32 (...), values on the grid.
        at: the modulator's levels.
        lut_min: the floor as a share of full range.
    """
    low, high = at.lo.abs(), at.hi.abs()
    tiny = 2.0**-22 * torch.maximum(low, high)
    # masks of 0 and 1 as floats: torch is several times slower on bools
    lifted = torch.maximum(value, lut_min * at.hi).mul_(value.clone().gt_(tiny))
    lowered = torch.minimum(value, -lut_min * low).mul_(value.clone().lt_(-tiny))
    return torch.add(lifted, lowered, out=value)


def detect_(
    acc: Tensor,
    at: Grid,
    keys: Tensor | None,
    first_column: Tensor | int = 0,
    lit: Lit | None = None,
) -> Tensor:
    """What the detector reads, in place.

    Args:
        acc: float32 (..., columns), contiguous; the raw accumulator.
        at: the detector's levels.
        keys: int32 (...) from `row_keys`, one per row, or None for no noise.
        first_column: index of the first column, even.
        lit: the light on the detector, whose noise takes the place of a level's; or None.

    Returns:
        `acc`, now lo + step * clamp(round((acc - lo) / step + u), 0, levels - 1); with light u is
        a normal number times the noise's deviation in levels.
    """
    columns = acc.shape[-1]
    rows = acc.view(-1, columns)
    keys = None if keys is None else keys.reshape(-1)
    height = max(1, block_size() // max(columns, 1))
    for first in range(0, len(rows), height):
        here = slice(first, first + height)
        block, deviation = rows[here], None
        if lit is not None:
            deviation = lit.deviation(block, here).mul_(at.per_level)
        block.sub_(at.lo).mul_(at.per_level)
        if keys is not None:
            bits = random_int16(keys[here], columns, first_column)
            if deviation is None:
                block.add_(bits.float().add_(0.5), alpha=2.0**-16)
            else:
                block.addcmul_(normal(bits), deviation)
        block.round_().clamp_(0, at.levels - 1).mul_(at.step).add_(at.lo)
    return acc
