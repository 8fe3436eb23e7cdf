"""What operations on a CPU are made of: passes over memory, and attention in blocks. Here in torch.

What quantises also looks: the pass that reads a batch anyway tells its extremes and how much of it
is clipped. `native.py` has the same in C and is held to this.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from aixsim_kernels.common.noise import global_rows, row_keys
from aixsim_kernels.optical import clipping, grid
from aixsim_kernels.optical.attention.scores import Block, Scores, range_of
from aixsim_kernels.optical.grid import Grid
from aixsim_kernels.optical.light import Lamp, Lit
from aixsim_kernels.optical.ranges import (
    calibrate,
    empty_ranges,
    is_empty,
    merge_observed,
    observe,
    only_finite,
    seen_of,
)


class Range:
    """A range that one call works with, and what it saw of the batch.

    Args:
        running: float32 (2,), lo and hi; (+inf, -inf) where it was never set.
        levels: of its modulator or detector.
    """

    def __init__(self, running: Tensor, levels: int) -> None:
        self.running, self.levels = running, levels
        self._own: Tensor | None = None
        self._extremes, self._clipped = empty_ranges(1, running.device)[0], running.new_zeros(())

    @cached_property
    def bounds(self) -> Tensor:
        """What is worked with, float32 (2,): where it was never set the batch's own range."""
        return self.running if self._own is None else calibrate(self.running, self._own)

    @cached_property
    def grid(self) -> Grid:
        """The levels."""
        return grid.grid(self.bounds, self.levels)

    def is_set(self) -> bool:
        """Whether it is known to have been set: on a GPU asking would be a wait for it."""
        return self.running.device.type == "cpu" and not bool(is_empty(self.running))

    def look(self, batch: Tensor, quantiles: Sequence[float] | None) -> None:
        """Take the batch's own range, before it is worked on, where a pass will not find it."""
        if quantiles is not None or not self.is_set():
            self.take(observe(batch, quantiles))

    def take(self, own: Tensor) -> None:
        """`own` (2,) is the batch's range."""
        self._own = own

    def see(self, extremes: Tensor, clipped: Tensor) -> None:
        """Add what a pass saw: extremes float32 (2,), NaN where one is; how many were clipped."""
        self._extremes = merge_observed(self._extremes, extremes)
        self._clipped = self._clipped + clipped

    def observed(self) -> Tensor:
        """The batch's own range, float32 (2,); the empty one where an end is not finite."""
        return only_finite(self._extremes) if self._own is None else self._own

    def clipped(self, n: int | Tensor) -> Tensor:
        """Clipped ones of `n` as a share: float32 0-d; 0 where there is no range, and of nothing.

        At most 1, which queries of NaN are: they are clipped, but attend to nothing.
        """
        share = (self._clipped / n).float().nan_to_num(0.0).clamp(max=1)
        return share.masked_fill(is_empty(self.bounds), 0)


class Attended(NamedTuple):
    """What came through the two products of attention; R query heads share one of keys and values.

    Args:
        light: float32 (B, G, R, M, Dv), the second product, not yet detected.
        total: float32 (B, G, R, M, 1), sums of exp(score - row maximum), 0 for a row with nothing
            to attend to.
        kept: float32 (B, G, R, M, 1), sums of what the modulator showed, in [0, 1] each.
        lit: float32 (B, G, R, M, Dv), the light that a differential second product has on its
            detectors, where there is a lamp; else None.
        pairs: how many queries and keys met, 0-d, where there is a lamp.
    """

    light: Tensor
    total: Tensor
    kept: Tensor
    lit: Tensor | None = None
    pairs: Tensor | int = 0


class Softmax(NamedTuple):
    """A block of detected scores behind the softmax; rows (b, g, R, m), `keys` columns.

    Args:
        weights: float32 (b, g, R, m, keys), exp(score - row maximum), 0 where the mask shuts.
        shown: float32 (b, g, R, m, keys), what the modulator shows of the probabilities, in [0, 1].
        total: float32 (b, g, R, m, 1), sums of the weights, 0 for a row with nothing to attend to.
        full: float32 (b, g, R, m, 1), what full light stands for.
    """

    weights: Tensor
    shown: Tensor
    total: Tensor
    full: Tensor


class Passes:
    """In torch: what `NativePasses` is compared with, and what GPUs use for odd tensors."""

    def ranges(self, running: Tensor, levels: Sequence[int]) -> Sequence[Range]:
        """The ranges of a call, from float32 (n, 2), and the levels of each."""
        return [Range(one, own) for one, own in zip(running, levels, strict=True)]

    def results(
        self, ranges: Sequence[Range], sizes: Sequence[int | Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Of a call's n ranges, of batches of these sizes, at its end.

        Returns:
            What it saw, float32 (n, 3), see `ranges.py`; used ranges, float32 (n, 2).
        """
        shares = [one.clipped(size) for one, size in zip(ranges, sizes, strict=True)]
        observed = torch.stack([one.observed() for one in ranges])
        return seen_of(observed, torch.stack(shares)), torch.stack([one.bounds for one in ranges])

    def row_keys(self, shape: Sequence[int], key: Tensor, seed: int) -> Tensor:
        """Noise key of each row of an output: int32 `shape`; `key` and `seed` as in `noise.py`."""
        return row_keys(global_rows(shape, key), key, seed)

    def modulate(
        self,
        x: Tensor,
        at: Range,
        lut_min: float = 0.0,
        codes: Tensor | None = None,
        inside: Tensor | None = None,
    ) -> Tensor:
        """What a modulator shows of an operand.

        Args:
            x: (...), any floating type and strides.
            at: its range; sees `x`.
            lut_min: smallest magnitude it can show as a share of its range, 0 for none.
            codes: integers, contiguous, as many as `x` has elements; filled with the codes.
            inside: uint8 (ceil(n / 8),); filled with one bit an element, 1 where it was not
                clipped.

        Returns:
            float32 (...), contiguous. NaN stays NaN.
        """
        extremes = _extremes(x)
        if inside is None:
            clipped = clipping.count(x, at.bounds, extremes)
        else:
            inside.copy_(clipping.pack_inside(x, at.bounds))
            clipped = clipping.packed_count(inside, x.numel())
        at.see(extremes, clipped)
        return grid.modulate(x, at.grid, lut_min, codes)

    def decode(self, codes: Tensor, at: Range) -> Tensor:
        """Values that integer codes stand for, without the floor: (...) -> float32 (...)."""
        return grid.decode(codes, at.grid)

    def mask_clipped_(self, grad: Tensor, x: Tensor, at: Range) -> Tensor:
        """Zeroes the gradient of clipped elements in place: float32 (...) contiguous, x (...)."""
        return clipping.mask_clipped_(grad, x, at.bounds)

    def mask_packed_(self, grad: Tensor, inside: Tensor) -> Tensor:
        """`mask_clipped_` from the bits that `modulate` left: float32 (...) contiguous."""
        return clipping.mask_packed_(grad, inside)

    def detect_(
        self,
        acc: Tensor,
        at: Range,
        keys: Tensor | None,
        *,
        first: Tensor | int = 0,
        by_row: bool = False,
        lit: Lit | None = None,
    ) -> None:
        """What the detector reads, in place of the raw accumulator.

        Args:
            acc: float32 (..., columns), contiguous.
            at: its range; sees the accumulator.
            keys: int32 (...) from `row_keys`, one per row, or None for no noise.
            first: index of the first column, even.
            by_row: what is counted as clipped is rows, not elements.
            lit: the light on it, if there is so little that it makes noise.
        """
        extremes = _extremes(acc)
        if not by_row:
            clipped = clipping.count(acc, at.bounds, extremes)
        elif acc.numel():
            clipped = clipping.are_clipped(acc.amin(-1), acc.amax(-1), at.bounds).sum()
        else:
            clipped = acc.new_zeros(())
        at.see(extremes, clipped)
        grid.detect_(acc, at.grid, keys, first, lit)

    def look_at_scores(
        self, scores: Scores, v: Tensor, at: Range, quantiles: Sequence[float] | None
    ) -> None:
        """`Range.look` at the raw scores: once for their range, before they are detected in it."""
        if quantiles is not None or not at.is_set():
            at.take(scores.range(quantiles))

    def attend(
        self,
        scores: Scores,
        v: Tensor,
        at: Range,
        keys: Tensor | None,
        *,
        rowmax: bool,
        lamp: Lamp | None = None,
    ) -> Attended:
        """Both products of attention, and the detector and modulator between them.

        Args:
            scores: operands of the first product.
            v: float32 (B, G, L, Dv), as shown.
            at: range of the scores' detector; sees what the mask lets through, and counts rows.
            keys: noise key of each score row, int32 (B, G, R, M), or None.
            rowmax: the modulator is driven at full range in each row, not over [0, 1].
            lamp: of the first product; sees its light.
        """
        rows = scores.shape[:4]
        light = v.new_zeros(*rows, v.shape[-1])
        total, kept = v.new_zeros(2, *rows, 1)
        bright = v.abs() if lamp is not None and not scores.is_offset else None
        lit = None if bright is None else torch.zeros_like(light)
        seen = v.new_zeros(2, dtype=torch.float64)
        if lamp is not None and not lamp.is_set():
            scores.measure(lamp)
        for block in scores.blocks():
            acc = scores.accumulate(block)
            low, high = scores.row_extremes(block, acc)
            at.see(range_of(low, high), clipping.are_clipped(low, high, at.bounds).sum())
            soft = self._softmax(scores, block, acc, at, keys, rowmax, lamp, seen)
            for of, out in ((v, light), (bright, lit)):
                if of is not None and out is not None:
                    product = soft.shown.flatten(2, 3) @ of[block.batch, block.heads, : block.keys]
                    block.rows_of(out).copy_(product.unflatten(2, acc.shape[2:4]))
            block.rows_of(total).copy_(soft.total)
            block.rows_of(kept).copy_(soft.shown.sum(-1, keepdim=True))
        if lamp is not None:
            lamp.see(seen[0], seen[1], scores.q.shape[-1])
        return Attended(light, total, kept, lit, seen[1])

    def attend_grad(
        self,
        scores: Scores,
        v: Tensor,
        at: Range,
        keys: Tensor | None,
        grad: Tensor,
        *,
        rowmax: bool,
        grad_mask: Tensor | None = None,
        lamp: Lamp | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of `attend`, times what full light stands for; straight through what rounds.

        The softmax's own gradient needs the probabilities before they were quantised, hence not
        FlashAttention's rowsum(grad * out): `out` holds the quantised ones and the detector's
        noise. They are computed again, with the same noise.

        Args:
            scores, v, at, keys, rowmax, lamp: as in `attend`.
            grad: float32 (B, G, R, M, Dv).
            grad_mask: zeros that broadcast to the scores; gets the gradient of an additive mask.

        Returns:
            Gradients of q (B, G, R, M, D), k (B, G, L, D) and v (B, G, L, Dv), float32.
        """
        grad_q, grad_k = torch.zeros_like(scores.q), torch.zeros_like(scores.k)
        grad_v = torch.zeros_like(v)
        for block in scores.blocks():
            seen = (block.batch, block.heads, slice(block.keys))
            acc = scores.accumulate(block)
            soft = self._softmax(scores, block, acc, at, keys, rowmax, lamp)
            g = block.rows_of(grad)
            grad_v[seen] += soft.shown.flatten(2, 3).mT @ (g * soft.full).flatten(2, 3)
            ds = (g.flatten(2, 3) @ v[seen].mT).view(acc.shape)
            p = soft.weights.div_(soft.total.clamp(min=1))
            ds.sub_((p * ds).sum(-1, keepdim=True)).mul_(p)
            if grad_mask is not None:  # a mask is added behind the scale
                own = block.part_of(grad_mask)
                own += ds.sum_to_size(own.shape)
            ds = ds.mul_(scores.scale).flatten(2, 3)
            block.rows_of(grad_q).copy_((ds @ scores.k[seen]).unflatten(2, g.shape[2:4]))
            grad_k[seen] += ds.mT @ block.rows_of(scores.q).flatten(2, 3)
        return grad_q, grad_k, grad_v

    def _softmax(
        self,
        scores: Scores,
        block: Block,
        acc: Tensor,
        at: Range,
        keys: Tensor | None,
        rowmax: bool,
        lamp: Lamp | None,
        seen: Tensor | None = None,
    ) -> Softmax:
        """Detects a block's raw scores (b, g, R, m, keys), in place; see `attend`.

        `seen` (2,) gets the light that the lamp sends to them, and of how many pairs, added.
        """
        lit = None
        if lamp is not None:
            light = scores.light(block, acc)
            lit = lamp.on(whole=light.view(-1, acc.shape[-1]))
            if seen is not None:
                seen += scores.light_seen(block, light)
        weights, total = scores.exponentials(block, acc, at.grid, keys, lit)
        full = full_light(total, rowmax)
        shown = weights * (1.0 if rowmax else (total > 0) / total.clamp(min=1))
        shown.mul_(scores.levels - 1).round_().mul_(1 / (scores.levels - 1))
        return Softmax(weights, shown, total, full)


def full_light(total: Tensor, rowmax: bool) -> Tensor:
    """What the modulator's full range stands for in rows with these sums, float32 (...): the row's
    largest probability, or 1; 0 in a row with nothing to attend to."""
    return (total > 0) / total.clamp(min=1) if rowmax else (total > 0).float()


def _extremes(x: Tensor) -> Tensor:
    if not x.numel():
        return empty_ranges(1, x.device)[0]
    return torch.stack(torch.aminmax(x)).float()
