"""Pretrain from scratch: torchtitan's Trainer in a run's folder, and how a run ends.

A step of training, in order (`trainer.PretrainTrainer.train_step` around torchtitan's own):

1. `TransformState.begin_step` sets the noise counters; the loader marks where it reads.
2. Forward and backward: simulated modules draw noise and record the extremes that they see.
3. torchtitan clips the gradient; `WatchedOptimizers.step` asks, and all ranks agree on a signal, on
   data and on numbers (`_agree`): Adam steps, or nothing changes and the step leaves no record.
4. `TransformConverter.post_optimizer_hook` moves all ranges, by one all-reduce; the schedule steps.
5. `RunMetrics.log` shows and records the step; a bad one is skipped or rolled back (`_recover`).
6. Weights are looked at where a checkpoint is due, and `Checkpointer.save` writes it.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torchtitan.protocols.model_converter import register_model_converter
from torchtitan.protocols.train_spec import register_train_spec

from aixsim_cli.config.budget import check_ranks, make_plan
from aixsim_cli.config.pretrain import CONVERTER_NAME, PretrainConfig
from aixsim_cli.errors import RunError, Stopped, UserError
from aixsim_cli.pretrain import compat
from aixsim_cli.pretrain.checkpointer import Checkpointer, checkpoints_in
from aixsim_cli.pretrain.converter import TransformConverter
from aixsim_cli.pretrain.metrics import METRICS_FILE
from aixsim_cli.pretrain.plan import describe_moved_budget
from aixsim_cli.pretrain.spec import build_train_spec
from aixsim_cli.pretrain.trainer import PretrainTrainer
from aixsim_cli.run import folder, launcher, log, ranks
from aixsim_cli.run.signals import say_stopped

logger = logging.getLogger("aixsim")
_FOLDER_KEY = "job.dump_folder"
_ANSWER_SECONDS = 10  # ranks time out one after the other


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Args:
        folder: of the last checkpoint; None when checkpoints are switched off.
        trained: how many steps this run trained; 0 = the checkpoint had them all.
    """

    folder: Path | None
    trained: int


def pretrain(config: PretrainConfig) -> Outcome:
    """Train as the config says, on this process's rank; resumes when the folder has checkpoints.

    Args:
        config: validated.

    Raises:
        UserError: the ranks at launch do not fit the config, or a checkpoint does not; the folder
            is in use, full or not writable.
        RunError: the loss or gradient is not finite, or a checkpoint could not be written.
        Stopped: by a signal, after a checkpoint.
    """
    compat.install(Checkpointer)
    launcher.complete_environment()
    check_ranks(config, int(os.environ["WORLD_SIZE"]))
    is_main = os.environ["RANK"] == "0"
    log.set_up(is_main=is_main, noise=compat.NOISE)
    if is_main:
        moved = describe_moved_budget(config, make_plan(config, int(os.environ["WORLD_SIZE"])))
        if moved is not None:
            logger.info(moved)
    register_train_spec(config.model.name, build_train_spec(config))
    if CONVERTER_NAME in config.model.converters:
        register_model_converter(TransformConverter, CONVERTER_NAME)  # pyright: ignore[reportArgumentType]
    dump = Path(config.job.dump_folder)
    with _held(config, dump) if is_main else contextlib.nullcontext():
        trainer = _train(config, dump)
    if trainer.stopped_by:
        raise Stopped(trainer.stopped_by)
    last = trainer.checkpoints.root / f"step-{trainer.step}" if config.checkpoint.enable else None
    return Outcome(last, trainer.step - trainer.checkpoints.began_at)


@contextlib.contextmanager
def _held(config: PretrainConfig, dump: Path) -> Iterator[None]:
    """The run's folder, locked and with nothing in the way of what will be written into it."""
    with folder.locked(dump, _FOLDER_KEY):
        checkpoints = checkpoints_in(dump / config.checkpoint.folder)
        folders = [checkpoints.root, checkpoints.aside] if config.checkpoint.enable else []
        if config.metrics.enable_wandb or config.metrics.enable_tensorboard:
            folders.append(dump / config.metrics.save_tb_folder)
        if config.comm.trace_buf_size > 0:
            folders.append(dump / config.comm.save_traces_folder)
        files = {dump / METRICS_FILE: ("a file", "a device", "a link to a file that is not there")}
        folder.check_places({path: ("a folder",) for path in folders} | files, _FOLDER_KEY)
        yield


def _train(config: PretrainConfig, dump: Path) -> PretrainTrainer:
    trainer: PretrainTrainer | None = None
    try:
        trainer = _join(config)
        if config.checkpoint.enable and not config.checkpoint.load_only:
            folder.check_free_space(dump, trainer.checkpoint_bytes(), _FOLDER_KEY)
        with trainer.signals:
            trainer.train()
            trainer.checkpoints.wait()
        if trainer.failure is not None:
            raise _with_what_is_saved(trainer, trainer.failure)
        if trainer.stopped_by:
            _report_stop(trainer)
        return trainer
    except RunError:
        if trainer is not None:
            # all ranks end alike; what they were saving is good
            with contextlib.suppress(RunError):
                trainer.checkpoints.wait()
        raise
    except RuntimeError as error:
        if trainer is None or "timed out" not in str(error).lower():
            raise
        raise RunError(_who_is_absent(trainer)) from error
    finally:
        if trainer is not None:
            trainer.close()
        # after a failure the other ranks may wait in a collective; tearing down would join them
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.destroy_process_group()


def _join(config: PretrainConfig) -> PretrainTrainer:
    try:
        return PretrainTrainer(config)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(launcher.port_in_use()) from error


def _who_is_absent(trainer: PretrainTrainer) -> str:
    """What to say of a collective that has timed out: the ranks that do not answer."""
    count, seconds = dist.get_world_size(), trainer.config.comm.train_timeout_seconds
    said = f"step {trainer.step}: ranks waited for each other longer than {seconds} s"
    try:
        answered = ranks.answering(_ANSWER_SECONDS)
    except RuntimeError:
        return f"{said}, and rank 0, where they meet, does not answer"
    absent = [str(rank) for rank in range(count) if rank not in answered]
    if not absent:
        return f"{said}; all are there now (comm.train_timeout_seconds)"
    return f"{said} (comm.train_timeout_seconds); no answer from rank {', '.join(absent)}"


def _with_what_is_saved(trainer: PretrainTrainer, failure: RunError | UserError) -> Exception:
    if isinstance(failure, UserError):  # nothing was trained
        return failure
    saved = trainer.checkpoints.last_saved if trainer.config.checkpoint.enable else None
    kept = f"{trainer.checkpoints.root}/step-{saved} holds" if saved else "no checkpoint holds"
    return RunError(
        f"{failure}. {kept} what was trained before; the same command goes on there once the data "
        "can be read, with --reliability.on_other_data mended where they were changed for it"
    )


def _report_stop(trainer: PretrainTrainer) -> None:
    kept = f"checkpoint {trainer.checkpoints.root}/step-{trainer.step}"
    if not trainer.config.checkpoint.enable:
        kept = "without a checkpoint: none are enabled"
    kept += "; the same command goes on from there"
    say_stopped(trainer.stopped_by, trainer.step, kept)
