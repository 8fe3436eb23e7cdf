"""What the optical paradigm takes, and what it costs; the simulation itself is `optical.py`."""

import math
from dataclasses import dataclass
from typing import Literal

from aixsim_cli.transforms.counts import Counts, Product
from aixsim_cli.transforms.protocol import Paradigm, imported, param
from aixsim_cli.transforms.ranges import SmoothFactor, checked, smooth_factor

_PAPER = "arXiv 2302.10360"
# a detector that counts so many has a skewness of 1 / sqrt(20); with fewer its noise is no Gaussian
FEW_PHOTONS = 20
# a watt on a detector for a microsecond at 1550 nm
_MOST_PHOTONS = 1e13


@dataclass(frozen=True)
class OpticalParams:
    """Parameters of the optical simulation, under NewComputeBench's names.

    Raises:
        ValueError: a value is out of range.
    """

    q_levels: int = param(
        256, "of modulators and detectors, 2 to 65536", unit="levels", source=f"{_PAPER}, section 3"
    )
    q_lut_min: float | None = param(
        0.020040,
        "smallest non-zero transmission of a modulator, in [0, 1); null = it can go fully dark; "
        "of a differential device",
        unit="of its maximum",
        source=f"{_PAPER}, section 3",
    )
    q_quantiles: tuple[float, float] | None = param(
        None,
        "[low, high]: ranges from these quantiles; null = from minimum and maximum",
        unit="probability",
        source="NewComputeBench",
    )
    q_smooth_factor: SmoothFactor = smooth_factor(before=0.9)  # noqa: RUF009 (a field)
    q_init_seed: int = param(0, "seed of the detector noise", source="NewComputeBench")
    q_bypass: bool = param(False, "true = leave the module digital", source="NewComputeBench")
    q_noise: bool = param(True, "false = noiseless detectors", source="aixsim")
    attention_range: Literal["unit", "rowmax"] = param(
        "unit",
        "what drives the modulators: the probabilities themselves, or each row over its largest",
        source="aixsim",
    )
    q_levels_out: int | None = param(
        None, "of detectors alone, 2 to 65536; null = q_levels", unit="levels", source="aixsim"
    )
    photons_per_mac: float | None = param(
        None,
        "mean light of a multiplication on the detectors, above 0, whose shot noise takes the "
        "place of the read-out's dither; null = light without end",
        unit="detected photons a multiplication",
        source="Poisson statistics; Wang et al. 2022, doi:10.1038/s41467-021-27774-8",
    )
    encoding: Literal["differential", "offset"] = param(
        "differential",
        "how light, which is never negative, carries signs: as the difference of two rails, or "
        "on top of a constant that is subtracted digitally",
        source="aixsim; offset: Wang et al. 2022",
    )
    read_noise: float = param(
        0.0,
        "of a detector's amplifier, each time it is read; needs photons_per_mac",
        unit="electrons rms",
        source="aixsim",
    )
    pixel_gain_std: float = param(
        0.0,
        "spread of the second modulator's pixels in brightness, fixed as a device is made",
        unit="of a pixel's brightness",
        source="aixsim",
    )
    dead_pixels: float = param(
        0.0,
        "share of the second modulator's pixels that stay dark, fixed as a device is made",
        unit="probability",
        source="aixsim",
    )
    device_seed: int = param(0, "which specimen of the device", source="aixsim")

    def __post_init__(self) -> None:
        for name, levels in (("q_levels", self.q_levels), ("q_levels_out", self.q_levels_out)):
            if levels is not None and not 2 <= levels <= 65536:
                raise ValueError(f"{name}: got {levels}; expected 2 to 65536")
        if self.photons_per_mac is not None and not 0 < self.photons_per_mac <= _MOST_PHOTONS:
            raise ValueError(
                f"photons_per_mac: got {self.photons_per_mac}; expected null, or a number above 0 "
                f"and up to {_MOST_PHOTONS:g}"
            )
        for name in ("read_noise", "pixel_gain_std"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name}: got {value}; expected 0 or more")
        if self.read_noise and self.photons_per_mac is None:
            raise ValueError(
                f"read_noise: got {self.read_noise} without photons_per_mac, which says how much "
                "an electron is worth; expected both"
            )
        if not 0 <= self.dead_pixels < 1:
            raise ValueError(f"dead_pixels: got {self.dead_pixels}; expected 0 <= x < 1")
        if self.q_lut_min is not None and not 0 <= self.q_lut_min < 1:
            raise ValueError(f"q_lut_min: got {self.q_lut_min}; expected null or 0 <= x < 1")
        # frozen: only as it is made
        object.__setattr__(self, "q_smooth_factor", checked(self.q_smooth_factor))
        if self.q_quantiles is not None:
            low, high = self.q_quantiles
            if not 0 <= low < high <= 1:
                raise ValueError(
                    f"q_quantiles: got {list(self.q_quantiles)}; expected [low, high] with "
                    "0 <= low < high <= 1"
                )


class Optical(Paradigm):
    """Linears and attention on optical hardware."""

    params = OpticalParams
    modules = imported("aixsim_cli.transforms.optical:MODULES")
    attention = imported("aixsim_cli.transforms.optical:OpticalAttention")

    @staticmethod
    def bypassed(params: OpticalParams) -> bool:
        return params.q_bypass

    @staticmethod
    def count(params: OpticalParams, product: Product) -> Counts:
        """Light, samples, bytes and operations of a product on modulators and detectors.

        Signs by differences take the passes and rails of the arrays. Signs by an offset take one
        pass on one rail, a digital sum of every vector, and two subtractions an output.
        """
        arrays, offset = product.arrays, params.encoding == "offset"
        shows, reads, pixels = (1, 1, 1) if offset else (arrays.shows, arrays.reads, arrays.pixels)
        light, levels_out = params.photons_per_mac, params.q_levels_out or params.q_levels
        bits, bits_out = math.log2(params.q_levels), math.log2(levels_out)
        sums = product.vectors * product.k + 2 * product.outputs if offset else 0
        return Counts(
            photons=None if light is None else light * product.macs,
            dot_products=product.macs / product.k,
            read_variance=product.read / product.outputs * reads * params.read_noise**2,
            inputs=product.shown * shows,
            weights=product.loads * pixels,
            outputs=product.read * reads,
            bits=bits,
            bits_out=bits_out,
            sram_bytes=((product.shown + product.loads) * bits + product.read * bits_out) / 8,
            dram_bytes=product.fetched * bits / 8,
            # decoding an output, and adding up what was read of it
            digital_ops=product.outputs + product.read * reads + sums,
            shots=product.shots * shows,
            samples=product.shots * reads,
        )
