"""Going on from a checkpoint: its state, this run's settings, and what is said of the two."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from aixsim_cli.errors import LONGEST_VALUE, printable, shorten


def describe(
    step: int,
    folder: Path,
    changed: Mapping[str, tuple[Any, Any]],
    last: int,
    *,
    other_data: bool = False,
) -> str:
    """A line that says from where a run goes on, and what is new.

    Args:
        step: of the checkpoint.
        folder: of the checkpoint.
        changed: setting -> (the checkpoint's, the run's).
        last: the run's number of steps.
        other_data: the checkpoint's position in the data means nothing in the run's.
    """
    line = f"resumed from {folder}"
    if step == last:
        line = f"{folder} has all {last} steps; nothing to train"
    if changed:
        line += f"; changed since: {listing(changed)}"
    if other_data:
        line += "; the data are read from their start"
    return line


def listing(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Changed settings as a message has them."""
    return ", ".join(f"{key} {_said(old)} -> {_said(new)}" for key, (old, new) in changed.items())


def _said(value: object) -> str:
    """A setting as it is written; that of a checkpoint may be a stranger's."""
    return printable(shorten(str(value), LONGEST_VALUE)).replace("\n", "\\n")


def hyperparameters(optimizers: Sequence[Optimizer]) -> list[list[dict[str, Any]]]:
    """The settings of each group of each optimizer."""
    return [
        [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        for optimizer in optimizers
    ]


def set_hyperparameters(
    optimizers: Sequence[Optimizer],
    schedulers: Sequence[LambdaLR],
    settings: list[list[dict[str, Any]]],
) -> None:
    """Put a run's settings back after a checkpoint was loaded, which brought its own.

    The learning rate becomes what the run's schedule says at the checkpoint's step; where
    nothing was changed it is the very number that was loaded.

    Args:
        optimizers: after loading.
        schedulers: of them, after loading.
        settings: `hyperparameters` from before.
    """
    for optimizer, scheduler, wanted in zip(optimizers, schedulers, settings, strict=True):
        groups = optimizer.param_groups
        for group, values, factor in zip(groups, wanted, scheduler.lr_lambdas, strict=True):
            group.update(values)
            group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        scheduler._last_lr = [group["lr"] for group in groups]
