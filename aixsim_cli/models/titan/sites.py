"""A torchtitan Llama's sites, and its state dict under Hugging Face's names and back.

Weights are torchtitan's own adapter's; only what a transform adds is handled here.
"""

import re
from typing import Any

from torch import nn
from torchtitan.models.llama3.model.args import TransformerModelArgs
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter

from aixsim_cli.models.names import hf_name, titan_name
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


def titan_sites(model: nn.Module) -> list[Site]:
    """Every linear and attention of a torchtitan Llama, in the order of the model."""
    sites = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            sites.append(Site(name, hf_name(name), "linear", is_head=name == "output"))
        elif _ATTENTION.fullmatch(name):
            sites.append(Site(name, hf_name(name), "attention"))
    return sites
