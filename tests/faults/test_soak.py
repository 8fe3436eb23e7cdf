"""A long run needs no more memory at its end than in its middle."""

import json
import statistics
import time
from pathlib import Path

from tests.faults.conftest import long

STEPS = 2000


def resident(run):
    """Resident memory of a run's process, MiB."""
    status = Path(f"/proc/{run.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


@long
def test_memory_of_2000_optical_steps_is_flat(start, tmp_path, capsys):
    options = ("--training.steps", STEPS, "--checkpoint.interval", 200)
    run = start(tmp_path, *options, "--checkpoint.keep_latest_k", 2, "--metrics.log_freq", 20)
    path = tmp_path / "metrics.jsonl"
    samples = []
    while run.process.poll() is None:
        count = path.read_text().count("\n") if path.exists() else 0
        if 0 < count < STEPS // 20:
            samples.append((count * 20, resident(run)))
        time.sleep(0.5)
    run.end(code=0)
    # the first checkpoints fill the allocator; what is asked is that it stays there
    late = [sample for sample in samples if sample[0] >= 600]
    slope = statistics.linear_regression(*zip(*late, strict=True)).slope * 1000
    seconds = [json.loads(line)["seconds"] for line in path.read_text().splitlines()]
    halves = [(seconds[n] - seconds[n - 40]) / 800 * 1000 for n in (49, 99)]
    with capsys.disabled():
        print(f"\nmemory {late[0][1]:.0f} to {late[-1][1]:.0f} MiB, {slope:+.1f} MiB in 1000 steps")
        print(f"step {halves[0]:.1f} ms in the first half, {halves[1]:.1f} ms in the second")
    assert slope < 0.02 * late[0][1], f"{slope:.1f} MiB in 1000 steps"
    # a ratio within one run; other work on the machine comes and goes
    assert halves[1] < 1.5 * halves[0], f"{halves} ms a step"
