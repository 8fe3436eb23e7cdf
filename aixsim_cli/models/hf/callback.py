"""What transformers' Trainer does for simulated hardware: noise by step, ranges after the step."""

from types import ModuleType
from typing import Any

from torch import nn
from transformers.trainer_callback import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from aixsim_cli.errors import UserError
from aixsim_cli.transforms.state import TransformState


class SimulationCallback(TrainerCallback):
    """Moves transforms' state with the optimizer's steps, whatever trainer calls it.

    The step is the trainer's, so a resumed run draws the noise that it would have drawn. Every
    Trainer has one (`register_callback`); digital models are left alone.

    Args:
        state: of the model that is trained; None = of every simulated model in the trainer's.
    """

    def __init__(self, state: TransformState | None = None) -> None:
        self.given = state
        self.states = [] if state is None else [state]

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Refuse what cannot be simulated: a trainer may evaluate and never train.

        Raises:
            UserError: as `on_train_begin`.
        """
        self._find_states(model)
        self._check(args)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Find the states: a search of hyper-parameters makes a model for each trial.

        Raises:
            UserError: sequences are split between ranks, or one process uses several GPUs.
        """
        self._find_states(model)
        self._check(args)

    def _find_states(self, model: nn.Module | None) -> None:
        if self.given is None and model is not None:
            found = [module.__dict__.get("transform_state") for module in model.modules()]
            self.states = [one for one in found if isinstance(one, TransformState)]

    def _check(self, args: TrainingArguments) -> None:
        if not self.states:
            return
        refuse_several_gpus(args)
        layout = getattr(args, "parallelism_config", None)
        if layout is not None and layout.cp_enabled:
            # transformers lets it pass: it takes this attention for the sdpa whose place it has
            raise UserError(
                f"parallelism_config: cp_size: got {layout.cp_size}; expected 1: simulated "
                "attention sees a rank's own piece of a sequence alone"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """New noise counters; micro-batches within the step count up from here."""
        for one in self.states:
            one.begin_step(state.global_step + 1, rank=args.process_index)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update the ranges, once a step."""
        for one in self.states:
            one.end_step()


def refuse_several_gpus(args: TrainingArguments) -> None:
    """Refuse the threads in which Trainer uses the GPUs that a process sees (nn.DataParallel).

    Noise would depend on which thread comes first, and ranges see the first GPU's rows alone.

    Raises:
        UserError: the process uses several.
    """
    if args.n_gpu > 1:
        raise UserError(
            f"n_gpu: got {args.n_gpu}; expected one GPU a process: start "
            f"`torchrun --nproc-per-node {args.n_gpu} …`, or set CUDA_VISIBLE_DEVICES to one of "
            "them (Trainer would put nn.DataParallel around the model)"
        )


def register_callback(trainer: ModuleType) -> None:
    """Give every Trainer the callback.

    Args:
        trainer: the module `transformers.trainer`.
    """
    trainer.DEFAULT_CALLBACKS.append(SimulationCallback)
