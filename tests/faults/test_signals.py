"""A signal ends a run after a checkpoint, a kill without; the run goes on bit for bit."""

import signal

import pytest

from tests.faults.conftest import PLANTED, STEPS, curve, steps


def saved(folder):
    return {path.parent.name for path in (folder / "checkpoint").glob("step-*/manifest.json")}


@pytest.mark.parametrize("name, code", [("SIGTERM", 75), ("SIGINT", 130)])
def test_signal_writes_a_checkpoint(start, whole, tmp_path, name, code):
    # one of them with saves in the background: what is on the disk must be of one step
    mode = ("--checkpoint.async_mode", "async" if name == "SIGINT" else "disabled")
    run = start(tmp_path, *mode)
    run.until_step(7)
    run.process.send_signal(getattr(signal, name))
    said = run.end(code=code)
    last = steps(tmp_path)[-1]
    assert last < STEPS
    assert f"stopped by {name} after step {last}" in said
    assert f"step-{last}" in saved(tmp_path)
    start(tmp_path).end(code=0)
    assert curve(tmp_path) == curve(whole)


def test_two_runs_into_one_folder(start, tmp_path):
    run = start(tmp_path)
    run.until_step(1)
    run.process.send_signal(signal.SIGSTOP)
    said = start(tmp_path).end(code=2)
    assert f"is in use by another run (process {run.process.pid} on" in said
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") <= 3
    # a lock dies with its process, whatever it leaves behind
    run.kill()
    assert (tmp_path / ".run.lock").exists()
    said = start(tmp_path, "--training.steps", 2).end(code=0)
    assert f"ended early (process {run.process.pid} on" in said


def test_tokens_are_written_nowhere(whole):
    files = [path for path in whole.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if PLANTED.encode() in path.read_bytes()]
