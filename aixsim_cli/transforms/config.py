"""The transform config: which modules are simulated, how, and with which parameters.

    transform: optical                      # a paradigm (default: optical)
    use_regex: true                         # patterns are regular expressions, matched in full
    layer_name_to_config:
      'layers\\.\\d+\\.feed_forward\\.w[123]': {q_levels: 256}
      'layers\\.0\\..*': null                 # null leaves a module digital
      default: null                         # for all that no pattern matches

The first full match wins, `default` comes last. The shorter form `attention: {…}` / `fc: {…}`
gives parameters to all attentions and all linears (the output projection aside).
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import regex

from aixsim_cli.config.load import build_dataclass, load_yaml
from aixsim_cli.errors import ConfigError, UserError, nearest
from aixsim_cli.transforms.protocol import Paradigm, Site
from aixsim_cli.transforms.registry import get_paradigm

KEYS = ("transform", "use_regex", "layer_name_to_config", "attention", "fc", "use_lora")
_PATTERN_SECONDS = 1
_KIND_KEYS = {"attention": "attention", "fc": "linear"}


@dataclass(frozen=True)
class Rule:
    """One line of a config: a pattern, or a kind of module, and its parameters (None = digital)."""

    pattern: str
    params: Any | None
    kind: str | None = None

    @property
    def is_default(self) -> bool:
        """Whether this rule catches what no pattern names; such rules may match nothing."""
        return self.kind is not None or self.pattern == "default"


@dataclass(frozen=True)
class TransformConfig:
    """A validated transform config.

    Args:
        mapping: as read from the file; what is stored with checkpoints and in pretraining configs.
        paradigm: the class registered under `transform`.
        rules: in order of precedence.
        source: the file, for messages.
    """

    mapping: Mapping[str, Any]
    paradigm: type[Paradigm]
    rules: tuple[Rule, ...]
    source: str

    @property
    def name(self) -> str:
        """The paradigm's registered name."""
        return self.mapping.get("transform", "optical")

    @cached_property
    def _patterns(self) -> dict[str, "regex.Pattern[str]"]:
        as_regex = self.mapping.get("use_regex", False)
        return {
            rule.pattern: regex.compile(rule.pattern if as_regex else regex.escape(rule.pattern))
            for rule in self.rules
            if not rule.is_default
        }

    def resolve(self, site: Site) -> Rule | None:
        """The rule for a site: the first pattern that matches either of its names in full."""
        for rule in self.rules:
            if rule.is_default:
                if not site.is_head and rule.kind in (None, site.kind):
                    return rule
            else:
                if self._matches(rule.pattern, site):
                    return rule
        return None

    def _matches(self, pattern: str, site: Site) -> bool:
        compiled = self._patterns[pattern]
        try:
            return any(
                compiled.fullmatch(name, timeout=_PATTERN_SECONDS)
                for name in (site.name, site.hf_name)
            )
        except TimeoutError:
            raise ConfigError(
                [
                    f"{self.source}: {pattern}: takes more than {_PATTERN_SECONDS} s to match "
                    f"{site.name}; expected a pattern without a repetition of repetitions"
                ]
            ) from None


def load_transform_file(path: str | Path) -> dict[str, Any]:
    """Read and validate a transform file (YAML, or the field's TOML form).

    Returns:
        The mapping as written, to be inlined in a pretraining config.

    Raises:
        ConfigError: naming file, pattern, parameter and the nearest valid word.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such transform config; expected a .yaml or .toml file")
    if path.suffix == ".toml":
        try:
            data: Any = tomllib.loads(path.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{path}: not valid TOML: {error}") from None
    else:
        data = load_yaml(path).data
    parse_transform(data, source=str(path))
    return data


def parse_transform(data: Any, *, source: str) -> TransformConfig:
    """Validate a transform mapping.

    Args:
        data: what a transform file holds.
        source: file (and section), for messages.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    if not isinstance(data, Mapping):
        raise ConfigError([f"{source}: got {data!r}; expected a mapping with {', '.join(KEYS)}"])
    problems = [
        f"{source}: {key}: unknown key{nearest(str(key), KEYS)}" for key in data if key not in KEYS
    ]
    if data.get("use_lora"):
        problems.append(f"{source}: use_lora: got true; LoRA is not available, expected false")
    layers = data.get("layer_name_to_config") or {}
    if not isinstance(layers, Mapping):
        problems.append(f"{source}: layer_name_to_config: expected pattern: parameters")
        layers = {}
    if not layers and not any(key in data for key in _KIND_KEYS):
        problems.append(f"{source}: nothing to transform; expected layer_name_to_config")
    paradigm = _paradigm(data, source, problems)
    if paradigm is None:
        raise ConfigError(problems)
    rules = [
        *(_rule(paradigm, str(p), v, None, source, problems) for p, v in _default_last(layers)),
        *(
            _rule(paradigm, k, data[k], _KIND_KEYS[k], source, problems)
            for k in _KIND_KEYS
            if k in data
        ),
    ]
    if data.get("use_regex", False):
        problems.extend(_bad_patterns(rules, source))
    if problems:
        raise ConfigError(problems)
    return TransformConfig(dict(data), paradigm, tuple(rules), source)


def _paradigm(data: Mapping, source: str, problems: list[str]) -> type[Paradigm] | None:
    try:
        return get_paradigm(str(data.get("transform", "optical")))
    except UserError as error:
        problems.append(f"{source}: {error}")
        return None


def _default_last(layers: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(layers.items(), key=lambda item: item[0] == "default")


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
    where = f"{source}: {pattern}" if kind else f"{source}: layer_name_to_config: {pattern}"
    if not isinstance(value, Mapping):
        problems.append(f"{where}: got {value!r}; expected parameters or null")
        return Rule(pattern, None, kind)
    try:
        return Rule(pattern, build_dataclass(paradigm.params, value, where=where), kind)
    except ConfigError as error:
        problems.extend(error.problems)
        return Rule(pattern, None, kind)


def _bad_patterns(rules: list[Rule], source: str) -> list[str]:
    problems = []
    for rule in rules:
        try:
            regex.compile(rule.pattern)
        except regex.error as error:
            problems.append(f"{source}: {rule.pattern}: not a regular expression: {error}")
    return problems
