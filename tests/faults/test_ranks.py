"""Two ranks: signals, a rank that dies, checkpoints that another number of ranks goes on from."""

import json
import signal
from pathlib import Path

import pytest
import torch

from aixsim_cli.backends.titan import device

device.prepare()

from aixsim_cli.checkpoint.dcp import read_checkpoint  # noqa: E402
from tests.faults.conftest import curve, steps  # noqa: E402

HURT = Path(__file__).parent / "hurt.py"
TWO = ("--nproc-per-node", 2, "--budget.num_ranks", 2)
REPLICAS = (*TWO, "--parallelism.data_parallel_replicate_degree", 2)


def test_sigterm_to_the_launcher(start, tmp_path):
    run = start(tmp_path, *TWO)
    run.until_step(3)
    run.process.send_signal(signal.SIGTERM)
    said = run.end(code=75)
    last = steps(tmp_path)[-1]
    assert f"stopped by SIGTERM after step {last}" in said
    assert (tmp_path / "checkpoint" / f"step-{last}" / "manifest.json").exists()


def test_dead_rank_ends_the_run_and_a_restart_goes_on(start, tmp_path):
    options = (*TWO, "--training.steps", 8)
    said = start(tmp_path / "dead", *options, program=(HURT, "die", "7")).end(code=1)
    assert "rank 1 ended with exit code -9" in said
    assert steps(tmp_path / "dead")[-1] <= 7
    restart = start(tmp_path / "again", *options, "--max-restarts", 1, program=(HURT, "die", "7"))
    restart.end(code=0)
    assert steps(tmp_path / "again")[-1] == 8
    # from the checkpoint of step 5, not from the beginning
    assert steps(tmp_path / "again").count(1) == 1
    assert steps(tmp_path / "again").count(6) == 2


@pytest.mark.parametrize(
    "before, after", [((), TWO), (TWO, ()), (TWO, REPLICAS)], ids=["1to2", "2to1", "FSDPtoDDP"]
)
def test_other_ranks_go_on(start, tmp_path, before, after):
    # the budget: as many sequences a step whatever the ranks
    half = ("--training.local_batch_size", 1)
    lr = ("--lr_scheduler.total_steps", 10, "--training.steps")
    start(tmp_path, *lr, 5, *before, *(half if before else ())).end(code=0)
    saved = read_checkpoint(tmp_path / "checkpoint" / "step-5").state_dict
    said = start(tmp_path, *lr, 6, *after, *(half if after else ())).end(code=0)
    loaded = read_checkpoint(tmp_path / "checkpoint" / "step-6").state_dict
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6], said
    ranges = [key for key in saved if key.endswith(".ranges")]
    assert len(ranges) == 16
    for key in ranges:
        # one step moves a range by a tenth of the way
        torch.testing.assert_close(loaded[key], saved[key], rtol=0.3, atol=0.3)
    losses = [values[0] for values in curve(tmp_path).values()]
    assert abs(losses[5] - losses[4]) < 1.0, json.dumps(losses)
