"""Start ranks: this process alone, or elastic workers of our own."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from aixsim_cli.config.pretrain import PretrainConfig
from aixsim_cli.errors import EXIT_CODES, RunError, SaidElsewhere, Stopped, UserError

if TYPE_CHECKING:
    from aixsim_cli.pretrain.train import Outcome

GRACE_SECONDS = 10
# from a signal to the ranks until they are killed: time for a step and a checkpoint
SHUTDOWN_SECONDS = 300


def run(config: PretrainConfig) -> "Outcome":
    """Train on this process's rank.

    Args:
        config: validated.
    """
    from aixsim_cli.pretrain.train import pretrain

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
        Stopped: by a signal, after a checkpoint.
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
        raise Stopped(error.sigval) from error
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        for number, code in EXIT_CODES.items():
            if failure.exitcode == code:
                raise Stopped(number) from error
        if failure.exitcode == 2:
            raise UserError(f"rank {rank} refused to start (its message is above)") from error
        raise RunError(f"rank {rank} ended with exit code {failure.exitcode}") from error


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
            raise SaidElsewhere from None
        raise
