"""What lies beyond a range and is clipped: its share, for the log, and its gradient, which is 0."""

from collections.abc import Iterator

import torch
from torch import Tensor

from aixsim_kernels.optical.blocks import block_size
from aixsim_kernels.optical.ranges import is_empty

# elements that are looked at together for whether any of them is clipped
PIECE = 1 << 12
# byte -> its eight bits, the lowest first, and how many of them are 1
_BYTES = torch.tensor([[float(byte >> i & 1) for i in range(8)] for byte in range(256)])
_ONES = _BYTES.sum(1, dtype=torch.int64)


def count(x: Tensor, bounds: Tensor, extremes: Tensor) -> Tensor:
    """How many elements of a batch a modulator or detector clips.

    Args:
        x: any shape and floating type.
        bounds: float32 (2,), lo and hi.
        extremes: float32 (2,), those of `x`: most batches need no look.

    Returns:
        0-d, with NaN among them.
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
    return looked_at.float().clamp(*bounds.unbind()).ne_(looked_at).sum()


def packed_count(bits: Tensor, n: int) -> Tensor:
    """`count` of `n` elements, from what `pack_inside` made of them: 0-d."""
    return n - _ONES.to(bits.device).index_select(0, bits.to(torch.int32)).sum()


def are_clipped(low: Tensor, high: Tensor, bounds: Tensor) -> Tensor:
    """1 where a range does not hold these extremes, 0 where it does or was never set: (...)."""
    lo, hi = bounds.unbind()
    kept = low.ge(lo).logical_and_(high.le(hi)).logical_or_(is_empty(bounds))
    return 1 - kept.float()


def is_held(extremes: Tensor, bounds: Tensor) -> bool:
    """Whether a range is known to hold all of a batch: on a GPU asking would be a wait for it."""
    if bounds.device.type != "cpu":
        return False
    (lowest, highest), (lo, hi) = extremes.tolist(), bounds.tolist()
    return lo <= lowest <= highest <= hi


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
