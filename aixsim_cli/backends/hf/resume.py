"""Which checkpoint a run of continual-pretrain goes on from, and what may have changed since.

As for pretrain, hardware, seed, tokenizer and data are what a run is: with others it is another
run, which has a folder of its own.
"""

import enum
import json
import logging
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from aixsim_cli.backends.hf import folder as hf_folder
from aixsim_cli.backends.hf.arguments import Arguments
from aixsim_cli.backends.hf.data import data_digest
from aixsim_cli.errors import UserError, first_line
from aixsim_cli.run import ranks
from aixsim_cli.run.checkpoints import Checkpoints, verify_by_all_ranks
from aixsim_cli.run.inputs import Inputs, definition_digest, read_inputs
from aixsim_cli.run.manifest import MANIFEST_FILE, is_complete, verify
from aixsim_cli.run.resume import listing
from aixsim_cli.transforms.config import hardware_difference
from aixsim_cli.transforms.loaded import check_numbers

logger = logging.getLogger("aixsim")
SETTINGS_FILE = "settings.json"
# what shapes the training; where files lie, what is logged and how often is saved do not
_TRAINING = (
    "seed", "data_seed", "max_steps", "num_train_epochs", "per_device_train_batch_size",
    "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs",
    "warmup_steps", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "bf16", "fp16",
)  # fmt: skip
_DATA = (
    "dataset_name", "dataset_config_name", "train_file", "max_train_samples", "streaming",
    "validation_split_percentage",
)  # fmt: skip
# a position counts blocks in the order that the seed draws of all of them
_ORDER = ("block_size", "data_seed", "dataset_name", "dataset_config_name", "training blocks")


def checkpoints_in(output: Path) -> Checkpoints:
    """The checkpoints of a run.

    Args:
        output: `--output_dir`, of the `checkpoint-N` folders.
    """
    return Checkpoints(
        output,
        prefix="checkpoint-",
        aside=output / "checkpoint.set-aside",
        key="--output_dir",
        asked_by="--resume_from_checkpoint PATH",
    )


def find_checkpoint(arguments: Arguments) -> Path | None:
    """The checkpoint to go on from, whole, the same on all ranks; None = the run starts anew.

    Torn and damaged ones are moved aside, and so are those that the run would write over.

    Raises:
        UserError: the folder holds a run already and nothing was said of it, there is no
            checkpoint, it is damaged, or it lacks what going on needs.
    """
    training = arguments.training
    output = Path(str(training.output_dir))
    if not training.do_train:
        return None
    asked = training.resume_from_checkpoint
    checkpoints = checkpoints_in(output)
    found = None
    if asked is None:
        _refuse(output, checkpoints=True)
    elif str(asked).lower() == "true":
        found = _newest(checkpoints)
    elif str(asked).lower() != "false":
        found = Path(asked)
        if not ranks.from_main(found.is_dir()):
            raise UserError(f"--resume_from_checkpoint: {asked}: no such folder")
        if not found.resolve().is_relative_to(output.resolve()):
            _refuse(output, checkpoints=True)
        verify_by_all_ranks(found)
        if problem := ranks.from_main(_problem_of_numbers(found) if ranks.is_main() else None):
            raise UserError(problem)
    if found is None:
        _refuse(output, checkpoints=False)
    else:
        _check_files(found, arguments)
    if ranks.is_main():
        checkpoints.set_later_aside(-1 if found is None else read_state(found).global_step)
    return found


def _refuse(output: Path, *, checkpoints: bool) -> None:
    """Refuse a folder that holds another run: its model, which this one would write over."""
    holds = "a model" if (output / "config.json").is_file() else None
    if checkpoints and checkpoints_in(output).steps():
        holds = "checkpoints"
    if holds := ranks.from_main(holds):
        raise UserError(
            f"--output_dir: {output} holds {holds} already; expected a new folder, or "
            "--resume_from_checkpoint true to go on with the run in it"
        )


def _newest(checkpoints: Checkpoints) -> Path | None:
    began = ranks.from_main(bool(checkpoints.steps()))
    unusable: dict[int, str] = {}
    while (step := checkpoints.agree(unusable)) is not None:
        folder = checkpoints.folder(step)
        problem = ranks.from_main(_problem_of_numbers(folder) if ranks.is_main() else None)
        if problem is None:
            return folder
        unusable[step] = problem
    if not began:
        raise UserError(
            f"--resume_from_checkpoint: {checkpoints.root} holds no checkpoint-N; expected a run's "
            "folder, or no such flag to start one"
        )
    # nothing but torn ones: the run was killed in its first save
    logger.warning("%s: no checkpoint was saved to its end; the run starts anew", checkpoints.root)
    return None


def _problem_of_numbers(folder: Path) -> str | None:
    """What a whole checkpoint holds that no run can go on from: what is not finite."""
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with readable(folder):
                tensors = load_file(path)
            check_numbers(tensors, str(folder))
        if (folder / "optimizer.pt").is_file():
            with readable(folder):
                moments = dict(_moments(folder / "optimizer.pt"))
            check_numbers(moments, str(folder))
    except UserError as error:
        return str(error)
    return None


def _moments(path: Path) -> Iterator[tuple[str, Tensor]]:
    saved = torch.load(path, map_location="cpu", weights_only=True)
    for number, state in saved["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                yield f"{path.name}: state {number} {name}", value


@contextmanager
def readable(checkpoint: str | Path) -> Iterator[None]:
    """What cannot be read is named: the libraries say what went wrong, but not where."""
    try:
        yield
    except (
        OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError,
        pickle.UnpicklingError, SafetensorError,
    ) as error:  # fmt: skip
        raise UserError(
            f"{checkpoint}: cannot be loaded into this run: {first_line(error)}; expected a whole "
            "checkpoint of the same model"
        ) from error


def _check_files(folder: Path, arguments: Arguments) -> None:
    """Trainer begins anew, without a word, what it does not find."""
    names = {path.name for path in folder.iterdir()}
    needed = ["trainer_state.json"]
    if not arguments.training.deepspeed:
        needed += ["scheduler.pt", "optimizer", *_random_states(folder, names, arguments)]
        # deepspeed scales by itself
        if arguments.training.fp16 and read_settings(folder).get("fp16", True):
            needed += ["scaler.pt"]
    missing = [need for need in needed if not any(name.startswith(need) for name in names)]
    if missing:
        raise UserError(
            f"{folder}: holds no {', no '.join(missing)} (--save_only_model leaves some out), and "
            "they would begin anew; expected a full checkpoint, or --model_name_or_path "
            f"{folder} to start from its weights"
        )


def _random_states(folder: Path, names: set[str], arguments: Arguments) -> list[str]:
    """The files of random states that a run needs of a checkpoint: one of each process."""
    now = arguments.training.world_size
    found = sum(name.startswith("rng_state") for name in names)
    before = read_settings(folder).get("processes") or found or now
    if before != now:
        logger.warning(
            "%s: holds the random states of %d processes, and this run has %d: they begin anew",
            folder,
            before,
            now,
        )
        return []
    return ["rng_state.pth"] if now == 1 else [f"rng_state_{rank}.pth" for rank in range(now)]


def read_state(folder: Path) -> TrainerState:
    """Trainer's counters in a checkpoint or a finished folder.

    Raises:
        UserError: they are damaged.
    """
    path = folder / TRAINER_STATE_NAME
    try:
        return TrainerState.load_from_json(str(path))
    except (OSError, ValueError, TypeError) as error:
        first = first_line(error)
        raise UserError(f"{path}: damaged: {first}; expected a whole checkpoint") from error


def holds_model_of(output: Path, checkpoint: Path, step: int) -> bool:
    """Whether the finished model in a run's folder is that of a step; a collective.

    Args:
        output: the run's folder.
        checkpoint: of the step, whole.
        step: the run's last.

    Raises:
        UserError: it is damaged, or somebody changed it, and it is not written over.
    """
    found, problem = False, None
    if ranks.is_main() and is_complete(output):
        try:
            verify(output)
            found = read_state(output).global_step == step
        except (UserError, OSError) as error:
            problem = str(error)
    found, problem = ranks.from_main((found, problem))
    if problem is not None:
        raise UserError(
            f"{problem}; expected the model as the run saved it: without {MANIFEST_FILE} it is "
            f"made anew, from {checkpoint}"
        )
    return found


def check_hardware(checkpoint: Path, model: PreTrainedModel) -> None:
    """Trainer loads of a checkpoint what fits the model, and begins the rest anew.

    Raises:
        UserError: it was trained on other hardware.
    """
    saved, asked = hf_folder.transform_in(checkpoint), hf_folder.saved_transform(model)
    difference = hardware_difference(saved, asked, source=str(checkpoint))
    if difference is None:
        return
    began, asks = difference
    raise UserError(
        f"--resume_from_checkpoint: {checkpoint} is of a run on {began}, and this run is on {asks};"
        " expected the hardware that the run began with (--transform_config), or a new --output_dir"
    )


def check_steps(checkpoint: Path, step: int, last: int) -> None:
    """See that a checkpoint is not beyond the run's end.

    Raises:
        UserError: it is.
    """
    if step > last:
        raise UserError(
            f"--max_steps: got {last}; {checkpoint} is beyond it; expected at least {step}, or a "
            "new --output_dir to start anew"
        )


def settings_of(
    arguments: Arguments, *, steps: int, block_size: int, blocks: int | None
) -> dict[str, Any]:
    """What shapes the training, under the names of the flags; no tokens.

    Args:
        arguments: of the run.
        steps: of the whole training.
        block_size: tokens a sequence.
        blocks: sequences of the training text; None where it is streamed.
    """
    training, data = arguments.training, arguments.data
    found = {name: getattr(data, name) for name in _DATA}
    found |= {name: getattr(training, name) for name in _TRAINING if hasattr(training, name)}
    found |= {
        "dtype": arguments.model.dtype or "float32",
        "max_steps": steps,
        "block_size": block_size,
        "training blocks": blocks,
        "processes": training.world_size,
    }
    # as they come back from the file
    return json.loads(json.dumps(found, default=_plain))


def read_settings(checkpoint: Path) -> dict[str, Any]:
    """The settings that a checkpoint was trained with; empty where it holds none."""
    path = checkpoint / SETTINGS_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}; expected a whole checkpoint") from None


def write_settings(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Put a run's settings into its checkpoint."""
    text = json.dumps(settings, indent=1)
    (checkpoint / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ: name -> (the checkpoint's, the run's)."""
    return {k: (saved[k], v) for k, v in now.items() if k in saved and saved[k] != v}


def inputs_of(arguments: Arguments, tokenizer: Any) -> Inputs:
    """Digests of the tokenizer and the training text.

    Args:
        arguments: of a run that trains.
        tokenizer: transformers tokenizer. Of one that is written in Python the tokens are told.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        definition = backend.to_str()
    else:
        definition = json.dumps({"model": tokenizer.get_vocab()})
    return Inputs(definition_digest(definition), data_digest(arguments.data))


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
        UserError: another seed, or another tokenizer; other data without that flag.
    """
    expected = "to go on, or a new --output_dir"
    if "seed" in changed:
        before, now = changed["seed"]
        raise UserError(
            f"--seed: {checkpoint} was trained with {before}, this run asks for {now}; expected "
            f"the same {expected}"
        )
    others = inputs.differing(read_inputs(checkpoint))
    if "tokenizer" in others:
        raise UserError(
            f"--tokenizer_name: {checkpoint} was trained with another tokenizer than this run's; "
            f"expected the same, wherever it lies, {expected}"
        )
    order = {key: changed[key] for key in _ORDER if key in changed}
    is_other = "data" in others or bool(order)
    if is_other and not arguments.training.ignore_data_skip:
        source = "train_file" if arguments.data.dataset_name is None else "dataset_name"
        flag = next((key for key in ("block_size", "data_seed") if key in order), source)
        listed = f" ({listing(order)})" if order else ""
        raise UserError(
            f"--{flag}: {checkpoint} was trained on other data than this run's, or in another "
            f"order{listed}; expected the same, wherever they lie, to go on; --ignore_data_skip "
            "true to go on with these from their start; or a new --output_dir"
        )
    return is_other


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else str(value)
