"""The Optical Transformer (arXiv 2302.10360): linears and attention products on photonic hardware.

Operands are quantised to the modulators' levels, products accumulate on detectors whose read-out
is quantised and noisy. The maths is `aixsim_kernels.optical`; this module keeps its parameters and
its state, and puts it in the place of a linear layer or of an attention's two matrix products.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from aixsim_kernels import Defects, Light, optical_attention, optical_linear
from torch import Tensor, nn

from aixsim_cli.transforms.lamp import signal_to_noise
from aixsim_cli.transforms.protocol import Paradigm, Site, param
from aixsim_cli.transforms.ranges import SmoothFactor, checked, smooth_factor
from aixsim_cli.transforms.state import (
    SimulatedAttention,
    SimulatedLinear,
    SimulatedModule,
    noise_stream,
)

logger = logging.getLogger("aixsim")

_PAPER = "arXiv 2302.10360"
# a detector that counts so many has a skewness of 1 / sqrt(20)
FEW_PHOTONS = 20


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
        "smallest non-zero transmission of a modulator, in [0, 1); null = it can go fully dark",
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
        unit="detected photons",
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
        if self.photons_per_mac is not None and not 0 < self.photons_per_mac < math.inf:
            raise ValueError(
                f"photons_per_mac: got {self.photons_per_mac}; expected null or a number above 0"
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


class OpticalModule(SimulatedModule):
    """What both kinds of optical modules share.

    Class data:
        products: how many matrix products it computes, each with a lamp of its own.
    """

    seed_field = "q_init_seed"
    logs_clipped = True
    products: ClassVar[int] = 1
    params: OpticalParams
    lit: Tensor

    def simulate(self, params: OpticalParams, name: str, kind: str, device: torch.device) -> None:
        super().simulate(params, name, kind, device)
        # which pixels are its own
        self.device_stream = noise_stream(params.device_seed, name)

        if self.lamp is not None:
            tell_of_little_light(params, self.shortest_sum())
            # photons a token, signal over noise: of the last training call
            self.register_buffer("lit", torch.zeros(2, device=device), persistent=False)

    def lamps(self) -> int:
        return 0 if self.params.photons_per_mac is None else self.products

    def shortest_sum(self) -> int | None:
        """Fewest multiplications whose light one detector adds up; None = not known yet."""
        return None

    def note_light(
        self, seen: Tensor, macs: Sequence[float], output: Tensor | None, depth: float
    ) -> None:
        """Note, in training, how much light a call took, and what it gave.

        Args:
            seen: float32 (n, 3), by the operation.
            macs: multiplications a token of each product.
            output: of the last one, as it was read, without a bias; None = it was scaled.
            depth: multiplications that one of its detectors adds up.
        """
        how = self.light()
        if self.lamp is None or how is None or not self.training:
            return
        with torch.no_grad():
            light, set_to = self.lamp.light(seen[-self.products :])
            photons = how.photons_per_mac * light / set_to
            self.lit[0] = sum(one * n for one, n in zip(photons.unbind(), macs, strict=True))
            if output is not None:
                electron = set_to[-1] / how.photons_per_mac
                of_reads = how.reads * (electron * how.read_noise) ** 2
                self.lit[1] = signal_to_noise(output, electron * light[-1] * depth + of_reads)

    def photons_per_token(self) -> Tensor | None:
        return None if self.lamp is None else self.lit[0]

    def metrics(self) -> dict[str, Tensor]:
        """What the training log shows of this module."""
        shown = super().metrics()
        return shown | {f"snr/{self.kind}": self.lit[1]} if self.tells_signal() else shown

    def tells_signal(self) -> bool:
        """Whether its output tells how strong the signal is."""
        return self.lamp is not None

    def light(self) -> Light | None:
        """How much light there is; None = without end."""
        params = self.params
        if params.photons_per_mac is None:
            return None
        return Light(params.photons_per_mac, params.encoding == "offset", params.read_noise)

    def physics(self) -> dict[str, Any]:
        """What the kernels take of the parameters."""
        params = self.params
        is_offset = params.encoding == "offset"
        defects = None
        if params.pixel_gain_std or params.dead_pixels:
            pixels = (params.pixel_gain_std, params.dead_pixels, self.device_stream, is_offset)
            defects = Defects(*pixels)
        return {
            "stream": 0,
            "levels": params.q_levels,
            "lut_min": params.q_lut_min or 0.0,
            "noise": params.q_noise,
            "quantiles": params.q_quantiles,
            "levels_out": params.q_levels_out or 0,
            "light": self.light(),
            "defects": defects,
        }


class OpticalLinear(OpticalModule, SimulatedLinear):
    """A linear layer on optical hardware; ranges of input, weight and output."""

    quantises = ("x", "w", "y")

    def forward(self, input: Tensor) -> Tensor:
        """Optical `input @ weight.T + bias`: (..., K) -> (..., N), in the input's dtype."""
        output, seen = optical_linear(
            input,
            self.weight,
            self.bias,
            self.all_ranges(),
            self.noise_key,
            **self.physics(),
        )
        self.record(seen)
        read = output if self.bias is None else output - self.bias
        self.note_light(seen, [self.weight.numel()], read, self.in_features)
        return output

    def shortest_sum(self) -> int:
        return self.in_features

    def asks_to_clip(self) -> float:
        low, high = self.params.q_quantiles or (0, 1)
        return 1 - (high - low)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_describe(self.params)}"


class OpticalAttention(OpticalModule, SimulatedAttention):
    """Both products of an attention on optical hardware; the softmax between them is digital.

    Ranges of query, key, score, value and output. `kept_mass` is the mean over rows of what
    quantisation leaves of a row's probability mass (1 = all), from the last training call.
    """

    quantises = ("q", "k", "score", "v", "y")
    products = 2
    kept_mass: Tensor

    def __init__(self, params: OpticalParams, site: Site) -> None:
        super().__init__(params, site)
        self.register_buffer("kept_mass", torch.ones(()), persistent=False)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
        is_causal: bool = True,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention as `scaled_dot_product_attention` computes it, optically.

        Args:
            q: (B, H, Lq, D).
            k: (B, Hkv, Lk, D), H a multiple of Hkv.
            v: (B, Hkv, Lk, D).
            attn_mask: None, bool (True = attend) or additive, broadcastable to (B, H, Lq, Lk).
            scale: of the scores; None = 1 / sqrt(D).
            is_causal: query i sees the keys up to i + Lk - Lq.
            enable_gqa: accepted for compatibility; grouped heads are told by the shapes.

        Returns:
            (B, H, Lq, D), in q's dtype.
        """
        output, seen, kept_mass = optical_attention(
            q,
            k,
            v,
            attn_mask,
            self.all_ranges(),
            self.noise_key,
            **self.physics(),
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            is_causal=is_causal,
            attention_range=self.params.attention_range,
        )
        self.record(seen)
        tell_of_little_light(self.params, q.shape[-1])
        keys = (k.shape[2] + 1) / 2 if is_causal else k.shape[2]
        macs = [q.shape[1] * keys * t.shape[-1] for t in (q, v)]
        self.note_light(seen, macs, output if self.tells_signal() else None, keys)
        if self.training:
            with torch.no_grad():
                self.kept_mass.copy_(kept_mass)
        return output

    def tells_signal(self) -> bool:
        # each row of the other kind is scaled by its own largest probability
        return super().tells_signal() and self.params.attention_range == "unit"

    def reset_record(self) -> None:
        super().reset_record()
        self.kept_mass.fill_(1.0)

    def metrics(self) -> dict[str, Tensor]:
        """What the training log shows of this module."""
        return {**super().metrics(), "attention_kept_mass": self.kept_mass}

    def extra_repr(self) -> str:
        return f"{_describe(self.params)}, attention_range={self.params.attention_range}"


class Optical(Paradigm):
    """Linears and attention on optical hardware."""

    params = OpticalParams
    modules = {nn.Linear: OpticalLinear.from_linear}  # noqa: RUF012

    attention = OpticalAttention

    @staticmethod
    def bypassed(params: OpticalParams) -> bool:
        return params.q_bypass


@cache
def tell_of_little_light(params: OpticalParams, depth: int | None) -> None:
    """Warn, once, where counts are too few for their noise to be a normal one."""
    photons = params.photons_per_mac
    if photons is not None and depth is not None and photons * depth < FEW_PHOTONS:
        logger.warning(
            "photons_per_mac: %g photons a multiplication, in sums of %d, are %.2g a detector: "
            "below %d, Poisson's distribution is skewed, and simulated by a normal one",
            photons,
            depth,
            photons * depth,
            FEW_PHOTONS,
        )


def _describe(params: OpticalParams) -> str:
    noise = "on" if params.q_noise else "off"
    return f"levels={params.q_levels}, lut_min={params.q_lut_min}, noise={noise}"
