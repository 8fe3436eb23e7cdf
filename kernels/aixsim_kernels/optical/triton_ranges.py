"""Ranges on a GPU: what each program saw, and the range that all of it makes, without the host.

`ranges.py` in two steps. A program that looks at a tensor leaves a row of partial findings behind:
lowest, highest, how many elements or rows lie beyond the range that was set, of how many. One
launch at the end of a call makes of them what the call found out. Where a range was never set, the
tensor is worked on a second time, in the range that the first launch found.

Legend: `ranges` and `used` are (n, 2), `seen` (n, 3), with row `index`; `low`, `high`, `beyond` and
`count` are a program's findings so far, one for each lane. A comment gives the shape of a value,
[] of a number.
"""

# triton's types say that a jit function returns nothing
# pyright: reportGeneralTypeIssues=false

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from aixsim_kernels.common.triton_launch import launch
from aixsim_kernels.optical.ranges import are_known_set, note_set

# ranges of the operation that has most
_MOST_RANGES = 5


class Findings:
    """What a call finds out about the tensors that it quantises, n of them.

    Args:
        ranges: float32 (n, 2), those that were set.
        programs: how many look at each tensor.

    Attributes:
        seen: float32 (n, 3), what was seen of the tensors, once the call has ended.
        used: float32 (n, 2), the ranges that were set, or the extremes; likewise.
        known: whether the host knows that they were all set.
        at: float32 (n, 2), where kernels read the ranges to work with before that.
    """

    def __init__(self, ranges: Tensor, programs: Sequence[int]) -> None:
        self._ranges, self._programs = ranges, list(programs)
        self._partial = torch.empty(sum(programs), 4, device=ranges.device)
        self._of_each = self._partial.split(self._programs)
        self.known = are_known_set(ranges)
        self.seen = ranges.new_empty(len(ranges), 3)
        # what was never set, and never seen, stays so
        self.used = torch.empty_like(ranges) if self.known else ranges.clone()
        self.at = ranges if self.known else self.used

    def look(self, kernel: Any, index: int | tuple[int, ...], /, **arguments: Any) -> None:
        """Launch a kernel that looks at tensor `index`, or these tensors, and works in its range.

        Unless the host knows that the range was set, the kernel is launched a second time, which
        does the work again in the range that the first found, and nothing where that was set.
        """
        several = index if isinstance(index, tuple) else (index,)
        partial = tuple(self._of_each[one] for one in several)
        counts = tuple(self._programs[one] for one in several)
        arguments |= {
            "partial_ptr": partial if isinstance(index, tuple) else partial[0],
            "n_partial": counts if isinstance(index, tuple) else counts[0],
            "ranges_ptr": self._ranges,
            "used_ptr": self.at,
        }
        for second in (False,) if self.known else (False, True):
            launch(kernel, sum(counts), **arguments, SECOND=second)

    def settle(self, mass: Tensor | None = None, kept_mass: Tensor | None = None) -> None:
        """End the call: make of partial findings what was found out.

        Args:
            mass: float32 (programs, 2), from each program that looked at the last tensor the mass
                that was kept, and of how many rows.
            kept_mass: float32 0-d, gets the mean of them over rows.
        """
        counts = [*self._programs, *[0] * (_MOST_RANGES - len(self._programs))]
        launch(
            _settle_kernel,
            len(self._programs),
            partial_ptr=self._partial,
            **{f"n_{index}": count for index, count in enumerate(counts)},
            ranges_ptr=self._ranges,
            seen_ptr=self.seen,
            used_ptr=self.used,
            mass_ptr=mass,
            kept_mass_ptr=kept_mass,
        )


def of_operands(ranges: Tensor, n: int) -> Tensor:
    """The first n ranges of a call, of which the host knows what it knows of all."""
    if len(ranges) == n:
        return ranges
    own = ranges[:n]
    if are_known_set(ranges):
        note_set(own)
    return own


@triton.jit
def clips(ranges_ptr, index):
    """Between which values nothing is clipped: the range, or all where it was never set."""
    lo, hi = tl.load(ranges_ptr + 2 * index), tl.load(ranges_ptr + 2 * index + 1)  # [], []
    is_set = lo <= hi
    return tl.where(is_set, lo, float("-inf")), tl.where(is_set, hi, float("inf"))


@triton.jit
def candidates(acc, mask):
    """What each element says the extremes are: itself; NaN -inf and inf; (inf, -inf) if masked."""
    good = acc == acc
    low = tl.where(mask, tl.where(good, acc, float("-inf")), float("inf"))
    high = tl.where(mask, tl.where(good, acc, float("inf")), float("-inf"))
    return low, high


@triton.jit
def least(a, b):
    """The smaller; NaN where one is NaN, which costs nothing more."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def most(a, b):
    """The larger; NaN where one is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_extremes(low, high):
    """Extremes of each row of two tensors, the lowest of one, the highest of the other."""
    return tl.reduce(low, 1, least), tl.reduce(high, 1, most)


@triton.jit
def are_clipped(low, high, ranges_ptr, index):
    """1 where a range does not hold these extremes, 0 where it does or was never set."""
    lo, hi = clips(ranges_ptr, index)
    return tl.where((low < lo) | (high > hi), 1.0, 0.0)


@triton.jit
def store_partial(partial_ptr, program, low, high, beyond, count):
    """Store a program's extremes and how many are clipped, of how many, from those of its rows."""
    partial_ptr += 4 * program
    tl.store(partial_ptr, tl.min(low, 0))  # []
    tl.store(partial_ptr + 1, tl.max(high, 0))  # []
    tl.store(partial_ptr + 2, tl.sum(beyond, 0))  # []
    tl.store(partial_ptr + 3, tl.sum(count, 0))  # []


@triton.jit
def settled(partial_ptr, n_partial, ranges_ptr, used_ptr, index, program):
    """Both ends of the range to work with; the first program stores what was found."""
    lo, hi = tl.load(ranges_ptr + 2 * index), tl.load(ranges_ptr + 2 * index + 1)  # [], []
    if lo > hi:
        lo, hi, _ = _reduced(partial_ptr, n_partial)
        if program == 0:
            tl.store(used_ptr + 2 * index, lo)  # []
            tl.store(used_ptr + 2 * index + 1, hi)  # []
    return lo, hi


@triton.jit
def _reduced(partial_ptr, n_partial, BLOCK: tl.constexpr = 1024):  # pyright: ignore[reportArgumentType]
    """Lowest, highest and the share that is clipped, of what all programs found out."""
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    beyond = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_partial, BLOCK):
        programs = start + tl.arange(0, BLOCK)
        mask = programs < n_partial
        one = partial_ptr + 4 * programs  # [BLOCK]
        low = tl.minimum(low, tl.load(one, mask, other=float("inf")))  # [BLOCK]
        high = tl.maximum(high, tl.load(one + 1, mask, other=float("-inf")))  # [BLOCK]
        beyond += tl.load(one + 2, mask, other=0.0)  # [BLOCK]
        count += tl.load(one + 3, mask, other=0.0)  # [BLOCK]
    lo = tl.min(low, 0)
    hi = tl.max(high, 0)
    is_finite = (lo > float("-inf")) & (hi < float("inf"))  # pyright: ignore[reportOperatorIssue]
    # rows of NaN are clipped, but attend to nothing
    share = tl.minimum(tl.sum(beyond, 0) / tl.maximum(tl.sum(count, 0), 1.0), 1.0)
    return tl.where(is_finite, lo, float("inf")), tl.where(is_finite, hi, float("-inf")), share


@triton.jit
def _mean_mass(mass_ptr, n, BLOCK: tl.constexpr = 1024):  # pyright: ignore[reportArgumentType]
    """The mass that a row keeps, of those that all programs worked on."""
    kept = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        programs = start + tl.arange(0, BLOCK)
        mask = programs < n
        kept += tl.load(mass_ptr + 2 * programs, mask, other=0.0)  # [BLOCK]
        count += tl.load(mass_ptr + 2 * programs + 1, mask, other=0.0)  # [BLOCK]
    return tl.sum(kept, 0) / tl.maximum(tl.sum(count, 0), 1.0)


@triton.jit(do_not_specialize=["n_0", "n_1", "n_2", "n_3", "n_4"])
def _settle_kernel(
    partial_ptr,
    n_0,
    n_1,
    n_2,
    n_3,
    n_4,
    ranges_ptr,
    seen_ptr,
    used_ptr,
    mass_ptr,
    kept_mass_ptr,
):
    """A program for each tensor; n_0 … programs looked at the first …"""
    index = tl.program_id(0)
    n, first = n_0, n_0 * 0
    if index >= 1:
        n, first = n_1, first + n_0
    if index >= 2:
        n, first = n_2, first + n_1
    if index >= 3:
        n, first = n_3, first + n_2
    if index >= 4:
        n, first = n_4, first + n_3
    least, most, share = _reduced(partial_ptr + 4 * first, n)
    lo, hi = tl.load(ranges_ptr + 2 * index), tl.load(ranges_ptr + 2 * index + 1)  # [], []
    unset = lo > hi
    tl.store(seen_ptr + 3 * index, -least)  # []
    tl.store(seen_ptr + 3 * index + 1, most)  # []
    tl.store(seen_ptr + 3 * index + 2, share)  # []
    tl.store(used_ptr + 2 * index, tl.where(unset, least, lo))  # []
    tl.store(used_ptr + 2 * index + 1, tl.where(unset, most, hi))  # []
    if mass_ptr is not None:  # noqa: SIM102 (constexpr, and not)
        if index == tl.num_programs(0) - 1:
            tl.store(kept_mass_ptr, _mean_mass(mass_ptr, n))  # []
