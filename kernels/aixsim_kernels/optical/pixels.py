"""Pixels of the second modulator that differ from each other, as a device was made.

Brightness is a function of the specimen, the layer, and the pixel's place in its array, and of
nothing else: the same in every call, on every rank and device, after every resume. A pixel shows
its value as that much light; a dark one shows none, which stands for 0, or for the lowest value
where signs are carried by an offset. What an offset adds is subtracted as it is shown, as a device
that is calibrated once knows it.
"""

import torch
from torch import Tensor

from aixsim_kernels.common.noise import normal, place_in, random_int16, row_keys, seed_word
from aixsim_kernels.optical.settings import Settings

# numbers that a pixel draws
_GAIN, _DARK, _DARK_TOO = range(3)
_DRAWS = 3


def brightness(
    x: Tensor, key: Tensor, settings: Settings, *, array: int = 0, repeats: int = 1
) -> Tensor:
    """How bright each pixel is that shows a second operand, 1 as it was meant.

    Args:
        x: (N, K), a weight; or (B, G, L, D), keys or values, of whatever type.
        key: of the operation; `placed`, x is a part of the whole.
        settings: of the operation.
        array: which one of a layer's, 0 or 1.
        repeats: query heads that share a head of keys or values.

    Returns:
        float32 (N, K), or (G, L, D), at least 0, on the device of x.
    """
    rows = torch.arange(x.shape[-2], device=x.device)
    place = place_in(key)
    if x.dim() == 4:
        heads = torch.arange(x.shape[1], device=x.device)
        if place is not None:
            heads = heads + place.first_head // repeats
        # a row's number does not depend on how many there are
        rows = (heads.unsqueeze(1) << 32) + rows
    elif place is not None:
        rows = rows + place.first_column

    def bits(draw: int) -> Tensor:
        seed = seed_word(settings.device, _DRAWS * array + draw)
        keys = row_keys(rows, torch.zeros_like(key.view(-1)[0]), seed)
        return random_int16(keys, x.shape[-1])

    gain = torch.ones((), device=x.device)
    if settings.gain_std:
        gain = normal(bits(_GAIN)).mul_(settings.gain_std).add_(1).clamp_(min=0)
    if settings.dead:
        # 32 bits: a share may be smaller than 2^-16
        number = (bits(_DARK).double() + 32768) * 65536 + (bits(_DARK_TOO).double() + 32768)
        gain = gain * (number >= settings.dead * 2.0**32)
    return gain


def show(value: Tensor, bright: Tensor, lo: Tensor, settings: Settings) -> Tensor:
    """What pixels show of values, in place.

    Args:
        value: float32 (..., G, L, D) or (N, K), as the modulator means them.
        bright: float32, from `brightness`.
        lo: float32 0-d, lowest value of the modulator's range.
        settings: of the operation.
    """
    if not settings.offset:
        return value.mul_(bright)
    return value.sub_(lo).mul_(bright).add_(lo)
