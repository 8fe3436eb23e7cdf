"""Put a transform into a transformers model that exists: the call for programs of one's own."""

from typing import Any

from transformers import PreTrainedModel

from aixsim_cli.models.hf.config import METHOD, AixsimConfig
from aixsim_cli.models.hf.quantizer import AixsimQuantizer
from aixsim_cli.models.hf.simulate import finish_layout, simulate, tell
from aixsim_cli.transforms.config import TransformConfig
from aixsim_cli.transforms.plan import TransformReport
from aixsim_cli.transforms.state import TransformState


def transform_hf_model(
    model: PreTrainedModel, config: TransformConfig
) -> tuple[TransformState, TransformReport]:
    """Simulate a transformers model's linears and attentions, in place.

    Works on any architecture, causal or not, with or without a head. `save_pretrained` then writes
    a folder that `from_pretrained` loads with its simulated hardware.

    Args:
        model: on a real device.
        config: what to simulate.

    Raises:
        ConfigError: a pattern matches nothing, or names an attention that is out of reach.
    """
    state, report = simulate(model, config)
    tell(report)
    finish_layout(model)
    _mark(model, AixsimConfig(config, modules=len(state.modules)))
    return state, report


def _mark(model: Any, saved: AixsimConfig) -> None:
    """Make a model look as if it had been loaded with its quantizer."""
    model.config.quantization_config = saved
    model.hf_quantizer = AixsimQuantizer(saved)
    model.quantization_method = METHOD
    model.is_quantized = True
