"""Attention scores and softmax, one block of queries at a time.

Notation: B batch, H query heads, G key-value heads, R = H / G query heads per key-value head,
M queries, L keys, D head dimension. Query head h uses key-value head h // R.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from aixsim_kernels.optical.blocks import block_size
from aixsim_kernels.optical.grid import Grid, detect_
from aixsim_kernels.optical.light import Lamp, Lit
from aixsim_kernels.optical.ranges import (
    empty_ranges,
    merge_observed,
    only_finite,
    quantile_range,
    spread,
)


class Block(NamedTuple):
    """Part of the score tensor: some batches, key-value heads, queries; the first `keys` keys."""

    batch: slice
    heads: slice
    queries: slice
    keys: int
    free: int
    """Keys below this one are let through for every query of the block."""

    def rows_of(self, t: Tensor) -> Tensor:
        """This part of a tensor (B, G, R, M, ...): (b, g, R, m, ...)."""
        return t[self.batch, self.heads, :, self.queries]

    def part_of(self, t: Tensor) -> Tensor:
        """This part of a tensor that broadcasts to the scores, (B, G, R, M, L) or ones."""
        whole = slice(None)
        parts = (self.batch, self.heads, whole, self.queries, slice(self.keys))
        return t[tuple(p if n > 1 else whole for p, n in zip(parts, t.shape, strict=True))]


@dataclass(frozen=True)
class Scores:
    """Score tensor that is computed one block at a time.

    Args:
        q: float32 (B, G, R, M, D), quantised.
        k: float32 (B, G, L, D), quantised.
        mask: (B, G, R, M, L), bool (True = attend) or additive; an expanded view will do; or None.
        scale: factor of the detected scores.
        is_causal: query i sees keys up to i + `later`.
        levels: of the modulators, that of the probabilities too.
        lowest: float32 (2,), ends that signs of q and of k are carried by the offset of; None =
            they are carried by the difference of two rails.
        shift: where queries that are a part begin, less where the last M of the whole do: at most
            0. A tensor, int64 0-d, on a GPU, where reading it would be a wait.
    """

    q: Tensor
    k: Tensor
    mask: Tensor | None
    scale: float
    is_causal: bool
    levels: int
    lowest: Tensor | None = None
    shift: int | Tensor = 0

    @property
    def is_offset(self) -> bool:
        """How signs are carried."""
        return self.lowest is not None

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(B, G, R, M, L)."""
        batches, heads, repeats, queries, _ = self.q.shape
        return batches, heads, repeats, queries, self.k.shape[2]

    @property
    def later(self) -> int | Tensor:
        """How many keys lie before that of the first query, in a causal attention."""
        *_, queries, keys = self.shape
        return keys - queries + self.shift

    def blocks(self) -> Iterator[Block]:
        """Blocks that cover everything the causal mask lets through."""
        batches, heads, repeats, queries, keys = self.shape
        size = block_size()
        height = min(queries, max(16, size // max(repeats * keys, 1)))
        together = max(1, size // max(height * repeats * keys, 1))
        # several key-value heads at a time, and several batches once all heads fit
        head_step, batch_step = min(heads, together), max(1, together // max(heads, 1))
        starts = [range(0, batches, batch_step), range(0, heads, head_step)]
        for first in range(0, queries, max(height, 1)):
            last = min(first + height, queries)
            seen, free = self._visible(first, last)
            if seen == 0:
                continue
            for batch, head in product(*starts):
                yield Block(
                    slice(batch, batch + batch_step),
                    slice(head, head + head_step),
                    slice(first, last),
                    seen,
                    free,
                )

    def _visible(self, first: int, last: int) -> tuple[int, int]:
        """How many keys some query and how many every query from `first` to `last` - 1 sees."""
        keys, later = self.shape[-1], self.later
        if not self.is_causal:
            return keys, keys if self.mask is None else 0
        if isinstance(later, Tensor):
            return keys, 0
        seen = min(max(last + later, 0), keys)
        free = min(max(first + 1 + later, 0), seen)
        return seen, free if self.mask is None else 0

    def accumulate(self, block: Block) -> Tensor:
        """Raw accumulator of a block, q k^T: float32 (b, g, R, m, keys)."""
        q = self.q[block.batch, block.heads, :, block.queries]
        k = self.k[block.batch, block.heads, : block.keys]
        return (q.flatten(2, 3) @ k.mT).unflatten(2, q.shape[2:4])

    def light(self, block: Block, acc: Tensor) -> Tensor:
        """Light on the detectors of a block, in units of its raw accumulator, of the same shape."""
        q = self.q[block.batch, block.heads, :, block.queries]
        k = self.k[block.batch, block.heads, : block.keys]
        if self.lowest is None:
            return (q.abs().flatten(2, 3) @ k.abs().mT).view(acc.shape)
        of_q, of_k = self.lowest.unbind()
        row = q.sum(-1, keepdim=True).sub_(q.shape[-1] * of_q).mul_(of_k)
        column = k.sum(-1).mul_(of_q)[:, :, None, None, :]
        return acc.sub(row).sub_(column)

    def light_seen(self, block: Block, light: Tensor) -> Tensor:
        """What the mask lets through of a block's light, and of how many pairs: float64 (2,)."""
        blocked = self.blocked(block)
        if blocked is None:
            return torch.stack([light.sum(dtype=torch.float64), _count(light)])
        seen = light[..., block.free :].masked_fill(blocked, 0).sum(dtype=torch.float64)
        seen += light[..., : block.free].sum(dtype=torch.float64)
        shut = blocked.expand(*light.shape[:-1], -1).sum(dtype=torch.float64)
        return torch.stack([seen, _count(light) - shut])

    def measure(self, lamp: Lamp) -> None:
        """Shows a lamp the light of all that the mask lets through."""
        seen = self.q.new_zeros(2, dtype=torch.float64)
        for block in self.blocks():
            seen += self.light_seen(block, self.light(block, self.accumulate(block)))
        lamp.see(seen[0], seen[1], self.q.shape[-1])

    def blocked(self, block: Block) -> Tensor | None:
        """Where keys from `block.free` on may not be attended to: bool (..., m, keys - free)."""
        if block.free == block.keys:
            return None
        shut = None
        if self.is_causal:
            query = torch.arange(block.queries.start, block.queries.stop, device=self.q.device)
            key = torch.arange(block.free, block.keys, device=self.q.device)
            shut = key > (query + self.later).unsqueeze(-1)
        mask = self.mask_of(block)
        if mask is None:
            return shut
        return ~lets_through(mask) if shut is None else ~lets_through(mask) | shut

    def mask_of(self, block: Block) -> Tensor | None:
        """A block's part of the mask: (b, g, R, m, keys)."""
        if self.mask is None:
            return None
        return self.mask[block.batch, block.heads, :, block.queries, : block.keys]

    def row_extremes(self, block: Block, acc: Tensor) -> tuple[Tensor, Tensor]:
        """Extremes of each query of a block where the mask lets through: float32 (b, g, R, m).

        NaN if one of these is NaN, (+inf, -inf) if there are none.
        """
        free, rest = acc[..., : block.free], acc[..., block.free :]
        low = acc.new_full(acc.shape[:-1], float("inf"))
        high = -low
        if block.free:
            low, high = free.amin(-1), free.amax(-1)
        blocked = self.blocked(block)
        if blocked is not None:
            low = torch.minimum(low, rest.masked_fill(blocked, float("inf")).amin(-1))
            high = torch.maximum(high, rest.masked_fill(blocked, -float("inf")).amax(-1))
        return low, high

    def range(self, quantiles: Sequence[float] | None) -> Tensor:
        """Range of the raw accumulator over all that the mask lets through: float32 (2,)."""
        seen = empty_ranges(1, self.q.device)[0]
        if quantiles is not None:
            return quantile_range(self._sample(), quantiles) if 0 not in self.shape else seen
        for block in self.blocks():
            seen = merge_observed(seen, range_of(*self.row_extremes(block, self.accumulate(block))))
        return only_finite(seen)

    def _sample(self) -> Tensor:
        """Raw accumulator at positions spread evenly, NaN where the mask shuts: float32 (n,)."""
        positions = spread(prod(self.shape), self.q.device)
        b, g, r, i, j = torch.unravel_index(positions, self.shape)
        sample = (self.q[b, g, r, i] * self.k[b, g, j]).sum(-1)
        if self.is_causal:
            sample.masked_fill_(j > i + self.later, float("nan"))
        if self.mask is not None:
            sample.masked_fill_(~lets_through(self.mask[b, g, r, i, j]), float("nan"))
        return sample

    def exponentials(
        self,
        block: Block,
        acc: Tensor,
        at: Grid,
        keys: Tensor | None,
        lit: Lit | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Detected scores of a block and their softmax, not yet divided by its sum, in place.

        Args:
            block: which part of the scores.
            acc: float32 (b, g, R, m, keys), from `accumulate`; becomes the result.
            at: the detector's levels.
            keys: noise key of each score row, int32 (B, G, R, M), or None.
            lit: the light on the detectors, if there is so little that it makes noise.

        Returns:
            exp(score - row maximum), 0 where the mask shuts, float32 (b, g, R, m, keys); its row
            sums (b, g, R, m, 1), 0 for a row with nothing to attend to.
        """
        if keys is not None:
            keys = keys[block.batch, block.heads, :, block.queries]
        scores = detect_(acc, at, keys, 0, lit).mul_(self.scale)
        mask = self.mask_of(block)
        if mask is not None and mask.dtype != torch.bool:
            scores.add_(mask)
        blocked = self.blocked(block)
        if blocked is not None:
            scores[..., block.free :].masked_fill_(blocked, -float("inf"))
        peak = scores.amax(-1, keepdim=True)
        peak.masked_fill_(peak == -float("inf"), 0)
        scores.sub_(peak).exp_()
        return scores, scores.sum(-1, keepdim=True)


def _count(x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.float64, device=x.device)


def range_of(low: Tensor, high: Tensor) -> Tensor:
    """Range of all rows from their extremes: float32 (...), twice -> float32 (2,)."""
    return torch.stack([low.amin(), high.amax()])


def lets_through(mask: Tensor) -> Tensor:
    """Where a mask, bool or additive, lets a query attend to a key: (...) -> bool (...)."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
