"""What a resumed run may change, and what the checkpoint decides.

The weights, ranges, moments and counters are the checkpoint's; the settings are the config's,
learning rate included. Hardware, model, seed, first weights, tokenizer and data have to be the
same: with others it is another run, which has a folder of its own.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aixsim_cli.config.pretrain import CONFIG_FILE, PretrainConfig
from aixsim_cli.data.local import find_files
from aixsim_cli.data.sources import text_digest
from aixsim_cli.data.tokenizer import DocumentEncoder, load_tokenizer, resolve_tokenizer
from aixsim_cli.errors import UserError
from aixsim_cli.run.inputs import (
    RANDOM,
    Inputs,
    contents_digest,
    definition_digest,
    read_inputs,
    tokenizer_digest,
    weights_digest,
)
from aixsim_cli.run.resume import listing
from aixsim_cli.settings.document import load_yaml
from aixsim_cli.settings.json_object import load_json_object
from aixsim_cli.transforms.config import difference
from aixsim_cli.transforms.read import parse_transform

logger = logging.getLogger("aixsim")

# what shapes the training; the layout of the ranks and what is logged do not
_SECTIONS = ("model", "optimizer", "lr_scheduler", "training")
# follows from the transform
_IGNORED = ("model.converters",)
# what makes another run
_IDENTITY = ("model.name", "model.flavor", "debug.seed")
# where something lies, told apart by its contents; how a step is computed, not what
_PLACES = ("model.hf_assets_path", "training.dataset_path")
_HOW = ("training.dataloader.", "training.gc_", "training.enable_cpu_offload")


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The config that a checkpoint was trained with; None where it holds none."""
    path = folder / CONFIG_FILE
    return load_yaml(path).data if path.is_file() else None


def inputs_of(config: PretrainConfig) -> Inputs:
    """Digests of the tokenizer, the data and the first weights that a run reads.

    Raises:
        UserError: they cannot be read.
    """
    try:
        path, text = config.training.dataset_path, None
        data = text_digest(config.training.dataset, path)
        if config.training.dataset == "local":
            text = contents_digest(find_files(str(path)))
        folder = resolve_tokenizer(config.model.hf_assets_path)
        tokenizer = tokenizer_digest(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer or the data cannot be read: {error}") from error
    encoder = DocumentEncoder(load_tokenizer(folder))
    return Inputs(
        tokenizer, data, _start_digest(config), encoder.frame, tokens=encoder.digest, text=text
    )


def _start_digest(config: PretrainConfig) -> str | None:
    source = config.checkpoint.initial_load_path
    if not source:
        return RANDOM
    try:
        return weights_digest(Path(source)) if Path(source).is_dir() else None
    except OSError as error:
        raise UserError(
            f"checkpoint.initial_load_path: {source} cannot be read: {error.strerror}"
        ) from error


def _start(settings: Mapping[str, Any]) -> str | None:
    return (settings.get("checkpoint") or {}).get("initial_load_path") or None


def other_inputs(
    saved: Mapping[str, Any], config: PretrainConfig, inputs: Inputs, folder: Path
) -> list[str]:
    """Which inputs differ between a checkpoint and a run.

    Args:
        saved: the checkpoint's config.
        config: the run's.
        inputs: the run's.
        folder: the checkpoint's.
    """
    theirs = read_inputs(folder)
    others = inputs.differing(theirs)
    if theirs.tokenizer is not None and theirs.tokens is None:
        _warn_of_other_tokens(config, folder)
    # weights that are gone are not needed any more: then their place has to be the same
    if None in (inputs.start, theirs.start) and _start(saved) != _start(dataclasses.asdict(config)):
        others.append("start")
    return others


def _warn_of_other_tokens(config: PretrainConfig, folder: Path) -> None:
    """An earlier version read tokenizer.json alone, and padded where that says so."""
    files = resolve_tokenizer(config.model.hf_assets_path)
    definition = DocumentEncoder(load_tokenizer(files)).definition
    pads = load_json_object(files / "tokenizer.json").get("padding") is not None
    if pads or definition is None or definition_digest(definition) != tokenizer_digest(files):
        logger.warning(
            "%s: of an earlier version, which read %s/tokenizer.json alone; tokenizer_config.json "
            "may make other tokens of the text from here on",
            folder,
            files,
        )


def check_resume(
    saved: Mapping[str, Any], config: PretrainConfig, folder: Path, step: int, *, others: list[str]
) -> None:
    """Refuse to go on where the result would not be what the config says.

    Args:
        saved: the checkpoint's config.
        config: the run's.
        folder: the checkpoint's, for messages.
        step: the checkpoint's.
        others: which inputs differ by their contents, see `run/inputs.py`.

    Raises:
        UserError: another run than the folder's, or a checkpoint beyond the last step.
    """
    # step 0 is a model to start from, on whatever hardware
    if step == 0:
        return
    trained = saved.get("transform")
    trained = parse_transform(trained, source=str(folder), saved=True) if trained else None
    differing = difference(trained, config.transform_config)
    if differing is not None:
        raise UserError(
            f"transform: {folder} was trained on {differing[0]}, this run asks for "
            f"{differing[1]}; expected the same transform to go on, or another job.dump_folder "
            "(and checkpoint.initial_load_path to start from its weights)"
        )
    if step > config.training.steps:
        raise UserError(
            f"training.steps: got {config.training.steps}; {folder} is beyond it; expected at "
            "least as many, or another job.dump_folder to start anew"
        )
    _check_identity(saved, config, folder, others)
    changed = changes(saved, config)
    idle = {k: v for k, v in changed.items() if k not in _PLACES and not k.startswith(_HOW)}
    read_anew = reads_other_data(saved, config, others)
    if step == config.training.steps and (idle or read_anew):
        listed = listing(idle) if idle else "the data"
        raise UserError(
            f"{folder} has all {step} steps, and was trained with other settings than this run's: "
            f"{listed}; nothing would be trained with them; expected more training.steps to go on "
            "with, or another job.dump_folder to start anew"
        )


def _check_identity(
    saved: Mapping[str, Any], config: PretrainConfig, folder: Path, others: list[str]
) -> None:
    """What a folder's run is: its model, seed, first weights, tokenizer and data."""
    now = dataclasses.asdict(config)
    for key in _IDENTITY:
        section, name = key.split(".")
        before = (saved.get(section) or {}).get(name, now[section][name])
        if before != now[section][name]:
            raise UserError(
                f"{key}: {folder} was trained with {before}, this run asks for "
                f"{now[section][name]}; expected the same to go on, or another job.dump_folder"
            )
    if "start" in others:
        before, asked = (_start(where) or "random weights" for where in (saved, now))
        asked = asked if asked != before else "other weights in their place"
        raise UserError(
            f"checkpoint.initial_load_path: the run of {folder} began with {before}, this run asks "
            f"for {asked}; expected the same weights, wherever they lie, to go on, or another "
            "job.dump_folder"
        )
    if "tokenizer" in others:
        raise UserError(
            f"model.hf_assets_path: {folder} was trained with another tokenizer than "
            f"{config.model.hf_assets_path}; expected the same, wherever it lies, to go on, or "
            "another job.dump_folder"
        )
    if reads_other_data(saved, config, others) and config.reliability.on_other_data == "stop":
        raise UserError(
            f"training.{'dataset_path' if config.training.dataset_path else 'dataset'}: {folder} "
            "was trained on other data; expected the same, wherever they lie, to go on; "
            "reliability.on_other_data continue to go on with these from their start; or another "
            "job.dump_folder"
        )


def changes(saved: Mapping[str, Any], config: PretrainConfig) -> dict[str, tuple[Any, Any]]:
    """Settings of the training that differ: dotted key -> (the checkpoint's, the run's)."""
    now = dataclasses.asdict(config)
    found = {}
    for section in _SECTIONS:
        before = dict(_leaves(saved.get(section) or {}, f"{section}."))
        for key, value in _leaves(now[section], f"{section}."):
            if before.get(key, value) != value and key not in _IGNORED:
                found[key] = (before[key], value)
    return found


def reads_other_data(
    saved: Mapping[str, Any], config: PretrainConfig, others: Sequence[str]
) -> bool:
    """Whether a position in the old data means nothing in the new.

    Files that have moved are the same data, mended ones where the config says so; another data
    set, or other contents, are not.

    Args:
        saved: the checkpoint's config.
        config: the run's.
        others: as of `check_resume`.
    """
    before = (saved.get("training") or {}).get("dataset", config.training.dataset)
    mended = config.reliability.on_other_data == "mended"
    return ("data" in others and not mended) or before != config.training.dataset


def _leaves(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
