"""torchtitan's module names and Hugging Face's for the same model, and its state dict in both.

The pairs of names come from torchtitan's own adapter; only what a transform adds is handled here.
"""

import re
from typing import Any

from torch import nn
from torchtitan.models.llama3.model.args import TransformerModelArgs
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter

from aixsim_cli.transforms.protocol import Site

_ATTENTION = re.compile(r"(layers\.\d+)\.attention")


class StateDictAdapter(Llama3StateDictAdapter):
    """torchtitan's Llama adapter, which also carries the buffers of a transform.

    Weights of wq and wk are permuted between the two RoPE layouts by the parent class; ranges are
    per tensor and need no permutation, only their name changes.
    """

    def __init__(self, model_args: TransformerModelArgs, hf_assets_path: str | None = None) -> None:
        # the parent looks for an index of weights in that folder and warns when there is none
        super().__init__(model_args, None)

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """torchtitan names and layouts -> Hugging Face's."""
        weights, buffers = _split(state_dict)
        renamed = {hf_name(key): value for key, value in buffers.items()}
        return super().to_hf(weights) | renamed

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        """Hugging Face names and layouts -> torchtitan's."""
        weights, buffers = _split(hf_state_dict)
        renamed = {titan_name(key): value for key, value in buffers.items()}
        return super().from_hf(weights) | renamed


def _split(state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    weights = {key: value for key, value in state_dict.items() if key.endswith(".weight")}
    return weights, {key: value for key, value in state_dict.items() if key not in weights}


def _pairs() -> list[tuple[str, str]]:
    adapter = Llama3StateDictAdapter.__new__(Llama3StateDictAdapter)
    Llama3StateDictAdapter.__init__(adapter, None, None)  # pyright: ignore[reportArgumentType]
    pairs = [
        (titan.removesuffix(".weight"), hf.removesuffix(".weight"))
        for hf, titan in adapter.from_hf_map.items()
        if titan is not None
    ]
    return [*pairs, ("layers.{}.attention", "model.layers.{}.self_attn")]


_PAIRS = _pairs()


def hf_name(titan: str) -> str:
    """`layers.0.attention.wq[.…]` -> `model.layers.0.self_attn.q_proj[.…]`.

    Raises:
        KeyError: no module of the model has that name.
    """
    return _rename(titan, _PAIRS)


def titan_name(hf: str) -> str:
    """The inverse of `hf_name`."""
    return _rename(hf, [(b, a) for a, b in _PAIRS])


def _rename(name: str, pairs: list[tuple[str, str]]) -> str:
    layer = re.search(r"\d+", name)
    index = layer.group() if layer else ""
    # the longest prefix wins: an attention's linear before the attention itself
    for old, new in sorted(pairs, key=lambda pair: -len(pair[0])):
        prefix = old.format(index)
        if name == prefix or name.startswith(f"{prefix}."):
            return new.format(index) + name[len(prefix) :]
    raise KeyError(name)


def titan_sites(model: nn.Module) -> list[Site]:
    """Every linear and attention of a torchtitan Llama, in the order of the model."""
    sites = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            sites.append(Site(name, hf_name(name), "linear", is_head=name == "output"))
        elif _ATTENTION.fullmatch(name):
            sites.append(Site(name, hf_name(name), "attention"))
    return sites
