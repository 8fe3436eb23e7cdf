"""Data that cannot be read in the middle of a run: what was trained is saved, the place is named,
and once the data are mended the run goes on as if nothing had been.
"""

import json
import os

import pytest

from aixsim_cli.data import windows
from tests.faults.conftest import curve, long, steps

ROWS = [json.dumps({"text": f"row {n}, " + f"some words of it {n * n} " * 3}) for n in range(90)]
BAD = 40  # of these lines, from 0


def write(path, bad=None, rows=ROWS):
    lines = [*rows]
    if bad is not None:
        lines[bad] = lines[bad][:25]
    path.write_text("\n".join(lines) + "\n")
    return ("--training.dataset", "local", "--training.dataset_path", path)


def options(path, *more, bad=BAD):
    # no interval is due before the bad row
    return (*write(path, bad), "--checkpoint.interval", 100, "--training.steps", 24, *more)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=long)])
def test_the_run_ends_after_a_checkpoint_and_goes_on(train, tmp_path, workers):
    path, folder = tmp_path / "rows.jsonl", tmp_path / "run"
    words = options(path, "--training.dataloader.num_workers", workers)
    said = train(folder, *words, code=1)
    last = steps(folder)[-1]
    assert 0 < last < 24
    assert f"step {last + 1}: {path}: cannot be read: line {BAD + 1}: " in said
    assert f"step-{last} holds what was trained before" in said
    assert (folder / "checkpoint" / f"step-{last}" / "manifest.json").exists()
    if workers:
        return
    assert "--reliability.on_other_data mended where they were changed for it" in said
    # nothing can be trained until it is mended, and nothing is lost by trying
    again = train(folder, *words, code=2)
    assert f"{path}: cannot be read: line {BAD + 1}: " in again
    assert steps(folder)[-1] == last
    write(path)
    assert "was trained on other data" in train(folder, *words, code=2)
    train(folder, *words, "--reliability.on_other_data", "mended")
    train(tmp_path / "whole", *options(path, bad=None))
    assert curve(folder) == curve(tmp_path / "whole")


def test_at_the_first_step_it_is_a_mistake_like_any_other(train, tmp_path):
    folder = tmp_path / "of" / "many" / "runs"
    said = train(folder, *options(tmp_path / "rows.jsonl", bad=1), code=2)
    assert "rows.jsonl: cannot be read: line 2: " in said
    # what was made for the run is taken away
    assert not (tmp_path / "of").exists()


def one_rank_cannot_read():
    iterate = windows.TextDataset.__iter__

    def fault(self):
        windows = iterate(self)
        for _ in range(7):
            yield next(windows)
        if os.environ["RANK"] == "1":
            raise RuntimeError("worn out")
        yield from windows

    windows.TextDataset.__iter__ = fault


def test_one_rank_of_two(train, tmp_path):
    """The other does not wait for it in a collective; both save, one speaks."""
    words = ("--budget.num_ranks", 2, "--checkpoint.interval", 100, "--training.steps", 24)
    said = train(tmp_path / "run", *words, fault=one_rank_cannot_read, ranks=2, code=1)
    assert said.count("step 4: the data cannot be read: RuntimeError: worn out") == 1
    assert steps(tmp_path / "run") == [1, 2, 3]
    files = (tmp_path / "run" / "checkpoint" / "step-3").glob("*.distcp")
    assert sorted(path.name for path in files) == ["__0_0.distcp", "__1_0.distcp"]
