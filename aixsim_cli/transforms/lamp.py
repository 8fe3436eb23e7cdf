"""The lamps of a module that has little light: their state, and what it costs and is worth."""

from collections.abc import Iterable

import torch
from aixsim_kernels import empty_ranges, observed_in
from torch import Tensor, nn

# rows of an output that tell how strong its signal is
_SAMPLE = 256


class Lamp(nn.Module):
    """The lamps of a module, one for each of its products.

    A module of its own: a file that knows of no lamp lacks its tensor, and has all others.

    Buffers:
        ranges: float32 (n, 2), between which means of light a multiplication lately lay, in units
            of the product; (+inf, -inf) = not yet set. Part of the state dict.
    """

    ranges: Tensor

    def __init__(self, n: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("ranges", empty_ranges(n, device=device))

    def light(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Of each lamp the batch's light a multiplication, and what it is set to: float32 (n,).

        Args:
            seen: float32 (n, 3), by the operation, of its lamps.
        """
        own = observed_in(seen)[:, 0]
        set_to = self.ranges.mean(1)
        return own, torch.where(set_to.isfinite(), set_to, own)

    def _apply(self, fn, recurse=True):  # pyright: ignore[reportIncompatibleMethodOverride]
        before = self.ranges
        super()._apply(fn, recurse)
        if self.ranges.dtype != torch.float32:
            # what float16 cannot hold would become no light
            self._buffers["ranges"] = before.to(self.ranges.device)
        return self


def signal_to_noise(output: Tensor, variance: Tensor, bias: Tensor | None = None) -> Tensor:
    """Deviation of a signal over that of its noise, float32 0-d, from some rows of both.

    Args:
        output: (..., N), as it was read, signal and noise, and the bias added.
        variance: of the noise, 0-d.
        bias: (N,) or None.
    """
    rows = output.reshape(-1, output.shape[-1])
    some = rows[:: max(1, len(rows) // _SAMPLE)].float()
    some = some if bias is None else some - bias
    ratio = ((some.var(correction=0) - variance).clamp(min=0) / variance).sqrt()
    # without light there is neither
    return ratio.nan_to_num(0.0, 0.0, 0.0)


def keep_float32(module: nn.Module, names: Iterable[str]) -> None:
    """bfloat16 cannot hold 256 levels of an arbitrary range: `.to(bfloat16)` leaves these alone."""
    for name in names:
        buffer = module._buffers[name]
        if buffer is not None and buffer.dtype != torch.float32:
            module._buffers[name] = buffer.float()
