"""Start ranks: this process alone, or elastic workers of our own."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from aixsim_cli.backends.titan import device
from aixsim_cli.backends.titan.schema import PretrainConfig
from aixsim_cli.errors import RunError, UserError
from aixsim_cli.run.signals import EXIT_CODES

if TYPE_CHECKING:
    from aixsim_cli.backends.titan.train import Outcome

GRACE_SECONDS = 10
# from a signal to the ranks until they are killed: time for a step and a checkpoint
SHUTDOWN_SECONDS = 300


def run(config: PretrainConfig) -> "Outcome":
    """Train on this process's rank.

    Args:
        config: validated.
    """
    device.prepare()
    from aixsim_cli.backends.titan.train import pretrain

    with errors_of_rank_zero():
        return pretrain(config)


def launch(config: PretrainConfig, ranks: int, max_restarts: int = 0) -> None:
    """Train on `ranks` processes of this machine, with torch's elastic launcher.

    Each rank runs this very command; torch sets its rank in the environment.

    Args:
        config: validated; its ranks are checked before anything starts.
        ranks: number of processes.
        max_restarts: how often all ranks are started again, from the last checkpoint, after one
            of them has failed.

    Raises:
        UserError: the ranks do not fit the config.
        RunError: a rank failed; its own message is on stderr already.
        SystemExit: a signal stopped the run (see `signals.EXIT_CODES`).
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from aixsim_cli.config.budget import check_ranks

    check_ranks(config, ranks)
    # two ranks on two cores: more threads than cores each would fight for them
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="aixsim",
        max_restarts=max_restarts,
    )
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    # torch 2.13 keeps one store over all restarts, where ranks find the dead ones' addresses
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if max_restarts == 0:
        # what they say of a rank's end is said below, in a line
        logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(
            logging.CRITICAL
        )
    command = [sys.executable, "-u", "-m", "aixsim_cli", *sys.argv[1:]]
    try:
        elastic_launch(settings, command[0])(*command[1:])
    except SignalException as error:
        raise SystemExit(EXIT_CODES.get(error.sigval, 1)) from error
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in EXIT_CODES.values():
            raise SystemExit(failure.exitcode) from error
        if failure.exitcode == 2:
            raise UserError(f"rank {rank} refused to start (its message is above)") from error
        raise RunError(f"rank {rank} ended with exit code {failure.exitcode}") from error


def complete_environment() -> int:
    """Check what a launcher has set; without a launcher, make this process the only rank.

    Returns:
        The number of ranks.

    Raises:
        UserError: a variable is missing, or is not what a launcher sets.
    """
    if "RANK" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    size = _whole_number("WORLD_SIZE", 1, 2**31)
    _whole_number("RANK", 0, size)
    _whole_number("LOCAL_RANK", 0, size)
    _whole_number("MASTER_PORT", 0 if size == 1 else 1, 2**16)
    if not os.environ.get("MASTER_ADDR"):
        raise UserError(f"MASTER_ADDR: not set; expected the host of rank 0, {_FROM_LAUNCHER}")
    return size


_FROM_LAUNCHER = "as torchrun sets it, or neither RANK nor WORLD_SIZE"


def _whole_number(name: str, least: int, end: int) -> int:
    text = os.environ.get(name)
    if text is None:
        raise UserError(f"{name}: not set; expected a number, {_FROM_LAUNCHER}")
    if not text.isdecimal() or not least <= int(text) < end:
        raise UserError(f"{name}: got {text!r}; expected {least} to {end - 1}, {_FROM_LAUNCHER}")
    return int(text)


@contextmanager
def errors_of_rank_zero() -> Iterator[None]:
    """All ranks meet the same mistake, or agree on why a run failed: rank 0 alone speaks of it.

    A launcher ends all ranks when the first one ends: that must not be a silent one. A rank that
    is still there after a while speaks of a run's failure, since rank 0 may be what failed.
    """
    try:
        yield
    except (UserError, RunError) as error:
        if os.environ.get("RANK", "0") == "0":
            raise
        time.sleep(GRACE_SECONDS)
        if isinstance(error, UserError):
            raise SystemExit(2) from None
        raise
