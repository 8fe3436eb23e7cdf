"""Simulated hardware as tensor operations: plain tensors and numbers in, tensors out."""

from aixsim_kernels.bitflip.op import bitflip
from aixsim_kernels.common.noise import uniform_noise
from aixsim_kernels.optical.attention.op import optical_attention
from aixsim_kernels.optical.linear.op import optical_linear
from aixsim_kernels.optical.ranges import (
    are_known_set,
    empty_ranges,
    is_empty,
    note_set,
    update_ranges,
)

__all__ = [
    "are_known_set",
    "bitflip",
    "empty_ranges",
    "is_empty",
    "note_set",
    "optical_attention",
    "optical_linear",
    "uniform_noise",
    "update_ranges",
]
