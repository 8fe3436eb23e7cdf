"""Simulated hardware as tensor operations: plain tensors and numbers in, tensors out."""

from aixsim_kernels.bitflip.op import bitflip
from aixsim_kernels.common.noise import uniform_noise
from aixsim_kernels.optical.attention.op import optical_attention
from aixsim_kernels.optical.linear.op import optical_linear
from aixsim_kernels.optical.ranges import empty_ranges, merge_observed, update_ranges

__all__ = [
    "bitflip",
    "empty_ranges",
    "merge_observed",
    "optical_attention",
    "optical_linear",
    "uniform_noise",
    "update_ranges",
]
