"""Faulty digital hardware: the bits of a linear layer's operands flip at random.

As in NewComputeBench's bit-flip-aware pretraining (https://aicrosssim.github.io/NewComputeBench).
The maths is `aixsim_kernels.bitflip`, its parameters are `bitflip_params`; attention's two products
stay digital.
"""

import torch
from aixsim_kernels import bitflip
from torch import Tensor, nn

from aixsim_cli.transforms.bitflip_params import BitflipParams
from aixsim_cli.transforms.state import SimulatedLinear


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


MODULES = {nn.Linear: BitflipLinear.from_linear}
