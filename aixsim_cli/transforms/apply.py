"""Put a transform into a model: the only walk over modules, shared by both libraries of models."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from aixsim_cli.transforms.config import TransformConfig
from aixsim_cli.transforms.plan import Simulation, TransformReport, plan_transform
from aixsim_cli.transforms.protocol import Site
from aixsim_cli.transforms.state import SimulatedModule, TransformState

logger = logging.getLogger("aixsim")


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
