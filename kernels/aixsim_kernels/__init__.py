"""Simulated hardware as tensor operations: plain tensors and numbers in, tensors out."""

from aixsim_kernels.bitflip.op import bitflip
from aixsim_kernels.common.noise import Place, placed, uniform_noise
from aixsim_kernels.optical.attention.op import optical_attention
from aixsim_kernels.optical.linear.op import optical_linear
from aixsim_kernels.optical.ranges import (
    are_known_set,
    clipped_in,
    empty_ranges,
    empty_seen,
    is_empty,
    note_set,
    observed_in,
    seen_of,
    update_ranges,
)
from aixsim_kernels.optical.settings import Defects, Light

__all__ = [
    "Defects",
    "Light",
    "Place",
    "are_known_set",
    "bitflip",
    "clipped_in",
    "empty_ranges",
    "empty_seen",
    "is_empty",
    "note_set",
    "observed_in",
    "optical_attention",
    "optical_linear",
    "placed",
    "seen_of",
    "uniform_noise",
    "update_ranges",
]
