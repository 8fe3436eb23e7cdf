"""What an optical operation is told beside its tensors."""

from collections.abc import Sequence
from typing import NamedTuple


class Light(NamedTuple):
    """How much light an operation has, `optical/light.py`.

    Args:
        photons_per_mac: detected photons a multiplication, above 0.
        is_offset: signs are carried by an offset, not by the difference of two rails.
        read_noise: of each read of a detector, in electrons rms.
    """

    photons_per_mac: float
    is_offset: bool = False
    read_noise: float = 0.0

    @property
    def reads(self) -> int:
        """Reads of a detector that an output takes: of four passes, or of one."""
        return 1 if self.is_offset else 4


class Defects(NamedTuple):
    """How the pixels of the second modulator differ, `optical/pixels.py`.

    Args:
        gain_std: spread of their brightness, of 1.
        dead: share of them that are dark.
        device: hash of layer and specimen.
        is_offset: as in `Light`: what a dark pixel stands for.
    """

    gain_std: float
    dead: float
    device: int
    is_offset: bool = False


class Settings(NamedTuple):
    """Of an optical linear or attention.

    Args:
        stream: hash of layer and seed; selects the noise together with the key.
        levels: quantisation levels of modulators, and of detectors, 2 to 65536.
        lut_min: smallest magnitude that the second operand's modulator can show, as a share of its
            range; 0 for none.
        noise: whether detectors add noise: U(-1/2, 1/2) of a level or, with `photons`, that of
            light.
        quantiles: probabilities that replace min and max as the ends of a batch's range.
        scale: factor of the detected scores; of an attention, as are the two that follow.
        is_causal: query i sees keys up to i + L - M.
        rowmax: probabilities are quantised relative to their row's largest, not over [0, 1].
        levels_out: of detectors, where they have others; 0 = `levels`.
        photons: mean of detected photons a multiplication; 0 = light without end.
        offset: signs are carried by an offset, not by the difference of two rails.
        read_noise: of each read of a detector, in electrons rms.
        gain_std: spread of the second modulator's pixels in brightness, of 1.
        dead: share of the second modulator's pixels that are dark.
        device: hash of layer and specimen; selects its pixels.
    """

    stream: int
    levels: int
    lut_min: float
    noise: bool
    quantiles: Sequence[float] | None = None
    scale: float = 1.0
    is_causal: bool = False
    rowmax: bool = False
    levels_out: int = 0
    photons: float = 0.0
    offset: bool = False
    read_noise: float = 0.0
    gain_std: float = 0.0
    dead: float = 0.0
    device: int = 0

    @property
    def detector_levels(self) -> int:
        """Levels of detectors."""
        return self.levels_out or self.levels

    @property
    def light(self) -> Light | None:
        """How much light there is; None = without end."""
        return Light(self.photons, self.offset, self.read_noise) if self.photons else None

    @property
    def has_light(self) -> bool:
        """Whether there is so little light that it has a state, and noise of its own."""
        return self.photons > 0

    @property
    def has_defects(self) -> bool:
        """Whether pixels differ."""
        return self.gain_std > 0 or self.dead > 0


def with_physics(settings: Settings, light: Light | None, defects: Defects | None) -> Settings:
    """The settings of an operation with light and pixels."""
    if light is not None:
        photons, is_offset, read_noise = light
        settings = settings._replace(photons=photons, offset=is_offset, read_noise=read_noise)
    if defects is not None:
        gain_std, dead, device, is_offset = defects
        settings = settings._replace(
            gain_std=gain_std, dead=dead, device=device, offset=is_offset or settings.offset
        )
    return settings


# an operator's schema knows no tuples: it takes the fields one after another, `*settings`, and
# `Settings(*fields)` is made of them again behind it
SCHEMA = (
    "SymInt stream, SymInt levels, float lut_min, bool noise, float[]? quantiles, float scale, "
    "bool is_causal, bool rowmax, SymInt levels_out, float photons, bool offset, float read_noise, "
    "float gain_std, float dead, SymInt device"
)
