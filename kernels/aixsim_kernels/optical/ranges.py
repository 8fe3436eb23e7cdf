"""Ranges of operands and outputs: observed, calibrated, moved.

A range is a float32 pair (lo, hi); (+inf, -inf) is the empty range, "never set".

What a call saw of a tensor is a float32 triple: its lowest value, negated, its highest, and the
share of it that was clipped. The larger of two, number by number, holds both.
"""

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# ranges that were all seen to be set -> the version that they had then
_known_set = WeakIdKeyDictionary()
# how many elements a quantile is estimated from
QUANTILE_SAMPLE = 1 << 16


def empty_ranges(n: int, device: torch.device | str | None = None) -> Tensor:
    """Ranges that were never set: float32 (n, 2) filled with (+inf, -inf)."""
    ranges = torch.full((n, 2), float("inf"), device=device)
    # filled, not copied from the host, which a training step would wait for
    ranges[:, 1].fill_(-float("inf"))
    return ranges


def is_empty(ranges: Tensor) -> Tensor:
    """Which ranges were never set: (..., 2) -> bool (...)."""
    return ranges[..., 0] > ranges[..., 1]


def empty_seen(n: int, device: torch.device | str | None = None) -> Tensor:
    """Nothing seen of n tensors: float32 (n, 3)."""
    seen = torch.full((n, 3), -float("inf"), device=device)
    seen[:, 2].zero_()
    return seen


def seen_of(observed: Tensor, clipped: Tensor | None = None) -> Tensor:
    """What a call saw: ranges (n, 2), shares that were clipped (n,) -> float32 (n, 3)."""
    share = torch.zeros_like(observed[:, 0]) if clipped is None else clipped
    return torch.stack([-observed[:, 0], observed[:, 1], share], 1)


def observed_in(seen: Tensor) -> Tensor:
    """The ranges of what was seen: (n, 3) -> (n, 2)."""
    return torch.stack([-seen[:, 0], seen[:, 1]], 1)


def clipped_in(seen: Tensor) -> Tensor:
    """The shares of what was seen that were clipped: (n, 3) -> (n,), a view."""
    return seen[:, 2]


def note_set(ranges: Tensor) -> None:
    """Remember that all of these ranges are set, as the caller has seen.

    A GPU works without the host, which knows nothing of its ranges, and launches what would have to
    be done again if they were not set. It forgets as soon as somebody writes into them, other than
    by `.data` or numpy, which nothing tells of.
    """
    if not ranges.is_inference():
        _known_set[ranges] = ranges._version


def are_known_set(ranges: Tensor) -> bool:
    """Whether `note_set` was told of these ranges, and nobody has written into them since."""
    return not ranges.is_inference() and _known_set.get(ranges) == ranges._version


def merge_observed(a: Tensor, b: Tensor) -> Tensor:
    """Smallest ranges that hold both: (n, 2), (n, 2) -> (n, 2). The empty range is neutral."""
    return torch.stack(
        [torch.minimum(a[..., 0], b[..., 0]), torch.maximum(a[..., 1], b[..., 1])], -1
    )


def calibrate(ranges: Tensor, observed: Tensor) -> Tensor:
    """`ranges`, those never set replaced by the batch's own: (..., 2), (..., 2) -> (..., 2)."""
    return torch.where(is_empty(ranges).unsqueeze(-1), observed, ranges)


def update_ranges(
    ranges: Tensor, observed: Tensor, attack: float | Tensor, release: float | Tensor
) -> Tensor:
    """Each end of the ranges becomes `w * end + (1 - w) * observed end`.

    Args:
        ranges: float32 (n, 2), the running ranges.
        observed: float32 (n, 2), what the last step saw.
        attack: w of an end that was exceeded, in [0, 1]; a number or a tensor (n, 1).
        release: w of one that was not.

    Returns:
        float32 (n, 2). A range never set takes the observed one, an empty observation changes
        nothing.
    """
    grows = torch.stack([observed[..., 0] < ranges[..., 0], observed[..., 1] > ranges[..., 1]], -1)
    out, into = (weight * ranges + (1 - weight) * observed for weight in (attack, release))
    smoothed = torch.where(grows, out, into)
    kept = torch.where(is_empty(observed).unsqueeze(-1), ranges, smoothed)
    return torch.where(is_empty(ranges).unsqueeze(-1), observed, kept)


def observe(x: Tensor, quantiles: Sequence[float] | None = None) -> Tensor:
    """Range of a batch before it is quantised.

    Args:
        x: any shape and floating type.
        quantiles: pair of probabilities that replace min and max. They are estimated from at most
            `QUANTILE_SAMPLE` elements spread evenly: the estimate's own probability is off by at
            most about 4 * sqrt(p * (1 - p)) / 256.

    Returns:
        float32 (2,); the empty range if there are no elements or an end is not finite, so that
        a NaN or an infinity never gets into a running range.
    """
    if x.numel() == 0:
        return empty_ranges(1, x.device)[0]
    if quantiles is None:
        return only_finite(torch.stack(torch.aminmax(x)).float())
    return quantile_range(x.flatten()[spread(x.numel(), x.device)], quantiles)


def spread(n: int, device: torch.device) -> Tensor:
    """Up to `QUANTILE_SAMPLE` of the indices below `n`, evenly spread: int64 (count,).

    Multiples of about the golden ratio of `n`, modulo `n`: unlike a small stride it does not fall
    in step with the rows of a matrix.
    """
    index = torch.arange(min(n, QUANTILE_SAMPLE), device=device)
    if n <= QUANTILE_SAMPLE:
        return index
    stride = int(n * 0.6180339887498949)
    while gcd(stride, n) > 1:
        stride += 1
    return index * stride % n


def quantile_range(sample: Tensor, quantiles: Sequence[float]) -> Tensor:
    """Pair of quantiles of a sample, NaN left out: float (n,) -> float32 (2,).

    Equal to `torch.nanquantile`, and many times faster where the quantiles are near the ends: only
    what lies beyond them is put in order.
    """
    sample = sample.float()
    low, high = quantiles
    nan = sample.isnan()
    last = (~nan).sum() - 1
    # of fewer elements, where some are NaN, the quantiles lie no deeper
    depth = 2 + int(max(low, 1 - high) * len(sample))
    if 8 * depth > len(sample):
        return only_finite(torch.nanquantile(sample, sample.new_tensor(quantiles)))
    ends = []
    for probability, largest in ((low, False), (high, True)):
        filled = sample.masked_fill(nan, -float("inf") if largest else float("inf"))
        ordered = filled.topk(depth, largest=largest).values
        rank = sample.new_tensor(probability) * last
        below = rank.floor()
        positions = torch.stack([below, rank.ceil()]).long()
        if largest:
            positions = last - positions
        at_below, at_above = ordered[positions.clamp(0, depth - 1)].unbind()
        ends.append(at_below.lerp(at_above, rank - below))
    return only_finite(torch.stack(ends))


def only_finite(pair: Tensor) -> Tensor:
    """The range (2,) itself, or the empty range where an end is NaN or infinite."""
    return torch.where(pair.isfinite().all(), pair, empty_ranges(1, pair.device)[0])
