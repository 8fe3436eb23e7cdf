"""Low-rank updates of simulated weights (LoRA, arXiv 2106.09685).

The update is part of the weight that the hardware is given, f(x, W + (alpha / r) B A): what would
be programmed into the device is the sum. So it works for every paradigm: a parametrization of
`weight` (`torch.nn.utils.parametrize`), which the simulated module reads like any other.
"""

import logging
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from aixsim_cli.errors import UserError
from aixsim_cli.transforms.protocol import Lora
from aixsim_cli.transforms.state import noise_stream, state_of

logger = logging.getLogger("aixsim")


class LowRankUpdate(nn.Module):
    """W -> W + (alpha / r) B A; A (r, K) random, B (N, r) zero, both float32.

    Args:
        module: the simulated linear it is for, weight (N, K).
        lora: rank and scale.
        name: of the module; A is drawn from it, the same on every rank.
    """

    simulated_class: Any

    def __init__(self, module: Any, lora: Lora, name: str) -> None:
        super().__init__()
        stored = module._parameters["weight"]
        self.transposed = getattr(module, "stores_transposed", False)
        rows, columns = stored.T.shape if self.transposed else stored.shape
        generator = torch.Generator().manual_seed(noise_stream(0, name))
        # as torch initialises a linear
        bound = columns**-0.5
        # on a real device even where the model is being built on meta
        a = torch.empty(lora.r, columns, device="cpu").uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(a.to(stored.device))
        self.B = nn.Parameter(torch.zeros(rows, lora.r, device=stored.device))
        self.scale = lora.alpha / lora.r

    def forward(self, stored: Tensor) -> Tensor:
        """The parameter as it is stored -> the weight (N, K), in the parameter's type."""
        weight = stored.T if self.transposed else stored
        # what is trained is what is merged, under autocast too
        with torch.autocast(weight.device.type, enabled=False):
            return (weight + self.scale * (self.B @ self.A)).to(weight.dtype)


def add_lora(model: nn.Module) -> list[str]:
    """Freeze a model and give the simulated linears the updates that its config asks for.

    The model computes what it computed before, as B is zero. Its state dict names a weight
    `<module>.parametrizations.weight.original`, until `merge_lora`. A linear that has its update
    already, from a checkpoint within a run, keeps it.

    Args:
        model: with its transform applied and its weights in place; or digital.

    Returns:
        Names of the linears; empty where the config has no `lora`, and then nothing is changed.

    Raises:
        UserError: a weight is shared with another module.
    """
    state = state_of(model)
    wanted: dict[str, Lora] = {} if state is None else state.lora
    loaded = {name: u for name in wanted if (u := _updated(model.get_submodule(name))) is not None}
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    for name in wanted.keys() - loaded.keys():
        if uses[id(model.get_submodule(name)._parameters["weight"])] > 1:
            raise UserError(
                f"lora: {name}: its weight is another module's too, which an update would change; "
                "expected a transform config that leaves it digital"
            )
    _tell_wide(model, {name: lora for name, lora in wanted.items() if name not in loaded})
    if wanted:
        model.requires_grad_(False)
    for name, lora in wanted.items():
        module = model.get_submodule(name)
        if name in loaded:
            loaded[name][0].requires_grad_(True)
            continue
        update = LowRankUpdate(module, lora, name)
        if update.transposed:
            # the update does what the class that shows the weight transposed did
            update.simulated_class = type(module)
            module.__class__ = update.simulated_class.__base__
        # unsafe: a transposed parameter changes its shape, and meta has no autocast to switch off
        unsafe = update.transposed or update.A.is_meta
        parametrize.register_parametrization(module, "weight", update, unsafe=unsafe)
    return list(wanted)


def _tell_wide(model: nn.Module, wanted: dict[str, Lora]) -> None:
    """Say where an update has more ranks than its weight: it costs more and can do no more."""
    shapes = {name: model.get_submodule(name)._parameters["weight"] for name in wanted}
    wide = [
        f"{name} {tuple(weight.shape)}"
        for name, weight in shapes.items()
        if weight is not None and wanted[name].r > min(weight.shape)
    ]
    if wide:
        logger.warning(
            "lora: r: got %d, more than the rank of %d of the weights, %s for one",
            max(lora.r for lora in wanted.values()),
            len(wide),
            wide[0],
        )


@torch.no_grad()
def merge_lora(model: nn.Module) -> list[str]:
    """Put the updates into the weights: the same outputs, from an ordinary model.

    Its parameters can be trained again. To keep the updates trainable, merge a deep copy.

    Args:
        model: after `add_lora`, or any other, which is left as it is.

    Returns:
        Names of the linears.
    """
    merged = []
    for name, module in model.named_modules():
        updated = _updated(module)
        if updated is None:
            continue
        update, stored = updated[0], updated.original
        weight = update(stored)
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        stored.copy_(weight.T if update.transposed else weight)
        if update.transposed:
            module.__class__ = update.simulated_class
        merged.append(name)
    if merged:
        model.requires_grad_(True)
    return merged


def _updated(module: nn.Module) -> Any:
    """The stored weight and its update, a `ParametrizationList`; None without an update."""
    lists: Any = getattr(module, "parametrizations", {})
    if "weight" not in lists:
        return None
    return lists["weight"] if isinstance(lists["weight"][0], LowRankUpdate) else None
