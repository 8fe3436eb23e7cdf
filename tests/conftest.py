"""Shared by all tests: the command line through its entry point, offline, with its own cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory):
    """One cache for the whole run of the tests, no network, one thread a process."""
    cache = os.environ.get("AIXSIM_TEST_CACHE") or str(tmp_path_factory.mktemp("cache"))
    patch = pytest.MonkeyPatch()
    for name, value in {
        "AIXSIM_CACHE": cache,
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
        "COLUMNS": "100",
    }.items():
        patch.setenv(name, value)
    for name in ("AIXSIM_DEBUG", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        patch.delenv(name, raising=False)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def aixsim():
    """Run `aixsim` in a process of its own: `aixsim("eval", "ppl", …, code=2)`."""

    def run(*arguments, code: int = 0, cwd=REPOSITORY, launcher=(), **env):
        command = [sys.executable, *launcher, "-m", "aixsim_cli", *map(str, arguments)]
        done = subprocess.run(
            command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
        if code:
            assert "Traceback" not in done.stderr, done.stderr
        return done

    return run
