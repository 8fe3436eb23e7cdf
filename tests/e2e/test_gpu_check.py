"""The script for a GPU's first minutes runs to its end where there is none."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif("AIXSIM_TEST_LONG" not in os.environ, reason="AIXSIM_TEST_LONG=1 runs it")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for machines without")
@pytest.mark.timeout(900)
def test_the_rehearsal(tmp_path):
    # the launches of every compiler and machine are tests of their own
    environment = {key: value for key, value in os.environ.items() if key != "AIXSIM_TEST_LONG"}
    done = subprocess.run(
        ["scripts/gpu_check.sh", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a rehearsal: no number below counts" in done.stderr
    lines = done.stdout.splitlines()
    # kernels, memory, parts of a step, training
    for row in (
        "| 60M | wq, wo |",
        "| 60M attention |",
        "| update of ranges |",
        "| 60M | optical |",
    ):
        assert any(line.startswith(row) for line in lines), row
    assert "kernel tests: passed" in done.stdout
