"""The equations of the optical matmul: range -> code -> value, lookup-table floor, detector.

A range is a float32 pair (lo, hi); (+inf, -inf) is the empty range, "never set". With L levels

    code = round_half_even(clamp((x - lo) * (L - 1) / (hi - lo), 0, L - 1))
    x^   = lo + code * (hi - lo) / (L - 1)

and the detector adds u ~ U(-1/2, 1/2) before it rounds (arXiv 2302.10360, section 3). Arithmetic is
float32 whatever the storage type: bfloat16 cannot hold 256 levels of an arbitrary range.
"""

from collections.abc import Iterator, Sequence
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from aixsim_kernels.common.noise import random_int16

# how many elements a quantile is estimated from
QUANTILE_SAMPLE = 1 << 16
# elements a thread works on at a time: few enough to stay in a cache with their temporaries
BLOCK = 1 << 18
# elements that are looked at together for whether any of them is clipped
PIECE = 1 << 12


def block_size() -> int:
    """Elements that are worked on at a time, on a CPU by all its threads together."""
    return BLOCK * torch.get_num_threads()


def empty_ranges(n: int, device: torch.device | str | None = None) -> Tensor:
    """Ranges that were never set: float32 (n, 2) filled with (+inf, -inf)."""
    ranges = torch.full((n, 2), float("inf"), device=device)
    # filled, not copied from the host, which a training step would wait for
    ranges[:, 1].fill_(-float("inf"))
    return ranges


def is_empty(ranges: Tensor) -> Tensor:
    """Which ranges were never set: (..., 2) -> bool (...)."""
    return ranges[..., 0] > ranges[..., 1]


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


def clipped_share(x: Tensor, bounds: Tensor, extremes: Tensor | None = None) -> Tensor:
    """Share of a batch that a modulator or detector clips.

    Args:
        x: any shape and floating type.
        bounds: float32 (2,), lo and hi.
        extremes: float32 (2,), those of `x` where they are known: most batches need no look.

    Returns:
        float32 0-d, with NaN among them; 0 where there are no elements, or no range.
    """
    values = x.reshape(-1)
    if not len(values) or is_held(extremes, bounds):
        return bounds.new_zeros(())
    looked_at = values
    if values.device.type == "cpu":
        busy = ~_holds_all(values, bounds)
        # most pieces hold none, and are left out
        if 4 * int(busy.sum()) < len(busy):
            n = len(busy) * PIECE
            looked_at = torch.cat([values[:n].view(-1, PIECE)[busy].view(-1), values[n:]])
    # compared in place, as floats: torch is several times slower on bools
    clipped = looked_at.float().clamp(*bounds.unbind()).ne_(looked_at).sum()
    return (clipped / len(values)).masked_fill_(is_empty(bounds), 0)


def packed_share(bits: Tensor, n: int, bounds: Tensor) -> Tensor:
    """`clipped_share` of `n` elements, from what `pack_inside` made of them: float32 0-d."""
    if not n:
        return bounds.new_zeros(())
    kept = _ONES.to(bits.device).index_select(0, bits.to(torch.int32)).sum()
    return ((n - kept) / n).masked_fill_(is_empty(bounds), 0)


def are_clipped(low: Tensor, high: Tensor, bounds: Tensor) -> Tensor:
    """1 where a range does not hold these extremes, 0 where it does or was never set: (...)."""
    lo, hi = bounds.unbind()
    kept = low.ge(lo).logical_and_(high.le(hi)).logical_or_(is_empty(bounds))
    return 1 - kept.float()


def is_held(extremes: Tensor | None, bounds: Tensor) -> bool:
    """Whether a range is known to hold all of a batch: on a GPU asking would be a wait for it."""
    if extremes is None or bounds.device.type != "cpu":
        return False
    (lowest, highest), (lo, hi) = extremes.tolist(), bounds.tolist()
    return lo <= lowest <= highest <= hi


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


def inside(x: Tensor, bounds: Tensor) -> Tensor:
    """1 where the modulator did not clip, lo <= x <= hi, else 0, for NaN too: float32 (...)."""
    lo, hi = bounds.unbind()
    x = x.float()
    above = x - lo
    # compared in place, as floats: torch is several times slower on bools
    return torch.minimum(above, hi - x, out=above).ge_(0)


def mask_clipped_(grad: Tensor, x: Tensor, bounds: Tensor) -> Tensor:
    """Zeroes the gradient of clipped elements in place: float32 (...) contiguous, x (...)."""
    grads, values = grad.view(-1), x.reshape(-1)
    for part in _parts(_holds_all(values, bounds), len(values)):
        grads[part].mul_(inside(values[part], bounds))
    return grad


def pack_inside(x: Tensor, bounds: Tensor) -> Tensor:
    """`inside`, 8 elements a byte, the first in the lowest bit: (...) -> uint8 (ceil(n / 8),)."""
    values = x.reshape(-1)
    bits = torch.full(((len(values) + 7) // 8,), 255, dtype=torch.uint8, device=x.device)
    for part in _parts(_holds_all(values, bounds), len(values)):
        # torch converts to int8 several times faster than to uint8
        kept = inside(values[part], bounds).to(torch.int8)
        if len(kept) % 8:
            kept = torch.nn.functional.pad(kept, (0, -len(kept) % 8))
        # eight bytes of 0 or 1 as one integer: the product gathers their bits in the top byte
        packed = (kept.view(torch.int64) * 0x0102040810204080) >> 56
        bits[part.start // 8 :][: len(packed)].copy_(packed)
    return bits


def mask_packed_(grad: Tensor, bits: Tensor) -> Tensor:
    """Zeroes the gradient of clipped elements in place: float32 (...) contiguous.

    Args:
        grad: gradient of the modulator's values.
        bits: uint8 (ceil(n / 8),), from `pack_inside`.
    """
    table = _BYTES.to(bits.device)
    grads = grad.view(-1)
    whole = bits[: len(grads) // PIECE * (PIECE // 8)].view(-1, PIECE // 8)
    for part in _parts(whole.amin(1) == 255, len(grads)):
        packed = bits[part.start // 8 : (part.stop + 7) // 8]
        kept = table.index_select(0, packed.to(torch.int32)).view(-1)
        grads[part].mul_(kept[: part.stop - part.start])
    return grad


def _holds_all(values: Tensor, bounds: Tensor) -> Tensor:
    """Whether a range holds all of a piece: (n,) -> bool (n // PIECE,)."""
    lo, hi = bounds.unbind()
    pieces = values[: len(values) // PIECE * PIECE].view(-1, PIECE)
    # torch.aminmax is many times slower along a dimension
    return (pieces.amin(1) >= lo) & (pieces.amax(1) <= hi)


def _parts(spared: Tensor, n: int) -> Iterator[slice]:
    """Parts of `n` elements that have to be looked at, of at most a block each.

    Few elements are clipped, and most pieces hold none. On a CPU, where reading a tensor waits for
    nothing, those are left out.

    Args:
        spared: bool (n // PIECE,), the pieces that need not.
        n: number of elements; what lies behind the last whole piece is looked at.
    """
    pieces = len(spared)
    busy = (~spared).nonzero().flatten().tolist() if spared.device.type == "cpu" else None
    # scattered pieces cost more than their elements do: beyond a few, all is looked at
    if busy is None or 16 * len(busy) > pieces:
        size = block_size()
        yield from (slice(first, min(first + size, n)) for first in range(0, n, size))
        return
    yield from (slice(piece * PIECE, (piece + 1) * PIECE) for piece in busy)
    if pieces * PIECE < n:
        yield slice(pieces * PIECE, n)


# byte -> its eight bits, the lowest first, and how many of them are 1
_BYTES = torch.tensor([[float(byte >> i & 1) for i in range(8)] for byte in range(256)])
_ONES = _BYTES.sum(1, dtype=torch.int64)


def detect_(acc: Tensor, at: Grid, keys: Tensor | None) -> Tensor:
    """What the detector reads, in place.

    Args:
        acc: float32 (..., columns), contiguous; the raw accumulator.
        at: the detector's levels.
        keys: int32 (...) from `row_keys`, one per row, or None for no noise.

    Returns:
        `acc`, now lo + step * clamp(round((acc - lo) / step + u), 0, levels - 1).
    """
    columns = acc.shape[-1]
    rows = acc.view(-1, columns)
    keys = None if keys is None else keys.reshape(-1)
    height = max(1, block_size() // max(columns, 1))
    for first in range(0, len(rows), height):
        block = rows[first : first + height].sub_(at.lo).mul_(at.per_level)
        if keys is not None:
            bits = random_int16(keys[first : first + height], columns)
            block.add_(bits.float().add_(0.5), alpha=2.0**-16)
        block.round_().clamp_(0, at.levels - 1).mul_(at.step).add_(at.lo)
    return acc
