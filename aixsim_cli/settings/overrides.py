"""Dotted overrides from the command line: `--training.steps 20 --compile.enable`."""

import dataclasses
import types
import typing
from collections.abc import Collection
from typing import Any

from aixsim_cli.errors import ConfigError, UserError, closest, nearest, shown
from aixsim_cli.settings.build import unknown_key
from aixsim_cli.settings.document import Document
from aixsim_cli.settings.formats import parse_yaml


def parse_overrides(
    arguments: list[str], cls: type, options: Collection[str] = ()
) -> dict[str, Any]:
    """Read what a command line leaves after the command's own options.

    A value follows its key as the next word or after `=`; a key alone means true. Dashes stand for
    underscores, and a section may carry NewComputeBench's suffix: `--metrics_args.enable_wandb`.

    Args:
        arguments: of the command line.
        cls: the dataclass whose keys they name.
        options: the command's own, such as "--dry-run", of which a word may be a misspelling.

    Returns:
        dotted key -> value, read as YAML.

    Raises:
        ConfigError: every word that is no key of `cls`.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    known = dotted_keys(cls)
    argv = list(arguments)
    while argv:
        word = argv.pop(0)
        if not word.startswith("--") or "." not in word.partition("=")[0]:
            problems.append(not_a_key(word, options))
            if word.startswith("--") and "=" not in word and argv and argv[0][:1] != "-":
                argv.pop(0)  # its value
            continue
        name, has_value, text = word[2:].partition("=")
        if not has_value and argv and not argv[0].startswith("--"):
            has_value, text = "=", argv.pop(0)
        section, _, key = name.replace("-", "_").partition(".")
        dotted = f"{section.removesuffix('_args')}.{key}"
        if dotted not in known:
            problems.append(f"--{name}: unknown key{_hint(dotted, known)}")
            continue
        if not has_value and known[dotted] is not bool:
            problems.append(f"--{name}: no value; expected one after it")
            continue
        if "\n" in text and _is_text(known[dotted]):
            # YAML would fold the line break of a file's name into a blank
            values[dotted] = text
            continue
        try:
            values[dotted] = parse_yaml(text, f"--{name}")[0] if has_value else True
        except UserError as error:
            problems.append(f"{error}; got {shown(text)}, expected a YAML value")
    if problems:
        raise ConfigError(problems)
    return values


def _hint(dotted: str, known: Collection[str]) -> str:
    """What was meant by a key: one of its section, the same of another one, or all of its own."""
    # by whole names "model.dim" would be close to "model.name"
    prefix, key = f"{dotted.rpartition('.')[0]}.", dotted.rpartition(".")[2]
    inside = [name.removeprefix(prefix) for name in known if name.startswith(prefix)]
    elsewhere = [name for name in known if name.rpartition(".")[2] == key]
    if elsewhere and inside and closest(key, inside) is None:
        return f"; did you mean '{elsewhere[0]}'?"
    return unknown_key(key, inside, prefix=prefix) if inside else nearest(dotted, known)


def _is_text(hint: Any) -> bool:
    return hint is str or (isinstance(hint, types.UnionType) and str in typing.get_args(hint))


def not_a_key(word: str, options: Collection[str] = ()) -> str:
    """What is wrong with a word that is neither an option nor a dotted key.

    Args:
        word: as given.
        options: those there are.
    """
    if word.startswith("-"):
        name = word.partition("=")[0]
        meant = closest(name, options)
        if meant is not None:
            return f"{name}: unknown option; did you mean '{meant}'?"
        return f"{word}: unknown option; keys of the config are dotted: --training.steps 20"
    return f"{word}: unexpected; expected options, or dotted keys with a value each"


def dotted_keys(cls: type, prefix: str = "") -> dict[str, Any]:
    """All keys of a nested dataclass, as `section.key` -> type."""
    hints = typing.get_type_hints(cls)
    keys: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        nested = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        keys |= dotted_keys(hint, f"{name}.") if nested else {name: hint}
    return keys


def apply_overrides(document: Document, values: dict[str, Any]) -> Document:
    """The document with overridden keys, whose messages will name the option."""
    data = _copy(document.data)
    for dotted, value in values.items():
        *sections, key = dotted.split(".")
        target = data
        for section in sections:
            target = target.setdefault(section, {})
        target[key] = value
    origins = {dotted: f"--{dotted}" for dotted in values}
    return dataclasses.replace(document, data=data, origins=origins)


def _copy(data: Any) -> Any:
    return {k: _copy(v) for k, v in data.items()} if isinstance(data, dict) else data
