"""Ranges on a GPU: what each program saw, and the range that all of it makes, without the host.

`ranges.py` in two steps. Programs leave partial findings (n, 4): lowest, highest, how many elements
or rows lie beyond the range that was set, of how many. The launch that works with the range settles
it: its first program stores what all found, and the others look only where it was never set.

Legend: `ranges`, `observed` and `used` are (n, 2) with row `index`; `low`, `high`, `beyond` and
`count` are a program's findings so far, one for each lane. A comment gives the shape of a value,
[] of a number.
"""

# triton's types say that a jit function returns nothing
# pyright: reportGeneralTypeIssues=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# elements a program of an element-wise kernel works on
FLAT = 4096
# programs that share the reduction of a tensor
_REDUCERS = 256


class Found(NamedTuple):
    """What a call finds out about the tensors that it quantises, n of them.

    Args:
        observed: float32 (n, 2), their extremes.
        clipped: float32 (n,), shares beyond the range that was set.
        used: float32 (n, 2), the range that was set, or the extremes.
    """

    observed: Tensor
    clipped: Tensor
    used: Tensor


class Findings(NamedTuple):
    """What programs find out about a tensor, and where what it comes to is stored.

    Args:
        programs: how many.
        partial: float32 (programs, 4), a row from each; see `store_partial`. If there are none, one
            that found nothing.
        ranges: float32 (n, 2), those that were set.
        found: of n tensors.
    """

    programs: int
    partial: Tensor
    ranges: Tensor
    found: Found

    def arguments(self) -> dict[str, Any]:
        """As a kernel takes them that calls `settled`."""
        return {
            "partial_ptr": self.partial,
            "n_partial": len(self.partial),
            "ranges_ptr": self.ranges,
            "observed_ptr": self.found.observed,
            "clipped_ptr": self.found.clipped,
            "used_ptr": self.found.used,
        }


def new_found(ranges: Tensor) -> Found:
    """Room for what a call with these ranges (n, 2) finds out."""
    return Found(torch.empty_like(ranges), ranges.new_empty(len(ranges)), torch.empty_like(ranges))


def new_findings(programs: int, ranges: Tensor, found: Found) -> Findings:
    """Room for what programs find out; ranges (n, 2)."""
    partial = torch.empty(max(programs, 1), 4, device=ranges.device)
    if not programs:
        # filled, not copied from the host
        partial.zero_()
        partial[:, 0], partial[:, 1] = torch.inf, -torch.inf
    return Findings(programs, partial, ranges, found)


def extremes(x: Tensor, ranges: Tensor, found: Found, index: int) -> Findings:
    """What there is to find out about a contiguous tensor with the range `ranges[index]`."""
    programs = max(1, min(triton.cdiv(x.numel(), FLAT), _REDUCERS))
    findings = new_findings(programs, ranges, found)  # pyright: ignore[reportArgumentType]
    launch: Any = _extremes_kernel[(programs,)]
    launch(
        x_ptr=x,
        partial_ptr=findings.partial,
        ranges_ptr=ranges,
        index=index,
        n=x.numel(),
        BLOCK=FLAT,
    )
    return findings


def launch_twice(kernel: Any, findings: Findings, index: int, **arguments: Any) -> None:
    """Launch a kernel that finds out the range that it works with, row `index`.

    The second launch does the work again in the range that the first found, which it settles. It
    does nothing else where that was set before.
    """
    if not findings.programs:
        settle(findings, index)
        return
    for second in (False, True):
        kernel[(findings.programs,)](**findings.arguments(), **arguments, SECOND=second)


def settle(findings: Findings, index: int) -> None:
    """Store what programs found out in row `index`, where no launch follows that does."""
    launch: Any = _settle_kernel[(1,)]
    launch(**findings.arguments(), index=index)


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
def store_partial(partial_ptr, low, high, beyond, count):
    """Store a program's extremes and how many are clipped, of how many, from those of its rows."""
    partial_ptr += 4 * tl.program_id(0)
    tl.store(partial_ptr, tl.min(low, 0))  # []
    tl.store(partial_ptr + 1, tl.max(high, 0))  # []
    tl.store(partial_ptr + 2, tl.sum(beyond, 0))  # []
    tl.store(partial_ptr + 3, tl.sum(count, 0))  # []


@triton.jit
def _extremes_kernel(x_ptr, partial_ptr, ranges_ptr, index, n, BLOCK: tl.constexpr):
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    beyond = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    lo, hi = clips(ranges_ptr, index)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, n, stride):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < n
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
        # a NaN is no extreme, but must not be forgotten
        least, most = candidates(x, mask)
        low, high = tl.minimum(low, least), tl.maximum(high, most)
        beyond += tl.where((least < lo) | (most > hi), 1.0, 0.0)
        count += mask.to(tl.float32)
    store_partial(partial_ptr, low, high, beyond, count)


@triton.jit
def settled(partial_ptr, n_partial, ranges_ptr, observed_ptr, clipped_ptr, used_ptr, index):
    """Both ends of the range to work with; the first program stores all that was found out."""
    lo, hi = tl.load(ranges_ptr + 2 * index), tl.load(ranges_ptr + 2 * index + 1)  # [], []
    unset = lo > hi
    if unset | (tl.program_id(0) == 0):
        least, most, share = _reduced(partial_ptr, n_partial)
        lo = tl.where(unset, least, lo)
        hi = tl.where(unset, most, hi)
        if tl.program_id(0) == 0:
            tl.store(observed_ptr + 2 * index, least)  # []
            tl.store(observed_ptr + 2 * index + 1, most)  # []
            tl.store(clipped_ptr + index, share)  # []
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


@triton.jit(do_not_specialize=["n_partial"])
def _settle_kernel(partial_ptr, n_partial, ranges_ptr, observed_ptr, clipped_ptr, used_ptr, index):
    settled(partial_ptr, n_partial, ranges_ptr, observed_ptr, clipped_ptr, used_ptr, index)
