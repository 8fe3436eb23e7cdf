"""`aixsim` in a fork of a process that has its imports behind it: a second a run, not ten.

It goes through the entry point as any other; what happens before that, and what is read while
libraries are imported (`HF_…` variables), is the same for all of them. A `fault` is a function at
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

from aixsim_cli.errors import UserError

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [f"aixsim_cli.{name}" for name in ("pretrain.train", "continual.train", "main")]
)
LIMIT_SECONDS = 250


def run(
    words: list[str],
    out: Path,
    err: Path,
    *,
    fault: Callable[[], None] | None,
    ranks: int,
    env: Mapping[str, str],
    cwd: Path,
) -> list[int]:
    """The exit codes of all ranks of `aixsim WORDS`.

    Args:
        out: a file to which all ranks add what they say on their standard output.
        err: the same for their error output.
        ranks: processes that are started as a launcher would start them.
    """
    processes = []
    port = _free_port()
    # the fork finds this file, and a test's, by their names from the root of the tests
    sys.path.append(str(Path(__file__).parents[1]))
    try:
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment = {**os.environ, **env, **(place if ranks > 1 else {})}
            first = processes[0].pid if rank else None
            begin = (words, out, err, fault, environment, cwd, first)
            processes.append(_SERVER.Process(target=_main, args=begin))
            processes[-1].start()
    finally:
        sys.path.pop()
    deadline = time.monotonic() + LIMIT_SECONDS
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in alive:
        processes[rank].kill()
    assert not alive, f"{words}: ranks {alive} did not end: {out.read_text()}\n{err.read_text()}"
    return [process.exitcode for process in processes]


def _main(words, out, err, fault, environment, cwd, first):
    import torchtitan.train

    from aixsim_cli.pretrain import launch

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, path in enumerate((out, err), 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = ["aixsim", *words]
    if "RANK" not in environment:
        # torchtitan sleeps 2 s at the end, for other ranks to end
        torchtitan.train.time = SimpleNamespace(perf_counter=time.perf_counter, sleep=id)
    if first is not None:
        launch.time = SimpleNamespace(sleep=lambda _: _end_after(first))
    if fault is not None:
        fault()
    from aixsim_cli.__main__ import main

    main()


def _end_after(first: int):
    """A launcher ends the ranks that wait for rank 0 to speak, once it has ended."""
    code = 2 if isinstance(sys.exc_info()[1], UserError) else 1
    while Path(f"/proc/{first}").exists():
        time.sleep(0.02)
    raise SystemExit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
