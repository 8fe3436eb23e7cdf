"""Put a transform into a model: the only walk over modules, shared by both libraries of models."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import regex
import torch
from torch import nn

from aixsim_cli.errors import ConfigError, nearest
from aixsim_cli.transforms.config import Rule, Transform, TransformConfig
from aixsim_cli.transforms.patterns import quoted
from aixsim_cli.transforms.protocol import Site
from aixsim_cli.transforms.state import SimulatedModule, TransformState

logger = logging.getLogger("aixsim")
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
    kinds = "linear or attention" if transform.paradigm.attention is not None else "linear"
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


def apply_transform(
    model: nn.Module, config: TransformConfig, sites: Sequence[Site]
) -> tuple[TransformState, TransformReport]:
    """Replace the modules that the config names, in place.

    The model's root gets a hook that gives every call fresh noise, and the attribute
    `transform_state`. Low-rank updates are not added here: a model's weights may come later
    (`lora.add_lora`).

    Args:
        model: its parameters may be on the meta device.
        config: what to simulate.
        sites: every linear and attention of the model, from `titan_sites` or `hf_sites`.

    Returns:
        The state of the simulated modules, and a report.

    Raises:
        ConfigError: a pattern matches nothing, or two transforms simulate one module.
    """
    report = plan_transform(config, sites)
    simulated: dict[str, SimulatedModule] = {}
    for place in report.simulated:
        name, replacement = _replace(model, place)
        if isinstance(replacement, SimulatedModule):
            simulated[name] = replacement
    lora = {
        place.site.name: place.transform.lora
        for place in report.simulated
        if place.site.kind == "linear" and place.transform.lora is not None
    }
    state = TransformState(simulated, lora)
    model.transform_state = state  # pyright: ignore[reportArgumentType]
    model.register_forward_pre_hook(_fresh_noise)
    # also after a forward that raised
    model.register_forward_hook(_end_call, always_call=True)
    return state, report


def _replace(model: nn.Module, place: Simulation) -> tuple[str, nn.Module]:
    """Build a simulated module and put it in its place: its name in the model, and itself."""
    paradigm, params, site = place.transform.paradigm, place.rule.params, place.site
    if site.kind == "linear":
        digital = model.get_submodule(site.name)
        replacement = paradigm.modules[nn.Linear](digital, params, site)
        replacement.train(digital.training)
        model.set_submodule(site.name, replacement)
        return site.name, replacement
    assert paradigm.attention is not None
    replacement, owner = paradigm.attention(params, site), model.get_submodule(site.name)
    replacement.to(next(owner.parameters()).device)
    owner.inner_attention = replacement
    return f"{site.name}.inner_attention", replacement


def begin_calls_of_parts(model: nn.Module, kind: type[nn.Module]) -> None:
    """Give fresh noise to parts of a simulated model that are called by themselves too.

    Args:
        model: after `apply_transform`.
        kind: of the parts; of a base model, say, which is called for its hidden states.
    """
    for part in model.modules():
        if isinstance(part, kind) and part is not model:
            part.state_of_whole = model.transform_state
            part.register_forward_pre_hook(_begin_call_of_part)
            part.register_forward_hook(_end_call_of_part, always_call=True)


def _fresh_noise(model: nn.Module, inputs: object) -> None:
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        _say_frozen()
    else:
        # through the model, not a closure: a copied model has a state of its own
        _begin_call(model, model.transform_state)


@torch.compiler.assume_constant_result  # runs while it is traced
def _say_frozen() -> bool:
    logger.warning(
        "the exported program draws the same noise in every call: what gives each call its own is "
        "not part of it"
    )
    return True


def _begin_call_of_part(part: nn.Module, inputs: object) -> None:
    # within a compiled model it is no call of its own, and a break of the graph
    if not torch.compiler.is_compiling() and not part.state_of_whole.calls.is_running:  # pyright: ignore
        _begin_call(part, part.state_of_whole)


@torch.compiler.disable(reason="calls are counted outside graphs: compile without fullgraph=True")
def _begin_call(caller: nn.Module, state: Any) -> None:
    state.next_call()
    state.calls.enter()
    if caller.training and torch.is_grad_enabled():
        state.watch.called()


def _end_call(model: nn.Module, inputs: object, outputs: object) -> None:
    if not torch.compiler.is_exporting():
        _leave(model.transform_state, outputs)


def _end_call_of_part(part: nn.Module, inputs: object, outputs: object) -> None:
    if not torch.compiler.is_compiling():
        _leave(part.state_of_whole, outputs)


@torch.compiler.disable()
def _leave(state: Any, outputs: object) -> None:
    state.calls.leave(outputs)
