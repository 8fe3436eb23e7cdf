"""`aixsim` in a fork of a process that has its imports behind it: a second a run, not ten.

It goes through the entry point as any other; what happens before that, and what is read while
libraries are imported (`HF_…` variables), is the same for all of them. A `hurt` is a function at
the top of a test module that puts a fault in, in the fork.
"""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

_SERVER = multiprocessing.get_context("forkserver")
# schema first: it prepares the device that torchtitan looks for while it is imported
_SERVER.set_forkserver_preload(
    [
        f"aixsim_cli.{name}"
        for name in ("backends.titan.schema", "backends.titan.train", "backends.hf.train", "main")
    ]
)
_ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 250


def run(
    words,
    out: Path,
    err: Path,
    *,
    hurt: Callable[[], None] | None = None,
    ranks: int = 1,
    env: Mapping[str, str] | None = None,
    cwd: Path = _ROOT,
) -> list[int]:
    """The exit codes of the ranks of `aixsim WORDS` that ended by themselves.

    Args:
        out: a file to which all ranks add what they say on their standard output.
        err: the same for their error output; it may be the same file.
        ranks: processes that are started, and ended once one fails, as a launcher does it.
    """
    environment = {**os.environ, **(env or {})}
    processes = []
    port = _free_port()
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environ = environment | (place if ranks > 1 else {})
        begin = (list(map(str, words)), out, err, hurt, environ, cwd)
        processes.append(_SERVER.Process(target=_main, args=begin))
    # the fork finds this file, and a test's, by their names from the root of the tests
    sys.path.append(str(_ROOT))
    try:
        for process in processes:
            process.start()
    finally:
        sys.path.pop()
    try:
        return _codes(processes)
    except TimeoutError as error:
        said = f"{out.read_text()}\n{err.read_text()}"
        raise AssertionError(f"{words} did not end in {LIMIT_SECONDS} s: {said}") from error
    finally:
        for process in processes:
            process.kill()


def _codes(processes) -> list[int]:
    """Exit codes of those that ended by themselves: when one fails, a launcher ends the rest."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while True:
        # read once: what ends in between is seen the next time
        codes = [process.exitcode for process in processes]
        if any(codes) or None not in codes:
            return [code for code in codes if code is not None]
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)


def _main(words, out, err, hurt, environment, cwd):
    import torchtitan.train

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, path in enumerate((out, err), 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = ["aixsim", *words]
    if "RANK" not in environment:
        # torchtitan sleeps 2 s at the end, for other ranks to end
        torchtitan.train.time = SimpleNamespace(perf_counter=time.perf_counter, sleep=id)
    if hurt is not None:
        hurt()
    from aixsim_cli.__main__ import main

    main()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
