"""What an optical operation is told beside its tensors."""

from collections.abc import Sequence
from typing import NamedTuple


class Settings(NamedTuple):
    """Of an optical linear or attention; the last three are the attention's alone.

    Args:
        stream: hash of layer and seed; selects the noise together with the key.
        levels: quantisation levels of modulators and detectors, 2 to 65536.
        lut_min: smallest magnitude that the second operand's modulator can show, as a share of its
            range; 0 for none.
        noise: whether detectors add U(-1/2, 1/2) of a level.
        quantiles: probabilities that replace min and max as the ends of a batch's range.
        scale: factor of the detected scores.
        is_causal: query i sees keys up to i + L - M.
        rowmax: probabilities are quantised relative to their row's largest, not over [0, 1].
    """

    stream: int
    levels: int
    lut_min: float
    noise: bool
    quantiles: Sequence[float] | None = None
    scale: float = 1.0
    is_causal: bool = False
    rowmax: bool = False


# an operator's schema knows no tuples: it takes the fields one after another, `*settings`, and
# `Settings(*fields)` is made of them again behind it
SCHEMA = (
    "SymInt stream, SymInt levels, float lut_min, bool noise, float[]? quantiles, float scale, "
    "bool is_causal, bool rowmax"
)
