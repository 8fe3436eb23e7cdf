"""Our recipe for pretraining: what generate-cfg writes where nothing else is asked for.

The one place of these values. Imports no torch, so that `--help` can show them at once.
"""

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from aixsim_cli.config.pretrain import PretrainConfig


def follow(config: "PretrainConfig") -> "PretrainConfig":
    """Set a config to the recipe, in place; what follows from a model's size is set later.

    Returns:
        The config.
    """
    config.model.name = "aixsim"
    config.model.hf_assets_path = "HuggingFaceTB/cosmo2-tokenizer"

    training = config.training
    training.dataset = "fineweb-edu"
    training.local_batch_size = 8
    training.seq_len = 2048
    training.max_norm = 1.0
    training.mixed_precision_param = "bfloat16"

    layout = config.parallelism
    layout.data_parallel_replicate_degree = 1
    layout.data_parallel_shard_degree = -1
    layout.tensor_parallel_degree = 1

    optimizer = config.optimizer
    optimizer.name = "AdamW"
    optimizer.lr = 1e-4
    optimizer.beta1, optimizer.beta2 = 0.9, 0.95
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.1
    config.lr_scheduler.decay_type = "cosine"
    config.lr_scheduler.min_lr_factor = 0.1

    checkpoint = config.checkpoint
    checkpoint.enable = True
    checkpoint.interval = 500
    checkpoint.keep_latest_k = 3
    checkpoint.last_save_model_only = False

    config.compile.enable = False
    config.metrics.log_freq = 10
    config.debug.seed = 42
    return config


class _Blank:
    """Has any attribute: stands for the schema, whose import takes seconds."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        section = _Blank()
        setattr(self, name, section)
        return section


RECIPE = follow(cast("PretrainConfig", _Blank()))


def default_dump_folder(config: "PretrainConfig") -> str:
    """Where a run goes: outputs/<flavor>, with the paradigm, and a seed that is not the default.

    A folder has one run: those of several seeds do not meet in one.
    """
    hardware = config.transform_config
    paradigm = hardware and hardware.name
    seed = f"seed{config.debug.seed}" if config.debug.seed != RECIPE.debug.seed else None
    parts = [part for part in (config.model.flavor, paradigm, seed) if part]
    return f"outputs/{'-'.join(map(str, parts))}"
