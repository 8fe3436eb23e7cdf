"""Transform-aware training of language models: the `aixsim` command and the library under it.

After `import aixsim_cli`, transformers' `from_pretrained` loads the folders that this package
writes, simulated hardware included.
"""

from wrapt import register_post_import_hook

__version__ = "0.1.0"

# torchtitan looks for its device while it is imported
register_post_import_hook("aixsim_cli.run.device:prepare", "torchtitan.tools.logging")
# when transformers is imported, not before: `aixsim --help` must not wait for it
register_post_import_hook(
    "aixsim_cli.models.hf.quantizer:register_quantizer", "transformers.quantizers.auto"
)
register_post_import_hook(
    "aixsim_cli.models.hf.quantizer:register_guard", "transformers.modeling_utils"
)
register_post_import_hook(
    "aixsim_cli.models.hf.strict:register_model_type",
    "transformers.models.auto.configuration_auto",
)
register_post_import_hook("aixsim_cli.models.hf.callback:register_callback", "transformers.trainer")
register_post_import_hook(
    "aixsim_cli.models.hf.adapters:register_adapters", "peft.utils.save_and_load"
)
register_post_import_hook("aixsim_cli.models.hf.adapters:register_hotswap", "peft.utils.hotswap")
