"""Pretrain from scratch: torchtitan's Trainer, with a transform, its mends and a watch on NaN."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchtitan.train
from torch import Tensor, nn
from torchtitan.protocols.model_converter import register_model_converter
from torchtitan.protocols.train_spec import register_train_spec
from torchtitan.train import Trainer

from aixsim_cli.backends.titan import compat
from aixsim_cli.backends.titan.checkpointer import Checkpointer
from aixsim_cli.backends.titan.converter import TransformConverter
from aixsim_cli.backends.titan.schema import CONVERTER_NAME, PretrainConfig
from aixsim_cli.backends.titan.spec import build_train_spec
from aixsim_cli.config.budget import check_ranks
from aixsim_cli.errors import RunError

logger = logging.getLogger("aixsim")


class PretrainTrainer(Trainer):
    """torchtitan's Trainer; advances the noise counters and stops at a loss that is not finite."""

    def __init__(self, job_config: PretrainConfig) -> None:
        self._inputs: list[Tensor] = []
        self._losses: list[Tensor] = []
        compat.watch_gradient_norm(self._stop_if_not_finite)
        super().__init__(job_config)
        self.checkpointer.run_config = job_config  # pyright: ignore[reportAttributeAccessIssue]
        self.transform_state = getattr(self.model_parts[0], "transform_state", None)
        dims = self.parallel_dims
        self.data_rank = dims.get_mesh("batch").get_local_rank() if dims.dp_enabled else 0

    def train_step(self, data_iterator: Iterator[tuple[dict[str, Tensor], Tensor]]) -> None:
        self._inputs, self._losses = [], []
        if self.transform_state is not None:
            self.transform_state.begin_step(self.step, self.data_rank)
        super().train_step(data_iterator)

    def forward_backward_step(
        self, *, input_dict: dict[str, Tensor], labels: Tensor, global_valid_tokens: Tensor
    ) -> Tensor:
        self._inputs.append(input_dict["input"])
        loss = super().forward_backward_step(
            input_dict=input_dict, labels=labels, global_valid_tokens=global_valid_tokens
        )
        self._losses.append(loss.detach())
        return loss

    def _stop_if_not_finite(self, grad_norm: Tensor) -> None:
        """Before the optimizer's step: the weights are still those of the last good step."""
        loss = torch.stack(self._losses).sum()
        if torch.isfinite(grad_norm + loss):
            return
        what, value = ("gradient norm", grad_norm) if torch.isfinite(loss) else ("loss", loss)
        # where this rank alone has seen it, the others would not join another forward
        where = "on this rank" if torch.isfinite(grad_norm) else self._first_culprit()
        raise RunError(
            f"step {self.step}: {what} is {float(value)}; {where}. The weights of step "
            f"{self.step - 1} were not changed; checkpoints up to it are kept"
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


def pretrain(config: PretrainConfig) -> Path | None:
    """Train as the config says, on this process's rank; resumes when the folder has checkpoints.

    Args:
        config: validated.

    Returns:
        The folder of the last checkpoint; None when checkpoints are switched off.

    Raises:
        UserError: the ranks at launch do not fit the config, or a checkpoint does not.
        RunError: the loss or gradient is not finite.
    """
    compat.install()
    _single_rank_environment()
    check_ranks(config, int(os.environ["WORLD_SIZE"]))
    _init_logging()
    torchtitan.train.CheckpointManager = Checkpointer
    register_train_spec(config.model.name, build_train_spec(config))
    if CONVERTER_NAME in config.model.converters:
        register_model_converter(TransformConverter, CONVERTER_NAME)  # pyright: ignore[reportArgumentType]
    Path(config.job.dump_folder).mkdir(parents=True, exist_ok=True)
    trainer: PretrainTrainer | None = None
    try:
        trainer = PretrainTrainer(config)
        trainer.train()
        if not config.checkpoint.enable:
            return None
        return Path(trainer.checkpointer.folder) / f"step-{trainer.step}"
    finally:
        if trainer is not None:
            trainer.close()
        # after a failure the other ranks may wait in a collective; tearing down would join them
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.destroy_process_group()


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
