"""The best checkpoint of a run of HF's Trainer, and whose it is."""

import json
import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from aixsim_cli.continual.resume import read_state
from aixsim_cli.errors import RunError, UserError
from aixsim_cli.run import ranks
from aixsim_cli.run.checkpoints import Checkpoints, verify_by_all_ranks

logger = logging.getLogger("aixsim")


class BestCallback(TrainerCallback):
    """A run that goes on keeps the best checkpoint so far, wherever the run's folder is now.

    Trainer looks at the place alone where it once was, and takes what lies there.

    Attributes:
        recorded: the checkpoint that the run goes on from names a best one, by what this run
            chooses by.
        folder: where that is; None = nowhere.
    """

    def __init__(self) -> None:
        self.recorded = False
        self.folder: Path | None = None
        self._goes_on = False
        self._in_the_way: Path | None = None
        self._why = ""

    def find(self, checkpoint: Path, root: Path, *, by_the_same: bool) -> None:
        """Look for it: in the run's folder, beside the checkpoint, where it was; a collective.

        Args:
            checkpoint: to go on from.
            root: of the run.
            by_the_same: what was best is so by what this run chooses by.
        """
        self._goes_on = True
        state = read_state(checkpoint)
        if state.best_model_checkpoint is None:
            return
        self.recorded = by_the_same
        where = Path(state.best_model_checkpoint)
        own = root / where.name
        found: Path | None = None
        if ranks.is_main():
            places = [own, checkpoint.parent / where.name, where]
            found = next((place for place in places if self._is_of(place, state)), None)
            if own.is_dir() and found != own:
                self._in_the_way = own
        self.folder, self._why = ranks.from_main((found if by_the_same else None, self._why))

    def _is_of(self, place: Path, state: TrainerState) -> bool:
        """Whether a checkpoint is of the run that a state is of, by its history."""
        if not place.is_dir():
            self._why = self._why or f"{place}: no such folder"
            return False
        try:
            history = read_state(place).log_history
        except UserError as error:
            self._why = self._why or str(error)
            return False
        # as texts: NaN is not equal to itself
        if json.dumps(history) == json.dumps(state.log_history[: len(history)]):
            return True
        self._why = self._why or f"{place / TRAINER_STATE_NAME}: is of another run"
        return False

    def verified(self) -> Path:
        """The best checkpoint, verified; a collective.

        Raises:
            RunError: it is nowhere, or not whole.
        """
        if self.folder is None:
            raise _not_taken(self._why)
        check_best(self.folder)
        return self.folder

    def clear_the_way(self, checkpoints: Checkpoints) -> None:
        """Move what Trainer would take for the best one, by its name."""
        if self._in_the_way is not None:
            why = f"{self._in_the_way}: has the name of this run's best checkpoint ({self._why})"
            checkpoints.set_aside(self._in_the_way, why)
        if self.recorded and self.folder is None and ranks.is_main():
            logger.warning("%s: the best checkpoint is lost; later ones compete anew", self._why)

    def put_into(self, state: TrainerState) -> None:
        """Put it in the place of what Trainer took over."""
        state.best_model_checkpoint = str(self.folder) if self.folder else None
        if self.folder is None:
            # nothing would be better than what is not there
            state.best_metric = state.best_global_step = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Trainer has read the checkpoint's counters."""
        if self._goes_on:
            self.put_into(state)


def check_best(folder: Path) -> None:
    """Verify the checkpoint whose weights a run ends with; a collective.

    Raises:
        RunError: it is not whole.
    """
    try:
        if not ranks.from_main(folder.is_dir()):
            raise UserError(f"{folder}: no such folder")
        verify_by_all_ranks(folder)
    except UserError as error:
        raise _not_taken(str(error)) from error


def _not_taken(why: str) -> RunError:
    return RunError(
        f"the best checkpoint cannot be taken: {why}; expected a complete copy of it, or "
        "--resume_from_checkpoint true --load_best_model_at_end false to take the last one's "
        "weights"
    )
