"""The rule by which running ranges follow what a step saw, whichever paradigm quantises.

An end of a range that was exceeded moves out with one weight, the attack; one that was not reached
moves in with another, the release (the words are those of envelope followers). A paradigm has one
field for it, made by `smooth_factor`, which `SimulatedModule` looks for.
"""

from dataclasses import MISSING
from typing import Any

from aixsim_cli.transforms.protocol import param

# one weight for both, or those of growing and of shrinking
SmoothFactor = float | tuple[float, float]

# measured in docs/results.md, "How a range follows what it measures"
DEFAULT: SmoothFactor = (0.0, 0.9)


def smooth_factor(before: Any = MISSING) -> Any:
    """The field `q_smooth_factor` of a paradigm's parameters; `before` as in `param`."""
    return param(
        DEFAULT,
        "weight of the old range in an update, 0 to 1: [of an end that grows, of one that "
        "shrinks], or one for both",
        unit="per step",
        source="aixsim; 0.9 for both: NewComputeBench",
        before=before,
    )


def attack_release(smooth: SmoothFactor) -> tuple[float, float]:
    """Both weights."""
    return smooth if isinstance(smooth, tuple) else (smooth, smooth)


def checked(smooth: SmoothFactor) -> SmoothFactor:
    """The weights in their simplest form: one number where both are the same.

    Raises:
        ValueError: one is not within [0, 1].
    """
    attack, release = attack_release(smooth)
    if not (0 <= attack <= 1 and 0 <= release <= 1):
        got = list(smooth) if isinstance(smooth, tuple) else smooth
        raise ValueError(f"q_smooth_factor: got {got}; expected 0 to 1, or two such numbers")
    return attack if attack == release else (attack, release)
