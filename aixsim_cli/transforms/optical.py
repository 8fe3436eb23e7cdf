"""The Optical Transformer (arXiv 2302.10360): linears and attention products on photonic hardware.

Operands are quantised to the modulators' levels, products accumulate on detectors whose read-out
is quantised and noisy. The maths is `aixsim_kernels.optical`, its parameters are `optical_params`;
this module keeps its state, and puts it in the place of a linear layer or of an attention's two
matrix products.
"""

import torch
from aixsim_kernels import optical_attention, optical_linear
from torch import Tensor, nn

from aixsim_cli.transforms.optical_params import OpticalParams
from aixsim_cli.transforms.protocol import Site
from aixsim_cli.transforms.state import SimulatedAttention, SimulatedLinear


class OpticalLinear(SimulatedLinear):
    """A linear layer on optical hardware; ranges of input, weight and output."""

    seed_field = "q_init_seed"
    quantises = ("x", "w", "y")
    logs_clipped = True
    params: OpticalParams

    def forward(self, input: Tensor) -> Tensor:
        """Optical `input @ weight.T + bias`: (..., K) -> (..., N), in the input's dtype."""
        output, seen = optical_linear(
            input,
            self.weight,
            self.bias,
            self.ranges,
            self.noise_key,
            stream=0,
            levels=self.params.q_levels,
            lut_min=self.params.q_lut_min or 0.0,
            noise=self.params.q_noise,
            quantiles=self.params.q_quantiles,
        )
        self.record(seen)
        return output

    def asks_to_clip(self) -> float:
        low, high = self.params.q_quantiles or (0, 1)
        return 1 - (high - low)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_describe(self.params)}"


class OpticalAttention(SimulatedAttention):
    """Both products of an attention on optical hardware; the softmax between them is digital.

    Ranges of query, key, score, value and output. `kept_mass` is the mean over rows of what
    quantisation leaves of a row's probability mass (1 = all), from the last training call.
    """

    seed_field = "q_init_seed"
    quantises = ("q", "k", "score", "v", "y")
    logs_clipped = True
    params: OpticalParams
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
            self.ranges,
            self.noise_key,
            stream=0,
            levels=self.params.q_levels,
            lut_min=self.params.q_lut_min or 0.0,
            noise=self.params.q_noise,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            is_causal=is_causal,
            attention_range=self.params.attention_range,
            quantiles=self.params.q_quantiles,
        )
        self.record(seen)
        if self.training:
            with torch.no_grad():
                self.kept_mass.copy_(kept_mass)
        return output

    def reset_record(self) -> None:
        super().reset_record()
        self.kept_mass.fill_(1.0)

    def metrics(self) -> dict[str, Tensor]:
        """What the training log shows of this module."""
        return {**super().metrics(), "attention_kept_mass": self.kept_mass}

    def extra_repr(self) -> str:
        return f"{_describe(self.params)}, attention_range={self.params.attention_range}"


MODULES = {nn.Linear: OpticalLinear.from_linear}


def _describe(params: OpticalParams) -> str:
    noise = "on" if params.q_noise else "off"
    return f"levels={params.q_levels}, lut_min={params.q_lut_min}, noise={noise}"
