"""The finished model of continual-pretrain: written beside, and put in place all at once."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import upload_folder
from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME

from aixsim_cli import __version__
from aixsim_cli.continual.arguments import Arguments
from aixsim_cli.continual.card import CARD_FILE, write_card
from aixsim_cli.continual.resume import FINISHED, MAKERS, checkpoints_in
from aixsim_cli.continual.trainer import SimulationTrainer, not_written
from aixsim_cli.errors import RunError, UserError
from aixsim_cli.files import NOT_THERE, write_atomic
from aixsim_cli.models.hf import saved as hf_saved
from aixsim_cli.models.hf.config import AixsimConfig
from aixsim_cli.run import ranks
from aixsim_cli.run.folder import check_places
from aixsim_cli.run.manifest import MANIFEST_FILE, read_beside, read_manifest
from aixsim_cli.run.replace import WORKPLACES, open_to_all, publish, stage
from aixsim_cli.transforms.lora import merge_lora

_ALL_RESULTS = "all_results.json"
# about the model, not of it: a later evaluation adds to them, and a card may be edited
_NOT_OF_THE_MODEL = (CARD_FILE, _ALL_RESULTS, "train_results.json", "eval_results.json")

logger = logging.getLogger("aixsim")


def check_writable(folder: Path, key: str) -> None:
    """See, before the training, that nothing is in the way of the finished model.

    Args:
        folder: `--output_dir`.
        key: the setting that names it, for messages.

    Raises:
        UserError: naming what is, or results that are none of a run's.
    """
    files = [path for path in folder.iterdir() if any(map(path.match, FINISHED))]
    folders = (checkpoints_in(folder).aside, *(folder / name for name in WORKPLACES))
    places = {path: ("a file", NOT_THERE) for path in files}
    check_places(places | {path: ("a folder",) for path in folders}, key)
    for path in folders:
        if path.is_symlink():
            raise UserError(f"{key}: {path}: got a link; expected a folder, or nothing there")
    for path in files:
        if path.match("*_results.json") and not _is_ours(path):
            raise UserError(
                f"{key}: {path}: holds no results of a training or an evaluation, and would be "
                "written over; expected another folder, or that name to be free"
            )


def _is_ours(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    # an earlier version wrote an empty object where it had nothing to say
    return found == {} or (
        isinstance(found, dict) and not {"train_loss", "eval_loss"}.isdisjoint(found)
    )


def save_finished(
    trainer: SimulationTrainer, arguments: Arguments, metrics: Mapping[str, float]
) -> Path:
    """Put the trained model into `--output_dir`, in the place of an earlier one; all ranks.

    Args:
        trainer: after the training.
        arguments: of the run.
        metrics: of training and evaluation.

    Returns:
        The folder.

    Raises:
        RunError: it is not finite, could not be written, or not be pushed.
    """
    folder = Path(str(arguments.training.output_dir))
    trainer.check_weights()
    _merge(trainer.accelerator.unwrap_model(trainer.model))
    main = trainer.is_world_process_zero()
    staged: Path | None = None
    try:
        staged = stage(folder, checkpoints_in(folder).aside) if main else None
        staged = ranks.from_main(staged)
        # sharded weights are gathered by the Trainer; every rank takes part. Not yet the whole
        # folder, so nothing is pushed from there
        trainer.save_model(str(staged), _internal_call=True)
        if main:
            _complete(Path(str(staged)), trainer, arguments, metrics)
            publish(
                folder,
                checkpoints_in(folder).aside,
                maker=MAKERS[_is_best(trainer)],
                leave_out=_NOT_OF_THE_MODEL,
            )
    except (OSError, RuntimeError, SafetensorError) as error:
        if main and staged is not None:
            shutil.rmtree(staged, ignore_errors=True)
        raise not_written(folder, "the model", error) from error
    if main and arguments.training.push_to_hub:
        push(trainer, folder)
    return folder


def _is_best(trainer: SimulationTrainer) -> bool:
    # where nothing was ever best, Trainer leaves the last
    is_there = trainer.state.best_model_checkpoint is not None
    return trainer.args.load_best_model_at_end and is_there


def _complete(
    staged: Path, trainer: SimulationTrainer, arguments: Arguments, metrics: Mapping[str, float]
) -> None:
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    hf_saved.finish_folder(model, staged, arguments.simulation.form)
    trainer.state.save_to_json(str(staged / TRAINER_STATE_NAME))
    if metrics:
        write_results(staged, metrics)
    write_card(staged, model, arguments, dict(metrics))
    open_to_all(staged)


def write_results(folder: Path, metrics: Mapping[str, float]) -> None:
    """Add results to a folder's, in the files that Trainer writes.

    Args:
        folder: `train_results.json`, `eval_results.json`, and `all_results.json` of both.
        metrics: those of an evaluation are named `eval_…` or `perplexity`.
    """
    evaluated = {k: v for k, v in metrics.items() if k.startswith("eval_") or k == "perplexity"}
    trained = {k: v for k, v in metrics.items() if k not in evaluated and k != "epoch"}
    epoch = {"epoch": metrics["epoch"]} if "epoch" in metrics else {}
    path = folder / _ALL_RESULTS
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    for name, found in (("train_results.json", trained), ("eval_results.json", evaluated)):
        if found:
            write_atomic(folder / name, json.dumps(found | epoch, indent=4, sort_keys=True))
    write_atomic(path, json.dumps({**before, **metrics}, indent=4, sort_keys=True))


def _merge(model: Any) -> None:
    """Put low-rank updates into the weights: what is saved is the hardware and its weights."""
    if not merge_lora(model):
        return
    section = model.config.quantization_config
    merged = section.transform_config.without_lora()
    model.config.quantization_config = AixsimConfig(merged, modules=section.modules)


def push(trainer: SimulationTrainer, folder: Path) -> None:
    """Upload the finished model, and nothing else that lies beside it.

    Args:
        trainer: whose arguments name the repository.
        folder: that holds the model.

    Raises:
        RunError: it was not uploaded.
    """
    # Trainer's own push would save the model once more, in the default form
    names = read_manifest(folder).keys() | read_beside(folder).keys() | {MANIFEST_FILE}
    names -= {"training_args.bin"}
    try:
        upload_folder(
            repo_id=str(trainer.hub_model_id),
            folder_path=folder,
            commit_message=f"Trained by aixsim {__version__}",
            token=trainer.args.hub_token,
            revision=trainer.args.hub_revision,
            allow_patterns=sorted(names),
        )
    except Exception as error:  # what a failed connection raises differs between hub versions
        raise RunError(f"{folder} is saved, but was not pushed to the hub: {error}") from error
