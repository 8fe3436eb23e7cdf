"""HF's Trainer around a simulated model: no silent NaN, and checkpoints that are complete.

Noise and ranges are the business of `callback.py`, signals and numbers that of `steps.py`.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.conversion_mapping import get_model_conversion_mapping

from aixsim_cli.continual.best import BestCallback, check_best
from aixsim_cli.continual.console import shorten_records
from aixsim_cli.continual.identity import read_settings, write_settings
from aixsim_cli.continual.resume import checkpoints_in, last_checkpoint, read_state, readable
from aixsim_cli.continual.steps import WatchedTrainer
from aixsim_cli.errors import RunError, UserError, first_line
from aixsim_cli.models.hf.saved import load_model
from aixsim_cli.run import ranks
from aixsim_cli.run.checkpoints import remove
from aixsim_cli.run.inputs import Inputs, write_inputs
from aixsim_cli.run.manifest import begin_saving, is_complete, write_manifest
from aixsim_cli.run.nonfinite import NonfinitePolicy
from aixsim_cli.run.replace import open_to_all
from aixsim_cli.run.resume import hyperparameters, set_hyperparameters
from aixsim_cli.transforms.state import TransformState

logger = logging.getLogger("aixsim")


class SimulationTrainer(WatchedTrainer):
    """HF's Trainer with these callbacks, and with checkpoints that are complete or are none.

    `settings` and `inputs` are written into every checkpoint.

    Args:
        transform: state of the model's transform; None for a digital model.
        policy: for steps that come to no number.
        arguments: Trainer's own.
    """

    def __init__(
        self, *, transform: TransformState | None, policy: NonfinitePolicy, **arguments: Any
    ) -> None:
        self.transform, self.policy = transform, policy
        super().__init__(**arguments)
        self.settings: dict[str, Any] = {}
        self.inputs = Inputs()
        self.checkpoints = checkpoints_in(Path(str(self.args.output_dir)))
        # Trainer would delete before a checkpoint is complete, and by age
        self._keep, self.args.save_total_limit = self.args.save_total_limit or 0, None
        self.best = BestCallback()
        self.add_callback(self.best)
        self.add_callback(self.watch)
        shorten_records(self)

    def planned_steps(self) -> int:
        """Steps of the whole training, from its start."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        # the order of the data is drawn later, and must not depend on this
        with torch.random.fork_rng(devices=[]):
            loader = self.get_train_dataloader()
        return int(self.set_initial_training_values(self.args, loader)[-1])

    def checkpoint_bytes(self) -> int:
        """About what is saved at once: weights, and Adam's moments of those that are trained."""
        model: Any = self.model
        sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
        with_moments = self.args.save_strategy != "no" and not self.args.save_only_model
        return sum(size * (3 if is_trained and with_moments else 1) for size, is_trained in sizes)

    def restore(self, checkpoint: Path) -> None:
        """Take over the weights and counters of a checkpoint that has all steps of the run."""
        self.state = read_state(checkpoint)
        self.best.put_into(self.state)
        if self.args.load_best_model_at_end and self.best.recorded:
            checkpoint = self.best.verified()
        self._load_from_checkpoint(str(checkpoint))

    def check_best(self) -> None:
        """See that the weights a run may end with are there; Trainer would pass over them.

        Raises:
            UserError: they are not, or not intact.
        """
        if not self.args.load_best_model_at_end or not self.best.recorded:
            return
        try:
            self.best.verified()
        except RunError as error:
            raise UserError(str(error)) from error

    @contextmanager
    def weights_kept(self) -> Iterator[None]:
        """Evaluate in the block: `--bf16_full_eval` casts the weights for good."""
        model: Any = self.model
        if not (self.args.bf16_full_eval or self.args.fp16_full_eval):
            yield
            return
        weights = [(weight, weight.detach().clone()) for weight in model.parameters()]
        # a cast makes new ones of buffers, ranges among them
        buffers = [
            (module, name, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
        ]
        try:
            yield
        finally:
            for weight, before in weights:
                weight.data = before
            for module, name, before in buffers:
                module._buffers[name] = before

    def _load_best_model(self) -> None:
        """Trainer's, which reads what is there, and logs where nothing is."""
        best = str(self.state.best_model_checkpoint)
        check_best(Path(best))
        with readable(best):
            if self._is_converted():
                self._load_converted(best)
            else:
                super()._load_best_model()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's; the manifest comes last, when every rank's files are there."""
        self.check_weights()
        folder = self.checkpoints.folder(self.state.global_step)
        try:
            if ranks.is_main():
                begin_saving(folder)
            super()._save_checkpoint(model, trial)
            if ranks.is_main():
                write_settings(folder, self.settings)
                write_inputs(self.inputs, folder)
            if ranks.several():
                dist.barrier()
            if ranks.is_main():
                open_to_all(folder)
                write_manifest(folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not is_complete(folder) and ranks.is_main():
                remove(folder)
            raise not_written(self.checkpoints.root, folder.name, error) from error
        self.saved = self.state.global_step
        if self._keep > 0 and ranks.is_main():
            best = self.state.best_model_checkpoint
            self.checkpoints.remove_old(self._keep, Path(best) if best else None)

    def _save(self, *arguments: Any, **keywords: Any) -> None:
        """Trainer's, which saves its arguments too: without the tokens among them."""
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(*arguments, **keywords)
        finally:
            self.args.hub_token = token

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with readable(resume_from_checkpoint):
            if self._is_converted():
                self._load_converted(resume_from_checkpoint)
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _is_converted(self) -> bool:
        """Whether the model's files have other names than it has: Trainer would not find them."""
        model: Any = self.model
        is_one_file = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        return is_one_file and bool(get_model_conversion_mapping(model, add_legacy=False))

    def _load_converted(self, folder: str) -> None:
        model: Any = self.model
        # as wide as any of them: low-rank updates are float32 beside weights of 16 bits
        loaded = load_model(folder, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """What Trainer warns of: weights that a checkpoint lacks would be those of the start."""
        model: Any = self.model
        state = model.state_dict()
        lacking = set(load_result.missing_keys)
        loaded = {tensor.data_ptr() for name, tensor in state.items() if name not in lacking}
        # a tied weight is saved once
        lost = sorted(name for name in lacking if state[name].data_ptr() not in loaded)
        if lost or load_result.unexpected_keys:
            name = lost[0] if lost else load_result.unexpected_keys[0]
            raise ValueError(
                f"{'lacks' if lost else 'holds'} {name}, which this run's model has"
                f"{'' if lost else ' not'}"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's, which restores the settings with the moments: the run's own are put back."""
        if checkpoint is None:
            return
        optimizers: Any = [self.optimizer]
        settings = hyperparameters(optimizers)
        with readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            if not self.args.deepspeed:
                step = read_state(Path(checkpoint)).global_step
                is_fp16 = bool(read_settings(Path(checkpoint)).get("fp16", self.args.fp16))
                self._check_moments(step, is_fp16=is_fp16)
        if isinstance(self.lr_scheduler, LambdaLR):
            set_hyperparameters(optimizers, [self.lr_scheduler], settings)
            return
        # one that follows the loss has its learning rate from what it has seen (`check_identity`)
        for group, wanted in zip(optimizers[0].param_groups, settings[0], strict=True):
            group.update({k: v for k, v in wanted.items() if k not in ("lr", "initial_lr")})

    def _check_moments(self, step: int, *, is_fp16: bool) -> None:
        """See that what was loaded is of these weights: a fused optimizer reads past their end.

        Raises:
            ValueError: an optimizer without moments, moments of another shape, or a schedule at
                another step.
        """
        optimizer: Any = self.optimizer
        inner = getattr(optimizer, "optimizer", optimizer)
        is_adam = isinstance(inner, torch.optim.Adam)
        if is_adam and not inner.state:
            raise ValueError("optimizer.pt holds no moments")
        # a weight that no gradient has reached has none
        for parameter, state in inner.state.items() if is_adam else ():
            shapes = {tuple(v.shape) for v in state.values() if isinstance(v, Tensor) and v.ndim}
            if not {"exp_avg", "exp_avg_sq"} <= state.keys() or shapes != {tuple(parameter.shape)}:
                raise ValueError(
                    f"optimizer.pt holds moments of the shapes {shapes} for a weight of "
                    f"{tuple(parameter.shape)}"
                )
        # others count evaluations
        at = self.lr_scheduler.last_epoch if isinstance(self.lr_scheduler, LambdaLR) else step
        # a step that fp16's scale skips is none of the schedule's
        if at > step or (at < step and not is_fp16):
            raise ValueError(f"scheduler.pt is at step {at}, and trainer_state.json at {step}")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with readable(checkpoint):
                super()._load_rng_state(checkpoint)

    def create_model_card(self, *arguments: Any, **keywords: Any) -> None:
        """Nothing: the card of a trained folder is written by `card.py`."""

    def log(self, logs: dict[str, Any], *arguments: Any, **keywords: Any) -> None:
        """A training record also shows what the simulated modules report."""
        if self.transform is not None and "loss" in logs:
            logs |= self.transform.metrics()
        elif self.transform is not None and "train_loss" in logs:
            # the end: there may have been no record before
            self.transform.metrics()
        super().log(logs, *arguments, **keywords)


def not_written(output: Path, what: str, error: BaseException) -> RunError:
    """The error of a save that failed.

    Args:
        output: the run's folder.
        what: was to be saved.
        error: that the writer raised.
    """
    reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    return RunError(
        f"{output}: {what} could not be written to disk: {reason}; {last_checkpoint(output)}"
    )
