"""Light: how much of it reaches a detector, and the noise that it is counted with.

Photons come one by one. A detector that gets the light S, in units of the product that it stands
for, counts a Poisson number of them with the mean S / e, where one photo-electron is worth e. What
is decoded of the count then has the variance e S; each read of the amplifier adds its own:

    variance = e S + reads (e sigma)^2,    e = s / photons,    s = mean of S a multiplication

s is the setting of a lamp: a running mean, kept like a range. `photons` is then the mean number of
detected photons a multiplication, over all outputs of a product.

How light, which is never negative, carries signs, decides S:

- differential: each of a = a+ - a-, b = b+ - b- has its own rail. For each k one of the four
  products of rails is lit, in a pass of its own; signs are those of counts, whose variances add up,
  so that S = sum_k |a_k| |b_k|, with four reads;
- offset: a - a_lo and b - b_lo are shown, and what that adds is subtracted digitally, exactly:
  S = sum_k (a_k - a_lo) (b_k - b_lo), in one read. Where nothing is to be computed there is light.

Poisson's distribution is taken for a normal one of its variance: from some 20 photons a sum on its
third moment no longer shows.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aixsim_kernels.optical.ranges import empty_ranges, is_empty, seen_of
from aixsim_kernels.optical.settings import Settings

_UNSET = (math.inf, -math.inf)


class Lamp:
    """The lamp of a product in one call on a CPU: what one photo-electron is worth.

    Args:
        running: float32 (2,), between which means of S a multiplication lately lay; their middle is
            what the lamp is set to. (+inf, -inf) where it was never set: it is on this batch.
        settings: of the operation.
    """

    def __init__(self, running: Tensor, settings: Settings) -> None:
        assert settings.light is not None
        self.is_offset, self._photons = settings.offset, settings.photons
        # in electrons squared
        self.read_variance = settings.light.reads * settings.read_noise**2
        self._begin(running)

    def _begin(self, running: Tensor) -> None:
        self._set_to: tuple[float, ...] = tuple(running.tolist())
        self._own, self._depth = _UNSET, 0.0

    def is_set(self) -> bool:
        """Whether it is known to have been set: on another device asking would be a wait for it."""
        return self._set_to[0] <= self._set_to[1]

    def see(self, light: Tensor, outputs: float | Tensor, depth: float | Tensor) -> None:
        """The batch's S, summed, 0-d; of how many outputs, and of how many multiplications each.

        Where nothing shone at all, nothing was seen: a lamp is not set to no light.
        """
        n, self._depth = float(outputs) * float(depth), float(depth)
        mean = float(light) / n if n else math.nan
        self._own = (mean, mean) if math.isfinite(mean) and mean > 0 else _UNSET

    @property
    def electron(self) -> float | Tensor:
        """e: a number or float32 0-d; 0 where nothing was ever seen."""
        lo, hi = self._set_to if self.is_set() else self._own
        return (lo + hi) / 2 / self._photons if lo <= hi else 0.0

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """The batch's own mean, twice, and what is worked with, which is that where the lamp was
        never set: float32 (2,), the empty range where nothing was seen. Multiplications of an
        output, 0-d."""
        at = self._set_to if self.is_set() else self._own
        return torch.tensor(self._own), torch.tensor(at), torch.tensor(self._depth)

    def of_kernels(self, settings: Settings) -> Tensor:
        """e, and the variance of the reads of an output: float32 (2,); 0 without noise."""
        electron = torch.as_tensor(self.electron * settings.noise, dtype=torch.float32)
        return torch.stack([electron, electron**2 * self.read_variance])

    def on(
        self,
        *,
        whole: Tensor | None = None,
        row: Tensor | None = None,
        column: Tensor | None = None,
    ) -> "Lit":
        """Its light on the detectors of an output; see there."""
        return Lit(row, column, whole, self.is_offset, self.electron, self.read_variance)


class DeviceLamp(Lamp):
    """The same on another device, which nothing here waits for: its numbers stay there."""

    def _begin(self, running: Tensor) -> None:
        self._running, self._mean = running, empty_ranges(1, running.device)[0]
        self._depth = running.new_zeros(())

    def is_set(self) -> bool:
        return False

    def see(self, light: Tensor, outputs: float | Tensor, depth: float | Tensor) -> None:
        mean = (light / outputs / depth).float()
        seen = mean.isfinite() & (mean > 0)
        self._mean = torch.where(seen, mean.expand(2), self._mean)
        self._depth = torch.as_tensor(depth, dtype=torch.float32, device=mean.device)

    @property
    def electron(self) -> Tensor:
        middle = self.results()[1].mean()
        return torch.where(middle.isfinite(), middle, 0.0) / self._photons

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        at = torch.where(is_empty(self._running), self._mean, self._running)
        return self._mean, at, self._depth


def lamps_of(ranges: Tensor, settings: Settings) -> list[Lamp]:
    """The lamps of a call, from what they were set to, float32 (n, 2)."""
    kind = Lamp if ranges.device.type == "cpu" else DeviceLamp
    return [kind(one, settings) for one in ranges]


class Lit(NamedTuple):
    """S on the detectors of an output (rows, columns), as one of three.

    Args:
        row: float32 (rows, 1) or None.
        column: float32 (columns,) or None.
        whole: float32 (rows, columns), S itself; or None, and it is the square of `row * column`,
            or with `is_offset` the accumulator + row + column.
        is_offset: see there.
        electron: e, a number or float32 0-d.
        read_variance: of all reads of an output, in electrons squared.
    """

    row: Tensor | None
    column: Tensor | None
    whole: Tensor | None
    is_offset: bool
    electron: float | Tensor
    read_variance: float

    def light(self, acc: Tensor, rows: slice) -> Tensor:
        """S of some rows, float32 (n, columns), from their accumulators (n, columns)."""
        if self.whole is not None:
            return self.whole[rows]
        assert self.row is not None
        row = self.row[rows]
        if self.is_offset:
            lit = acc + row
            return lit if self.column is None else lit.add_(self.column)
        assert self.column is not None
        return (row * self.column).square_()

    def deviation(self, acc: Tensor, rows: slice) -> Tensor:
        """Deviation of the noise of some rows, in units of the accumulator (n, columns)."""
        variance = self.light(acc, rows).mul(self.electron)
        # an offset that rounding took a little too much of leaves less than no light
        variance.clamp_(min=0).add_(self.electron**2 * self.read_variance)
        return variance.sqrt_()


def margins(second: Tensor) -> tuple[Tensor, Tensor]:
    """What a differential product's S is made of, on the side of the second operand.

    S of all outputs would be a product of its own. `R_m c_n`, with R = |a| @ mean and c as below,
    is a product with one vector, has each row's mean exactly, and a row's noise depends on no
    other row. What is left is some per cent of the noise's deviation (docs/optical.md).

    Args:
        second: float32 (N, K), as shown.

    Returns:
        Mean of |b| over outputs, float32 (K,); sums of |b| of each output over their mean, float32
        (N,), 1 where there is no light at all.
    """
    magnitude = second.abs()
    of_column = magnitude.sum(1)
    mean = of_column.mean()
    return magnitude.mean(0), torch.where(mean > 0, of_column / mean, 1.0)


def lamp_results(lamps: Sequence[Lamp], seen: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """What a call saw (n, 3), and ranges that it used (n, 2), those of its lamps last.

    Where others have a share that is clipped, a lamp has the multiplications of an output.
    """
    if not lamps:
        return seen, used
    own, at, depth = (torch.stack(t) for t in zip(*(lamp.results() for lamp in lamps), strict=True))
    return torch.cat([seen, seen_of(own, depth)]), torch.cat([used, at])
