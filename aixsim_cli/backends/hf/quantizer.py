"""Simulated hardware as a transformers "quantization method", so that every loader restores it.

transformers calls a quantizer while it builds a model, before the weights are read. Ours puts the
simulated modules in, and weights and ranges then come out of the same safetensors files. One
method, `aixsim`, serves all paradigms: config.json holds the transform config itself.
"""

import copy
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin
from wrapt import wrap_function_wrapper

from aixsim_cli.errors import UserError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "aixsim"
SCHEMA_VERSION = 1


class AixsimConfig(QuantizationConfigMixin):
    """The `quantization_config` of a simulated model.

    Args:
        transform: a transform config, as its file has it, or with its patterns as a list.
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
        transform: Mapping[str, Any],
        modules: int | None = None,
        dequantize: bool = False,
        schema_version: int = SCHEMA_VERSION,
        quant_method: str = METHOD,
    ) -> None:
        from aixsim_cli.transforms.config import parse_transform, require_paradigms

        if schema_version != SCHEMA_VERSION:
            raise UserError(
                f"quantization_config: schema_version: got {shown(schema_version)}; this version "
                f"of aixsim reads {SCHEMA_VERSION}: expected the version that wrote it"
            )
        self.transform = _patterns(transform, as_list=False)
        if not dequantize:
            require_paradigms(self.transform, source="quantization_config")
            parse_transform(self.transform, source="quantization_config: transform", saved=True)
        self.modules = modules
        self.dequantize = dequantize
        self.schema_version = schema_version
        self.quant_method = quant_method  # pyright: ignore[reportAttributeAccessIssue]
        self._is_loading = False

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds; its keys get sorted, and the first pattern that matches wins."""
        fields = super().to_dict() | {"transform": _patterns(self.transform, as_list=True)}
        return {k: v for k, v in fields.items() if not k.startswith("_")}


class AixsimQuantizer(HfQuantizer):
    """Builds the simulated modules of a model that is being loaded, and sets their state."""

    quantization_config: AixsimConfig

    @property
    def is_trainable(self) -> bool:
        """The weights stay floating point numbers; training goes on."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """No adapter is needed."""
        return True

    def is_serializable(self) -> bool:
        """`save_pretrained` writes weights and ranges."""
        return True

    def update_attn_implementation(self, config: Any) -> Any:
        """Called last before the model is built, whose simulated modules then follow."""
        # a copy: the caller's would keep the mark, were the model never built
        config.quantization_config = copy.copy(config.quantization_config)
        config.quantization_config._is_loading = True
        return config

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        from aixsim_cli.backends.hf.apply import finish_layout, simulate, tell
        from aixsim_cli.transforms.config import parse_transform
        from aixsim_cli.transforms.lora import add_lora

        model.config.quantization_config._is_loading = False
        # bfloat16 cannot hold 256 levels of an arbitrary range
        kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
        model._keep_in_fp32_modules_strict = {*kept, "ranges"}
        if self.quantization_config.modules is None or self.quantization_config.dequantize:
            # another hardware than the folder's: no word of ranges that only one of them has
            for kind in ("missing", "unexpected"):
                ignored = getattr(model, f"_keys_to_ignore_on_load_{kind}") or ()
                setattr(model, f"_keys_to_ignore_on_load_{kind}", {*ignored, r"\.ranges$"})
        if self.quantization_config.dequantize:
            return
        mapping = self.quantization_config.transform
        config = parse_transform(mapping, source="quantization_config: transform", saved=True)
        _, report = simulate(model, config)
        if self.quantization_config.modules is None:
            # another hardware than the folder's, whose own patterns were told of once
            tell(report)
        if config.uses_lora and self.quantization_config.modules is not None:
            # saved in the middle of a run, its updates not merged yet
            finish_layout(model)
            add_lora(model)

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        from aixsim_cli.backends.hf.apply import finish_layout
        from aixsim_cli.transforms.state import state_of

        if self.quantization_config.dequantize:
            return
        finish_layout(model)
        state = state_of(model)
        assert state is not None
        modules = state.modules
        saved = self.quantization_config.modules
        if saved is not None and saved != len(modules):
            raise UserError(
                f"quantization_config: the model was saved with {saved} simulated modules, and "
                f"what config.json describes now has {len(modules)}; expected its sizes and the "
                "transformers version as they were when it was saved"
            )
        missing = []
        for name, module in modules.items():
            # buffers that no file holds come out of transformers as uninitialised memory
            if not len(module.ranges) or getattr(module.ranges, "_is_hf_initialized", False):
                module.reset_record()
            else:
                missing.append(f"{name}.ranges")
                module.reset_state()
        if saved is not None and missing:
            raise UserError(
                f"quantization_config: the model's files lack {', '.join(missing[:4])}; expected a "
                "folder as it was saved, ranges included"
            )
        self.quantization_config.modules = len(modules)


def _patterns(transform: Any, *, as_list: bool) -> Any:
    """A transform config with its patterns as a list of pairs, or as the mapping that it was."""
    from aixsim_cli.transforms.config import LIST_KEY

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


def register_quantizer(auto: ModuleType) -> None:
    """Make the method known to transformers.

    Args:
        auto: the module `transformers.quantizers.auto`.
    """
    auto.register_quantization_config(METHOD)(AixsimConfig)
    auto.register_quantizer(METHOD)(AixsimQuantizer)


def register_guard(modeling: ModuleType) -> None:
    """Refuse to build a digital model under a config that describes simulated hardware.

    Args:
        modeling: the module `transformers.modeling_utils`.
    """

    def build(wrapped: Any, _: Any, args: Any, kwargs: Any) -> None:
        config = args[0] if args else kwargs.get("config")
        if _describes_hardware(config):
            raise UserError(
                f"{type(config).__name__}: quantization_config: got {METHOD}, and a model built "
                "from a config alone would be digital under that name; expected `from_pretrained` "
                "of the folder, or `del config.quantization_config` and `transform_hf_model` on "
                "what is built"
            )
        wrapped(*args, **kwargs)

    wrap_function_wrapper(modeling, "PreTrainedModel.__init__", build)


def _describes_hardware(config: Any) -> bool:
    section = getattr(config, "quantization_config", None)
    fields = section if isinstance(section, Mapping) else vars(section) if section else {}
    is_ours = fields.get("quant_method") == METHOD
    return is_ours and not (fields.get("dequantize") or fields.get("_is_loading"))
