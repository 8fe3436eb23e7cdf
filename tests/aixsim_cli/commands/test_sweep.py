"""`aixsim eval sweep`: what is refused before a model is looked for."""

import pytest


@pytest.mark.parametrize(
    "words, expected",
    [
        (("--vary", "q_levels"), "--vary: got 'q_levels'; expected NAME=LO:HI:N"),
        (("--vary", "q_levels=4", "--vary", "q_lut_min=0:1:3"), "expected both above 0"),
        (("--vary", "q_levels=4", "--hardware", "enginered"), "did you mean 'engineered'?"),
        (("--vary", "q_levels=4", "--plot", "p.txt"), "--plot: got p.txt; expected a .png"),
        (("--vary", "q_levels=4", "--transform-config", "no.yaml"), "no such transform config"),
        (("--vary", "q_levels=4", "--repeats", "0"), "--repeats"),
        ((), "--vary"),
    ],
)
def test_a_mistake_is_told_before_anything_is_loaded(aixsim, words, expected):
    done = aixsim("eval", "sweep", "nowhere/at/all", *words, code=2)
    assert expected in done.stderr and "loading" not in done.stderr
