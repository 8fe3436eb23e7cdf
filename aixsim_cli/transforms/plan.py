"""Which rule of a transform simulates which place of a model, before anything is built."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import regex

from aixsim_cli.errors import ConfigError, nearest
from aixsim_cli.transforms.config import Rule, Transform, TransformConfig
from aixsim_cli.transforms.patterns import quoted
from aixsim_cli.transforms.protocol import Site

# patterns that match nothing are named up to here, and counted from here
_TOLD = 8


@dataclass(frozen=True)
class Simulation:
    """A place of a model, and what simulates it.

    Args:
        site: the place.
        transform: the part of the config that simulates it.
        rule: the line of that part.
    """

    site: Site
    transform: Transform
    rule: Rule


@dataclass
class TransformReport:
    """What a transform does to a model.

    Args:
        simulated: every place that is simulated, in the order of the model.
        digital: names of what stays digital, linears and attentions first.
        notes: what is no mistake, and may be one: a `null` pattern that leaves nothing digital,
            modules out of reach.
    """

    simulated: list[Simulation] = field(default_factory=list)
    digital: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def replaced(self) -> Counter[tuple[str, str]]:
        """(paradigm, pattern) -> number of modules that it simulates."""
        return Counter((s.transform.name, s.rule.pattern) for s in self.simulated)

    def __str__(self) -> str:
        lines = [f"{name}: {n} modules match {p}" for (name, p), n in self.replaced.items()]
        some = ", ".join(self.digital[:4]) + (", …" if len(self.digital) > 4 else "")
        lines.append(f"digital: {len(self.digital)} modules" + (f" ({some})" if some else ""))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def plan_transform(config: TransformConfig, sites: Sequence[Site]) -> TransformReport:
    """Match every site with the rule that simulates it; nothing is changed.

    Raises:
        ConfigError: a pattern matches nothing, or two transforms simulate one module.
    """
    problems, notes = [], []
    for transform in config.transforms:
        unmatched = _unmatched(transform, sites)
        # null asks for no change: a file may name what one model has and another one lacks, as a
        # folder's own does once it is loaded without a head
        notes += _told(transform, [r for r in unmatched if r.params is None], sites)
        problems += _told(transform, [r for r in unmatched if r.params is not None], sites)
    report = TransformReport(notes=notes)
    for site in sites:
        found = [
            Simulation(site, transform, rule)
            for transform in config.transforms
            if (rule := transform.simulates(site)) is not None
        ]
        report.simulated += found[:1]
        if not found:
            report.digital.append(site.name)
        elif len(found) > 1:
            both = " and by ".join(f"{s.transform.name} ({s.rule.pattern})" for s in found)
            problems.append(
                f"{config.source}: {site.name}: simulated by {both}; expected one of them, "
                "null in the others"
            )
    if problems:
        raise ConfigError(problems)
    return report


def _unmatched(transform: Transform, sites: Sequence[Site]) -> list[Rule]:
    """The rules with a pattern that are no site's."""
    used = {
        rule.pattern
        for site in sites
        if (rule := transform.match(site)) is not None
        # null holds for what the paradigm would not simulate anyway
        and (rule.params is None or transform.reaches(site))
    }
    idle = [rule for rule in transform.named if rule.pattern not in used]
    digital = [site for site in sites if transform.simulates(site) is None]
    # digital as asked, by an earlier null
    return [
        rule
        for rule in idle
        if rule.params is not None or not any(transform.names(rule, site) for site in digital)
    ]


def _told(transform: Transform, rules: list[Rule], sites: Sequence[Site]) -> list[str]:
    kinds = "linear or attention" if transform.paradigm.has_attention() else "linear"
    reached = [site for site in sites if transform.reaches(site)]
    names = list(dict.fromkeys(name for site in reached for name in site.names))
    told = []
    for rule in rules[:_TOLD]:
        taken = [site for site in reached if transform.names(rule, site)]
        earlier = transform.match(taken[0]) if taken else None
        if earlier is not None:
            said = (
                f"an earlier pattern has all that it matches, {taken[0].name} as "
                f"{quoted(earlier.pattern)}; expected it before that one"
            )
        else:
            hint = _hint(rule.pattern, names, transform.use_regex)
            said = f"matches no {kinds} of this model{hint}"
        told.append(f"{transform.source}: layer_name_to_config: {quoted(rule.pattern)}: {said}")
    if len(rules) > _TOLD:
        told.append(
            f"{transform.source}: layer_name_to_config: {len(rules) - _TOLD:,} more patterns match "
            "nothing"
        )
    return told


def _hint(pattern: str, names: list[str], use_regex: bool) -> str:
    if not use_regex and regex.search(r"[\\*+?\[\](){}|^$]", pattern):
        # no name of a module holds these characters
        return "; without `use_regex: true` it is taken as a name, not as a regular expression"
    if len(names) < 40 and len(pattern) < 200:
        return nearest(pattern, names)
    return f"; names in this model are like {', '.join(names[:8])}"
