"""The pretraining config: torchtitan's sections, and three of ours."""

# ruff: noqa: RUF009 (fields that a function makes)

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torchtitan.config import JobConfig, job_config

from aixsim_cli.config.flavors import FLAVORS, find_flavor
from aixsim_cli.data.sources import SOURCES
from aixsim_cli.errors import ConfigError, UserError, nearest
from aixsim_cli.files import write_atomic
from aixsim_cli.run import device
from aixsim_cli.run.nonfinite import OnNonfinite
from aixsim_cli.settings import overrides
from aixsim_cli.settings.build import build
from aixsim_cli.settings.document import PRETRAIN, Document, check_purpose, load_yaml
from aixsim_cli.settings.formats import dump_yaml
from aixsim_cli.transforms.choice import DIGITAL, KEEP_OWN, Choice
from aixsim_cli.transforms.config import TransformConfig
from aixsim_cli.transforms.read import parse_transform

CONVERTER_NAME = "aixsim"
# in every checkpoint, the config it was trained with
CONFIG_FILE = "config.yaml"
OPTIMIZERS = ("Adam", "AdamW")
# torchtitan imports whatever module these name
CODE_KEYS = ("experimental.custom_import", "experimental.custom_args_module")

_MOST_STEPS = 2**31 - 1  # a C int, in torch and datasets
# what a text may be
_CHOICES: dict[str, Collection[str]] = {
    "model.name": FLAVORS,
    "training.dataset": SOURCES,
    "optimizer.name": OPTIMIZERS,
}
# what a number may be, and which may; that it is finite is checked for every field
_RANGES: dict[tuple[Callable[[Any], bool], str], tuple[str, ...]] = {
    (lambda value: value > 0, "more than 0"): (
        "training.seq_len",
        "training.local_batch_size",
        "training.max_norm",
        "training.gc_freq",
        "optimizer.lr",
        "optimizer.eps",
        "metrics.log_freq",
        "checkpoint.interval",
        "comm.init_timeout_seconds",
        "comm.train_timeout_seconds",
        "parallelism.data_parallel_replicate_degree",
        "parallelism.tensor_parallel_degree",
        "parallelism.context_parallel_degree",
        "parallelism.pipeline_parallel_degree",
    ),
    (lambda value: value >= 0, "0 or more"): (
        "optimizer.weight_decay",
        "lr_scheduler.warmup_steps",
        "reliability.max_nonfinite",
        "reliability.data_retries",
    ),
    (lambda value: 0 < value <= _MOST_STEPS, f"1 to {_MOST_STEPS:,}"): (
        "training.steps",
        "lr_scheduler.total_steps",
    ),
    (lambda value: 0 <= value < 1, "at least 0 and less than 1"): (
        "optimizer.beta1",
        "optimizer.beta2",
    ),
    (lambda value: 0 <= value <= 1, "0 to 1"): (
        "lr_scheduler.min_lr_factor",
        "lr_scheduler.decay_ratio",
        "activation_checkpoint.memory_budget",
    ),
    (lambda value: value == -1 or value > 0, "-1 or more than 0"): (
        "parallelism.data_parallel_shard_degree",
    ),
    (lambda value: value >= -1, "-1 (the newest) or a step"): ("checkpoint.load_step",),
}


@dataclass
class Reliability:
    """What a run does when something goes wrong (docs/reliability.md)."""

    on_nonfinite: OnNonfinite = "stop"
    """A loss or gradient that is not finite: "stop" the run; "skip" the step; "rollback" to the
    last checkpoint and go on with the data that follow."""
    max_nonfinite: int = 10
    """Steps skipped or rolled back between two checkpoints before the run stops."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """A checkpoint that cannot be written: "stop" the run, or "continue" it."""
    on_other_data: Literal["stop", "continue", "mended"] = "stop"
    """A checkpoint that was trained on other data than the config's: "stop" the run; "continue" it
    with the config's, from their start; or, where a row that could not be read was "mended", go on
    at the same row."""
    data_retries: int = 8
    """Of a failed read of the data, in a row, with a growing pause between them."""


@dataclass
class Budget:
    """What a config's number of steps was computed from."""

    parameters: int = 0
    """Of the model, without the input embedding."""
    tokens: int = 0
    """That the steps consume."""
    num_ranks: int = 0
    """Ranks that the computation assumed; 0 = nothing was assumed."""


def _section(section: Any, meaning: str) -> Any:
    """A field that holds a section of keys; generate-cfg writes its meaning above it."""
    return field(default_factory=section, metadata={"description": meaning})


@dataclass
class PretrainConfig(JobConfig):
    """torchtitan's job config with the transform, the token budget and what to do about faults."""

    job: job_config.Job = _section(
        job_config.Job, "where the run's files go: checkpoints, metrics.jsonl, logs"
    )
    model: job_config.Model = _section(
        job_config.Model,
        "architecture, size, and the tokenizer (a folder, a hub name or `builtin`)",
    )
    training: job_config.Training = _section(
        job_config.Training,
        "data; local_batch_size is per rank, global_batch_size -1 = no accumulation",
    )
    parallelism: job_config.Parallelism = _section(
        job_config.Parallelism,
        "replicate = DDP, shard = FSDP (-1: all ranks that are left), both = HSDP",
    )
    optimizer: job_config.Optimizer = _section(job_config.Optimizer, "AdamW")
    lr_scheduler: job_config.LRScheduler = _section(
        job_config.LRScheduler, "linear warm-up, then cosine decay to min_lr_factor x lr"
    )
    checkpoint: job_config.Checkpoint = _section(
        job_config.Checkpoint,
        "every `interval` steps, and a full one at the end; keep_latest_k 0 = keep all",
    )
    activation_checkpoint: job_config.ActivationCheckpoint = _section(
        job_config.ActivationCheckpoint, "none, selective or full: memory for time"
    )
    compile: job_config.Compile = _section(job_config.Compile, "torch.compile of every block")
    metrics: job_config.Metrics = _section(
        job_config.Metrics, "log_freq in steps; W&B and TensorBoard are torchtitan's"
    )
    debug: job_config.Debug = _section(job_config.Debug, "seed of initialisation")

    transform: dict[str, Any] | None = field(
        default=None,
        metadata={"description": "hardware to simulate (docs/transforms.md); null = digital"},
    )
    budget: Budget = _section(
        Budget, "what training.steps was computed from; other ranks than these are refused"
    )
    reliability: Reliability = _section(
        Reliability, "on_nonfinite stop, skip or rollback; on_save_error stop or continue"
    )

    @cached_property
    def transform_config(self) -> TransformConfig | None:
        """The transform section, read; None = digital.

        Raises:
            ConfigError: everything that is wrong with it.
        """
        if self.transform is None:
            return None
        return parse_transform(self.transform, source="transform", saved=True)


def parse_overrides(arguments: list[str], options: Collection[str] = ()) -> dict[str, Any]:
    """Dotted overrides of a pretraining config; see `settings/overrides.py`."""
    return overrides.parse_overrides(arguments, PretrainConfig, options)


def load_config(
    path: str | Path,
    values: dict[str, Any] | None = None,
    *,
    transform: Choice = KEEP_OWN,
) -> PretrainConfig:
    """Read, override and check a pretraining config.

    Args:
        path: a YAML file from generate-cfg.
        values: dotted key -> value, from `parse_overrides`.
        transform: to train with in place of the config's.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    document = load_yaml(path)
    check_purpose(document.data, str(path), PRETRAIN)
    document = overrides.apply_overrides(document, values or {})
    if isinstance(transform, TransformConfig):
        document.data["transform"] = dict(transform.mapping)
    elif transform is DIGITAL:
        document.data["transform"] = None
    config = build_config(document)
    if isinstance(transform, TransformConfig):
        # as it was read: its messages name the file
        config.transform_config = transform
    return config


def build_config(document: Document) -> PretrainConfig:
    """Check a config that has been read.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    config = build(PretrainConfig, document)
    problems = check(config)
    if problems:
        raise ConfigError([f"{document.where(key)}: {said}" for key, said in problems])
    if config.transform is not None and CONVERTER_NAME not in config.model.converters:
        config.model.converters.append(CONVERTER_NAME)
    if config.transform is None and CONVERTER_NAME in config.model.converters:
        config.model.converters.remove(CONVERTER_NAME)
    return config


def check(config: PretrainConfig) -> list[tuple[str, str]]:
    """Values that are impossible, or impossible together.

    Returns:
        (dotted key, what is wrong) of each.
    """
    return [
        *_check_choices(config),
        *_check_model(config),
        *_check_ranges(config),
        *_check_transform(config),
        *((key, said) for key, said in (_impossible(config) | _unused(config)).items() if said),
    ]


def _value(config: PretrainConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _check_choices(config: PretrainConfig) -> list[tuple[str, str]]:
    found = {key: (_value(config, key), choices) for key, choices in _CHOICES.items()}
    return [
        (key, f"got {value!r}{nearest(value, choices)}")
        for key, (value, choices) in found.items()
        if value not in choices
    ]


def _check_model(config: PretrainConfig) -> list[tuple[str, str]]:
    if config.model.name not in FLAVORS:
        return []
    try:
        size = find_flavor(config.model.name, config.model.flavor)
    except UserError as error:
        return [("model.flavor", str(error))]
    degree = config.parallelism.tensor_parallel_degree
    if degree <= 0 or not (size.n_heads % degree or size.n_kv_heads % degree):
        return []
    heads = f"{size.n_heads} heads and {size.n_kv_heads} key-value heads"
    said = f"got {degree}; expected a divisor of {heads}"
    return [("parallelism.tensor_parallel_degree", said)]


def _check_ranges(config: PretrainConfig) -> list[tuple[str, str]]:
    return [
        (key, f"got {value}; expected {expected}")
        for (is_valid, expected), keys in _RANGES.items()
        for key in keys
        if (value := _value(config, key)) is not None and not is_valid(value)
    ]


def _check_transform(config: PretrainConfig) -> list[tuple[str, str]]:
    try:
        transform = config.transform_config
    except ConfigError as error:
        return [("transform", problem.removeprefix("transform: ")) for problem in error.problems]
    if transform is not None and transform.uses_lora:
        reason = "low-rank updates of random weights would be trained; expected none from scratch"
        return [("transform", f"lora: {reason} (aixsim continual-pretrain takes it)")]
    return []


# key -> what is wrong with it, or nothing
_Refused = dict[str, Any]


def _impossible(config: PretrainConfig) -> _Refused:
    """Values that cannot be, or not together."""
    training, layout, checkpoint = config.training, config.parallelism, config.checkpoint
    local, whole = training.local_batch_size, training.global_batch_size
    tensor, folder = layout.tensor_parallel_degree, Path(checkpoint.folder)
    other_degree = "got {}; torchtitan 0.2.2's {}, expected 1 (use data_parallel_shard_degree)"
    return {
        "training.global_batch_size": whole != -1
        and (whole <= 0 or (local > 0 and whole % local))
        and f"got {whole}; expected -1 or a multiple of local_batch_size ({local})",
        "training.dataset_path": training.dataset == "local"
        and not training.dataset_path
        and "got null; dataset local needs files, a glob or a folder",
        "parallelism.pipeline_parallel_degree": layout.pipeline_parallel_degree > 1
        and other_degree.format(
            layout.pipeline_parallel_degree, "pipeline gives gradients of another size"
        ),
        "parallelism.context_parallel_degree": layout.context_parallel_degree > 1
        and other_degree.format(
            layout.context_parallel_degree, "attention over shards is not tested here"
        ),
        "training.seq_len": tensor > 1
        and training.seq_len % tensor
        and f"got {training.seq_len}; its ranks share every sequence, expected a multiple of "
        f"tensor_parallel_degree ({tensor})",
        "compile.enable": tensor > 1
        and config.compile.enable
        and f"got true with tensor_parallel_degree {tensor}; the backward of compiled blocks over "
        "shards fails in torch 2.13, expected false",
        "checkpoint.keep_latest_k": (checkpoint.keep_latest_k < 0 or checkpoint.keep_latest_k == 1)
        and f"got {checkpoint.keep_latest_k}; expected 0 (all) or at least 2, as the newest may be "
        "being written",
        "checkpoint.folder": (folder.is_absolute() or ".." in folder.parts)
        and f"got {folder}; expected a folder inside job.dump_folder",
    }


def _unused(config: PretrainConfig) -> _Refused:
    """Keys of torchtitan's that would do nothing here, or something else than they say."""
    others = [name for name in config.model.converters if name != CONVERTER_NAME]
    profiler = "got true; torchtitan's profiler needs an accelerator, expected false"
    on_cpu = device.device_type() == "cpu"
    return {
        "validation.enable": config.validation.enable
        and "got true; expected false, use `aixsim eval ppl`",
        "optimizer.early_step_in_backward": config.optimizer.early_step_in_backward
        and "got true; weights would change before a gradient that is not finite is seen, expected "
        "false",
        "model.converters": others
        and f"got {others}; expected none, `transform` says what is simulated",
        "quantize": config.quantize != JobConfig().quantize
        and "is not used here; `transform` says what is simulated",
        "fault_tolerance.enable": config.fault_tolerance.enable
        and "got true; torchft is not used here, expected false (see reliability)",
        "checkpoint.async_mode": on_cpu
        and config.checkpoint.async_mode == "async_with_pinned_mem"
        and "got async_with_pinned_mem; pinned memory needs an accelerator, expected async",
        "training.enable_cpu_offload": on_cpu
        and config.training.enable_cpu_offload
        and "got true; there is no accelerator to offload from, expected false",
        "profiling.enable_profiling": on_cpu and config.profiling.enable_profiling and profiler,
        "profiling.enable_memory_snapshot": on_cpu
        and config.profiling.enable_memory_snapshot
        and profiler,
        **{
            key: _value(config, key) and "would run code that a config names; expected ''"
            for key in (*CODE_KEYS, "job.custom_config_module")
        },
    }


def dump_config(config: PretrainConfig, path: str | Path) -> None:
    """Write a config whole, every key resolved; `load_config` reads it back."""
    write_atomic(path, dump_yaml(dataclasses.asdict(config)))
