"""A loss that is not finite: stop, skip the step, or roll back to the last checkpoint."""

from pathlib import Path

import pytest

from tests.faults.conftest import curve, steps

HURT = Path(__file__).parent / "hurt.py"


def test_stop_keeps_the_last_good_step(start, tmp_path):
    said = start(tmp_path, program=(HURT, "nan", "7")).end(code=1)
    assert "step 7: loss is nan" in said and "The weights of step 6 were not changed" in said
    assert steps(tmp_path)[-1] == 6
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-5"]


def test_skip(start, whole, tmp_path):
    options = ("--reliability.on_nonfinite", "skip", "--training.steps", 10)
    said = start(tmp_path, *options, program=(HURT, "nan", "7")).end(code=0)
    assert "step 7: loss or gradient is not finite; skipped (1 of at most 10" in said
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 8, 9, 10]
    ours, theirs = curve(tmp_path), curve(whole)
    assert all(ours[step] == theirs[step] for step in range(1, 7))
    assert ours[8] != theirs[8]


def test_skips_have_a_limit(start, tmp_path):
    options = ("--reliability.on_nonfinite", "skip", "--reliability.max_nonfinite", 2)
    said = start(tmp_path, *options, program=(HURT, "nan", "4,6,7,8,9")).end(code=1)
    # the checkpoint of step 5 began the count anew
    assert "step 8: loss or gradient is not finite, for the 3th time" in said


def test_rollback(start, whole, tmp_path):
    options = ("--reliability.on_nonfinite", "rollback", "--training.steps", 10)
    said = start(tmp_path, *options, program=(HURT, "nan", "7")).end(code=0)
    assert "rolled back to step 5, on with the data that follow" in said
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10]
    # step 6 again, on the data that would have been step 8's: weights and ranges are step 5's
    assert curve(tmp_path)[6] != curve(whole)[6]
    assert curve(tmp_path)[5] == curve(whole)[5]


def test_nothing_to_roll_back_to(start, tmp_path):
    options = ("--reliability.on_nonfinite", "rollback")
    said = start(tmp_path, *options, program=(HURT, "nan", "2")).end(code=1)
    assert "there is no checkpoint to roll back to" in said


@pytest.mark.parametrize("key, value", [("on_nonfinite", "ignore"), ("max_nonfinite", -1)])
def test_wrong_values_are_named(start, tmp_path, key, value):
    said = start(tmp_path, f"--reliability.{key}", value).end(code=2)
    assert f"--reliability.{key}: got" in said
