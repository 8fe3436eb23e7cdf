"""What the bit-flip paradigm takes; the simulation itself is `bitflip.py`."""

from dataclasses import dataclass

from aixsim_cli.transforms.protocol import Paradigm, imported, param

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


class Bitflip(Paradigm):
    """Random bit-flips in the operands of linear layers."""

    params = BitflipParams
    modules = imported("aixsim_cli.transforms.bitflip:MODULES")

    @staticmethod
    def bypassed(params: BitflipParams) -> bool:
        return params == BitflipParams(seed=params.seed)
