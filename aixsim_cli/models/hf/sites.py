"""Where a transformers model can be simulated: its linears and its attentions, by behaviour.

Nothing here knows an architecture, but for the second names of a Llama's modules. An attention is a
module whose forward calls transformers' attention interface; the head is what lies outside the base
model.
"""

from torch import nn
from transformers import LlamaModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from aixsim_cli.errors import ConfigError
from aixsim_cli.models.hf.source_code import (
    has_own_sdpa,
    is_attention,
    is_product,
    multiplied_by,
    unknown_terms,
)
from aixsim_cli.models.names import titan_name
from aixsim_cli.transforms.config import TransformConfig
from aixsim_cli.transforms.protocol import Site


def hf_sites(model: PreTrainedModel) -> list[Site]:
    """Every linear and attention of a transformers model, in its order."""
    body = _body_prefix(model)
    sites = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            if not _past_its_forward(model, name):
                is_head, known = not name.startswith(body), aliases(model, name)
                sites.append(Site(name, name, "linear", is_head=is_head, aliases=known))
        elif is_attention(type(module)) and _can_intercept(model, name):
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
        name -> class, and in brackets why: attentions that do not call transformers' attention
        interface or hand it terms that the simulation lacks, linears that are multiplied elsewhere
        or do something else, experts whose weights are stacked in one tensor, and what else holds
        a weight: convolutions, routers.
    """
    attentions = {site.name for site in hf_sites(model) if site.kind == "attention"}
    found: dict[str, str] = {}
    digital: list[str] = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        stacked = any(p.ndim == 3 for p in module.parameters(recurse=False))
        if isinstance(module, nn.Linear | Conv1D):
            why = _past_its_forward(model, name)
            if why:
                found[name] = f"{kind} ({why})"
        elif is_attention(type(module)) or kind.endswith("Attention"):
            terms = ", ".join(sorted(unknown_terms(type(module))))
            if not any(other == name or other.startswith(f"{name}.") for other in attentions):
                found[name] = f"{kind} ({terms})" if terms else kind
                # what wraps it is no attention of its own
                for outer in [o for o in digital if name.startswith(f"{o}.")]:
                    digital.remove(outer)
                    del found[outer]
                digital.append(name)
        elif any(name.startswith(f"{outer}.") for outer in digital):
            continue
        elif (stacked and kind.endswith("Experts")) or _holds_weight(module):
            found[name] = kind
    return found


def partly_out_of_reach(model: PreTrainedModel) -> dict[str, str]:
    """Linears that are simulated where they are called, but are not in another branch.

    Returns:
        name -> class that multiplies the weight itself there, as fused kernels on a GPU do.
    """
    found = {}
    for site in hf_sites(model):
        owner, child = _owner_and_child(model, site.name)
        if site.kind == "linear" and multiplied_by(owner).get(child):
            found[site.name] = owner.__name__
    return found


def check_reach(model: PreTrainedModel, config: TransformConfig) -> None:
    """Refuse a config that asks for an attention out of reach.

    `default` alone does not ask for one: it means "whatever can be simulated".

    Raises:
        ConfigError: naming the rule, the attention and its class.
    """
    problems = []
    for name, kind in out_of_reach(model).items():
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear | Conv1D) or _holds_weight(module):
            # among others that a pattern means; alone it matches nothing, and that is told
            continue
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


def _past_its_forward(model: PreTrainedModel, name: str) -> str:
    """Why replacing a linear would not be noticed, or be wrong; "" where it would do."""
    if not is_product(type(model.get_submodule(name))):
        return "its forward is its own"
    owner, child = _owner_and_child(model, name)
    return "" if multiplied_by(owner).get(child, True) else f"multiplied by {owner.__name__}"


def _holds_weight(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim > 1 and not isinstance(module, nn.Embedding)


def _owner_and_child(model: nn.Module, name: str) -> tuple[type[nn.Module], str]:
    path, _, child = name.rpartition(".")
    return type(model.get_submodule(path)), child


def _can_intercept(model: PreTrainedModel, name: str) -> bool:
    """Whether the attention `name` is simulated as it is meant, once sdpa is (`attention.py`)."""
    # what scaled_dot_product_attention cannot express (soft caps, sinks), the simulation cannot
    owner, kind = owner_of(model, name), type(model.get_submodule(name))
    can_be_sdpa = type(owner)._can_set_attn_implementation() and bool(owner._supports_sdpa)
    return can_be_sdpa and not unknown_terms(kind) and not has_own_sdpa(kind)


def owner_of(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The innermost transformers model around a module: its config names the attention."""
    owner, path = model, name.split(".")
    for depth in range(1, len(path)):
        module = model.get_submodule(".".join(path[:depth]))
        if isinstance(module, PreTrainedModel):
            owner = module
    return owner
