"""The Triton kernels under Triton's interpreter, in a process that never compiles any."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.timeout(600)
def test_triton_kernels_compute_what_the_cpu_does():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr
