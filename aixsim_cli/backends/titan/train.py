"""Pretrain from scratch: torchtitan's Trainer, with a transform, its mends and a watch on NaN."""

import contextlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torchtitan.train
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtitan.protocols.model_converter import register_model_converter
from torchtitan.protocols.train_spec import register_train_spec
from torchtitan.train import Trainer

from aixsim_cli.backends.titan import compat
from aixsim_cli.backends.titan.checkpointer import Checkpointer
from aixsim_cli.backends.titan.converter import TransformConverter
from aixsim_cli.backends.titan.plan import describe_moved_budget, make_plan
from aixsim_cli.backends.titan.schema import CONVERTER_NAME, PretrainConfig
from aixsim_cli.backends.titan.spec import build_train_spec
from aixsim_cli.config.budget import check_ranks
from aixsim_cli.errors import RunError
from aixsim_cli.run import folder
from aixsim_cli.run.signals import EXIT_CODES, StopSignals

logger = logging.getLogger("aixsim")
_FOLDER_KEY = "job.dump_folder"


class _StepGivenUp(Exception):
    """Leaves torchtitan's step before the optimizer's."""


class PretrainTrainer(Trainer):
    """torchtitan's Trainer; advances the noise counters, and watches for what may go wrong.

    Once a step, before the optimizer's, all ranks agree by one small all-reduce on whether a
    signal asked to stop, and whether loss and gradient are finite.
    """

    def __init__(self, job_config: PretrainConfig) -> None:
        self._inputs: list[Tensor] = []
        self._losses: list[Tensor] = []
        self.signals = StopSignals()
        self.stopped_by = 0
        self.config = job_config
        compat.watch_gradient_norm(self._agree)
        super().__init__(job_config)
        self.checkpoints = cast(Checkpointer, self.checkpointer)
        self.checkpoints.run_config = job_config
        self.transform_state = getattr(self.model_parts[0], "transform_state", None)
        dims = self.parallel_dims
        self.data_rank = dims.get_mesh("batch").get_local_rank() if dims.dp_enabled else 0
        # on the host, whatever the device: a flag must not wait for the accelerator's queue
        self._flags = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self._given_up = 0  # steps, since the last checkpoint
        self._counted_from: int | None = None

    def checkpoint_bytes(self) -> int:
        """About what a checkpoint takes on the disk: weights and Adam's two moments."""
        weights = (p for part in self.model_parts for p in part.parameters())
        return 3 * sum(p.numel() * p.element_size() for p in weights)

    def train_step(self, data_iterator: Iterator[tuple[dict[str, Tensor], Tensor]]) -> None:
        self._inputs, self._losses = [], []
        if self.transform_state is not None:
            self.transform_state.begin_step(self.step, self.data_rank)
        try:
            super().train_step(data_iterator)
        except _StepGivenUp:
            self._recover()
        if self.stopped_by:
            self.checkpoints.save_now = True

    def should_continue_training(self) -> bool:
        return not self.stopped_by and super().should_continue_training()

    def forward_backward_step(
        self, *, input_dict: dict[str, Tensor], labels: Tensor, global_valid_tokens: Tensor
    ) -> Tensor:
        self._inputs.append(input_dict["input"])
        loss = super().forward_backward_step(
            input_dict=input_dict, labels=labels, global_valid_tokens=global_valid_tokens
        )
        self._losses.append(loss.detach())
        return loss

    def _agree(self, grad_norm: Tensor) -> None:
        """Called with the gradient norm: the weights are still those of the last good step."""
        loss = torch.stack(self._losses).sum()
        if isinstance(loss, DTensor):  # under tensor parallelism
            loss = loss.full_tensor()
        finite = torch.isfinite(torch.stack([loss, grad_norm.to(loss)])).tolist()
        flags = torch.tensor([self.signals.received, not finite[0], not finite[1]])
        if self._flags is not None:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._flags)
        self.stopped_by, bad_loss, bad_gradient = flags.tolist()
        if not bad_loss and not bad_gradient:
            return
        if self.config.reliability.on_nonfinite == "stop":
            raise RunError(self._describe(loss, grad_norm, bool(bad_gradient)))
        raise _StepGivenUp

    def _describe(self, loss: Tensor, grad_norm: Tensor, everywhere: bool) -> str:
        what, value = ("gradient norm", grad_norm) if torch.isfinite(loss) else ("loss", loss)
        # the norm is the same on all ranks; a loss alone may be one rank's, without a forward
        where = self._first_culprit() if everywhere else "on one of the ranks"
        return (
            f"step {self.step}: {what} is {float(value)}; {where}. The weights of step "
            f"{self.step - 1} were not changed; checkpoints up to it are kept"
        )

    def _recover(self) -> None:
        """Skip the step, or roll back; the same on all ranks."""
        policy, limit = self.config.reliability.on_nonfinite, self.config.reliability.max_nonfinite
        if self.checkpoints.last_saved != self._counted_from:
            self._counted_from, self._given_up = self.checkpoints.last_saved, 0
        failed, self._given_up = self.step, self._given_up + 1
        if self._given_up > limit:
            raise RunError(
                f"step {failed}: loss or gradient is not finite, for the {self._given_up}th time "
                f"since the last checkpoint; reliability.max_nonfinite allows {limit}"
            )
        if self.transform_state is not None:
            for module in self.transform_state.modules.values():
                module.reset_record()
        if policy == "skip":
            self.lr_schedulers.step()
            went = "skipped"
        elif self.checkpoints.roll_back():
            went = f"rolled back to step {self.step}, on with the data that follow"
        else:
            raise RunError(
                f"step {failed}: loss or gradient is not finite, and there is no checkpoint to "
                "roll back to"
            )
        if dist.get_rank() == 0:
            logger.warning(
                "step %d: loss or gradient is not finite; %s (%d of at most %d until the next "
                "checkpoint)",
                failed,
                went,
                self._given_up,
                limit,
            )

    def _first_culprit(self) -> str:
        """The first module in the order of computation whose output or gradient is not finite."""
        model = self.model_parts[0]
        for tokens in self._inputs:
            found = first_nonfinite_output(model, tokens)
            if found is not None:
                return f"first seen in the output of {found}"
        names = [name for name, p in model.named_parameters() if not _grad_is_finite(p)]
        # backward runs from the last module to the first
        return f"first seen in the gradient of {names[-1]}" if names else "no module found"


def first_nonfinite_output(model: nn.Module, tokens: Tensor) -> str | None:
    """Run the model forward once, and name the first module whose output is not finite.

    Args:
        model: left as it was; nothing is recorded.
        tokens: (B, L) int64.
    """
    found: list[str] = []

    def hook(name: str):
        def check(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not found and not torch.isfinite(output).all():
                found.append(name)

        return check

    handles = [
        module.register_forward_hook(hook(name.replace("_orig_mod.", "")))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    model.eval()
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        model.train()
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _grad_is_finite(parameter: nn.Parameter) -> bool:
    gradient = parameter.grad
    if gradient is None:
        return True
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient  # pyright: ignore
    return bool(torch.isfinite(local).all())


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
        SystemExit: a signal stopped the run, after a checkpoint (see `signals.EXIT_CODES`).
    """
    compat.install()
    _single_rank_environment()
    check_ranks(config, int(os.environ["WORLD_SIZE"]))
    _init_logging()
    if os.environ["RANK"] == "0":
        moved = describe_moved_budget(config, make_plan(config, int(os.environ["WORLD_SIZE"])))
        if moved is not None:
            logger.info(moved)
    torchtitan.train.CheckpointManager = Checkpointer
    register_train_spec(config.model.name, build_train_spec(config))
    if CONVERTER_NAME in config.model.converters:
        register_model_converter(TransformConverter, CONVERTER_NAME)  # pyright: ignore[reportArgumentType]
    dump = Path(config.job.dump_folder)
    main = os.environ["RANK"] == "0"
    with folder.locked(dump, _FOLDER_KEY) if main else contextlib.nullcontext():
        trainer = _train(config, dump)
    if trainer.stopped_by:
        raise SystemExit(EXIT_CODES[trainer.stopped_by])
    last = trainer.checkpoints.root / f"step-{trainer.step}" if config.checkpoint.enable else None
    return Outcome(last, trainer.step - trainer.checkpoints.began_at)


def _train(config: PretrainConfig, dump: Path) -> PretrainTrainer:
    trainer: PretrainTrainer | None = None
    try:
        trainer = PretrainTrainer(config)
        if config.checkpoint.enable and not config.checkpoint.load_only:
            folder.check_free_space(dump, trainer.checkpoint_bytes(), _FOLDER_KEY)
        with trainer.signals:
            trainer.train()
            trainer.checkpoints.wait()
        if trainer.stopped_by:
            _report_stop(trainer)
        return trainer
    finally:
        if trainer is not None:
            trainer.close()
        # after a failure the other ranks may wait in a collective; tearing down would join them
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.destroy_process_group()


def _report_stop(trainer: PretrainTrainer) -> None:
    name = signal.Signals(trainer.stopped_by).name
    saved = f"checkpoint {trainer.checkpoints.root}/step-{trainer.step}"
    logger.info(
        "stopped by %s after step %d, %s; the same command goes on from there",
        name,
        trainer.step,
        saved if trainer.config.checkpoint.enable else "without a checkpoint: none are enabled",
    )


def _single_rank_environment() -> None:
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    if "RANK" not in os.environ:
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def _init_logging() -> None:
    """Our own lines on stderr, of rank 0 alone; torchtitan's only from warnings up, or in debug."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    debug = os.environ.get("AIXSIM_DEBUG") == "1"
    if not debug:
        # torch and torchtitan warn of each other's deprecated calls, once a rank
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch(titan|data)?\.")
    root.setLevel(logging.INFO if debug else logging.WARNING)
    logger.setLevel(logging.INFO if os.environ["RANK"] == "0" else logging.WARNING)
