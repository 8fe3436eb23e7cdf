"""`aixsim` in a fork of a process that has its imports behind it: a second a run, not ten.

A `hurt` is a function at the top of a test module that puts a fault in, in the fork.
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
    [f"aixsim_cli.{name}" for name in ("backends.titan.schema", "backends.titan.train", "main")]
)


def run(
    words,
    said: Path,
    *,
    code: int = 0,
    hurt: Callable[[], None] | None = None,
    ranks: int = 1,
    env: Mapping[str, str] | None = None,
) -> str:
    """What `aixsim WORDS` says, on both its outputs and all ranks, once it has ended with `code`.

    Args:
        said: a file to be written with it.
        ranks: processes that are started as a launcher would start them.
    """
    environment = {**os.environ, **(env or {})}
    processes = []
    port = _free_port()
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        begin = (list(map(str, words)), said, hurt, environment | (place if ranks > 1 else {}))
        processes.append(_SERVER.Process(target=_main, args=begin))
    # the fork finds this file, and a test's, by their names from the root of the tests
    sys.path.append(str(Path(__file__).parents[2]))
    try:
        for process in processes:
            process.start()
    finally:
        sys.path.pop()
    for process in processes:
        process.join(200)
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        process.kill()
    text = said.read_text()
    assert not alive, f"did not end: {text}"
    assert {process.exitcode for process in processes} == {code}, text
    assert "Traceback" not in text, text
    return text


def _main(words, said, hurt, environment):
    import torchtitan.train

    os.environ.clear()
    os.environ.update(environment)
    sink = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
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
