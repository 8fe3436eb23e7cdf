"""HF's Trainer around a simulated model: noise by step, ranges after the step, no silent NaN, and
a checkpoint where a signal ends the run.
"""

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from aixsim_cli.errors import RunError
from aixsim_cli.run.finite import all_finite
from aixsim_cli.run.ranks import true_on_all
from aixsim_cli.run.signals import StopSignals
from aixsim_cli.transforms.state import TransformState

logger = logging.getLogger("aixsim")


class SimulationCallback(TrainerCallback):
    """Moves a transform's state with the optimizer's steps, whatever trainer calls it.

    The step is the trainer's, so a resumed run draws the noise that it would have drawn.

    Args:
        state: of the model that is trained.
    """

    def __init__(self, state: TransformState) -> None:
        self.state = state

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """New noise counters; micro-batches within the step count up from here."""
        self.state.begin_step(state.global_step + 1, rank=args.process_index)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update the ranges, once a step."""
        self.state.end_step()


class ResumeCallback(TrainerCallback):
    """Says that a resumed run keeps its learning rate: Trainer restores it with the moments."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Compare the peak that was restored with the flag."""
        if state.global_step == 0 or optimizer is None:
            return
        restored = optimizer.param_groups[0].get("initial_lr", args.learning_rate)
        if restored != args.learning_rate:
            logger.warning(
                "--learning_rate %g is not used: the run goes on with its checkpoint's, %g; to "
                "change it, start from the checkpoint by --model_name_or_path",
                args.learning_rate,
                restored,
            )


class StopCallback(TrainerCallback):
    """Ends a run after the step in which a signal came, with a checkpoint: all ranks in one step.

    With transformers' `--enable_jit_checkpoint` every rank saves when its own signal comes, and
    SIGINT is not heard.
    """

    def __init__(self) -> None:
        self.signals = StopSignals()
        self.stopped_by = 0  # number of the signal
        self._group: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Meet on the host: no rank waits for its accelerator."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Agree on a signal; after the last step a run ends by itself."""
        received = torch.tensor(self.signals.received)
        if self._group is not None:
            dist.all_reduce(received, op=dist.ReduceOp.MAX, group=self._group)
        if state.global_step < state.max_steps:
            self.stopped_by = int(received)
        if self.stopped_by:
            control.should_save = control.should_training_stop = True
            # who sent the signal waits for seconds, not for an evaluation
            control.should_evaluate = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An interrupted epoch is no epoch."""
        if self.stopped_by:
            control.should_save = control.should_evaluate = False
            # Trainer would load it, and with `--save_total_limit 1` delete the others
            state.best_model_checkpoint = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A launcher ends all ranks when the first one ends: not while another one saves."""
        if self.stopped_by and self._group is not None:
            dist.barrier(self._group)


class FiniteCallback(TrainerCallback):
    """Ends a run whose loss or weights are not finite, before they are saved.

    transformers logs such a loss as the average of earlier ones, saves the weights and exits
    with 0.
    """

    def __init__(self) -> None:
        self.finite: Tensor | None = None

    def record(self, loss: Tensor) -> None:
        """Remember whether a micro-batch's loss was finite; no synchronisation."""
        finite = torch.isfinite(loss.detach())
        self.finite = finite if self.finite is None else self.finite & finite

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at the record when something is about to be shown or saved, on all ranks."""
        due = control.should_log or control.should_save or control.should_evaluate
        ends = state.global_step >= state.max_steps
        if not (due or ends) or self.finite is None:
            return
        finite = self.finite
        if (control.should_save or ends) and model is not None:
            # a loss says nothing of the step that was just taken
            finite = finite & all_finite(model)
        if not true_on_all(finite):
            raise RunError(
                f"loss or weights are not finite at step {state.global_step}; nothing was saved "
                f"of it, {_last_checkpoint(args)}; expected a lower --learning_rate"
            )


class SimulationTrainer(Trainer):
    """HF's Trainer with these callbacks.

    Args:
        transform: state of the model's transform; None for a digital model.
        arguments: Trainer's own.
    """

    def __init__(self, *, transform: TransformState | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.transform = transform
        self.stop, self.finite = StopCallback(), FiniteCallback()
        # in this order: what is saved at a signal is looked at too
        self.add_callback(ResumeCallback())
        self.add_callback(self.stop)
        self.add_callback(self.finite)
        if transform is not None:
            self.add_callback(SimulationCallback(transform))

    def training_step(self, *arguments: Any, **keywords: Any) -> Tensor:
        """One micro-batch; its loss is remembered."""
        loss = super().training_step(*arguments, **keywords)
        self.finite.record(loss)
        return loss

    def create_model_card(self, *arguments: Any, **keywords: Any) -> None:
        """Nothing: the card of a trained folder is written by `card.py`."""

    def log(self, logs: dict[str, Any], *arguments: Any, **keywords: Any) -> None:
        """A training record also shows what the simulated modules report."""
        if self.transform is not None and "loss" in logs:
            logs |= {name: value.item() for name, value in self.transform.metrics().items()}
        super().log(logs, *arguments, **keywords)


def _last_checkpoint(args: TrainingArguments) -> str:
    from transformers.trainer_utils import get_last_checkpoint

    last = get_last_checkpoint(args.output_dir or ".")
    return f"the newest checkpoint is {last}" if last else "there is no checkpoint yet"
