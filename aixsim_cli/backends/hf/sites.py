"""Where a transformers model can be simulated: its linears and its attentions, by behaviour.

Nothing here knows an architecture, but for the second names of a Llama's modules. An attention is a
module whose forward calls transformers' attention interface; the head is what lies outside the base
model.
"""

import inspect

from torch import nn
from transformers import LlamaModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from aixsim_cli.errors import ConfigError
from aixsim_cli.models.names import titan_name
from aixsim_cli.transforms.config import TransformConfig
from aixsim_cli.transforms.protocol import Site


def hf_sites(model: PreTrainedModel) -> list[Site]:
    """Every linear and attention of a transformers model, in its order."""
    body = _body_prefix(model)
    sites = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            is_head, known = not name.startswith(body), aliases(model, name)
            sites.append(Site(name, name, "linear", is_head=is_head, aliases=known))
        elif _is_attention(module) and _can_intercept(model):
            sites.append(Site(name, name, "attention", aliases=aliases(model, name)))
    return sites


def aliases(model: PreTrainedModel, name: str) -> tuple[str, ...]:
    """What else a transform config may call a module of a transformers model.

    A Llama's modules have torchtitan's names too, so that the file of a pretraining means the same
    modules after its conversion. No other architecture has: `layers.0.…` is a name of its own in
    some. A model without a head has the names of one with a head.

    Args:
        model: that the module is in.
        name: of the module.
    """
    body = _body_prefix(model)
    inside = name.removeprefix(body)
    if not isinstance(model.base_model, LlamaModel):
        return () if body or not model.base_model_prefix else (f"{model.base_model_prefix}.{name}",)
    known = f"model.{inside}" if name.startswith(body) else name
    try:
        return known, titan_name(known)
    except KeyError:
        return (known,)


def out_of_reach(model: PreTrainedModel) -> dict[str, str]:
    """What stays digital because nothing here can intercept it.

    Args:
        model: before anything is replaced.

    Returns:
        name -> class: attentions that do not call transformers' attention interface or use terms
        that the simulation lacks, and experts whose weights are stacked in one tensor.
    """
    attentions = {site.name for site in hf_sites(model) if site.kind == "attention"}
    found = {}
    for name, module in model.named_modules():
        is_attention = type(module).__name__.endswith("Attention")
        inside = any(other == name or other.startswith(f"{name}.") for other in attentions)
        stacked = any(p.ndim == 3 for p in module.parameters(recurse=False))
        is_experts = stacked and type(module).__name__.endswith("Experts")
        if (is_attention and not inside) or is_experts:
            found[name] = type(module).__name__
    return found


def check_reach(model: PreTrainedModel, config: TransformConfig) -> None:
    """Refuse a config that asks for an attention out of reach.

    `default` alone does not ask for one: it means "whatever can be simulated".

    Raises:
        ConfigError: naming the rule, the attention and its class.
    """
    problems = []
    for name, kind in out_of_reach(model).items():
        for transform in config.transforms:
            site = Site(name, name, "attention", aliases=aliases(model, name))
            rule = transform.match(site) if transform.reaches(site) else None
            if rule is None or rule.params is None or rule.pattern == "default":
                continue
            problems.append(
                f"{transform.source}: {rule.pattern}: asks for {name}, but {kind} cannot be "
                "intercepted (it does not call transformers' attention interface, or uses terms "
                "that the simulation lacks); expected rules for its linears alone"
            )
    if problems:
        raise ConfigError(problems)


def _body_prefix(model: PreTrainedModel) -> str:
    # a bare base model has no head
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _is_attention(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _can_intercept(model: PreTrainedModel) -> bool:
    # what scaled_dot_product_attention cannot express (soft caps, sinks), the simulation cannot
    return type(model)._can_set_attn_implementation() and bool(model._supports_sdpa)
