"""Simulated modules in the place of a transformers model's own."""

import logging
from collections import Counter
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from aixsim_cli.errors import UserError
from aixsim_cli.models.hf import attention
from aixsim_cli.models.hf.sites import (
    check_reach,
    hf_sites,
    out_of_reach,
    owner_of,
    partly_out_of_reach,
)
from aixsim_cli.transforms.apply import apply_transform, begin_calls_of_parts
from aixsim_cli.transforms.config import TransformConfig
from aixsim_cli.transforms.plan import TransformReport, plan_transform
from aixsim_cli.transforms.protocol import Site
from aixsim_cli.transforms.state import TransformState

logger = logging.getLogger("aixsim")

# what transformers' attentions call the dropout of their probabilities
_DROPOUTS = ("attention_dropout", "attn_dropout", "dropout", "dropout_p", "dropout_prob")


def plan(model: PreTrainedModel, config: TransformConfig) -> TransformReport:
    """What `simulate` would do; nothing is changed.

    Args:
        model: on a real device or on meta.
        config: what to simulate.

    Returns:
        The report, which also names and notes what is out of reach.

    Raises:
        ConfigError: as `simulate`.
    """
    check_reach(model, config)
    report = plan_transform(config, hf_sites(model))
    report.digital += [name for name in out_of_reach(model) if name not in report.digital]
    report.notes += _what_stays_digital(model)
    return report


def simulate(
    model: PreTrainedModel, config: TransformConfig
) -> tuple[TransformState, TransformReport]:
    """Replace the modules; a model on the meta device needs `finish_layout` once it has weights.

    Args:
        model: on a real device or on meta.
        config: what to simulate.

    Raises:
        ConfigError: a pattern matches nothing, or names an attention that is out of reach.
    """
    check_reach(model, config)
    for sentence in _what_stays_digital(model):
        logger.warning("%s", sentence)
    sites = hf_sites(model)
    transposed = {
        site.name: model.get_submodule(site.name)
        for site in sites
        if isinstance(model.get_submodule(site.name), Conv1D)
    }
    for name, module in transposed.items():
        model.set_submodule(name, _as_linear(module))
    state, report = apply_transform(model, config, sites)
    for name, module in transposed.items():
        if name in state.modules:
            # its own parameter again, in its own layout: files and loaders see a Conv1D
            simulated: Any = model.get_submodule(name)
            simulated.weight = module.weight
            simulated.stores_transposed = True
        else:
            model.set_submodule(name, module)
    if any(name.endswith("inner_attention") for name in state.modules):
        attention.register()
        _use_sdpa(model, sites)
        _warn_of_dropout(model, sites)
        _guard_attention(model)
    begin_calls_of_parts(model, PreTrainedModel)
    _keep_ranks_apart(model, state)
    return state, report


def tell(report: TransformReport) -> None:
    """Say what a config asks for and the model has not."""
    for note in report.notes:
        logger.warning("note: %s", note)


def finish_layout(model: PreTrainedModel) -> None:
    """Make the modules that took a Conv1D's place read its weight in the layout of a linear."""
    for module in list(model.modules()):
        is_done = parametrize.is_parametrized(module) or hasattr(type(module), "shows_transposed")
        if getattr(module, "stores_transposed", False) and not is_done:
            module.__class__ = _transposed_class(type(module))


def _as_linear(conv: Any) -> nn.Linear:
    """GPT-2's Conv1D, weight (K, N), as the linear that it is."""
    features_in, features_out = conv.weight.shape
    linear = nn.Linear(features_in, features_out, device="meta")
    linear.weight = nn.Parameter(conv.weight.detach().T)
    linear.bias = conv.bias
    linear.train(conv.training)
    return linear


class _Shown(Tensor):
    """A view of a parameter that writes through: `module.weight.data = …`, as PEFT merges."""

    # as nn.Parameter has it: operations see and return plain tensors
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.detach().as_subclass(Tensor)

    @data.setter
    @torch.no_grad()
    def data(self, value: Tensor) -> None:
        self.copy_(value)


@cache
def _transposed_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A linear class whose parameter is stored as (K, N) and read as (N, K)."""

    def weight(module: Any) -> Tensor:
        shown = module._parameters["weight"].T
        return shown if torch.compiler.is_compiling() else shown.as_subclass(_Shown)

    shown = {"weight": property(weight), "shows_transposed": True}
    return type(f"Transposed{cls.__name__}", (cls,), shown)


def _keep_ranks_apart(model: Any, state: TransformState) -> None:
    """Every rank's record and noise are its own: DDP must not overwrite them with rank 0's."""
    model._ddp_params_and_buffers_to_ignore = [
        f"{name}.{buffer}"
        for name, module in state.modules.items()
        for buffer in module._non_persistent_buffers_set
    ]


def _guard_attention(model: PreTrainedModel) -> None:
    """Refuse to run an attention past its simulation once its config names another function."""
    for module in model.modules():
        if hasattr(module, "inner_attention") and hasattr(module, "config"):
            module.register_forward_pre_hook(_refuse_other_attention)


def _refuse_other_attention(attention_module: Any, inputs: object) -> None:
    used = attention_module.config._attn_implementation
    if used != attention.ATTENTION_NAME:
        raise UserError(
            f"attn_implementation: got {used}, which would run {type(attention_module).__name__} "
            f"digitally; expected `model.set_attn_implementation('{attention.ATTENTION_NAME}')`, "
            "or a transform that leaves attention digital"
        )


def _use_sdpa(model: PreTrainedModel, sites: list[Site]) -> None:
    """Name sdpa in every config that a simulated attention, or who makes its masks, looks at."""
    attentions = [site.name for site in sites if site.kind == "attention"]
    readers: list[Any] = [owner_of(model, name) for name in attentions]
    readers += [model.get_submodule(name) for name in attentions]
    if model._supports_sdpa:
        readers.append(model)
    for reader in readers:
        if hasattr(reader, "config"):
            # of this config alone: a part of the model may know no sdpa
            reader.config._attn_implementation = {"": attention.ATTENTION_NAME}


def _warn_of_dropout(model: PreTrainedModel, sites: list[Site]) -> None:
    found: Counter[tuple[str, float]] = Counter()
    for site in sites:
        owner = model.get_submodule(site.name)
        if site.kind == "attention" and hasattr(owner, "inner_attention"):
            values = [getattr(owner, name, 0.0) for name in _DROPOUTS]
            rates = [value.p if isinstance(value, nn.Dropout) else value for value in values]
            rate = max((rate for rate in rates if isinstance(rate, float)), default=0.0)
            found[type(owner).__name__, rate] += rate > 0
    for (kind, rate), count in (+found).items():
        logger.warning(
            "%d x %s have a dropout of %s: simulated attention has no dropout", count, kind, rate
        )


def _what_stays_digital(model: PreTrainedModel) -> list[str]:
    """A sentence for each class that is out of reach, wholly or in part."""
    said = [
        f"{count} x {kind} stay digital: they cannot be intercepted"
        for kind, count in Counter(out_of_reach(model).values()).items()
    ]
    said += [
        f"{count} linears of {kind} are digital where it multiplies their weights itself, as fused "
        "kernels do; they are simulated where it calls them"
        for kind, count in Counter(partly_out_of_reach(model).values()).items()
    ]
    return said
