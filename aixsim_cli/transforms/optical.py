"""The Optical Transformer (arXiv 2302.10360): linears and attention products on photonic hardware.

Operands are quantised to the modulators' levels, products accumulate on detectors whose read-out
is quantised and noisy. The maths is `aixsim_kernels.optical`, its parameters are `optical_params`;
this module keeps its state, and puts it in the place of a linear layer or of an attention's two
matrix products.
"""

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from aixsim_kernels import (
    Defects,
    Light,
    clipped_in,
    optical_attention,
    optical_linear,
)
from torch import Tensor, nn

from aixsim_cli.transforms.lamp import keep_float32, signal_to_noise
from aixsim_cli.transforms.optical_params import FEW_PHOTONS, OpticalParams
from aixsim_cli.transforms.protocol import Site
from aixsim_cli.transforms.state import (
    SimulatedAttention,
    SimulatedLinear,
    SimulatedModule,
    noise_stream,
)

logger = logging.getLogger("aixsim")


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
            tell_of_little_light(params.photons_per_mac, self.shortest_sum())
            # photons a token, signal over noise: of the last training call
            self.register_buffer("lit", torch.zeros(2, device=device), persistent=False)

    def lamps(self) -> int:
        return 0 if self.params.photons_per_mac is None else self.products

    def lamp_name(self) -> str:
        return "lamp" if self.params.encoding == "differential" else "lamp_offset"

    def reset_record(self) -> None:
        super().reset_record()
        if self.lamp is not None:
            self.lit.zero_()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.lamp is not None:
            keep_float32(self, ("lit",))
        return self

    def shortest_sum(self) -> int | None:
        """Fewest multiplications whose light one detector adds up; None = not known yet."""
        return None

    def note_light(
        self, seen: Tensor, outputs: Sequence[float], output: Tensor, bias: Tensor | None = None
    ) -> None:
        """Note, in training, how much light a call took, and what it gave.

        Args:
            seen: float32 (n, 3), by the operation.
            outputs: of each product, a token; of attention's first a key that it sees.
            output: of the last one, with the bias.
            bias: (N,) or None.
        """
        how = self.light()
        if self.lamp is None or how is None or not self.training:
            return
        with torch.no_grad():
            light, set_to = self.lamp.light(seen[-self.products :])
            # multiplications of an output; of the last product, an attention's keys of a query
            depth = clipped_in(seen)[-self.products :].clone()
            depth[:-1] *= depth[-1]
            photons = (how.photons_per_mac * light / set_to).nan_to_num(0.0, 0.0, 0.0) * depth
            self.lit[0] = sum(one * n for one, n in zip(photons.unbind(), outputs, strict=True))
            if self.tells_signal():
                electron = set_to[-1] / how.photons_per_mac
                of_reads = how.reads * (electron * how.read_noise) ** 2
                variance = electron * light[-1] * depth[-1] + of_reads
                self.lit[1] = signal_to_noise(output, variance, bias)

    def photons_per_token(self) -> Tensor | None:
        return None if self.lamp is None else self.lit[0]

    def metrics(self) -> dict[str, Tensor]:
        """What the training log shows of this module."""
        shown = super().metrics()
        return shown | {f"snr/{self.kind}": self.lit[1]} if self.tells_signal() else shown

    def tells_signal(self) -> bool:
        """Whether its output tells how strong the signal is."""
        return self.lamp is not None and self.params.q_noise

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
            # with an offset, a value next to 0 is half of full light
            "lut_min": 0.0 if is_offset else params.q_lut_min or 0.0,
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
        self.note_light(seen, [self.out_features], output, self.bias)
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
        if self.lamp is not None and not torch.compiler.is_compiling():
            tell_of_little_light(self.params.photons_per_mac, q.shape[-1])
        self.note_light(seen, [q.shape[1], q.shape[1] * v.shape[-1]], output)
        if self.training:
            with torch.no_grad():
                self.kept_mass.copy_(kept_mass)
        return output

    def lamp_name(self) -> str:
        # what the probabilities of a row send on a detector is another thing
        kind = self.params.attention_range
        return super().lamp_name() + ("" if kind == "unit" else f"_{kind}")

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


MODULES = {nn.Linear: OpticalLinear.from_linear}


@cache
def tell_of_little_light(photons: float | None, depth: int | None) -> None:
    """Warn, once, where counts are too few for their noise to be a normal one."""
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
