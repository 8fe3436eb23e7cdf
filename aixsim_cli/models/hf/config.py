"""The `quantization_config` of a simulated model: its transform config, within config.json."""

from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from aixsim_cli.errors import UserError, shown
from aixsim_cli.transforms.config import LIST_KEY, TransformConfig
from aixsim_cli.transforms.read import parse_transform, require_paradigms

METHOD = "aixsim"
SCHEMA_VERSION = 1


class AixsimConfig(QuantizationConfigMixin):
    """The `quantization_config` of a simulated model.

    Args:
        transform: a transform config, or its mapping, as a file has it or with its patterns as a
            list; the attribute is the mapping.
        modules: how many modules were simulated when the model was saved; None = not saved with it.
        dequantize: load the weights digitally, and leave the ranges where they are.
        schema_version: of this section.
        quant_method: always "aixsim".

    Raises:
        UserError: written by a newer version, or the package of its paradigm is missing.
        ConfigError: the transform config is wrong.
    """

    def __init__(
        self,
        transform: TransformConfig | Mapping[str, Any],
        modules: int | None = None,
        dequantize: bool = False,
        schema_version: int = SCHEMA_VERSION,
        quant_method: str = METHOD,
    ) -> None:
        if schema_version != SCHEMA_VERSION:
            raise UserError(
                f"quantization_config: schema_version: got {shown(schema_version)}; this version "
                f"of aixsim reads {SCHEMA_VERSION}: expected the version that wrote it"
            )
        self._config = transform if isinstance(transform, TransformConfig) else None
        mapping = transform.mapping if isinstance(transform, TransformConfig) else transform
        self.transform = _patterns(mapping, as_list=False)
        if not dequantize and self._config is None:
            require_paradigms(self.transform, source="quantization_config")
            self._config = parse_transform(
                self.transform, source="quantization_config: transform", saved=True
            )
        self.modules = modules
        self.dequantize = dequantize
        self.schema_version = schema_version
        self.quant_method = quant_method  # pyright: ignore[reportAttributeAccessIssue]
        self._is_loading = False

    @property
    def transform_config(self) -> TransformConfig | None:
        """The transform of the model; None where it is loaded digitally."""
        return None if self.dequantize else self._config

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds; its keys get sorted, and the first pattern that matches wins."""
        fields = super().to_dict() | {"transform": _patterns(self.transform, as_list=True)}
        return {k: v for k, v in fields.items() if not k.startswith("_")}


def _patterns(transform: Any, *, as_list: bool) -> Any:
    """A transform config with its patterns as a list of pairs, or as the mapping that it was."""
    if not isinstance(transform, Mapping):
        return transform
    result = dict(transform)
    layers = result.get("layer_name_to_config")
    if as_list and isinstance(layers, Mapping) and len(layers) > 1:
        result["layer_name_to_config"] = [list(pair) for pair in layers.items()]
    elif not as_list and isinstance(layers, list):
        result["layer_name_to_config"] = dict(layers)
    if isinstance(result.get(LIST_KEY), list):
        result[LIST_KEY] = [_patterns(part, as_list=as_list) for part in result[LIST_KEY]]
    return result


def transform_of(model: Any) -> TransformConfig | None:
    """The transform of a transformers model, adapters around it or not; None for a digital one."""
    section = getattr(getattr(model, "config", None), "quantization_config", None)
    return section.transform_config if isinstance(section, AixsimConfig) else None


def describes_transform(config: Any) -> bool:
    """Whether a model's config names our method, and means it: not while a model is loaded."""
    section = getattr(config, "quantization_config", None)
    fields = section if isinstance(section, Mapping) else vars(section) if section else {}
    is_ours = fields.get("quant_method") == METHOD
    return is_ours and not (fields.get("dequantize") or fields.get("_is_loading"))
