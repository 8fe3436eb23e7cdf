"""A `model_type` of its own for a folder that must not be loaded without its simulated hardware.

transformers ignores a quantization method that it does not know, with a warning: without aixsim an
optical folder loads as a digital model. A strict folder says `model_type: aixsim` instead, which
transformers refuses by name. With aixsim it is the model it was made of.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

MODEL_TYPE = "aixsim"
BASE_KEY = "base_model_type"


class StrictConfig(PreTrainedConfig):
    """Reads a strict config.json and gives back the config of the model underneath."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        from transformers import CONFIG_MAPPING

        base = config_dict[BASE_KEY]
        plain = {k: v for k, v in config_dict.items() if k != BASE_KEY} | {"model_type": base}
        return CONFIG_MAPPING[base].from_dict(plain, **kwargs)


def make_strict(folder: Path) -> None:
    """Give a saved folder the model type `aixsim`; a strict one stays as it is."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config["model_type"] == MODEL_TYPE:
        return
    config |= {"model_type": MODEL_TYPE, BASE_KEY: config["model_type"]}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def register_model_type(auto: ModuleType) -> None:
    """Make the model type known to transformers.

    Args:
        auto: the module `transformers.models.auto.configuration_auto`.
    """
    auto.AutoConfig.register(MODEL_TYPE, StrictConfig)
