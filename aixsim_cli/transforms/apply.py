"""Put a transform into a model: the only walk over modules, shared by both backends."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from aixsim_cli.errors import ConfigError, nearest
from aixsim_cli.transforms.config import Rule, TransformConfig
from aixsim_cli.transforms.protocol import Site
from aixsim_cli.transforms.state import SimulatedModule, TransformState


@dataclass
class TransformReport:
    """What a transform did to a model.

    Args:
        paradigm: name of the paradigm.
        replaced: pattern -> number of modules it simulates.
        digital: names of the linears and attentions that stay digital.
        sites: (site, rule or None) for every place considered.
    """

    paradigm: str
    replaced: Counter[str] = field(default_factory=Counter)
    digital: list[str] = field(default_factory=list)
    sites: list[tuple[Site, Rule | None]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.paradigm}: {n} modules match {p}" for p, n in self.replaced.items()]
        shown = ", ".join(self.digital[:4]) + (", …" if len(self.digital) > 4 else "")
        lines.append(f"digital: {len(self.digital)} modules" + (f" ({shown})" if shown else ""))
        return "\n".join(lines)


def plan_transform(config: TransformConfig, sites: Sequence[Site]) -> TransformReport:
    """Match every site with its rule; nothing is changed.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    report = TransformReport(config.name)
    matched: Counter[str] = Counter()
    for site in sites:
        rule = config.resolve(site)
        report.sites.append((site, rule))
        if rule is not None:
            matched[rule.pattern] += 1
        if rule is None or rule.params is None or config.paradigm.bypassed(rule.params):
            report.digital.append(site.name)
        else:
            report.replaced[rule.pattern] += 1
    names = [name for site in sites for name in (site.name, site.hf_name)]
    # a null pattern may match nothing: it asks for no change, and then there is none
    unmatched = [
        f"{config.source}: layer_name_to_config: {rule.pattern}: matches no linear or attention "
        f"of this model{nearest(rule.pattern, names) if len(names) < 40 else _example(names)}"
        for rule in config.rules
        if not rule.is_default and rule.params is not None and not matched[rule.pattern]
    ]
    if unmatched:
        raise ConfigError(unmatched)
    return report


def _example(names: list[str]) -> str:
    shown = list(dict.fromkeys(names))[:8]
    return f"; names in this model are like {', '.join(shown)}"


def apply_transform(
    model: nn.Module, config: TransformConfig, sites: Sequence[Site]
) -> tuple[TransformState, TransformReport]:
    """Replace the modules that the config names, in place.

    The model's root gets a hook that gives every call fresh noise, and the attribute
    `transform_state`.

    Args:
        model: its parameters may be on the meta device.
        config: what to simulate.
        sites: every linear and attention of the model, from the backend.

    Returns:
        The state of the simulated modules, and a report.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    report = plan_transform(config, sites)
    simulated: dict[str, SimulatedModule] = {}
    for site, rule in report.sites:
        if rule is None or rule.params is None or config.paradigm.bypassed(rule.params):
            continue
        if site.kind == "attention":
            replacement, path = config.paradigm.attention(rule.params, site), "inner_attention"
            if replacement is None:
                continue
            owner = model.get_submodule(site.name)
            replacement.to(next(owner.parameters()).device)
            setattr(owner, path, replacement)
            name = f"{site.name}.{path}"
        else:
            name = site.name
            digital = model.get_submodule(name)
            replacement = config.paradigm.modules[nn.Linear](digital, rule.params, site)
            replacement.train(digital.training)
            model.set_submodule(name, replacement)
        if isinstance(replacement, SimulatedModule):
            simulated[name] = replacement
    state = TransformState(simulated)
    model.transform_state = state  # pyright: ignore[reportArgumentType]
    model.register_forward_pre_hook(_fresh_noise)
    return state, report


def _fresh_noise(model: nn.Module, inputs: object) -> None:
    # through the model, not a closure: a copied model has a state of its own
    model.transform_state.next_call()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
