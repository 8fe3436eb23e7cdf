"""Configuration from YAML into dataclasses, with every mistake named by file, line and key.

Types are checked by pydantic, field by field; names, line numbers and
the wording of messages are ours.
"""

import dataclasses
import math
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from aixsim_cli.errors import MOST_PROBLEMS, ConfigError, UserError, nearest, shown
from aixsim_cli.files import read_text
from aixsim_cli.settings.formats import MAX_SIZE, Lines, dump_yaml, parse_yaml

T = TypeVar("T")


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
        line = _line_of(self.lines, key)
        return f"{self.source}:{line}: {key}" if line else f"{self.source}: {key}"


PRETRAIN = "a pretraining config (aixsim pretrain --config)"
TRANSFORM = "a transform file (--transform-config)"
CONTINUAL = "flags of aixsim continual-pretrain (its --config)"
# keys that tell what a file is for
_TELLTALES = {
    PRETRAIN: {"job", "training", "parallelism", "optimizer", "lr_scheduler"},
    TRANSFORM: {"layer_name_to_config", "transforms", "attention", "fc", "use_regex", "lora"},
    CONTINUAL: {"model_name_or_path", "output_dir", "do_train", "train_file", "dataset_name"},
}
# what others call a key, and what it is here
_OTHER_NAMES = {
    "learning_rate": "lr",
    "batch_size": "local_batch_size",
    "max_steps": "steps",
    "num_steps": "steps",
    "sequence_length": "seq_len",
    "max_seq_len": "seq_len",
    "tokenizer_path": "hf_assets_path",
}
_SIZES = {"dim", "n_layers", "n_heads", "size", "hidden_size", "num_hidden_layers", "vocab_size"}


def check_purpose(data: Mapping[str, Any], source: str, expected: str) -> None:
    """See that a file is not meant for something else.

    Args:
        data: as read.
        source: file, for messages.
        expected: `PRETRAIN`, `TRANSFORM` or `CONTINUAL`.

    Raises:
        UserError: its keys are those of another kind of file.
    """
    found = [purpose for purpose, keys in _TELLTALES.items() if not keys.isdisjoint(data)]
    if found and expected not in found:
        raise UserError(f"{source}: is {found[0]}; expected {expected}")


def unknown_key(key: str, known: Collection[str], *, prefix: str = "") -> str:
    """The end of a message about a key that a section does not have.

    Args:
        key: as given.
        known: the section's keys.
        prefix: shown before each of them.
    """
    if key in _SIZES and "flavor" in known:
        return f"; sizes have names, expected {prefix}flavor: debug, 60M, …"
    other = _OTHER_NAMES.get(key)
    if other in known:
        return f"; did you mean '{prefix}{other}'?"
    return nearest(key, known, prefix=prefix)


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


def build(cls: type[T], document: Document) -> T:
    """Make a (nested) dataclass of a document.

    Args:
        cls: a dataclass whose fields are dataclasses or plain values.
        document: keys that are missing take the dataclass's defaults.

    Raises:
        ConfigError: every unknown key and wrong type, each with its line.
    """
    problems: list[str] = []
    built = _build(cls, document.data, document, "", problems)
    if problems:
        raise ConfigError(problems)
    return built


def build_dataclass(cls: type[T], data: Mapping[str, Any], *, where: str) -> T:
    """Make a dataclass of a mapping that is part of a larger file.

    Args:
        cls: a dataclass.
        data: its fields.
        where: how messages name the place.

    Raises:
        ConfigError: every unknown key and wrong type.
    """
    return build(cls, Document(dict(data), where))


def _build(cls: type, data: Any, document: Document, prefix: str, problems: list[str]) -> Any:
    if not isinstance(data, Mapping):
        problems.append(
            f"{document.where(prefix[:-1])}: got {shown(data)}; expected a section of keys"
        )
        return None
    fields = _fields(cls)
    values = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if key not in fields:
            # thousands of them are counted, not all looked up
            hint = unknown_key(str(key), fields) if len(problems) < MOST_PROBLEMS else ""
            problems.append(f"{document.where(name)}: unknown key{hint}")
        elif dataclasses.is_dataclass(fields[key]):
            values[key] = _build(fields[key], value, document, f"{name}.", problems)
        else:
            values[key] = _leaf(fields[key], value, document.where(name), problems)
    if problems:
        return None
    try:
        return cls(**values)
    except (ValueError, AssertionError) as error:
        problems.append(f"{document.where(prefix[:-1]) if prefix else document.source}: {error}")
        return None


@cache
def _fields(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


@cache
def _adapter(hint: Any) -> TypeAdapter:
    return TypeAdapter(hint, config=ConfigDict(coerce_numbers_to_str=False))


def _leaf(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    # pydantic takes true for 1; YAML has types of its own
    is_number = _names(hint) & {"int", "float"} and "bool" not in _names(hint)
    of_numbers = isinstance(value, list | tuple) and _names_within(hint) <= _NUMBERS
    if (is_number and _is_bool(value)) or (of_numbers and any(map(_is_bool, value))):
        problems.append(f"{where}: got {_yaml(value)}; expected {_describe(hint)}")
        return None
    if "bool" in _names(hint) and isinstance(value, str | int | float) and type(value) is not bool:
        problems.append(f"{where}: got {shown(value)}; expected true or false")
        return None
    try:
        valid = _adapter(hint).validate_python(value)
    except ValidationError:
        problems.append(f"{where}: got {shown(value)}; expected {_describe(hint)}")
        return None
    problems += (f"{where}: {said}" for said in _numbers_out_of_range(valid))
    return valid


def _numbers_out_of_range(value: Any) -> Iterator[str]:
    """What is wrong with the numbers of a leaf: no field means NaN, infinity or more than int64."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers_out_of_range(item)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"got {_yaml(value)}; expected a finite number"
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        yield f"got a whole number of {value.bit_length()} bits; expected at most 63"


def _names(hint: Any) -> set[str]:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (list, dict, tuple, typing.Literal):
        return set()
    if arguments:
        return set().union(*map(_names, arguments))
    return {getattr(hint, "__name__", "")}


def _names_within(hint: Any) -> set[str]:
    """The types that a value, or a part of it, may have."""
    arguments = typing.get_args(hint)
    if not arguments or typing.get_origin(hint) is typing.Literal:
        return {getattr(hint, "__name__", "")}
    return set().union(*map(_names_within, arguments))


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


_NUMBERS = {"int", "float", "NoneType"}
_WORDS = {int: "a whole number", float: "a number", str: "a text", type(None): "null"}


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is list:
        return f"a list, each {_describe(arguments[0])}" if arguments else "a list"
    if origin is tuple:
        return "[" + ", ".join(_describe(a) for a in arguments) + "]"
    if origin is dict or hint is dict:
        return "a mapping"
    if arguments:
        return " or ".join(_describe(a) for a in arguments)
    return "true or false" if hint is bool else _WORDS.get(hint, str(hint))


def _yaml(value: Any) -> str:
    return shown(value) if isinstance(value, list | tuple) else dump_yaml(value).split("\n")[0]
