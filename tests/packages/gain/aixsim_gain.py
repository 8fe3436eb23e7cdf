"""A third party's paradigm: amplifiers of a wrong gain behind every matrix product."""

from dataclasses import dataclass

from torch import nn

from aixsim_cli.transforms.protocol import Paradigm, param
from aixsim_cli.transforms.state import SimulatedLinear


@dataclass(frozen=True)
class GainParams:
    gain: float = param(1.0, "of every output", source="tests")


class GainLinear(SimulatedLinear):
    def forward(self, input):
        return self.params.gain * super().forward(input)


class GainAttention(nn.Module):
    def __init__(self, params, site):
        super().__init__()
        self.gain = params.gain

    def forward(self, q, k, v, **options):
        options = {"is_causal": True} | options
        return self.gain * nn.functional.scaled_dot_product_attention(q, k, v, **options)


class Gain(Paradigm):
    """Amplifiers of a wrong gain."""

    params = GainParams
    modules = {nn.Linear: GainLinear.from_linear}  # noqa: RUF012
    attention = GainAttention
