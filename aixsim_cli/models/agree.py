"""Whether a torchtitan Llama and a transformers Llama are one and the same simulated model.

The logits of the two, each run by itself, do not tell. Heads lie in another order, so noise falls
on other channels, and one rounding that falls the other way moves all that follows. So they run in
step, noise on: the same modules have to be simulated; each has to compute the same of the same
inputs; each has to be given the same inputs; and with the simulated outputs of the one handed to
the other, the logits have to agree.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torchtitan.models.attention import ScaledDotProductAttentionWrapper
from torchtitan.models.llama3.model.args import TransformerModelArgs
from torchtitan.models.llama3.model.model import Transformer
from transformers import PreTrainedModel

from aixsim_cli.errors import RunError
from aixsim_cli.models.names import hf_name
from aixsim_cli.models.titan.sites import StateDictAdapter, titan_sites
from aixsim_cli.transforms.protocol import Site
from aixsim_cli.transforms.state import state_of

# of the largest value of a tensor
TOLERANCE = 1e-4
# what is handed on is cut to this: a flipped exponent bit makes numbers that no softmax survives
_LARGEST = 10.0
_ATTENTION_OPTIONS = ("attn_mask", "scale", "is_causal")


@dataclass
class _Place:
    """A simulated place: torchtitan's module, transformers', and what passes through them."""

    site: Site
    titan: nn.Module
    other: nn.Module
    index: Tensor | None  # of torchtitan's channels in transformers' order; None = the same order
    seed: int
    inputs: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    output: Tensor | None = None


@torch.no_grad()
def difference_in_step(
    args: TransformerModelArgs, titan: Transformer, other: PreTrainedModel, tokens: Tensor
) -> float:
    """Run both models in step.

    Args:
        args: of the torchtitan model.
        titan: with its hardware, in evaluation mode.
        other: the same model in transformers, likewise.
        tokens: (1, L) int64.

    Returns:
        The largest difference of a logit.

    Raises:
        RunError: they simulate other modules, or a module computes something else.
    """
    places = _places(args, titan, other)
    for model in (titan, other):
        state = state_of(model)
        if state is not None:
            state.begin_step(0)
    handles = []
    with torch.random.fork_rng(devices=[]):
        for place in places:
            handles.append(place.titan.register_forward_pre_hook(partial(_seeded, place)))
            handles.append(place.titan.register_forward_hook(_recorded(place), with_kwargs=True))
            handles.append(place.other.register_forward_hook(_followed(place), with_kwargs=True))
        try:
            expected = titan(tokens)
            return _difference(expected, other(tokens, use_cache=False).logits)
        finally:
            for handle in handles:
                handle.remove()


def _places(args: TransformerModelArgs, titan: Transformer, other: PreTrainedModel) -> list[_Place]:
    here: dict[str, Site] = {}
    there: dict[str, Site] = {}
    for site in titan_sites(titan):
        if _is_simulated(_at(titan, site.name, site)):
            here[site.hf_name] = site
        if _is_simulated(_at(other, site.hf_name, site)):
            there[site.hf_name] = site
    if here.keys() != there.keys():
        lone = [
            f"{name} in {'torchtitan' if name in here else 'transformers'} alone"
            for name in sorted(here.keys() ^ there.keys())
        ]
        more = f" and {len(lone) - 4} more" if len(lone) > 4 else ""
        raise RunError(
            f"the converted model simulates other modules than its source: {', '.join(lone[:4])}"
            f"{more}; nothing was written"
        )
    orders = _orders(args)
    return [
        _Place(
            site,
            _at(titan, site.name, site),
            _at(other, name, site),
            orders.get(site.name.rsplit(".", 1)[-1]),
            seed,
        )
        for seed, (name, site) in enumerate(here.items())
    ]


def _at(model: nn.Module, name: str, site: Site) -> Any:
    module = model.get_submodule(name)
    return getattr(module, "inner_attention", None) if site.kind == "attention" else module


def _is_simulated(module: nn.Module | None) -> bool:
    return module is not None and type(module) not in (nn.Linear, ScaledDotProductAttentionWrapper)


def _orders(args: TransformerModelArgs) -> dict[str, Tensor]:
    """Where transformers has torchtitan's query and key channels: the adapter's own permutation."""
    head = args.dim // args.n_heads
    widths = {"wq": args.dim, "wk": head * (args.n_kv_heads or args.n_heads)}
    orders = {}
    for name, width in widths.items():
        key = f"layers.0.attention.{name}.weight"
        rows = torch.arange(width, dtype=torch.int32)[:, None].repeat(1, args.dim)
        moved = StateDictAdapter(args).to_hf({key: rows})[hf_name(key)]
        orders[name] = moved[:, 0].long()
    return orders


def _seeded(place: _Place, module: nn.Module, inputs: Any) -> None:
    # for a paradigm that draws from torch's own generator
    torch.manual_seed(place.seed)


def _recorded(place: _Place) -> Callable[..., Tensor]:
    def hook(module: nn.Module, inputs: Any, options: dict[str, Any], output: Tensor) -> Tensor:
        place.inputs, place.options, place.output = inputs, options, output
        return _tame(output)

    return hook


def _followed(place: _Place) -> Callable[..., Tensor]:
    def hook(module: nn.Module, inputs: Any, options: dict[str, Any], output: Tensor) -> Tensor:
        if place.output is None:
            raise RunError(f"{place.site.name}: is not used in torchtitan; nothing was written")
        given = _digital(place, place.inputs, place.options)
        _demand(place, "is given other inputs", given, _digital(place, inputs, options))
        _demand(place, "computes something else", place.output, _again(place))
        handed = _tame(place.output)
        return handed if place.index is None else handed[..., place.index]

    return hook


def _again(place: _Place) -> Tensor:
    """What transformers' module makes of torchtitan's inputs, and of its channels' order."""
    module, titan = place.other, place.titan
    own = module._parameters.get("weight")
    if own is not None:
        module._parameters["weight"] = titan._parameters["weight"]
    torch.manual_seed(place.seed)
    try:
        # not by a call, which would come back to the hook
        return module.forward(*place.inputs, **place.options)
    finally:
        if own is not None:
            module._parameters["weight"] = own


def _digital(place: _Place, inputs: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """What tells inputs apart whatever the order of channels: an attention's digital result."""
    if place.site.kind == "linear":
        return inputs[0]
    query, key, value = inputs
    given = {name: options[name] for name in _ATTENTION_OPTIONS if name in options}
    grouped = query.shape[1] != key.shape[1]
    settings: dict[str, Any] = {"is_causal": True} | given
    return scaled_dot_product_attention(query, key, value, enable_gqa=grouped, **settings)


def _demand(place: _Place, what: str, expected: Tensor, found: Tensor) -> None:
    scale = max(1.0, torch.nan_to_num(expected, 0.0, 0.0, 0.0).abs().max().item())
    difference = _difference(expected, found)
    if not difference <= TOLERANCE * scale:
        raise RunError(
            f"the converted model is another one: {place.site.hf_name} {what} than "
            f"{place.site.name} (by {difference:.2e}, of values up to {scale:.2e}); "
            "nothing was written"
        )


def _difference(a: Tensor, b: Tensor) -> float:
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, (a - b).abs()).max().item()


def _tame(output: Tensor) -> Tensor:
    return torch.nan_to_num(output, 0.0, _LARGEST, -_LARGEST).clamp(-_LARGEST, _LARGEST)
