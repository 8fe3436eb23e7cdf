"""Shared by all tests: the command line through its entry point, offline, with its own cache."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings

from tests import warm

REPOSITORY = Path(__file__).parent.parent
# what starts processes, builds libraries' models, or takes minutes
SLOW = ("tests/e2e", "tests/faults", "tests/distributed", "tests/aixsim_cli/models")
SLOW += ("tests/aixsim_cli/eval", "tests/aixsim_cli/pretrain", "tests/aixsim_cli/continual")
SLOW += ("tests/aixsim_kernels/test_interpreted.py", "tests/aixsim_kernels/test_launches.py")


# the same examples in every run, new ones in the long run only
settings.register_profile("short", derandomize=True, deadline=None)
settings.register_profile("long", deadline=None)
settings.load_profile("long" if os.environ.get("AIXSIM_TEST_LONG") else "short")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Numbers that a test draws without a generator are the same alone and in any order."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """Mark what `scripts/test.sh --quick` leaves out: what runs the command line, or is slow."""
    for item in items:
        path = item.path.relative_to(REPOSITORY).as_posix()
        if path.startswith(SLOW) or not {"aixsim", "install"}.isdisjoint(item.fixturenames):
            item.add_marker("slow")


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory):
    """One cache for the whole run of the tests, no network, one thread a process."""
    cache = os.environ.get("AIXSIM_TEST_CACHE") or str(tmp_path_factory.mktemp("cache"))
    patch = pytest.MonkeyPatch()
    for name, value in {
        "AIXSIM_CACHE": cache,
        "HF_DATASETS_CACHE": f"{cache}/datasets",
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
def aixsim(tmp_path_factory):
    """Run `aixsim`: `aixsim("eval", "ppl", …, code=2)`; what it said, in `.stdout` and `.stderr`.

    In warm processes (`warm.run`: `ranks` of them, with a `fault` in them), or with `fresh=True` in
    one that starts as a user's does. Other keywords are variables of the environment.
    """
    outputs = tmp_path_factory.mktemp("outputs")
    count = itertools.count()

    def run(*arguments, code: int = 0, cwd=REPOSITORY, ranks=1, fault=None, fresh=False, **env):
        words = list(map(str, arguments))
        if fresh:
            done = subprocess.run(
                [sys.executable, "-m", "aixsim_cli", *words],
                cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=280,
            )  # fmt: skip
            codes = [done.returncode]
        else:
            files = [outputs / f"{next(count)}-{name}" for name in ("out", "err")]
            codes = warm.run(words, *files, fault=fault, ranks=ranks, env=env, cwd=cwd)
            done = SimpleNamespace(stdout=files[0].read_text(), stderr=files[1].read_text())
        assert set(codes) == {code}, f"{words}: {codes}\n{done.stdout}\n{done.stderr}"
        if code:
            assert "Traceback" not in done.stderr, done.stderr
        return done

    return run
