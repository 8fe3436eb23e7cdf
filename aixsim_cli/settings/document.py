"""A YAML file as read: its data, where every key stands, and what the file is for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aixsim_cli.errors import UserError
from aixsim_cli.files import read_text
from aixsim_cli.settings.formats import MAX_SIZE, Lines, parse_yaml


@dataclass(frozen=True)
class Document:
    """A YAML file as read.

    Args:
        data: the top-level mapping.
        source: path of the file, for messages.
        lines: of its keys, from 1.
        origins: dotted key -> where its value came from, when not from the file.
    """

    data: dict[str, Any]
    source: str
    lines: Lines = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)

    def where(self, key: str) -> str:
        """`file:line: key` of a dotted key, or the option that set it."""
        if key in self.origins:
            return self.origins[key]
        line = self.line_of(key)
        return f"{self.source}:{line}: {key}" if line else f"{self.source}: {key}"

    def line_of(self, key: str) -> int | None:
        """The line of a dotted key in the file; None = it is not in there."""
        return _line_of(self.lines, key)


PRETRAIN = "a pretraining config (aixsim pretrain --config)"
TRANSFORM = "a transform file (--transform-config)"
CONTINUAL = "flags of aixsim continual-pretrain (its --config)"
HARDWARE = "a price list (--hardware)"
# keys that tell what a file is for
_TELLTALES = {
    PRETRAIN: {"job", "training", "parallelism", "optimizer", "lr_scheduler"},
    TRANSFORM: {"layer_name_to_config", "transforms", "attention", "fc", "use_regex", "lora"},
    CONTINUAL: {"model_name_or_path", "output_dir", "do_train", "train_file", "dataset_name"},
    HARDWARE: {"hardware", "dac", "adc", "digital_op", "digital_mac", "references"},
}


def check_purpose(data: Mapping[str, Any], source: str, expected: str) -> None:
    """See that a file is not meant for something else.

    Args:
        data: as read.
        source: file, for messages.
        expected: `PRETRAIN`, `TRANSFORM`, `CONTINUAL` or `HARDWARE`.

    Raises:
        UserError: its keys are those of another kind of file.
    """
    found = [purpose for purpose, keys in _TELLTALES.items() if not keys.isdisjoint(data)]
    if found and expected not in found:
        raise UserError(f"{source}: is {found[0]}; expected {expected}")


def _line_of(lines: Lines, key: str) -> int | None:
    """The line of a dotted key, whose parts may have dots of their own."""
    if key in lines:
        return lines[key][0]
    dots = [place for place, letter in enumerate(key) if letter == "."]
    inner = (_line_of(lines[key[:at]][1], key[at + 1 :]) for at in dots if key[:at] in lines)
    return next(filter(None, inner), None)


def load_yaml(path: str | Path) -> Document:
    """Read a YAML file that holds a mapping.

    Raises:
        UserError: no such file, not YAML, not a mapping, a key given twice, or out of bounds.
    """
    data, lines = parse_yaml(read_text(path, limit=MAX_SIZE), str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path}: got {type(data).__name__}; expected a mapping of sections")
    return Document(data, str(path), lines)
