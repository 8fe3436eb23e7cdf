"""torchtitan's Trainer, with noise by step and a watch on NaN, on data and on signals."""

import contextlib
import math
from collections.abc import Iterator
from datetime import timedelta
from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.train import Trainer

from aixsim_cli.config.pretrain import PretrainConfig
from aixsim_cli.errors import RunError, UserError
from aixsim_cli.pretrain.checkpointer import Checkpointer
from aixsim_cli.pretrain.culprit import first_culprit
from aixsim_cli.pretrain.dataloader import ResumableLoader
from aixsim_cli.pretrain.metrics import RunMetrics
from aixsim_cli.pretrain.optimizers import WatchedOptimizers, clipped_norm, whole_norm
from aixsim_cli.run import ranks
from aixsim_cli.run.finite import first_nonfinite
from aixsim_cli.run.nonfinite import NonfinitePolicy
from aixsim_cli.run.resume import hyperparameters, set_hyperparameters
from aixsim_cli.run.signals import StopSignals
from aixsim_cli.transforms.state import state_of

_Batch = tuple[dict[str, Tensor], Tensor]
_SPOILT = "weights, ranges or moments are not finite"


class PretrainTrainer(Trainer):
    """torchtitan's Trainer; advances the noise counters, and watches for what may go wrong.

    Once a step, before the optimizer's, all ranks agree by one small all-reduce on whether a
    signal asked to stop, whether one of them met data that it cannot read, and whether loss and
    gradient are finite. Weights, ranges and moments are looked at before they are saved.
    """

    def __init__(self, job_config: PretrainConfig) -> None:
        self._inputs: list[Tensor] = []
        self._losses: list[Tensor] = []
        self.signals = StopSignals()
        self.stopped_by = 0
        # of the data, on this rank; and what came of it, the same on all ranks
        self._data_error: Exception | None = None
        self.failure: UserError | RunError | None = None
        self.config = job_config
        super().__init__(job_config)
        self.checkpoints = cast(Checkpointer, self.checkpointer)
        self.checkpoints.run_config = job_config
        self.weights = [p for part in self.model_parts for p in part.parameters()]
        cast(WatchedOptimizers, self.optimizers).may_step = self._agree
        rules = job_config.reliability
        self._policy = NonfinitePolicy(
            rules.on_nonfinite, rules.max_nonfinite, "reliability.max_nonfinite"
        )
        self.transform_state = state_of(self.model_parts[0])
        dims = self.parallel_dims
        self.data_rank = dims.get_mesh("batch").get_local_rank() if dims.dp_enabled else 0
        # the first step, where ranks may compile, is part of the start
        comm = job_config.comm
        longest = max(comm.init_timeout_seconds, comm.train_timeout_seconds)
        self._agreement = ranks.Agreement(timedelta(seconds=longest))
        self._trained = 0  # steps of this process

    def checkpoint_bytes(self) -> int:
        """About what a checkpoint takes on the disk: weights and Adam's two moments."""
        return 3 * sum(p.numel() * p.element_size() for p in self.weights)

    def train_step(self, data_iterator: Iterator[_Batch]) -> None:
        self._inputs, self._losses = [], []
        if self.transform_state is not None:
            self.transform_state.begin_step(self.step, self.data_rank)
        metrics = cast(RunMetrics, self.metrics_processor)
        metrics.is_left_out = False
        before = _Before(self)
        super().train_step(self._read(data_iterator))
        if self.failure is not None:
            before.put_back()
        elif metrics.is_left_out:
            self._recover("loss or gradient is not finite", spoilt=not self.checkpoints.is_finite())
        else:
            self._trained += 1
        self.checkpoints.save_now = bool(self.stopped_by or self.failure)
        self._check_weights()

    def should_continue_training(self) -> bool:
        return not self.stopped_by and self.failure is None and super().should_continue_training()

    def _read(self, data_iterator: Iterator[_Batch]) -> Iterator[_Batch]:
        """A step's batches; where they cannot be read, empty ones up to where the ranks agree.

        So torchtitan's step runs to its end, and nothing has to be thrown through it.
        """
        while self._data_error is None:
            try:
                batch = next(data_iterator)
            except Exception as error:  # whatever it is, the other ranks must not wait for this one
                self._data_error = error
            else:
                yield batch
        training = self.config.training
        tokens = torch.zeros(training.local_batch_size, training.seq_len, dtype=torch.int64)
        while True:
            yield {"input": tokens}, torch.full_like(tokens, IGNORE_INDEX)

    def forward_backward_step(
        self, *, input_dict: dict[str, Tensor], labels: Tensor, global_valid_tokens: Tensor
    ) -> Tensor:
        self._inputs.append(input_dict["input"])
        loss = super().forward_backward_step(
            input_dict=input_dict, labels=labels, global_valid_tokens=global_valid_tokens
        )
        self._losses.append(loss.detach())
        return loss

    def _agree(self) -> bool:
        """Whether the optimizer may step: the weights are still those of the last good step.

        Where it may not, torchtitan's step ends without a change and without a record.
        """
        loss = torch.stack(self._losses).sum()
        if isinstance(loss, DTensor):  # under tensor parallelism
            loss = loss.full_tensor()
        values = torch.stack([loss, clipped_norm(self.weights).to(loss)])
        found, norm = values.tolist()
        if norm == 0:
            norm = whole_norm(self.weights).item()
        self.stopped_by, unread, bad_loss, bad_gradient, has_gradient = self._agreement.of(
            self.signals.received,
            self._data_error is not None,
            not math.isfinite(found),
            not math.isfinite(norm),
            norm != 0,
        )
        # clipping makes 0 of all of them where their norm overflows
        bad_gradient = bad_gradient or not has_gradient
        if unread:
            self.failure = self._data_failure()
        elif not bad_loss and not bad_gradient:
            return True
        elif self._policy.action == "stop":
            norm = norm if has_gradient else math.inf
            raise RunError(self._describe(found, norm, bool(bad_gradient)))
        cast(RunMetrics, self.metrics_processor).is_left_out = True
        # the ranges stay, too: after the optimizer's step they follow what was recorded
        if self.transform_state is not None:
            self.transform_state.reset_records()
        return False

    def _describe(self, loss: float, norm: float, everywhere: bool) -> str:
        what, value = ("gradient norm", norm) if math.isfinite(loss) else ("loss", loss)
        # a gradient is bad on all ranks; a loss alone may be one rank's, without a forward
        where = (
            first_culprit(self.model_parts[0], self._inputs)
            if everywhere
            else "on one of the ranks"
        )
        kept = (
            f"The weights of step {self.step - 1} were not changed; checkpoints up to it are kept"
            if self.checkpoints.is_finite()
            else f"{_SPOILT} since an earlier step; {self._newest()}"
        )
        return f"step {self.step}: {what} is {value}; {where}. {kept}"

    def _newest(self) -> str:
        with contextlib.suppress(RunError):  # one that is being saved may be the newest
            self.checkpoints.wait()
        enabled = self.config.checkpoint.enable
        newest = self.checkpoints.folders.newest_complete() if enabled else None
        return f"the newest checkpoint is {newest}" if newest else "there is no checkpoint"

    def _data_failure(self) -> UserError | RunError:
        """What ends the run, the same on all ranks: the message of the first that has one."""
        mine = self._data_error and (_in_words(self._data_error), type(self._data_error))
        said, kind = next(found for found in ranks.of_all(mine) if found)
        # where nothing was trained, it is a mistake like any other that is met at the start
        is_mistake = issubclass(kind, UserError) and not self._trained
        return UserError(said) if is_mistake else RunError(f"step {self.step}: {said}")

    def _check_weights(self) -> None:
        """Before they are saved, and at the end: loss and gradient say nothing of the update."""
        due = self.step == self.config.training.steps or self.checkpoints.is_due(self.step)
        if self.failure is not None or not due or self.checkpoints.is_finite():
            return
        if self._policy.action == "stop":
            name = first_nonfinite(self.model_parts[0])
            raise RunError(
                f"step {self.step}: {_SPOILT} after the update{f', {name} first' if name else ''}; "
                f"nothing was saved of it, {self._newest()}; expected a lower optimizer.lr"
            )
        self._recover(f"{_SPOILT} after the update", spoilt=True)

    def _recover(self, what: str, *, spoilt: bool) -> None:
        """Skip the step, or roll back; the same on all ranks.

        Args:
            what: is wrong.
            spoilt: the weights themselves, so that leaving out an update does not help.
        """
        self._policy.recover(
            self.step,
            what,
            spoilt=spoilt,
            saved=self.checkpoints.last_saved,
            roll_back=lambda: self.step if self.checkpoints.roll_back() else None,
        )


class _Before:
    """A trainer before a step, to be put back where the step's data cannot be read."""

    def __init__(self, trainer: PretrainTrainer) -> None:
        self._trainer = trainer
        self._counters = (trainer.step - 1, trainer.ntokens_seen)
        self._schedule = trainer.lr_schedulers.state_dict()
        self._settings = hyperparameters(list(trainer.optimizers))
        cast(ResumableLoader, trainer.dataloader).mark()

    def put_back(self) -> None:
        """The counters, the schedule and the position in the data; weights have not changed."""
        trainer = self._trainer
        trainer.step, trainer.ntokens_seen = self._counters
        trainer.lr_schedulers.load_state_dict(self._schedule)
        schedulers = cast(list[LambdaLR], list(trainer.lr_schedulers))
        set_hyperparameters(list(trainer.optimizers), schedulers, self._settings)
        cast(ResumableLoader, trainer.dataloader).return_to_mark()


def _in_words(error: Exception) -> str:
    """One line; an error of a worker process has its traceback in its message."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    is_traceback = any("Original Traceback" in line for line in lines)
    line = lines[-1].partition(": ")[2] if is_traceback else lines[0]
    known = isinstance(error, UserError | RunError)
    return line if known else f"the data cannot be read: {type(error).__name__}: {line}"
