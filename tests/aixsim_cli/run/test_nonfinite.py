"""How many steps without a number a run survives."""

import pytest

from aixsim_cli.errors import RunError
from aixsim_cli.run.nonfinite import NonfinitePolicy


def lose(policy, step, saved):
    policy.recover(step, "loss is nan", spoilt=False, saved=saved, roll_back=lambda: None)


def test_a_checkpoint_after_a_good_step_begins_the_count_anew():
    policy = NonfinitePolicy("skip", 2, "max")
    for step, saved in ((1, None), (2, None), (5, 4), (6, 4), (9, 8)):
        lose(policy, step, saved)
    lose(policy, 10, 8)
    with pytest.raises(RunError, match=r"step 11: loss is nan, 3 times .*; max allows 2"):
        lose(policy, 11, 8)


def test_steps_left_out_in_a_row_count_on_over_a_checkpoint():
    # weights that are spoilt without being infinite are saved as any others
    policy = NonfinitePolicy("skip", 2, "max")
    lose(policy, 2, None)
    lose(policy, 3, 2)
    with pytest.raises(RunError, match="step 4: loss is nan, 3 times"):
        lose(policy, 4, 2)
