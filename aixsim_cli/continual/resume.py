"""Which checkpoint a run of continual-pretrain goes on from."""

import logging
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from aixsim_cli.continual.arguments import Arguments
from aixsim_cli.continual.identity import read_settings
from aixsim_cli.errors import UserError, first_line, shown
from aixsim_cli.models.hf import saved as hf_saved
from aixsim_cli.run import ranks
from aixsim_cli.run.checkpoints import Checkpoints, verify_by_all_ranks
from aixsim_cli.run.manifest import MANIFEST_FILE, READ, is_complete, maker_of, verify
from aixsim_cli.transforms.loaded import check_numbers

# what a finished model, and what is told of it, consists of
FINISHED = (
    *READ, "README.md", "all_results.json", "train_results.json", "eval_results.json",
    "training_args.bin", TRAINER_STATE_NAME, MANIFEST_FILE,
)  # fmt: skip

# of a finished model: what its manifest notes, by --load_best_model_at_end
MAKERS = ("continual-pretrain, the last step's", "continual-pretrain, the best checkpoint's")

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

    Torn and damaged ones are moved aside.

    Raises:
        UserError: the folder holds a run already and nothing was said of it, there is no
            checkpoint, or it is damaged.
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
        began = ranks.from_main(bool(checkpoints.steps()))
        found = newest(checkpoints)
        if found is None:
            # nothing, or nothing but torn ones: the run was killed before, or in, its first save
            why = "no checkpoint was saved to its end" if began else "holds no checkpoint-N"
            logger.warning("%s: %s; the run starts anew", checkpoints.root, why)
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
        _check_holds(found, [TRAINER_STATE_NAME])
    return found


def clear_the_way(output: Path, checkpoint: Path | None) -> None:
    """Move the checkpoints that a run would write over; a collective, once nothing refuses it.

    Args:
        output: the run's folder.
        checkpoint: that it goes on from; None = it starts anew.
    """
    if ranks.is_main():
        step = -1 if checkpoint is None else read_state(checkpoint).global_step
        checkpoints_in(output).set_later_aside(step)
    if ranks.several():
        # no rank writes into a folder that is being moved
        dist.barrier()


def _refuse(output: Path, *, checkpoints: bool) -> None:
    """Refuse a folder that holds another run, or what a new one's model would write over."""
    paths = output.iterdir() if output.is_dir() else ()
    names = sorted(path.name for path in paths if any(map(path.match, FINISHED)))
    holds = "a model" if "config.json" in names else names[0] if names else None
    if checkpoints and checkpoints_in(output).steps():
        holds = "checkpoints"
    if holds := ranks.from_main(holds):
        goes_on = ", or --resume_from_checkpoint true to go on with the run in it"
        if not ranks.from_main(bool(checkpoints_in(output).steps())):
            goes_on = ": there is no checkpoint to go on from"
        raise UserError(
            f"--output_dir: {output} holds {holds} already; expected a new folder{goes_on}"
        )


def last_checkpoint(output: str | Path | None) -> str:
    """What a message says of the newest checkpoint in a run's folder."""
    last = checkpoints_in(Path(str(output))).newest_complete()
    return f"the newest complete checkpoint is {last}" if last else "there is no checkpoint yet"


def newest(checkpoints: Checkpoints) -> Path | None:
    """The newest checkpoint that is whole and holds numbers, the same on all ranks; a collective.

    Raises:
        UserError: as `Checkpoints.agree`.
    """
    unusable: dict[int, str] = {}
    while (step := checkpoints.agree(unusable)) is not None:
        folder = checkpoints.folder(step)
        problem = ranks.from_main(_problem_of(folder) if ranks.is_main() else None)
        if problem is None:
            return folder
        unusable[step] = problem
    return None


def _problem_of(folder: Path) -> str | None:
    """Why no run can go on from a complete checkpoint: another step than its name's, no numbers."""
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
            with readable(folder / "optimizer.pt"):
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
        why = first_line(error)
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
            why = "a pickle that is damaged or holds more than tensors, and nothing of it was run"
        raise UserError(
            f"{checkpoint}: cannot be loaded into this run: {why}; expected a complete "
            "checkpoint of the same model"
        ) from error


def check_files(folder: Path, arguments: Arguments) -> None:
    """See that a checkpoint has what a run that goes on needs of it.

    Trainer begins anew, without a word, what it does not find.

    Args:
        folder: a complete checkpoint, before the run's last step.
        arguments: of the run.

    Raises:
        UserError: naming what it lacks.
    """
    if arguments.training.deepspeed:
        return
    names = {path.name for path in folder.iterdir()}
    needed = ["scheduler.pt", "optimizer", *_random_states(folder, names, arguments)]
    if arguments.training.fp16 and read_settings(folder).get("fp16", True):
        needed.append("scaler.pt")
    _check_holds(folder, needed)


def _check_holds(folder: Path, needed: list[str]) -> None:
    names = {path.name for path in folder.iterdir()}
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
        state = TrainerState.load_from_json(str(path))
        kinds = {"global_step": int, "log_history": list, "stateful_callbacks": dict}
        for name, kind in kinds.items():
            if not isinstance(getattr(state, name), kind):
                raise ValueError(f"{name}: got {shown(getattr(state, name))}")
        return state
    except (OSError, ValueError, TypeError, AttributeError) as error:
        first = first_line(error)
        raise UserError(f"{path}: damaged: {first}; expected a complete checkpoint") from error


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


def check_form(output: Path, asked: str) -> None:
    """See that the finished model in a run's folder has the form that is asked for.

    Raises:
        UserError: it has another one.
    """
    form = hf_saved.form_of(output)
    if form not in (asked, None):
        raise UserError(
            f"--output_dir: {output} holds the finished model in the form {form}, and this run "
            f"asks for {asked} (--form); expected the form that it has, or a new "
            "--output_dir"
        )


def check_end(output: Path, *, is_best: bool) -> None:
    """See that the finished model is the best checkpoint's, or the last one's, as is asked for.

    Args:
        output: holds the model.
        is_best: `--load_best_model_at_end`, and there is a best checkpoint.

    Raises:
        UserError: it is the other. One of an earlier version does not tell.
    """
    if maker_of(output) == MAKERS[not is_best]:
        raise UserError(
            f"--load_best_model_at_end: got {str(is_best).lower()}; {output} holds the model of "
            f"{MAKERS[not is_best]}; expected {str(not is_best).lower()}, or a new --output_dir"
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
