"""Which checkpoint a run of continual-pretrain goes on from."""

import logging
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from aixsim_cli.backends.hf.arguments import Arguments
from aixsim_cli.backends.hf.identity import read_settings
from aixsim_cli.errors import UserError, first_line
from aixsim_cli.run import ranks
from aixsim_cli.run.checkpoints import Checkpoints, verify_by_all_ranks
from aixsim_cli.run.manifest import MANIFEST_FILE, is_complete, verify
from aixsim_cli.transforms.loaded import check_numbers

# what a finished model, and what is told of it, consists of; the formats of tokenizers among them
FINISHED = (
    "README.md", "*_results.json", "config.json", "generation_config.json", "*.safetensors",
    "*.safetensors.index.json", "*.bin", "transform.yaml", "tokenizer*.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "vocab.*", "merges.txt", "*.model", TRAINER_STATE_NAME,
    MANIFEST_FILE,
)  # fmt: skip

logger = logging.getLogger("aixsim")


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
        if problem := ranks.from_main(_problem_of(found) if ranks.is_main() else None):
            raise UserError(problem)
    if found is None:
        _refuse(output, checkpoints=False)
    else:
        _check_files(found, arguments)
    if ranks.is_main():
        checkpoints.set_later_aside(-1 if found is None else read_state(found).global_step)
    return found


def _refuse(output: Path, *, checkpoints: bool) -> None:
    """Refuse a folder that holds another run, or what a new one's model would write over."""
    paths = output.iterdir() if output.is_dir() else ()
    names = sorted(path.name for path in paths if any(map(path.match, FINISHED)))
    holds = "a model" if "config.json" in names else names[0] if names else None
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
        problem = ranks.from_main(_problem_of(folder) if ranks.is_main() else None)
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


def _problem_of(folder: Path) -> str | None:
    """Why no run can go on from a whole checkpoint: another step than its name's, no numbers."""
    try:
        name = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        is_there = (folder / TRAINER_STATE_NAME).is_file()
        step = read_state(folder).global_step if name and is_there else None
        if name and step is not None and int(name[1]) != step:
            raise UserError(
                f"{folder}: is the checkpoint of step {step}, by its {TRAINER_STATE_NAME}; "
                "expected the name that it was saved under"
            )
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
