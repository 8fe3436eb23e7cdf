"""A transform file: which modules are simulated, how, and with which parameters.

    transform: optical                      # a paradigm (default: optical)
    use_regex: true                         # regular expressions (default: false, plain names)
    layer_name_to_config:
      'layers\\.\\d+\\.feed_forward\\.w[123]': {q_levels: 256}
      'layers\\.0\\..*': null                 # null leaves a module digital
      default: null                         # for all that no pattern matches
    lora: {r: 32, alpha: 32}                # train low-rank updates alone (default: null)

The first full match wins, `default` comes last. The shorter form `attention: {…}` / `fc: {…}`
gives parameters to all attentions and all linears (the output projection aside). Several such
mappings in a list, `transforms: [{…}, {…}]`, act on one model, each on modules of its own.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from math import isfinite
from pathlib import Path
from typing import Any

from aixsim_cli.errors import ConfigError, UserError, nearest, shown
from aixsim_cli.files import read_text
from aixsim_cli.settings.build import build_dataclass
from aixsim_cli.settings.document import TRANSFORM, check_purpose, load_yaml
from aixsim_cli.settings.formats import MAX_TOML_SIZE, parse_toml
from aixsim_cli.transforms.config import DEFAULT, LIST_KEY, Rule, Transform, TransformConfig
from aixsim_cli.transforms.patterns import problems_of, quoted
from aixsim_cli.transforms.protocol import Lora, Paradigm, as_in_file, defaults_before
from aixsim_cli.transforms.registry import get_paradigm, paradigm_names, paradigms_with

KEYS = ("transform", "use_regex", "layer_name_to_config", "attention", "fc", "lora", "use_lora")
_KIND_KEYS = {"attention": "attention", "fc": "linear"}


def read_transform(path: str | Path, *, saved: bool = False) -> TransformConfig:
    """Read and validate a transform file (YAML, or NewComputeBench's TOML form).

    Args:
        path: of the file.
        saved: it was written beside a model, see `parse_transform`.

    Raises:
        UserError: no such file; or, of a saved one, the package of a paradigm is missing.
        ConfigError: naming file, pattern, parameter and the nearest valid word.
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such transform config; expected a .yaml or .toml file")
    if path.suffix == ".toml":
        data: Any = parse_toml(read_text(path, limit=MAX_TOML_SIZE), str(path))
    else:
        data = load_yaml(path).data
    check_purpose(data, str(path), TRANSFORM)
    if saved:
        require_paradigms(data, source=str(path))
    return parse_transform(data, source=str(path), saved=saved)


def parse_transform(data: Any, *, source: str, saved: bool = False) -> TransformConfig:
    """Validate a transform mapping.

    Args:
        data: what a transform file holds.
        source: file (and section), for messages.
        saved: it is part of a checkpoint, a model or a pretraining config: a parameter that it does
            not name has the default of the version that wrote it.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    if not isinstance(data, Mapping):
        keys = ", ".join((*KEYS, LIST_KEY))
        raise ConfigError([f"{source}: got {shown(data)}; expected a mapping with {keys}"])
    items, problems = [(source, data)], []
    if LIST_KEY in data:
        listed = data[LIST_KEY]
        problems += [
            f"{source}: {key}: got it beside {LIST_KEY}; expected it inside the transform it is for"
            for key in data
            if key != LIST_KEY
        ]
        if not isinstance(listed, list) or not all(isinstance(item, Mapping) for item in listed):
            raise ConfigError(
                [*problems, f"{source}: {LIST_KEY}: expected a list of transforms, each a mapping"]
            )
        items = [(f"{source}: {LIST_KEY}[{i}]", item) for i, item in enumerate(listed)]
    if not items:
        problems.append(f"{source}: {LIST_KEY}: nothing to transform; expected at least one")
    found = [_transform(item, where, problems, saved=saved) for where, item in items]
    if problems:
        raise ConfigError(problems)
    transforms = tuple(transform for transform in found if transform is not None)
    parts = [_written_out(t, item) for t, (_, item) in zip(transforms, items, strict=True)]
    mapping = dict(data) | {LIST_KEY: parts} if LIST_KEY in data else parts[0]
    return TransformConfig(mapping, transforms, source)


def require_paradigms(mapping: Any, *, source: str) -> None:
    """Refuse what a model was saved with where the package that simulates it is missing.

    Args:
        mapping: a transform config as saved, whatever is in it; None = digital.
        source: the file that holds it, for messages.

    Raises:
        UserError: naming the paradigms.
    """
    missing = missing_paradigms(mapping)
    if missing:
        names = ", ".join(map(repr, missing))
        raise UserError(
            f"{source}: transform: {names}: a paradigm that is not installed here; expected the "
            "package that brings it, or --no-transform for the weights alone"
        )


def asks_for_lora(mapping: Mapping[str, Any]) -> bool:
    """Whether a transform config trains low-rank updates; its paradigms need not be installed."""
    return any(_lora(part, "", []) is not None for part in _parts(mapping))


def _parts(mapping: Any) -> list[Mapping[str, Any]]:
    listed = mapping.get(LIST_KEY, [mapping]) if isinstance(mapping, Mapping) else []
    return [p for p in listed if isinstance(p, Mapping)] if isinstance(listed, list) else []


def missing_paradigms(mapping: Any) -> list[str]:
    """The paradigms that a mapping names and that are not installed here, each once."""
    named = dict.fromkeys(_name(part) for part in _parts(mapping))
    return [name for name in named if name not in paradigm_names()]


def _name(part: Mapping[str, Any]) -> str:
    return str(part.get("transform", "optical"))


def _written_out(transform: Transform, data: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping with every parameter of its rules."""
    mapping = dict(data)
    layers = dict(data.get("layer_name_to_config") or {})
    for rule in transform.rules:
        lines = layers if rule.kind is None else mapping
        if rule.params is not None:
            lines[rule.pattern] = _every_parameter(rule.params, lines[rule.pattern])
    if layers:
        mapping["layer_name_to_config"] = layers
    if transform.lora is not None:
        mapping["lora"] = asdict(transform.lora)
    return mapping


def _every_parameter(params: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as a file has them, all that a file can hold; the others as they were given."""
    found = {f.name: as_in_file(getattr(params, f.name)) for f in fields(params) if f.init}
    try:
        if build_dataclass(type(params), found, where="") == params and _is_plain(found):
            return found
    except (ConfigError, TypeError):
        pass
    return {name: value for name, value in found.items() if _is_plain(value)} | dict(given)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    if isinstance(value, float):
        return isfinite(value)
    return type(value) in (str, int, bool, type(None))


def _transform(
    data: Mapping[str, Any], source: str, problems: list[str], *, saved: bool
) -> Transform | None:
    problems += [
        f"{source}: {key}: unknown key{nearest(str(key), KEYS)}" for key in data if key not in KEYS
    ]
    lora = _lora(data, source, problems)
    layers = _layers(data, source, problems)
    if not layers and not any(key in data for key in _KIND_KEYS):
        problems.append(f"{source}: nothing to transform; expected layer_name_to_config")
    name = _name(data)
    try:
        paradigm = get_paradigm(name)
    except UserError as error:
        problems.append(f"{source}: {error}")
        return None
    if data.get("attention") is not None and not paradigm.has_attention():
        problems.append(f"{source}: attention: {name} has no simulation of it; expected null")
    use_regex = _flag(data, "use_regex", source, problems)
    patterns = [pattern for pattern in layers if pattern != DEFAULT]
    wrong = list(problems_of(patterns, use_regex=use_regex))
    if wrong:
        problems += [f"{source}: {problem}" for problem in wrong]
        return None
    lines = [
        *((pattern, layers[pattern], None) for pattern in sorted(layers, key=_is_default)),
        *((key, data[key], kind) for key, kind in _KIND_KEYS.items() if key in data),
    ]
    before = defaults_before(paradigm.params) if saved else {}
    lines = [(p, {**before, **v} if isinstance(v, Mapping) else v, k) for p, v, k in lines]
    rules = tuple(_rule(paradigm, p, value, kind, source, problems) for p, value, kind in lines)
    return Transform(name, paradigm, rules, use_regex, lora, source)


def _is_default(pattern: object) -> bool:
    return pattern == DEFAULT


def _layers(data: Mapping[str, Any], source: str, problems: list[str]) -> Mapping[str, Any]:
    where = f"{source}: layer_name_to_config"
    layers = data.get("layer_name_to_config")
    if layers is None:
        return {}
    if not isinstance(layers, Mapping):
        problems.append(f"{where}: got {shown(layers)}; expected pattern: parameters")
        return {}
    other = [key for key in layers if not isinstance(key, str)]
    problems += [f"{where}: got {shown(key)} as a pattern; expected a text" for key in other[:8]]
    return {key: value for key, value in layers.items() if isinstance(key, str)}


def _flag(data: Mapping[str, Any], key: str, source: str, problems: list[str]) -> bool:
    value = data.get(key, False)
    if not isinstance(value, bool):
        problems.append(f"{source}: {key}: got {shown(value)}; expected true or false")
    return value is True


def _lora(data: Mapping[str, Any], source: str, problems: list[str]) -> Lora | None:
    """`lora: {r, alpha}`; NewComputeBench says `use_lora: true` too, and `lora_alpha`."""
    value = data.get("lora")
    wanted = _flag(data, "use_lora", source, problems) if "use_lora" in data else value is not None
    if not wanted:
        return None
    if value is not None and not isinstance(value, Mapping):
        problems.append(f"{source}: lora: got {shown(value)}; expected r and alpha, or null")
        return None
    given = {("alpha" if key == "lora_alpha" else key): v for key, v in (value or {}).items()}
    try:
        return build_dataclass(Lora, given, where=f"{source}: lora")
    except ConfigError as error:
        problems += error.problems
        return None


def _rule(
    paradigm: type[Paradigm],
    pattern: str,
    value: Any,
    kind: str | None,
    source: str,
    problems: list[str],
) -> Rule:
    if value is None:
        return Rule(pattern, None, kind)
    where = f"{source}: {pattern if kind else f'layer_name_to_config: {quoted(pattern)}'}"
    if not isinstance(value, Mapping):
        problems.append(f"{where}: got {shown(value)}; expected parameters or null")
        return Rule(pattern, None, kind)
    try:
        return Rule(pattern, build_dataclass(paradigm.params, value, where=where), kind)
    except ConfigError as error:
        problems += error.problems
        others = paradigms_with(value)
        if others and paradigm not in others.values():
            problems.append(f"{where}: these are parameters of `transform: {', '.join(others)}`")
        return Rule(pattern, None, kind)
