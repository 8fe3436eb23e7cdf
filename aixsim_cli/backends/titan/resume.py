"""What a resumed run may change, and what the checkpoint decides.

The weights, ranges, moments and counters are the checkpoint's; the settings are the config's,
learning rate included. The hardware has to be the same.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aixsim_cli.backends.titan.schema import CONFIG_FILE, PretrainConfig
from aixsim_cli.config.load import load_yaml
from aixsim_cli.errors import UserError
from aixsim_cli.transforms.config import hardware_difference

# what shapes the training; the layout of the ranks and what is logged do not
_SECTIONS = ("model", "optimizer", "lr_scheduler", "training")
# follows from the transform
_IGNORED = ("model.converters",)


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The config that a checkpoint was trained with; None where it holds none."""
    path = folder / CONFIG_FILE
    return load_yaml(path).data if path.is_file() else None


def check_resume(saved: Mapping[str, Any], config: PretrainConfig, folder: Path, step: int) -> None:
    """Refuse to go on where the result would not be what the config says.

    Args:
        saved: the checkpoint's config.
        config: the run's.
        folder: the checkpoint's, for messages.
        step: the checkpoint's.

    Raises:
        UserError: other hardware, or a checkpoint beyond the last step.
    """
    difference = hardware_difference(saved.get("transform"), config.transform, source=str(folder))
    # step 0 is a model to start from, on whatever hardware
    if step > 0 and difference is not None:
        raise UserError(
            f"transform: {folder} was trained on {difference[0]}, this run asks for "
            f"{difference[1]}; expected the same transform to go on, or another job.dump_folder "
            "(and checkpoint.initial_load_path to start from its weights)"
        )
    if step > config.training.steps:
        raise UserError(
            f"training.steps: got {config.training.steps}; {folder} is beyond it; expected at "
            "least as many, or another job.dump_folder to start anew"
        )


def changes(saved: Mapping[str, Any], config: PretrainConfig) -> dict[str, tuple[Any, Any]]:
    """Settings of the training that differ: dotted key -> (the checkpoint's, the run's)."""
    now = dataclasses.asdict(config)
    found = {}
    for section in _SECTIONS:
        before = dict(_leaves(saved.get(section) or {}, f"{section}."))
        for key, value in _leaves(now[section], f"{section}."):
            if before.get(key, value) != value and key not in _IGNORED:
                found[key] = (before[key], value)
    return found


def reads_other_data(changed: Mapping[str, Any]) -> bool:
    """Whether a position in the old data means nothing in the new.

    Files that have moved are the same data; another data set is not.
    """
    return "training.dataset" in changed


def _leaves(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
