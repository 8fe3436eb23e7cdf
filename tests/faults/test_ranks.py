"""Two ranks: signals, a rank that dies, checkpoints that another number of ranks goes on from."""

import contextlib
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from aixsim_cli.models.titan.saved import read_checkpoint
from tests.faults.conftest import STEPS, curve, long, steps

TWO = ("--nproc-per-node", 2, "--budget.num_ranks", 2)
REPLICAS = (*TWO, "--parallelism.data_parallel_replicate_degree", 2)
TENSOR = (*TWO, "--parallelism.tensor_parallel_degree", 2)


def test_sigterm_to_the_launcher(start, tmp_path):
    run = start(tmp_path, *TWO)
    run.until_step(3)
    run.process.send_signal(signal.SIGTERM)
    said = run.end(code=75)
    last = steps(tmp_path)[-1]
    assert f"stopped by SIGTERM after step {last}" in said
    assert (tmp_path / "checkpoint" / f"step-{last}" / "manifest.json").exists()


def process_of_rank(run, rank):
    """The process that the launcher started for a rank."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (path / "environ").read_bytes().split(b"\0")
            if parent == run.process.pid and f"RANK={rank}".encode() in variables:
                return int(path.name)
    raise AssertionError(f"no process of rank {rank}")


@long
def test_dead_rank_ends_the_run(start, tmp_path):
    run = start(tmp_path, *TWO)
    run.until_step(7)
    survivor = process_of_rank(run, 0)
    os.kill(process_of_rank(run, 1), signal.SIGKILL)
    before = time.monotonic()
    said = run.end(code=1)
    assert "rank 1 ended with exit code -9" in said
    # comm.train_timeout_seconds is 100
    assert time.monotonic() - before < 110
    assert not Path(f"/proc/{survivor}").exists()


@long
def test_restart_goes_on_from_the_checkpoint(start, tmp_path):
    run = start(tmp_path, *TWO, "--max-restarts", 1)
    run.until_step(7)
    os.kill(process_of_rank(run, 1), signal.SIGKILL)
    run.end(code=0)
    found = steps(tmp_path)
    assert found[-1] == STEPS and found.count(1) == 1
    assert sorted(set(found)) == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    "before, after",
    [
        pytest.param((), TWO, id="1to2"),
        pytest.param(TWO, (), id="2to1", marks=long),
        pytest.param(TWO, REPLICAS, id="FSDPtoDDP", marks=long),
        pytest.param(TENSOR, TWO, id="TPtoFSDP", marks=long),
        pytest.param(TENSOR, (), id="TPto1", marks=long),
    ],
)
def test_other_ranks_go_on(start, tmp_path, before, after):
    def batch(layout):
        """As many sequences a step whatever the ranks."""
        return ("--training.local_batch_size", 1) if layout in (TWO, REPLICAS) else ()

    lr = ("--lr_scheduler.total_steps", 10, "--training.steps")
    start(tmp_path, *lr, 5, *before, *batch(before)).end(code=0)
    saved = read_checkpoint(tmp_path / "checkpoint" / "step-5").state_dict
    said = start(tmp_path, *lr, 6, *after, *batch(after)).end(code=0)
    loaded = read_checkpoint(tmp_path / "checkpoint" / "step-6").state_dict
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6], said
    ranges = [key for key in saved if key.endswith(".ranges")]
    assert len(ranges) == 16
    for key in ranges:
        # one step moves a range by a tenth of the way
        torch.testing.assert_close(loaded[key], saved[key], rtol=0.3, atol=0.3)
    losses = [values[0] for values in curve(tmp_path).values()]
    assert abs(losses[5] - losses[4]) < 1.0, json.dumps(losses)


@long
def test_two_nodes(start, tmp_path):
    """Two launchers that meet at one port, each with one rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def node(number):
        program = (
            "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1, "--node-rank",
            number, "--master-addr", "127.0.0.1", "--master-port", port, "-m", "aixsim_cli",
        )  # fmt: skip
        options = ("--budget.num_ranks", 2, "--training.steps", 6)
        return start(tmp_path, *options, program=program)

    nodes = [node(0), node(1)]
    for run in nodes:
        run.end(code=0)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    saved = (tmp_path / "checkpoint" / "step-6").glob("*.distcp")
    assert sorted(path.name for path in saved) == ["__0_0.distcp", "__1_0.distcp"]
