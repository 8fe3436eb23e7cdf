"""The transform config as a value: rules, what they match, and how two of them differ.

How a file spells it is in `transforms/read.py`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from aixsim_cli.transforms.patterns import Matcher
from aixsim_cli.transforms.protocol import Lora, Paradigm, Site, as_in_file

LIST_KEY = "transforms"
DEFAULT = "default"


@dataclass(frozen=True)
class Rule:
    """One line of a config: a pattern, or a kind of module, and its parameters (None = digital)."""

    pattern: str
    params: Any | None
    kind: str | None = None

    @property
    def is_default(self) -> bool:
        """Whether this rule catches what no pattern names; such rules may match nothing."""
        return self.kind is not None or self.pattern == DEFAULT


@dataclass(frozen=True)
class Transform:
    """One paradigm and its rules.

    Args:
        name: under which the paradigm is registered.
        paradigm: its class.
        rules: in order of precedence.
        use_regex: whether patterns are regular expressions.
        lora: the low-rank update to train; None = the weights themselves.
        source: the file, and the place in it, for messages; no part of what it is.
    """

    name: str
    paradigm: type[Paradigm]
    rules: tuple[Rule, ...]
    use_regex: bool
    lora: Lora | None
    source: str = field(compare=False)

    @cached_property
    def named(self) -> tuple[Rule, ...]:
        """The rules that have a pattern, in order of precedence."""
        return tuple(rule for rule in self.rules if not rule.is_default)

    @cached_property
    def _matcher(self) -> Matcher:
        patterns = [rule.pattern for rule in self.named]
        return Matcher(patterns, use_regex=self.use_regex, source=self.source)

    @cached_property
    def _matched(self) -> dict[Site, Rule | None]:
        return {}

    def match(self, site: Site) -> Rule | None:
        """The rule for a site: the first pattern that matches one of its names in full."""
        if site not in self._matched:
            place = self._matcher.first(site.names)
            self._matched[site] = self._default(site) if place is None else self.named[place]
        return self._matched[site]

    def _default(self, site: Site) -> Rule | None:
        fitting = (rule for rule in self.rules if rule.is_default and not site.is_head)
        return next((rule for rule in fitting if rule.kind in (None, site.kind)), None)

    def names(self, rule: Rule, site: Site) -> bool:
        """Whether the pattern of a rule matches a site, whatever comes before it."""
        return self._matcher.matches(self.named.index(rule), site.names)

    def reaches(self, site: Site) -> bool:
        """Whether the paradigm has a simulation of this kind of place."""
        return site.kind == "linear" or self.paradigm.has_attention()

    def simulates(self, site: Site) -> Rule | None:
        """The rule by which this transform simulates a site; None = it leaves it alone."""
        rule = self.match(site)
        if rule is None or rule.params is None or not self.reaches(site):
            return None
        return None if self.paradigm.bypassed(rule.params) else rule


@dataclass(frozen=True)
class TransformConfig:
    """A validated transform config; equal to another of the same transforms, in whatever words.

    Args:
        mapping: the file's, with every parameter written out; what is stored with checkpoints and
            in pretraining configs, so that they mean the same where a default changes.
        transforms: one or several, on modules of their own.
        source: the file, for messages.
    """

    mapping: Mapping[str, Any] = field(compare=False)
    transforms: tuple[Transform, ...]
    source: str = field(compare=False)

    @property
    def name(self) -> str:
        """The paradigms' registered names."""
        return "+".join(transform.name for transform in self.transforms)

    @property
    def uses_lora(self) -> bool:
        """Whether any of its transforms trains low-rank updates."""
        return any(transform.lora is not None for transform in self.transforms)

    def without_lora(self) -> "TransformConfig":
        """The same without low-rank updates: what a model has once they are merged."""
        transforms = tuple(replace(transform, lora=None) for transform in self.transforms)
        return TransformConfig(_without_lora(self.mapping), transforms, self.source)


def _without_lora(mapping: Mapping[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in mapping.items() if k not in ("lora", "use_lora")}
    if LIST_KEY in kept:
        kept[LIST_KEY] = [_without_lora(part) for part in kept[LIST_KEY]]
    return kept


def difference(
    saved: TransformConfig | None, asked: TransformConfig | None
) -> tuple[str, str] | None:
    """How two transform configs, None = digital, differ.

    Args:
        saved: of a checkpoint.
        asked: of the run that goes on from it.

    Returns:
        Each as a message names it beside the other: the paradigm, and where both have the same
        one, what is its own; None = the same transforms and low-rank updates.
    """
    if saved == asked:
        return None
    return _name_beside(saved, asked), _name_beside(asked, saved)


def _name_beside(config: TransformConfig | None, other: TransformConfig | None) -> str:
    if config is None:
        return "digital hardware"
    if other is None or other.name != config.name:
        return config.name
    settings, others = _settings(config), _settings(other)
    differing = [f"{key} {value}" for key, value in settings.items() if others.get(key) != value]
    return f"{config.name} ({', '.join(differing[:3]) or 'its patterns otherwise'})"


def _settings(config: TransformConfig) -> dict[str, str]:
    settings = {}
    for transform in config.transforms:
        settings["lora"] = str(transform.lora and asdict(transform.lora))
        for rule in transform.rules:
            values = {"": None} if rule.params is None else asdict(rule.params)
            settings |= {
                f"{rule.pattern}: {key}": str(as_in_file(value)) for key, value in values.items()
            }
        settings["use_regex"] = str(transform.use_regex).lower()
    return settings
