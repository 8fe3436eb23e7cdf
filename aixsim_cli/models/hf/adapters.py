"""PEFT's adapters on simulated hardware: an adapter carries the ranges that it was trained with.

Training an adapter moves the ranges of the model underneath, which PEFT does not save with it, nor
what hardware that was. All its ways to save and load an adapter (`save_pretrained`,
`load_adapter`, a Trainer's checkpoints, hot swaps) end in the functions that are wrapped here, so
that both travel in its file.
"""

import json
import logging
import re
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from wrapt import wrap_function_wrapper

from aixsim_cli.errors import UserError, first_line
from aixsim_cli.models.hf.config import AixsimConfig, transform_of
from aixsim_cli.transforms.config import difference
from aixsim_cli.transforms.state import state_of

logger = logging.getLogger("aixsim")
_SUFFIX = ".ranges"
_LAMP = re.compile(r"\.lamp\w*\.ranges$")
# the transform config as JSON, uint8 (bytes,): a file of tensors travels whole
_TRANSFORM = "aixsim.transform"


def register_adapters(save_and_load: ModuleType) -> None:
    """Wrap what turns an adapter into a state dict and back.

    Args:
        save_and_load: the module `peft.utils.save_and_load`.
    """
    _wrap(save_and_load, "get_peft_model_state_dict", _get)
    _wrap(save_and_load, "set_peft_model_state_dict", _set)


def register_hotswap(hotswap: ModuleType) -> None:
    """Wrap what exchanges the weights of a loaded adapter in place.

    Args:
        hotswap: the module `peft.utils.hotswap`.
    """
    _wrap(hotswap, "hotswap_adapter_from_state_dict", _set)


def _wrap(module: ModuleType, name: str, wrapper: Callable[..., Any]) -> None:
    """Wrap a function of a module, wherever a name for it is already imported."""
    original = getattr(module, name)
    wrap_function_wrapper(module, name, wrapper)
    for other in list(sys.modules.values()):
        names = vars(other) if isinstance(other, ModuleType) else {}
        # `from peft import …` binds the function, and peft may be there before aixsim
        for held in [held for held, value in list(names.items()) if value is original]:
            setattr(other, held, getattr(module, name))


def _get(wrapped: Callable[..., dict[str, Tensor]], _: Any, args: Any, kwargs: Any) -> Any:
    """`get_peft_model_state_dict`, the ranges under their names in the model, and the hardware."""
    model = args[0] if args else kwargs["model"]
    saved = wrapped(*args, **kwargs)
    if transform := transform_of(model):
        text = json.dumps(transform.mapping, sort_keys=True).encode()
        saved[_TRANSFORM] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    for name, ranges in _ranges_of(model).items():
        # a copy: the next step moves the ranges
        saved[name] = ranges.detach().clone()
    return saved


def _set(wrapped: Callable[..., Any], _: Any, args: Any, kwargs: Any) -> Any:
    """`set_peft_model_state_dict` and its kind, and the ranges where the adapter is active."""

    def load(
        model: Any,
        state_dict: Mapping[str, Tensor],
        adapter_name: str = "default",
        *others: Any,
        **options: Any,
    ) -> Any:
        ranges = {k: v for k, v in state_dict.items() if k.endswith(_SUFFIX)}
        own = {k: v for k, v in state_dict.items() if k not in ranges and k != _TRANSFORM}
        result = wrapped(model, own, adapter_name, *others, **options)
        hardware = state_dict.get(_TRANSFORM)
        if hardware is not None:
            _compare_transform(model, adapter_name, hardware)
        _load_ranges(model, adapter_name, ranges, is_told=hardware is not None)
        return result

    # the one name that differs between them
    return load(*args, **{k.removeprefix("peft_model_"): v for k, v in kwargs.items()})


def _compare_transform(model: nn.Module, adapter: str, saved: Tensor) -> None:
    """Tell that an adapter comes onto other hardware; that may be what is studied."""
    try:
        trained = json.loads(bytes(saved.cpu().to(torch.uint8).flatten().tolist()))
        differing = difference(AixsimConfig(trained).transform_config, transform_of(model))
    except (UserError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        why = first_line(error)
        logger.warning("adapter %s: what hardware it was trained on is unknown: %s", adapter, why)
        return
    if differing is not None:
        logger.warning("adapter %s was trained on %s, and the model is on %s", adapter, *differing)


@torch.no_grad()
def _load_ranges(
    model: nn.Module, adapter: str, ranges: Mapping[str, Tensor], *, is_told: bool
) -> None:
    own = {_plain_name(name): running for name, running in _ranges_of(model).items()}
    saved = {_plain_name(name): value for name, value in ranges.items()}
    if not own:
        if saved and not is_told:
            logger.warning(
                "adapter %s was trained on simulated hardware, and this model has none: what it "
                "computes is another model; expected the base model that it was trained on",
                adapter,
            )
        return
    if adapter not in _active_adapters(model):
        logger.warning(
            "adapter %s is loaded beside %s: a model has one set of ranges, and keeps those of %s "
            "when adapters are switched; expected each adapter on a base model of its own",
            adapter,
            *2 * [", ".join(_active_adapters(model))],
        )
        return
    # where these are, and what they lack is a lamp, it is another amount of light: it calibrates
    lost = sorted(name for name in own.keys() - saved.keys() if not _LAMP.search(name))
    if lost:
        logger.warning(
            "adapter %s holds no ranges of %d simulated modules (%s, …), which keep the base "
            "model's: it was trained on other hardware, digitally, or without aixsim",
            adapter,
            len(lost),
            lost[0].removesuffix(_SUFFIX),
        )
    for name in own.keys() & saved.keys():
        if saved[name].shape != own[name].shape:
            raise UserError(
                f"adapter {adapter}: {name}: got shape {list(saved[name].shape)}; expected "
                f"{list(own[name].shape)}, as the base model's hardware has"
            )
        own[name].copy_(saved[name])


def _ranges_of(model: nn.Module) -> dict[str, Tensor]:
    """The ranges of simulated modules, under their present names: adapters wrap some of them."""
    state = state_of(model)
    ours = {id(m) for m in state.modules.values()} if state is not None else set()
    found: dict[str, Any] = {n: m for n, m in model.named_modules() if id(m) in ours}
    return {
        f"{name.removeprefix('_orig_mod.')}.{own}": ranges
        for name, module in found.items()
        for own, ranges in module.range_buffers().items()
    }


def _plain_name(name: str) -> str:
    """A module's name in a model without adapters; which ones are wrapped differs between files."""
    name = re.sub(r"^(base_model\.|model\.)*", "", name)
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _active_adapters(model: Any) -> list[str]:
    # a property of PEFT's models, a method of transformers'
    active: Any = model.active_adapters
    if callable(active):
        active = active()
    return list(active)
