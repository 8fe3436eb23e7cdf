"""A kill at any moment loses what came after the last complete checkpoint, and nothing else."""

import os
import random

from tests.faults.conftest import curve

# scripts/test_long.sh asks for 20
KILLS = int(os.environ.get("AIXSIM_TEST_KILLS", "2"))


def being_saved(folder):
    """Whether a checkpoint has been begun, and is not whole."""
    folders = (folder / "checkpoint").glob("step-*")
    return any(not (path / "manifest.json").exists() for path in folders)


def records_in(path):
    return path.read_text().count("\n") if path.exists() else 0


def test_resumed_curve_equals_the_whole_one(start, whole, tmp_path):
    random.seed(0)
    for kill in range(KILLS):
        run = start(tmp_path)
        path = tmp_path / "metrics.jsonl"
        begun = records_in(path) + 1 if kill else 0
        if kill % 3 == 0:
            run.until(lambda: being_saved(tmp_path), "a save")
        else:
            records = begun + random.randint(1, 9 if KILLS < 5 else 3)
            # a run that begins anew sets the records of the one before aside
            run.until(lambda: records_in(path) >= records, "a record")  # noqa: B023
        run.kill()
    said = start(tmp_path).end(code=0)
    assert curve(tmp_path) == curve(whole)
    aside = tmp_path / "checkpoint.set-aside"
    torn = sorted(path.name for path in aside.iterdir()) if aside.exists() else []
    print("set aside:", torn, said[:300])
    assert not being_saved(tmp_path)
