"""Simulated hardware as a transformers "quantization method", so that every loader restores it.

transformers calls a quantizer while it builds a model, before the weights are read. Ours puts the
simulated modules in, and weights and ranges then come out of the same safetensors files. One
method, `aixsim`, serves all paradigms: config.json holds the transform config itself.
"""

import copy
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from aixsim_kernels import empty_ranges
from transformers.quantizers.base import HfQuantizer
from wrapt import wrap_function_wrapper

from aixsim_cli.errors import UserError
from aixsim_cli.models.hf.config import METHOD, AixsimConfig, describes_transform
from aixsim_cli.transforms.lora import add_lora
from aixsim_cli.transforms.state import state_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        # not at the top: this file is imported while transformers is
        from aixsim_cli.models.hf.simulate import finish_layout, simulate, tell

        model.config.quantization_config._is_loading = False
        # bfloat16 cannot hold 256 levels of an arbitrary range
        kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
        model._keep_in_fp32_modules_strict = {*kept, "ranges"}
        if self.quantization_config.modules is None or self.quantization_config.dequantize:
            # another hardware than the folder's: no word of ranges that only one of them has
            for kind in ("missing", "unexpected"):
                ignored = getattr(model, f"_keys_to_ignore_on_load_{kind}") or ()
                setattr(model, f"_keys_to_ignore_on_load_{kind}", {*ignored, r"\.ranges$"})
        config = self.quantization_config.transform_config
        if config is None:
            return
        _, report = simulate(model, config)
        if self.quantization_config.modules is None:
            # another hardware than the folder's, whose own patterns were told of once
            tell(report)
        if config.uses_lora and self.quantization_config.modules is not None:
            # saved in the middle of a run, its updates not merged yet
            finish_layout(model)
            add_lora(model)

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        from aixsim_cli.models.hf.simulate import finish_layout

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
            module.reset_record()
            for own, ranges in module.range_buffers().items():
                # buffers that no file holds come out of transformers as uninitialised memory
                if not getattr(ranges, "_is_hf_initialized", False):
                    missing.append(f"{name}.{own}")
                    with torch.no_grad():
                        ranges.copy_(empty_ranges(len(ranges), device=ranges.device))
        if saved is not None and missing:
            raise UserError(
                f"quantization_config: the model's files lack {', '.join(missing[:4])}; expected a "
                "folder as it was saved, ranges included"
            )
        self.quantization_config.modules = len(modules)


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
        if describes_transform(config):
            raise UserError(
                f"{type(config).__name__}: quantization_config: got {METHOD}, and a model built "
                "from a config alone would be digital under that name; expected `from_pretrained` "
                "of the folder, or `del config.quantization_config` and `transform_hf_model` on "
                "what is built"
            )
        wrapped(*args, **kwargs)

    wrap_function_wrapper(modeling, "PreTrainedModel.__init__", build)
