"""What a run of continual-pretrain is, and what may have changed since a checkpoint of it.

As for pretrain, hardware, model, seed, tokenizer and data are what a run is: with others it is
another run, which has a folder of its own.
"""

import dataclasses
import enum
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer_utils import SchedulerType
from transformers.utils import cached_file

from aixsim_cli.continual.arguments import Arguments
from aixsim_cli.continual.data import data_digest, tokens_digest
from aixsim_cli.data.tokenizer import DocumentEncoder
from aixsim_cli.errors import UserError
from aixsim_cli.models.hf import saved as hf_saved
from aixsim_cli.models.hf.config import transform_of
from aixsim_cli.run import ranks
from aixsim_cli.run.inputs import RANDOM, Inputs, definition_digest, read_inputs
from aixsim_cli.run.manifest import digest_of
from aixsim_cli.run.resume import listing
from aixsim_cli.transforms.config import difference

SETTINGS_FILE = "settings.json"
BEST_BY = "best checkpoint by"
# what does not shape the training: where files lie, what is logged, saved, evaluated and pushed,
# and how a step is computed; and what is told apart by its contents. Every other flag is compared
_NOT_COMPARED = (
    "output_dir", "do_train", "do_eval", "do_predict", "resume_from_checkpoint",
    "ignore_data_skip", "local_rank", "debug", "restore_callback_states_from_checkpoint",
    "skip_memory_metrics", "logging_strategy", "logging_steps", "logging_first_step",
    "log_on_each_node", "logging_nan_inf_filter", "include_num_input_tokens_seen", "log_level",
    "log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id",
    "trackio_bucket_id", "trackio_static_space_id", "eval_strategy", "eval_steps", "eval_delay",
    "per_device_eval_batch_size", "prediction_loss_only", "eval_on_start",
    "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps",
    "include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval",
    "save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit",
    "enable_jit_checkpoint", "load_best_model_at_end", "metric_for_best_model",
    "greater_is_better", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id",
    "hub_strategy", "hub_always_push", "hub_revision", "activation_checkpointing",
    "activation_checkpointing_kwargs", "gradient_checkpointing", "gradient_checkpointing_kwargs",
    "torch_compile", "torch_compile_backend", "torch_compile_mode", "use_cache",
    "torch_empty_cache_steps", "use_cpu", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "ddp_find_unused_parameters", "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp",
    "fsdp_config", "parallelism_config", "validation_file", "max_eval_samples",
    "preprocessing_num_workers", "overwrite_cache", "keep_linebreaks",
)  # fmt: skip
# a position counts steps in the order that the seed draws of all blocks
_ORDER = (
    "block_size", "data_seed", "dataset_name", "dataset_config_name", "training blocks",
    "train_sampling_strategy", "dataloader_drop_last", "accelerator_config", "sequences a step",
    "stream workers", "streamed samples",
)  # fmt: skip
# schedules that follow the loss: what they have come to is the checkpoint's
_FOLLOWING = ("reduce_lr_on_plateau", "greedy")
_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "learning_rate", "warmup_steps")
# where something lies, told apart by its contents; who computes it
_PLACES = ("train_file", "dataset_name", "dataset_config_name", "processes")
# how a step is shared out, and how many steps are asked for: those are compared themselves
_HOW = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs")
_ADAMW = {"adamw_torch", "adamw_torch_fused"}
# of a model's config, what does not decide what its training computes; or follows from a flag, a
# tokenizer or the hardware, which are compared themselves
_NOT_OF_THE_MODEL = (
    "_name_or_path", "name_or_path", "transformers_version", "architectures", "auto_map",
    "quantization_config", "dtype", "torch_dtype", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id", "model_type", "output_attentions", "output_hidden_states", "return_dict",
)  # fmt: skip


def settings_of(
    arguments: Arguments, *, steps: int, block_size: int, blocks: int | None, held_out: Any
) -> dict[str, Any]:
    """What shapes the training, under the names of the flags; no tokens.

    Args:
        arguments: of the run.
        steps: of the whole training.
        block_size: tokens a sequence.
        blocks: sequences of the training text; None where it is streamed.
        held_out: to evaluate on, as `load_blocks` makes them; None = nothing.
    """
    training = arguments.training
    fields = [
        (item.name, getattr(group, item.name))
        for group in (training, arguments.data)
        for item in dataclasses.fields(group)
    ]
    found = {name: value for name, value in fields if name not in _NOT_COMPARED}
    if arguments.data.streaming:
        # several share out the files of a stream, and with them the order
        found["stream workers"] = max(1, training.dataloader_num_workers)
        found["streamed samples"] = arguments.data.max_train_samples
    a_step = training.per_device_train_batch_size * training.gradient_accumulation_steps
    found |= {
        "dtype": arguments.model.dtype or "float32",
        "max_steps": steps,
        "block_size": block_size,
        "training blocks": blocks,
        "sequences a step": a_step * training.world_size,
        "processes": training.world_size,
        BEST_BY: _best_by(training, held_out),
    }
    # as they come back from the file
    return json.loads(json.dumps(found, default=_plain))


def _best_by(training: Any, held_out: Any) -> str | None:
    """What a checkpoint is the best by: a loss on other text is another one."""
    if training.metric_for_best_model is None:
        return None
    metric = training.metric_for_best_model.removeprefix("eval_")
    text = ranks.from_main(tokens_digest(held_out) if ranks.is_main() else None) or "a stream"
    end = "greatest" if training.greater_is_better else "smallest"
    return f"{end} {metric} on {text[:12]}"


def read_settings(checkpoint: Path) -> dict[str, Any]:
    """The settings that a checkpoint was trained with; empty where it holds none."""
    path = checkpoint / SETTINGS_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(found, dict) or not isinstance(found.get("processes", 1), int):
            raise ValueError("is no object of settings")
        return found
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}; expected a complete checkpoint") from None


def write_settings(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Put a run's settings into its checkpoint."""
    text = json.dumps(settings, indent=1)
    (checkpoint / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ: name -> (the checkpoint's, the run's)."""
    return {k: (saved[k], v) for k, v in now.items() if k in saved and saved[k] != v}


def inputs_of(arguments: Arguments, tokenizer: Any, blocks: Any) -> Inputs:
    """What the run reads, told by its contents; a collective.

    Args:
        arguments: of a run that trains.
        tokenizer: transformers tokenizer. Of one that is written in Python the tokens are told.
        blocks: to train on, as `load_blocks` makes them.

    Raises:
        UserError, OSError: it cannot be read.
    """
    if not ranks.is_main():
        return ranks.from_main(None)
    encoder = DocumentEncoder(tokenizer)
    definition = encoder.definition or json.dumps({"model": tokenizer.get_vocab()})
    return ranks.from_main(
        Inputs(
            tokenizer=definition_digest(definition),
            data=data_digest(arguments.data),
            start=_start_digest(arguments),
            frame=encoder.frame,
            tokens=encoder.digest,
            blocks=tokens_digest(blocks),
        )
    )


def _start_digest(arguments: Arguments) -> str:
    """Of the files of weights that the run begins with, ranges among them."""
    model = arguments.model
    if model.model_name_or_path is None:
        return RANDOM
    options = {"cache_dir": model.cache_dir, "revision": model.model_revision}
    # where they lie, of a hub name too: they have just been loaded
    config = cached_file(
        model.model_name_or_path, "config.json", token=model.token, local_files_only=True, **options
    )
    files = hf_saved.weights_in(Path(str(config)).parent)
    listed = [(path.name, digest_of(path).sha256) for path in files]
    return hashlib.sha256(json.dumps(sorted(listed)).encode()).hexdigest()


def check_model(checkpoint: Path, model: PreTrainedModel, arguments: Arguments) -> None:
    """Compare what a checkpoint's config.json describes with the run's model, hardware included.

    Trainer loads of a checkpoint what fits the model, and begins the rest anew.

    Raises:
        UserError: it was trained on other hardware, or is another model.
    """
    _check_transform(checkpoint, model)
    saved = hf_saved.load_config(
        str(checkpoint), trust_remote_code=arguments.model.trust_remote_code
    )
    before, now = (dict(_leaves(config.to_dict(), "")) for config in (saved, model.config))
    changed = changes(before, now)
    if changed:
        asked = arguments.model.model_name_or_path or arguments.model.config_name
        raise UserError(
            f"--{'model_name_or_path' if arguments.model.model_name_or_path else 'config_name'}: "
            f"{checkpoint} was trained with another model than {asked} ({listing(changed)}); "
            "expected the model that the run began with, or a new --output_dir"
        )


def _leaves(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key in _NOT_OF_THE_MODEL or key.startswith("_"):
            continue
        if isinstance(value, Mapping):
            yield from _leaves({str(k): v for k, v in value.items()}, f"{prefix}{key}.")
        else:
            # as it comes back from a file
            yield f"{prefix}{key}", json.loads(json.dumps(value, default=_plain))


def _check_transform(checkpoint: Path, model: PreTrainedModel) -> None:
    differing = difference(hf_saved.transform_in(checkpoint), transform_of(model))
    if differing is None:
        return
    began, asks = differing
    raise UserError(
        f"--resume_from_checkpoint: {checkpoint} is of a run on {began}, and this run is on {asks};"
        " expected the hardware that the run began with (--transform_config), or a new --output_dir"
    )


def check_identity(
    checkpoint: Path, changed: Mapping[str, Any], arguments: Arguments, inputs: Inputs
) -> bool:
    """Refuse to go on with what is another run than the checkpoint's.

    Args:
        checkpoint: to go on from; what it does not know of its run is not compared.
        changed: of `changes`.
        arguments: of the run.
        inputs: of the run.

    Returns:
        Whether the data, or their order, are others: a position in the old ones means nothing in
        them, and `--ignore_data_skip` says to read them from their start.

    Raises:
        UserError: another seed, tokenizer or start, or a schedule that cannot be changed; other
            data without that flag.
    """
    expected = "to go on, or a new --output_dir"
    if "seed" in changed:
        before, now = changed["seed"]
        raise UserError(
            f"--seed: {checkpoint} was trained with {before}, this run asks for {now}; expected "
            f"the same {expected}"
        )
    theirs = read_inputs(checkpoint)
    if theirs.data == f"{arguments.data.dataset_name} {arguments.data.dataset_config_name}":
        # of an earlier version, which told folders by their names too
        theirs = dataclasses.replace(theirs, data=inputs.data)
    others = inputs.differing(theirs)
    if "tokenizer" in others:
        raise UserError(
            f"--tokenizer_name: {checkpoint} was trained with another tokenizer than this run's; "
            f"expected the same, wherever it lies, {expected}"
        )
    if "start" in others:
        asked = arguments.model.model_name_or_path or "random weights"
        raise UserError(
            f"--model_name_or_path: the run of {checkpoint} began with other files of weights than "
            f"those of {asked}; expected the same, wherever they lie, {expected}"
        )
    if not {*changed.get("optim", ())} <= _ADAMW:
        raise UserError(
            f"--optim: {checkpoint} has the moments of {changed['optim'][0]}, this run asks for "
            f"{changed['optim'][1]}, which cannot go on with them; expected the same {expected}"
        )
    scheduled = {key: changed[key] for key in _SCHEDULE if key in changed}
    schedules = {
        *changed.get("lr_scheduler_type", ()),
        _plain(SchedulerType(arguments.training.lr_scheduler_type)),
    }
    if scheduled and not schedules.isdisjoint(_FOLLOWING):
        raise UserError(
            f"--{next(iter(scheduled))}: {checkpoint} has, or this run asks for, a schedule that "
            f"follows the loss ({listing(scheduled)}); it cannot be changed on the way; expected "
            f"the same {expected}"
        )
    order = {key: changed[key] for key in _ORDER if key in changed}
    if inputs.blocks is not None and inputs.blocks == theirs.blocks:
        order = {key: change for key, change in order.items() if key not in _PLACES}
    is_other = "data" in others or bool(order)
    if is_other and not arguments.training.ignore_data_skip:
        raise _other_data(checkpoint, changed, order, arguments)
    return is_other


def _other_data(
    checkpoint: Path,
    changed: Mapping[str, Any],
    order: dict[str, tuple[Any, Any]],
    arguments: Arguments,
) -> UserError:
    source = "train_file" if arguments.data.dataset_name is None else "dataset_name"
    flags = {
        "sequences a step": "per_device_train_batch_size",
        "training blocks": source,
        "stream workers": "dataloader_num_workers",
        "streamed samples": "max_train_samples",
    }
    flag = next((flags.get(key, key) for key in _ORDER if key in order), source)
    if "sequences a step" in order and "processes" in changed:
        order["processes"] = changed["processes"]
        flag = "gradient_accumulation_steps"
    listed = f" ({listing(order)})" if order else ""
    return UserError(
        f"--{flag}: {checkpoint} was trained on other data than this run's, or in another "
        f"order{listed}; expected the same, wherever they lie, to go on; --ignore_data_skip "
        "true to go on with these from their start; or a new --output_dir"
    )


def check_finished(
    checkpoint: Path,
    step: int,
    changed: Mapping[str, Any],
    *,
    other_data: bool,
    takes_best: bool,
) -> None:
    """Refuse settings with which nothing would be trained: the run has all its steps.

    Args:
        checkpoint: of the last step.
        step: the last.
        changed: of `changes`.
        other_data: of `check_identity`.
        takes_best: the run ends with its best checkpoint's weights.

    Raises:
        UserError: naming them.
    """
    ignored = (*_PLACES, *_HOW) if takes_best else (*_PLACES, *_HOW, BEST_BY)
    idle = {
        name: change
        for name, change in changed.items()
        if name not in ignored and not (name == "optim" and {*change} <= _ADAMW)
    }
    if idle or other_data:
        raise UserError(
            f"{checkpoint} has all {step} steps, and was trained with other settings than this "
            f"run's: {listing(idle) if idle else 'the data'}; nothing would be trained with them; "
            "expected more --max_steps to go on with, or a new --output_dir to start anew"
        )


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value.value if isinstance(value, enum.Enum) else str(value)
