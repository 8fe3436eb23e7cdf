"""A third party's paradigm: amplifiers of a wrong gain behind every matrix product."""

from dataclasses import dataclass

from torch import nn

from aixsim_cli.transforms.protocol import Paradigm, param


@dataclass(frozen=True)
class GainParams:
    gain: float = param(1.0, "of every output", source="tests")


class GainLinear(nn.Linear):
    @classmethod
    def from_linear(cls, linear, params, site):
        module = cls(linear.in_features, linear.out_features, linear.bias is not None, "meta")
        module.weight, module.bias, module.gain = linear.weight, linear.bias, params.gain
        return module

    def forward(self, input):
        return self.gain * super().forward(input)


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
