"""Put a transform into a transformers model."""

from torch import nn
from transformers import PreTrainedModel

from aixsim_cli.backends.hf import attention
from aixsim_cli.transforms.apply import TransformReport, apply_transform
from aixsim_cli.transforms.config import TransformConfig
from aixsim_cli.transforms.protocol import Site
from aixsim_cli.transforms.state import TransformState


def hf_sites(model: PreTrainedModel) -> list[Site]:
    """Every linear and attention of a transformers model, in its order."""
    head = model.get_output_embeddings()
    sites = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            sites.append(Site(name, name, "linear", is_head=module is head))
        elif type(module).__name__.endswith("Attention") and hasattr(module, "is_causal"):
            sites.append(Site(name, name, "attention"))
    return sites


def transform_hf_model(
    model: PreTrainedModel, config: TransformConfig
) -> tuple[TransformState, TransformReport]:
    """Simulate a transformers model's linears and attentions, in place.

    Args:
        model: on a real device.
        config: what to simulate.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    state, report = apply_transform(model, config, hf_sites(model))
    if any(name.endswith("inner_attention") for name in state.modules):
        attention.register()
        model.set_attn_implementation(attention.ATTENTION_NAME)
    return state, report
