"""Faulty digital hardware: the bits of a linear layer's operands flip at random.

As in NewComputeBench's bit-flip-aware pretraining (https://aicrosssim.github.io/NewComputeBench).
The maths is `aixsim_kernels.bitflip`; attention's two products stay digital.
"""

from dataclasses import dataclass

import torch
from aixsim_kernels import bitflip
from torch import Tensor, nn

from aixsim_cli.transforms.protocol import Paradigm, param
from aixsim_cli.transforms.state import SimulatedLinear

_SOURCE = "NewComputeBench"
# a probability is a multiple of this: 32 binary digits decide each bit
RESOLUTION = 2.0**-32


def _probability(of: str) -> float | None:
    return param(None, f"flip probability of {of}; null = off", unit="per bit", source=_SOURCE)


def _threshold(of: str) -> float | None:
    return param(None, f"{of} become 0 after the flips unless |value| < this", source=_SOURCE)


@dataclass(frozen=True)
class BitflipParams:
    """Parameters of the bit-flip simulation, under NewComputeBench's names; each null = off.

    Raises:
        ValueError: a value is out of range.
    """

    x_p_exp: float | None = _probability("sign and exponent bits of activations")
    x_p_frac: float | None = _probability("fraction bits of activations")
    x_zero_out_t: float | None = _threshold("activations, NaN too,")
    w_p_exp: float | None = _probability("sign and exponent bits of weights")
    w_p_frac: float | None = _probability("fraction bits of weights")
    w_zero_out_t: float | None = _threshold("weights, NaN too,")
    seed: int = param(0, "seed of the flips", source="aixsim")

    def __post_init__(self) -> None:
        for name in ("x_p_exp", "x_p_frac", "w_p_exp", "w_p_frac"):
            p = getattr(self, name)
            if p and not RESOLUTION <= p <= 1:
                raise ValueError(
                    f"{name}: got {p}; expected null, 0, or a probability from 2**-32 to 1"
                )
        for name in ("x_zero_out_t", "w_zero_out_t"):
            threshold = getattr(self, name)
            if threshold is not None and not threshold > 0:
                raise ValueError(f"{name}: got {threshold}; expected null or more than 0")


class BitflipLinear(SimulatedLinear):
    """A linear layer whose input and weight suffer bit-flips, new ones in every call."""

    params: BitflipParams

    def forward(self, input: Tensor) -> Tensor:
        """`flip(input) @ flip(weight).T + bias`: (..., K) -> (..., N).

        Bits flip in the type that the product is computed in: autocast's where that is on.
        """
        p = self.params
        x = self._flip(input, 0, p.x_p_exp, p.x_p_frac, p.x_zero_out_t)
        weight = self._flip(self.weight, 1, p.w_p_exp, p.w_p_frac, p.w_zero_out_t)
        return nn.functional.linear(x, weight, self.bias)

    def _flip(
        self,
        x: Tensor,
        stream: int,
        p_exp: float | None,
        p_frac: float | None,
        zero_out: float | None,
    ) -> Tensor:
        if not p_exp and not p_frac and zero_out is None:
            return x
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        return bitflip(
            x,
            self.noise_key,
            stream=stream,
            p_exp=p_exp or 0.0,
            p_frac=p_frac or 0.0,
            zero_out=zero_out,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.params}"


class Bitflip(Paradigm):
    """Random bit-flips in the operands of linear layers."""

    params = BitflipParams
    modules = {nn.Linear: BitflipLinear.from_linear}  # noqa: RUF012

    @staticmethod
    def bypassed(params: BitflipParams) -> bool:
        return params == BitflipParams(seed=params.seed)
