"""The rule by which running ranges follow what a step saw, whichever paradigm quantises.

An end of a range that was exceeded moves out with one weight, the attack; one that was not reached
moves in with another, the release (the words are those of envelope followers). A paradigm has one
field for it, made by `smooth_factor`, and hands its value to `SimulatedModule.init_state`.
"""

from typing import Any

from aixsim_cli.transforms.protocol import param

# one weight for both, or those of growing and of shrinking
SmoothFactor = float | tuple[float, float]

# measured in docs/experiments.md, "How a range follows what it measures"
DEFAULT: SmoothFactor = (0.0, 0.9)
# one weight for both, of NewComputeBench, was the default before
BEFORE: SmoothFactor = 0.9


def smooth_factor() -> Any:
    """The field `q_smooth_factor` of a paradigm's parameters."""
    return param(
        DEFAULT,
        "weight of the old range in an update, 0 to 1: [of an end that grows, of one that "
        "shrinks], or one for both",
        unit="per step",
        source="aixsim; 0.9 for both: NewComputeBench",
        before=BEFORE,
    )


def attack_release(smooth: SmoothFactor) -> tuple[float, float]:
    """Both weights.

    Raises:
        ValueError: one is not within [0, 1].
    """
    both = smooth if isinstance(smooth, tuple) else (smooth, smooth)
    if not all(0 <= weight <= 1 for weight in both):
        got = list(smooth) if isinstance(smooth, tuple) else smooth
        raise ValueError(f"q_smooth_factor: got {got}; expected 0 to 1, or two such numbers")
    return both
