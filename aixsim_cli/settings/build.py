"""Dataclasses from what a file holds, with every mistake named by file, line and key.

Keys and types are checked by one pydantic adapter of the whole dataclass, which gives its JSON
Schema too; line numbers and the wording of messages are ours.
"""

import dataclasses
import typing
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from types import GenericAlias
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from aixsim_cli.errors import MOST_PROBLEMS, ConfigError, nearest, shown
from aixsim_cli.settings.document import Document
from aixsim_cli.settings.formats import dump_yaml

T = TypeVar("T")

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


def build(cls: type[T], document: Document) -> T:
    """Make a (nested) dataclass of a document.

    Args:
        cls: a dataclass whose fields are dataclasses or plain values.
        document: keys that are missing take the dataclass's defaults.

    Raises:
        ConfigError: everything that is wrong, in the order of the file, each with its line.
    """
    built = None
    problems = dict(_mistaken(cls, document.data))
    try:
        (built,) = _adapter(cls).validate_python((document.data,))
    except ValidationError as error:
        problems |= _in_our_words(cls, document.data, error)
    if problems:
        keys = sorted(problems, key=lambda key: document.line_of(key) or 0)
        where = {key: document.where(key) if key else document.source for key in keys}
        raise ConfigError([f"{where[key]}: {problems[key]}" for key in keys])
    return typing.cast(T, built)


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


def json_schema(cls: type) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the files that `build` makes a dataclass of.

    The text under a field, or its metadata's "description", is what an editor shows.
    """
    schema = _adapter(cls, explained=True).json_schema()
    inner = schema["$defs"]
    top = inner.pop(schema["prefixItems"][0]["$ref"].rpartition("/")[2])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **top, "$defs": inner}


@cache
def _adapter(cls: type, *, explained: bool = False) -> TypeAdapter:
    config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        coerce_numbers_to_str=False,
        # read from the source, which takes a while
        use_attribute_docstrings=explained,
    )
    # pydantic takes no config beside a dataclass, but does beside a tuple of one
    alone: Any = GenericAlias(tuple, (cls,))
    return TypeAdapter(alone, config=config)


@cache
def _fields(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _mistaken(cls: type, data: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Values that pydantic takes, or would take for another: (dotted key, what is wrong)."""
    for name, hint in _fields(cls).items():
        if not isinstance(data, Mapping) or name not in data:
            continue
        value, key = data[name], f"{prefix}{name}"
        if dataclasses.is_dataclass(hint):
            yield from _mistaken(typing.cast(type, hint), value, f"{key}.")
            continue
        items = value if isinstance(value, list | tuple) else [value]
        huge = [item for item in items if type(item) is int and not -(2**63) <= item < 2**63]
        if _takes_bools(hint):
            if isinstance(value, str | int | float) and not isinstance(value, bool):
                yield key, f"got {shown(value)}; expected true or false"
        elif any(isinstance(item, bool) for item in items) and _takes_numbers(hint, value):
            yield key, f"got {_yaml(value)}; expected {_describe(hint)}"
        elif huge:
            yield key, f"got a whole number of {huge[0].bit_length()} bits; expected at most 63"


def _in_our_words(cls: type, data: Any, error: ValidationError) -> dict[str, str]:
    """What pydantic found: dotted key -> what is wrong, once for every key."""
    problems: dict[str, str] = {}
    for found in error.errors(include_url=False):
        key, section, hint, value = _place(cls, data, found["loc"][1:])
        if hint is None:
            # thousands of them are counted, not all looked up
            few = len(problems) < MOST_PROBLEMS
            hint = unknown_key(str(found["loc"][-1]), _fields(section)) if few else ""
            problems[key] = f"unknown key{hint}"
        elif key not in problems or _is_not_finite(found, hint):
            problems[key] = _says(found, hint, value)
    return problems


def _place(cls: Any, data: Any, loc: tuple[int | str, ...]) -> tuple[str, Any, Any, Any]:
    """Where an error is: the dotted key, its section, its type (None = unknown), and its value."""
    key, section, hint, value = "", cls, cls, data
    for name in loc:
        if not dataclasses.is_dataclass(hint):
            break  # within a value, which is shown as a whole
        key = f"{key}.{name}" if key else str(name)
        section, hint = hint, _fields(typing.cast(type, hint)).get(str(name))
        value = value.get(name) if isinstance(value, Mapping) else None
    return key, section, hint, value


def _says(found: ErrorDetails, hint: Any, value: Any) -> str:
    if dataclasses.is_dataclass(hint):
        # of its __post_init__, if not of its type
        said = found.get("ctx", {}).get("error")
        return str(said) if said else f"got {shown(value)}; expected a section of keys"
    if _is_not_finite(found, hint):
        return f"got {_yaml(float(found['input']))}; expected a finite number"
    return f"got {shown(value)}; expected {_describe(hint)}"


def _is_not_finite(found: ErrorDetails, hint: Any) -> bool:
    return found["type"] == "finite_number" and float in _types(hint, within=True)


def _types(hint: Any, *, within: bool = False) -> set[Any]:
    """The types that a value may have, or `within` it a part of the value."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return set(map(type, arguments))
    if not arguments or (typing.get_origin(hint) in (list, dict, tuple) and not within):
        return {hint}
    return set().union(*(_types(argument, within=within) for argument in arguments))


def _takes_bools(hint: Any) -> bool:
    return bool in _types(hint)


def _takes_numbers(hint: Any, value: Any) -> bool:
    """Whether a value of this form is numbers: one, or a list of nothing else."""
    if isinstance(value, list | tuple):
        return _types(hint, within=True) <= {int, float, type(None)}
    return not _types(hint).isdisjoint({int, float})


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
