"""The flags of `aixsim continual-pretrain`: HF's run_clm, `TrainingArguments` itself, and ours.

A YAML file given as `--config` holds the same keys; the command line wins.
"""

import argparse
import dataclasses
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch.distributed import DistNetworkError
from transformers import HfArgumentParser, TrainingArguments

from aixsim_cli.continual.refused import cannot_recover, not_supported
from aixsim_cli.errors import ConfigError, RunError, UserError, nearest
from aixsim_cli.models.form import Form, choose_form
from aixsim_cli.models.hf.callback import refuse_several_gpus
from aixsim_cli.run.launcher import check_environment, is_launched, port_in_use
from aixsim_cli.run.nonfinite import OnNonfinite
from aixsim_cli.settings.document import CONTINUAL, check_purpose, load_yaml
from aixsim_cli.transforms.choice import KEEP_OWN, Choice, read_choice

# what earlier transformers, and NewComputeBench's scripts, call the same thing
ALIASES = {
    "transform_cfg": "transform_config",
    "evaluation_strategy": "eval_strategy",
    "max_train_steps": "max_steps",
    "num_warmup_steps": "warmup_steps",
    "warmup_ratio": "warmup_steps",
    "log_train_loss_steps": "logging_steps",
    "torch_dtype": "dtype",
    "use_auth_token": "token",
}
# flags of earlier transformers that ask for what is always done today
OBSOLETE = (
    "save_safetensors",
    "low_cpu_mem_usage",
    "with_tracking",
    "overwrite_output_dir",
    "enable_jit_checkpoint",
)


def _help(text: str, default: Any = None, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class ModelArguments:
    """Which model, and how it is read."""

    model_name_or_path: str | None = _help("Folder or hub name; none = train from scratch.")
    config_name: str | None = _help("From scratch: folder or hub name of a model config.")
    config_overrides: str | None = _help("From scratch: n_embd=10,scale_attn=false,…")
    tokenizer_name: str | None = _help("Tokenizer, if not the model's: folder, hub name, builtin.")
    cache_dir: str | None = _help("Where the hub's files are kept.")
    use_fast_tokenizer: bool = _help("Use the tokenizer written in Rust.", True)
    model_revision: str = _help("Branch, tag or commit on the hub.", "main")
    token: str | None = _help("For private models; default: what `hf auth login` stored.")
    trust_remote_code: bool = _help("Run code that comes with a model.", False)
    dtype: str | None = _help("Of the weights in memory.", choices=["float32", "bfloat16", "auto"])
    attn_implementation: str | None = _help("Of a digital model; simulated attention is ours.")


@dataclass
class DataArguments:
    """Which text, and how it becomes blocks of tokens."""

    dataset_name: str | None = _help("On the hub, or builtin.")
    dataset_config_name: str | None = _help("The hub's name for a part of it.")
    train_file: str | None = _help(
        ".txt, .jsonl, .json or .parquet: a file, a glob or a folder; or one .csv file."
    )
    validation_file: str | None = _help("Likewise, to evaluate on.")
    streaming: bool = _help("Read a hub dataset while training; needs --max_steps.", False)
    block_size: int | None = _help("Tokens a sequence; default: what the model allows, to 1024.")
    max_train_samples: int | None = _help("Use the first so many blocks.")
    max_eval_samples: int | None = _help("Likewise, to evaluate on.")
    validation_split_percentage: int = _help("Held out where a dataset has no validation.", 5)
    preprocessing_num_workers: int | None = _help("Processes that tokenise.")
    overwrite_cache: bool = _help("Tokenise again, whatever is cached.", False)
    keep_linebreaks: bool = _help("Always so; accepted for run_clm's sake.", True)


@dataclass
class SimulationArguments:
    """What aixsim adds."""

    transform_config: str | None = _help("Hardware to simulate: a transform file.")
    token_num_scale: float | None = _help("Tokens to train on, per parameter of the model.")
    effective_batch_size: int | None = _help("Sequences a step over all processes.")
    on_nonfinite: OnNonfinite = _help(  # noqa: RUF009 (a field)
        "A step whose loss or gradient is not finite: stop, skip it, or rollback to the last "
        "checkpoint and go on with the data that follow.",
        "stop",
    )
    max_nonfinite: int = _help("Steps skipped or rolled back between two checkpoints.", 10)
    form: Form = _help("Of the saved model; default: aixsim.")  # noqa: RUF009 (a field)
    strict: bool = _help("--form strict: nothing loads the folder without aixsim.", False)
    plain: bool = _help("--form plain: digital weights, the transform in files beside.", False)


@dataclass(frozen=True)
class Arguments:
    """Everything a run was asked for.

    Args:
        model: which model.
        data: which text.
        simulation: which hardware, and how much training.
        training: transformers' own.
        command: the arguments as given, for the model card.
        transform: what `simulation` asks for, read.
    """

    model: ModelArguments
    data: DataArguments
    simulation: SimulationArguments
    training: TrainingArguments
    command: tuple[str, ...]
    transform: Choice = KEEP_OWN


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse_arguments(argv: list[str]) -> Arguments:
    """Read the command line.

    Raises:
        ConfigError: unknown flags, each with the nearest one; or the transform file is wrong.
        UserError: a wrong value, flags that do not go together, several GPUs in one process, or
            half of a launcher's variables.
    """
    # before transformers connects the processes by them
    launched = check_environment() if is_launched() else 1
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    parser = _make_parser()
    known = {action.dest for action in parser._actions}
    spelled = _respell(_expand_config(argv, known))
    with _quiet_exit():
        model, data, simulation, training, *_, unknown = parser.parse_args_into_dataclasses(
            spelled, return_remaining_strings=True
        )
    flags = [word for word in unknown if word.startswith("-")] or unknown
    if flags:
        raise ConfigError([f"{w}: unknown flag{nearest(_key(w), known)}" for w in flags])
    arguments = Arguments(model, data, simulation, training, tuple(argv))
    refuse_several_gpus(training)
    asked = "bf16" if training.bf16 else "fp16" if training.fp16 else "no"
    if precision not in ("no", asked):
        flag = f"--{precision} true, or " if precision in ("bf16", "fp16") else ""
        raise UserError(
            f"ACCELERATE_MIXED_PRECISION: got {precision}, the flags ask for {asked}; expected "
            f"{flag}no such variable"
        )
    _check(arguments, given={_key(w) for w in spelled if w.startswith("--")}, launched=launched)
    return replace(arguments, transform=read_choice(simulation.transform_config))


def _make_parser() -> _Parser:
    classes: Any = (ModelArguments, DataArguments, SimulationArguments, TrainingArguments)
    parser = _Parser(
        classes,
        prog="aixsim continual-pretrain",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    # a NaN must be seen: transformers would log the average of earlier losses in its place
    parser.set_defaults(logging_nan_inf_filter=False)
    # every parameter of a causal model is used; looking for others costs time and a warning a rank
    parser.set_defaults(ddp_find_unused_parameters=False)
    # accelerate connects ranks without an accelerator only when it is told that they have none
    has_accelerator = torch.accelerator.is_available()
    parser.set_defaults(dataloader_pin_memory=has_accelerator, use_cpu=not has_accelerator)
    # Trainer copies a checkpoint that it pushes over the finished model
    parser.set_defaults(hub_strategy="end")
    parser.add_argument("--config", help="YAML file with the same keys; the command line wins.")
    return parser


class _quiet_exit:
    """What `TrainingArguments` raises for a wrong value is the user's mistake."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, DistNetworkError) and "EADDRINUSE" in str(error):
            raise UserError(port_in_use()) from error
        if isinstance(error, ValueError | ImportError):
            raise UserError(" ".join(str(error).split())) from error


def _key(word: str) -> str:
    return word.lstrip("-").partition("=")[0].replace("-", "_")


def _respell(argv: list[str]) -> list[str]:
    """Aliases and kebab-case in transformers' own spelling."""
    spelled = []
    skip_value = False
    for word in argv:
        if not word.startswith("--"):
            if not (skip_value and word.lower() in ("true", "false")):
                spelled.append(word)
            skip_value = False
            continue
        key = _key(word)
        skip_value = key in OBSOLETE
        if not skip_value:
            _, equals, value = word.partition("=")
            spelled.append(f"--{ALIASES.get(key, key)}{equals}{value}")
    return spelled


def _expand_config(argv: list[str], known: set[str]) -> list[str]:
    """Put the keys of `--config FILE` before the other arguments."""
    rest, path = [], None
    iterator = iter(argv)
    for word in iterator:
        if _key(word) != "config" or not word.startswith("--"):
            rest.append(word)
            continue
        path = word.partition("=")[2] or next(iterator, None)
        if path is None or path.startswith("--"):
            raise UserError("--config: got nothing; expected a YAML file")
    if path is None:
        return rest
    document = load_yaml(path)
    check_purpose(document.data, path, CONTINUAL)
    problems, expanded = [], []
    for name, value in ((str(name), value) for name, value in document.data.items()):
        key = ALIASES.get(name.replace("-", "_"), name.replace("-", "_"))
        if key not in known and key not in OBSOLETE:
            problems.append(f"{document.where(name)}: unknown key{nearest(key, known)}")
        elif value is not None:
            values = value if isinstance(value, list) else [value]
            expanded += [f"--{key}", *map(str, values)]
    if problems:
        raise ConfigError(problems)
    return expanded + rest


def _check(arguments: Arguments, given: set[str], launched: int) -> None:
    model, data, simulation = arguments.model, arguments.data, arguments.simulation
    problems = []
    if not (arguments.training.do_train or arguments.training.do_eval):
        problems.append("nothing to do; expected --do_train, --do_eval or both")
    if model.model_name_or_path is None and model.config_name is None:
        problems.append(
            "--model_name_or_path: missing; expected a folder or hub name, or --config_name to "
            "train from scratch"
        )
    if model.config_overrides and model.model_name_or_path:
        problems.append("--config_overrides: only for a model from scratch (--config_name)")
    if data.dataset_name is None and data.train_file is None and data.validation_file is None:
        problems.append("no text; expected --dataset_name or --train_file/--validation_file")
    if data.dataset_name and (data.train_file or data.validation_file):
        problems.append("--dataset_name and --train_file/--validation_file: expected one of them")
    try:
        simulation.form = choose_form(simulation.form, simulation.strict, simulation.plain)
    except UserError as error:
        problems.append(str(error))
    if simulation.token_num_scale is not None:
        if simulation.token_num_scale <= 0:
            problems.append(f"--token_num_scale: got {simulation.token_num_scale}; expected > 0")
        if arguments.training.max_steps > 0:
            problems.append("--token_num_scale and --max_steps: expected at most one of them")
    if data.block_size is not None and data.block_size < 2:
        problems.append(f"--block_size: got {data.block_size}; expected at least 2")
    endless = arguments.training.max_steps <= 0 and simulation.token_num_scale is None
    if data.streaming and arguments.training.do_train and endless:
        problems.append("--streaming: expected --max_steps or --token_num_scale with it")
    if "output_dir" not in given:
        problems.append("--output_dir: missing; expected a new folder for what the run writes")
    problems += _wrong_numbers(arguments)
    problems += not_supported(arguments.training)
    problems += cannot_recover(
        arguments.training,
        simulation.on_nonfinite,
        simulation.max_nonfinite,
        streaming=data.streaming,
    )
    if problems:
        raise ConfigError(problems)
    if arguments.training.world_size != launched:
        raise RunError(
            f"the launcher started {launched} processes, and transformers sees "
            f"{arguments.training.world_size}: each would train a model of its own"
        )


def _wrong_numbers(arguments: Arguments) -> Iterator[str]:
    """Numbers that train nothing, or nothing that can be used."""
    training, data = arguments.training, arguments.data
    for group in (training, data, arguments.simulation):
        for item in dataclasses.fields(group):
            value = getattr(group, item.name)
            if isinstance(value, float) and not math.isfinite(value):
                yield f"--{item.name}: got {value}; expected a number"
    if training.max_steps < -1 or training.max_steps == 0:
        yield f"--max_steps: got {training.max_steps}; expected at least 1, or -1 to count epochs"
    by_epochs = training.max_steps == -1 and arguments.simulation.token_num_scale is None
    if by_epochs and training.num_train_epochs <= 0:
        yield f"--num_train_epochs: got {training.num_train_epochs}; expected > 0"
    at_least_one = {
        "per_device_train_batch_size": training.per_device_train_batch_size,
        "per_device_eval_batch_size": training.per_device_eval_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "effective_batch_size": arguments.simulation.effective_batch_size,
        "max_train_samples": data.max_train_samples,
        "max_eval_samples": data.max_eval_samples,
        "preprocessing_num_workers": data.preprocessing_num_workers,
    }
    for name, value in at_least_one.items():
        if value is not None and not value > 0:
            yield f"--{name}: got {value}; expected at least 1"
    for name in ("learning_rate", "weight_decay", "max_grad_norm"):
        if getattr(training, name) < 0:
            yield f"--{name}: got {getattr(training, name)}; expected at least 0"
    for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor"):
        if not 0 <= getattr(training, name) < 1:
            yield f"--{name}: got {getattr(training, name)}; expected at least 0, and below 1"
    if not training.adam_epsilon > 0:
        yield f"--adam_epsilon: got {training.adam_epsilon}; expected > 0"
    for name in ("optim_args", "lr_scheduler_kwargs"):
        if found := re.search(r"\b(nan|inf|infinity)\b", str(getattr(training, name)).lower()):
            yield f"--{name}: got {found[1]}; expected numbers"
    for name in ("seed", "data_seed"):
        value = getattr(training, name)
        if value is not None and not 0 <= value < 2**32:
            yield f"--{name}: got {value}; expected 0 to {2**32 - 1}"
    if not 0 < data.validation_split_percentage < 100:
        yield (
            f"--validation_split_percentage: got {data.validation_split_percentage}; expected 1 "
            "to 99"
        )


def set_steps_and_batch(arguments: Arguments, parameters: int, block_size: int) -> None:
    """Work `max_steps` and the accumulation out of what was asked for, in place.

    Args:
        arguments: of the run.
        parameters: of the model, the input embedding left out, as in pretraining.
        block_size: tokens a sequence.

    Raises:
        UserError: the effective batch is no multiple of what the processes do at once.
    """
    training, simulation = arguments.training, arguments.simulation
    at_once = training.per_device_train_batch_size * training.world_size
    if simulation.effective_batch_size is not None:
        steps, rest = divmod(simulation.effective_batch_size, at_once)
        if rest or not steps:
            raise UserError(
                f"--effective_batch_size: got {simulation.effective_batch_size}; expected a "
                f"multiple of {at_once} ({training.world_size} processes x "
                f"{training.per_device_train_batch_size} sequences)"
            )
        training.gradient_accumulation_steps = steps
    if simulation.token_num_scale is not None:
        tokens = simulation.token_num_scale * parameters
        a_step = at_once * training.gradient_accumulation_steps * block_size
        training.max_steps = max(1, -(-int(tokens) // a_step))


def without_secrets(argv: Sequence[str]) -> list[str]:
    """A command line without its tokens, to be shown or kept."""
    kept: list[str] = []
    skip = False
    for word in argv:
        if word.startswith("--"):
            is_secret = _key(word).endswith("token")
            skip = is_secret and "=" not in word
            if is_secret:
                continue
        elif skip:
            skip = False
            continue
        kept.append(word)
    return kept


def print_help() -> None:
    """All flags, on standard output."""
    _make_parser().print_help(sys.stdout)
