"""Configuration from YAML into dataclasses, with every mistake named by file, line and key.

YAML by safe loading only. Types are checked by pydantic, field by field; names, line numbers and
the wording of messages are ours.
"""

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from aixsim_cli.errors import ConfigError, UserError, nearest

T = TypeVar("T")


@dataclass(frozen=True)
class Document:
    """A YAML file as read.

    Args:
        data: the top-level mapping.
        source: path of the file, for messages.
        lines: dotted key -> line, from 1.
        origins: dotted key -> where its value came from, when not from the file.
    """

    data: dict[str, Any]
    source: str
    lines: Mapping[str, int] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)

    def where(self, key: str) -> str:
        """`file:line: key` of a dotted key, or the option that set it."""
        if key in self.origins:
            return self.origins[key]
        line = self.lines.get(key)
        return f"{self.source}:{line}: {key}" if line else f"{self.source}: {key}"


class _Loader(yaml.SafeLoader):
    """Safe loading that refuses a key given twice."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str | int | float | bool):
            raise UserError(f"{loader.name}:{line}: got the key {key!r}; expected a plain word")
        if key in result:
            raise UserError(f"{loader.name}:{line}: {key}: given twice; expected once")
        result[key] = loader.construct_object(value_node, deep=True)
    return result


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_yaml(path: str | Path) -> Document:
    """Read a YAML file that holds a mapping.

    Raises:
        UserError: no such file, not YAML, not a mapping, or a key given twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a text file; expected YAML") from None
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    loader.name = str(path)
    try:
        node = loader.get_single_node()
        data = loader.construct_document(node) if node is not None else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not valid YAML: {reason}") from None
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        raise UserError(f"{path}: got {type(data).__name__}; expected a mapping of sections")
    return Document(data, str(path), _lines(node) if node is not None else {})


def _lines(node: yaml.Node, prefix: str = "") -> dict[str, int]:
    lines: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            lines[name] = key.start_mark.line + 1
            lines |= _lines(value, f"{name}.")
    return lines


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
        problems.append(f"{document.where(prefix[:-1])}: got {data!r}; expected a section of keys")
        return None
    fields = _fields(cls)
    values = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if key not in fields:
            problems.append(f"{document.where(name)}: unknown key{nearest(str(key), fields)}")
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
    # pydantic takes true for 1 and "12" for 12; YAML has types of its own, and `1e-4` is the one
    # number that YAML 1.1 reads as a string
    is_number = _names(hint) & {"int", "float"} and "bool" not in _names(hint)
    if is_number and isinstance(value, bool):
        problems.append(f"{where}: got {_yaml(value)}; expected {_describe(hint)}")
        return None
    if "bool" in _names(hint) and isinstance(value, str | int | float) and type(value) is not bool:
        problems.append(f"{where}: got {value!r}; expected true or false")
        return None
    try:
        valid = _adapter(hint).validate_python(value)
    except ValidationError:
        problems.append(f"{where}: got {value!r}; expected {_describe(hint)}")
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
    return yaml.safe_dump(value).split("\n")[0]
