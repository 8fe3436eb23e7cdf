"""A signal ends a run of HF's Trainer after the step, with a checkpoint."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from aixsim_cli.run.ranks import Agreement
from aixsim_cli.run.signals import StopSignals


class StopCallback(TrainerCallback):
    """Ends a run after the step in which a signal came, with a checkpoint: all ranks in one."""

    def __init__(self) -> None:
        self.signals = StopSignals()
        self.stopped_by = 0  # number of the signal
        self.agreement = Agreement()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Agree on a signal; after the last step a run ends by itself."""
        (received,) = self.agreement.of(self.signals.received)
        if state.global_step < state.max_steps:
            self.stopped_by = received
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
        if self.stopped_by:
            self.agreement.meet()
