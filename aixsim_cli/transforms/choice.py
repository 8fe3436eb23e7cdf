"""Which transform a command asks for, as one value that travels."""

from enum import Enum
from pathlib import Path
from typing import Final

from aixsim_cli.errors import UserError
from aixsim_cli.transforms.config import TransformConfig
from aixsim_cli.transforms.read import read_transform


class Without(Enum):
    """A choice that names no transform of its own."""

    KEEP_OWN = "what the model was saved with"
    DIGITAL = "digital, whatever the model was saved with"


KEEP_OWN: Final = Without.KEEP_OWN
DIGITAL: Final = Without.DIGITAL
Choice = Without | TransformConfig


def read_choice(path: str | Path | None, no_transform: bool = False) -> Choice:
    """The choice of `--transform-config FILE`, `--no-transform`, or neither.

    Raises:
        UserError: both are given, or the file cannot be used.
    """
    if path is None:
        return DIGITAL if no_transform else KEEP_OWN
    if no_transform:
        raise UserError("--transform-config and --no-transform: expected at most one of them")
    return read_transform(path)
