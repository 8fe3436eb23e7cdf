"""The steps of HF's Trainer: all ranks agree on each before the optimizer takes it.

On whether a signal came, and on whether loss and gradient are finite. A step that came to no number
ends the run, is left out, or sends the run back to its last checkpoint (`run/nonfinite.py`).
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from aixsim_cli.continual.resume import last_checkpoint, newest, read_state
from aixsim_cli.errors import RunError, UserError
from aixsim_cli.run.checkpoints import Checkpoints
from aixsim_cli.run.finite import all_finite
from aixsim_cli.run.nonfinite import NonfinitePolicy
from aixsim_cli.run.ranks import Agreement, true_on_all
from aixsim_cli.run.signals import StopSignals
from aixsim_cli.transforms.state import TransformState

_WEIGHTS = "weights, their moments or ranges are not finite"
_STEP = "loss or gradient is not finite"
# in trainer_state.json: optimizer steps of data that were read beyond those of the weights
_AHEAD = "aixsim_steps_ahead"


class WatchedTrainer(Trainer):
    """HF's Trainer, asked before each optimizer's step.

    Attributes:
        transform: state of the model's transform; None for a digital model.
        checkpoints: of the run.
        policy: for steps that came to no number.
        saved: the step of the newest checkpoint; None = there is none.
        watch: the callback that asks.
    """

    transform: TransformState | None
    checkpoints: Checkpoints
    policy: NonfinitePolicy
    saved: int | None = None

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.watch = StepCallback(self)
        self._losses = torch.tensor(0.0)
        self._reads_on = self.policy.action != "stop"

    def train(self, resume_from_checkpoint: str | None = None, **keywords: Any) -> Any:
        """Trainer's; what it goes on from may have read ahead of its weights."""
        if resume_from_checkpoint is not None:
            self._reads_on |= steps_ahead(read_state(Path(resume_from_checkpoint))) > 0
        return super().train(resume_from_checkpoint, **keywords)

    def training_step(self, *arguments: Any, **keywords: Any) -> Tensor:
        """One micro-batch; its loss is remembered."""
        loss = super().training_step(*arguments, **keywords)
        self.watch.losses.append(loss.detach())
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Trainer's, which it shows to nobody before the weights have been changed."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.watch.norm = norm
        return norm

    def is_finite(self) -> bool:
        """Whether weights, ranges and moments are, on all ranks, each of which has to ask."""
        model: Any = self.model
        optimizer: Any = self.optimizer
        return true_on_all(all_finite(model, [optimizer] if optimizer else []))

    def check_weights(self) -> None:
        """See that what is about to be saved can be trained on: a loss knows no later step.

        Raises:
            RunError: a weight, moment or range is not finite; on all ranks.
        """
        if not WatchedTrainer.is_finite(self):
            raise not_finite(_WEIGHTS, self.state.global_step, self.args)

    def begin_step(self) -> None:
        """Remember the sum of the losses that are to be logged: that of a bad step is none."""
        self._losses = self._tr_loss.clone()

    def leave_out(self) -> None:
        """Have the optimizer's step change nothing: what has no gradient is not updated."""
        # an optimizer under fp16's scale leaves such a step out by itself
        if self.accelerator.scaler is None:
            optimizer: Any = self.optimizer
            optimizer.zero_grad(set_to_none=True)
        if self.transform is not None:
            self.transform.reset_records()
        self._tr_loss.copy_(self._losses)

    def recover(self, what: str, *, spoilt: bool) -> bool:
        """Go on after a step that was left out, or back; whether it went back.

        Args:
            what: is wrong.
            spoilt: the weights themselves.

        Raises:
            RunError: as `NonfinitePolicy.recover`.
        """
        failed = self.state.global_step
        self.policy.recover(
            failed, what, spoilt=spoilt, saved=self.saved, roll_back=self._roll_back
        )
        if self.state.global_step < failed:
            return True
        # averages are over the steps that were taken
        self._globalstep_last_logged += 1
        self._initial_global_step += 1
        return False

    def _roll_back(self) -> int | None:
        """Go back to the newest complete checkpoint, but not back in the data."""
        failed = self.state.global_step
        try:
            folder = newest(self.checkpoints)
            if folder is None:
                return None
            sharded = self.model_wrapped if self.is_fsdp_enabled else None
            self._load_from_checkpoint(str(folder), sharded)
            self._load_optimizer_and_scheduler(str(folder))
            self._load_scaler(str(folder))
            step = read_state(folder).global_step
        except UserError as error:  # a mistake no more: the run had begun
            raise RunError(str(error)) from error
        self.state.global_step = self.saved = step
        ahead = steps_ahead(self.state) + failed - step
        noted: Any = self.state.stateful_callbacks
        noted[_AHEAD] = {"args": {}, "attributes": {"steps": ahead}}
        # the steps that are undone were trained, and are part of what is told of the run
        self._total_loss_scalar += self._tr_loss.item()
        self._tr_loss.zero_()
        self._globalstep_last_logged = step
        self._initial_global_step -= failed - 1 - step
        return step

    def set_initial_training_values(self, *arguments: Any, **keywords: Any) -> Any:
        """Trainer's; a run that goes back reads on beyond its epochs, up to its last step."""
        epochs, *others = super().set_initial_training_values(*arguments, **keywords)
        return (sys.maxsize if self._reads_on else epochs, *others)

    def _init_training_state(self, max_steps: int, steps_an_epoch: int, *others: Any) -> Any:
        """Trainer's; the data go on where they were read to, which is not where the weights are."""
        epochs, batches = super()._init_training_state(max_steps, steps_an_epoch, *others)
        self.saved = self.state.global_step or None
        if ahead := steps_ahead(self.state):
            epochs, steps = divmod(self.state.global_step + ahead, steps_an_epoch)
            batches = steps * self.args.gradient_accumulation_steps
        return epochs, 0 if self.args.ignore_data_skip else batches


class StepCallback(TrainerCallback):
    """Asks before each step of the optimizer, and acts after it: all ranks alike.

    Args:
        trainer: that has this callback.
    """

    def __init__(self, trainer: WatchedTrainer) -> None:
        self.trainer = trainer
        self.signals = StopSignals()
        self.stopped_by = 0  # number of the signal
        self.losses: list[Tensor] = []
        self.norm: Any = None
        self._agreement = Agreement()
        self._received, self._is_bad = 0, 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin a record."""
        self.losses = []
        self.trainer.begin_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Agree, while the weights are still those of the last good step.

        Raises:
            RunError: loss or gradient is not finite, and the policy is to stop.
        """
        is_bad = not self._is_finite()
        self._received, self._is_bad = self._agreement.of(self.signals.received, is_bad)
        if self._is_bad and self.trainer.policy.action == "stop":
            raise not_finite(_STEP, state.global_step + 1, args)
        if self._is_bad:
            self.trainer.leave_out()

    def _is_finite(self) -> bool:
        finite = torch.stack(self.losses).isfinite().all()
        # under fp16 an overflow of the gradient is the scale's, which leaves the step out
        if self.norm is not None and self.trainer.accelerator.scaler is None:
            norm = torch.as_tensor(getattr(self.norm, "full_tensor", lambda: self.norm)())
            finite = finite & norm.isfinite().to(finite.device)
        return bool(finite)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End with a checkpoint where a signal came; after the last step a run ends by itself."""
        if state.global_step < state.max_steps:
            self.stopped_by = self._received
        if self.stopped_by:
            control.should_save = control.should_training_stop = True
            # who sent the signal waits for seconds, not for an evaluation
            control.should_evaluate = False
        if self._is_bad:
            control.should_log = False
            self._recover(_STEP, control, spoilt=not self.trainer.is_finite())
        else:
            self._look_at_weights(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An interrupted epoch is no epoch."""
        if self.stopped_by:
            control.should_save = control.should_evaluate = False
            # Trainer would load it, and with `--save_total_limit 1` delete the others
            state.best_model_checkpoint = None
        elif control.should_save:
            self._look_at_weights(state, control)

    def _look_at_weights(self, state: TrainerState, control: TrainerControl) -> None:
        """Before they are saved: an update cannot be left out once it is made."""
        due = control.should_save or state.global_step >= state.max_steps
        if due and self.trainer.policy.action != "stop" and not self.trainer.is_finite():
            self._recover(f"{_WEIGHTS} after the update", control, spoilt=True)

    def _recover(self, what: str, control: TrainerControl, *, spoilt: bool) -> None:
        if self.trainer.recover(what, spoilt=spoilt):
            # what it went back to is on the disk, and was evaluated
            control.should_log = control.should_save = control.should_evaluate = False
            control.should_training_stop = bool(self.stopped_by)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A launcher ends all ranks when the first one ends: not while another one saves."""
        if self.stopped_by:
            self._agreement.meet()


def steps_ahead(state: TrainerState) -> int:
    """By how many steps a run has read more data than its weights were trained on."""
    noted: Any = state.stateful_callbacks or {}
    return int(noted.get(_AHEAD, {}).get("attributes", {}).get("steps", 0))


def not_finite(what: str, step: int, args: TrainingArguments) -> RunError:
    """The failure of a run that came to no number.

    Args:
        what: of it.
        step: in which.
        args: name the run's folder.
    """
    return RunError(
        f"{what} at step {step}; nothing was saved of it, {last_checkpoint(args.output_dir)}; "
        "expected a lower --learning_rate"
    )
