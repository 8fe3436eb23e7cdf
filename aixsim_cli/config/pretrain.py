"""The pretraining config: torchtitan's sections, and two of ours."""

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torchtitan.config import JobConfig

from aixsim_cli.config.budget import Budget
from aixsim_cli.config.flavors import FLAVORS, find_flavor
from aixsim_cli.errors import ConfigError, UserError, nearest
from aixsim_cli.files import write_whole
from aixsim_cli.run import device
from aixsim_cli.settings import overrides
from aixsim_cli.settings.formats import dump_yaml
from aixsim_cli.settings.load import PRETRAIN, Document, build, check_purpose, load_yaml
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
    """What a run does when something goes wrong (docs/reliability.md).

    Args:
        on_nonfinite: a loss or gradient that is not finite: "stop" the run; "skip" the step;
            "rollback" to the last checkpoint and go on with the data that follow.
        max_nonfinite: steps skipped or rolled back between two checkpoints before the run stops.
        on_save_error: a checkpoint that cannot be written: "stop" the run, or "continue" it.
        on_other_data: a checkpoint that was trained on other data than the config's: "stop" the
            run; "continue" it with the config's, from their start; or, where a row that could not
            be read was "mended", go on at the same row.
        data_retries: of a failed read of the data, in a row, with a growing pause between them.
    """

    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    max_nonfinite: int = 10
    on_save_error: Literal["stop", "continue"] = "stop"
    on_other_data: Literal["stop", "continue", "mended"] = "stop"
    data_retries: int = 8


@dataclass
class PretrainConfig(JobConfig):
    """torchtitan's job config with the transform, the token budget and what to do about faults."""

    transform: dict[str, Any] | None = None
    """A transform config (docs/transforms.md); null = digital."""

    budget: Budget = field(default_factory=Budget)
    """What the number of steps was computed from."""

    reliability: Reliability = field(default_factory=Reliability)
    """What to do when something goes wrong."""

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
    """Dotted overrides of a pretraining config; see `config.overrides`."""
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
    return build_config(document)


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
        *_check_model(config),
        *_check_ranges(config),
        *_check_batch(config),
        *_check_data(config),
        *_check_transform(config),
        *_check_layout(config),
        *_check_checkpoint(config),
        *_check_unused(config),
        *_check_code(config),
    ]


def _check_model(config: PretrainConfig) -> list[tuple[str, str]]:
    arch, flavor = config.model.name, config.model.flavor
    if arch not in FLAVORS:
        return [("model.name", f"got {arch!r}{nearest(arch, FLAVORS)}")]
    try:
        size = find_flavor(arch, flavor)
    except UserError as error:
        return [("model.flavor", str(error))]
    degree = config.parallelism.tensor_parallel_degree
    if degree > 0 and (size.n_heads % degree or size.n_kv_heads % degree):
        return [
            (
                "parallelism.tensor_parallel_degree",
                f"got {degree}; expected a divisor of {size.n_heads} heads and "
                f"{size.n_kv_heads} key-value heads",
            )
        ]
    return []


def _check_ranges(config: PretrainConfig) -> list[tuple[str, str]]:
    problems = []
    for (is_valid, expected), keys in _RANGES.items():
        for key in keys:
            section, name = key.split(".")
            value = getattr(getattr(config, section), name)
            if value is not None and not is_valid(value):
                problems.append((key, f"got {value}; expected {expected}"))
    return problems


def _check_batch(config: PretrainConfig) -> list[tuple[str, str]]:
    local, whole = config.training.local_batch_size, config.training.global_batch_size
    if whole != -1 and (whole <= 0 or (local > 0 and whole % local)):
        return [
            (
                "training.global_batch_size",
                f"got {whole}; expected -1 or a multiple of local_batch_size ({local})",
            )
        ]
    return []


def _check_data(config: PretrainConfig) -> list[tuple[str, str]]:
    from aixsim_cli.data.sources import SOURCES

    name, path = config.training.dataset, config.training.dataset_path
    if name not in SOURCES:
        return [("training.dataset", f"got {name!r}{nearest(name, SOURCES)}")]
    if name == "local" and not path:
        return [
            ("training.dataset_path", "got null; dataset local needs files, a glob or a folder")
        ]
    if config.validation.enable:
        return [("validation.enable", "got true; expected false, use `aixsim eval ppl`")]
    return []


def _check_transform(config: PretrainConfig) -> list[tuple[str, str]]:
    try:
        transform = config.transform_config
    except ConfigError as error:
        return [("transform", problem.removeprefix("transform: ")) for problem in error.problems]
    if transform is not None and transform.uses_lora:
        reason = "low-rank updates of random weights would be trained; expected none from scratch"
        return [("transform", f"lora: {reason} (aixsim continual-pretrain takes it)")]
    return []


def _check_layout(config: PretrainConfig) -> list[tuple[str, str]]:
    reasons = {
        "pipeline_parallel_degree": "torchtitan 0.2.2's pipeline gives gradients of another size",
        "context_parallel_degree": "torchtitan 0.2.2's attention over shards is not tested here",
    }
    problems = [
        (
            f"parallelism.{name}",
            f"got {getattr(config.parallelism, name)}; {reason}, expected 1 "
            "(use data_parallel_shard_degree)",
        )
        for name, reason in reasons.items()
        if getattr(config.parallelism, name) > 1
    ]
    tensor, length = config.parallelism.tensor_parallel_degree, config.training.seq_len
    if tensor > 1 and length % tensor:
        said = f"got {length}; its ranks share every sequence, expected a multiple of"
        problems.append(("training.seq_len", f"{said} tensor_parallel_degree ({tensor})"))
    if tensor > 1 and config.compile.enable:
        reason = "the backward of compiled blocks over shards fails in torch 2.13"
        problems.append(
            (
                "compile.enable",
                f"got true with tensor_parallel_degree {tensor}; {reason}, expected false",
            )
        )
    return problems


def _check_checkpoint(config: PretrainConfig) -> list[tuple[str, str]]:
    keep = config.checkpoint.keep_latest_k
    problems = []
    if keep < 0 or keep == 1:
        problems.append(
            (
                "checkpoint.keep_latest_k",
                f"got {keep}; expected 0 (all) or at least 2, as the newest may be being written",
            )
        )
    if config.checkpoint.async_mode == "async_with_pinned_mem" and device.device_type() == "cpu":
        problems.append(
            (
                "checkpoint.async_mode",
                "got async_with_pinned_mem; pinned memory needs an accelerator, expected async",
            )
        )
    folder = Path(config.checkpoint.folder)
    if folder.is_absolute() or ".." in folder.parts:
        problems.append(
            ("checkpoint.folder", f"got {folder}; expected a folder inside job.dump_folder")
        )
    return problems


def _check_unused(config: PretrainConfig) -> list[tuple[str, str]]:
    """Keys of torchtitan's that would do nothing here, or something else than they say."""
    problems = []
    if config.optimizer.name not in OPTIMIZERS:
        got = f"got {config.optimizer.name!r}{nearest(config.optimizer.name, OPTIMIZERS)}"
        problems.append(("optimizer.name", got))
    if config.optimizer.early_step_in_backward:
        reason = "weights would change before a gradient that is not finite is seen"
        problems.append(("optimizer.early_step_in_backward", f"got true; {reason}, expected false"))
    others = [name for name in config.model.converters if name != CONVERTER_NAME]
    if others:
        said = f"got {others}; expected none, `transform` says what is simulated"
        problems.append(("model.converters", said))
    if config.quantize != JobConfig().quantize:
        problems.append(("quantize", "is not used here; `transform` says what is simulated"))
    if config.fault_tolerance.enable:
        said = "got true; torchft is not used here, expected false (see reliability)"
        problems.append(("fault_tolerance.enable", said))
    if config.training.enable_cpu_offload and device.device_type() == "cpu":
        said = "got true; there is no accelerator to offload from, expected false"
        problems.append(("training.enable_cpu_offload", said))
    for key in ("enable_profiling", "enable_memory_snapshot"):
        if getattr(config.profiling, key) and device.device_type() == "cpu":
            said = "got true; torchtitan's profiler needs an accelerator, expected false"
            problems.append((f"profiling.{key}", said))
    return problems


def _check_code(config: PretrainConfig) -> list[tuple[str, str]]:
    set_keys = [key for key in CODE_KEYS if getattr(config.experimental, key.split(".")[1])]
    if config.job.custom_config_module:
        set_keys.append("job.custom_config_module")
    return [(key, "would run code that a config names; expected ''") for key in set_keys]


def dump_config(config: PretrainConfig, path: str | Path) -> None:
    """Write a config whole, every key resolved; `load_config` reads it back."""
    write_whole(path, dump_yaml(dataclasses.asdict(config)))
