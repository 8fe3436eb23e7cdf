"""The checkpoints of a run: which of them can be trusted, and which may be deleted."""

import contextlib
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from aixsim_cli.errors import UserError
from aixsim_cli.run import ranks
from aixsim_cli.run.manifest import (
    MANIFEST_FILE,
    SAVING_FILE,
    begin_saving,
    is_being_saved,
    is_complete,
    read_manifest,
    verify,
)
from aixsim_cli.run.replace import set_aside

logger = logging.getLogger("aixsim")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoint folders of one run, `step-5` or `checkpoint-5`.

    Args:
        root: that holds them.
        prefix: of their names, before the number of the step.
        aside: where torn and damaged ones are moved to.
        key: the setting that names the run's folder, for messages.
        asked_by: the setting that asks for one of them, for messages.
    """

    root: Path
    prefix: str
    aside: Path
    key: str
    asked_by: str

    def folder(self, step: int) -> Path:
        """The checkpoint of a step, whether it is there or not."""
        return self.root / f"{self.prefix}{step}"

    def steps(self) -> list[int]:
        """The steps of all checkpoint folders, complete or not, newest first."""
        pattern = re.compile(re.escape(self.prefix) + r"(0|[1-9]\d*)")
        found = (pattern.fullmatch(path.name) for path in self.root.glob(f"{self.prefix}*"))
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def newest_complete(self) -> Path | None:
        """The newest checkpoint that was declared complete; its files are not looked at."""
        folders = map(self.folder, self.steps())
        return next((folder for folder in folders if is_complete(folder)), None)

    def agree(self, unusable: Mapping[int, str] | None = None) -> int | None:
        """The step that a run goes on from: the newest that is intact, the same on all ranks.

        Folders that are torn or damaged are moved aside with a warning, so that they are neither
        loaded nor mixed with what this run writes.

        Args:
            unusable: step -> why a checkpoint that is intact is as good as damaged.

        Returns:
            None = there is no checkpoint.

        Raises:
            UserError: all complete checkpoints are damaged, or there are only some without a
                manifest whose saving was not interrupted: another program's.
        """
        damaged: dict[Path, str] = {}
        incomplete: list[Path] = []
        found = None
        for step in ranks.from_main(self.steps()):
            folder = self.folder(step)
            if not ranks.from_main(is_complete(folder)):
                incomplete.append(folder)
                continue
            problem = (unusable or {}).get(step) or _problem_of_any_rank(folder)
            if problem is None:
                found = step
                break
            damaged[folder] = problem
        if found is None:
            self._refuse_to_start_anew(damaged, incomplete)
        if ranks.is_main():
            for folder in incomplete:
                self.set_aside(folder, f"{folder}: {_why_incomplete(folder)}")
            for folder, problem in damaged.items():
                self.set_aside(folder, problem)
        return found

    def _refuse_to_start_anew(self, damaged: dict[Path, str], incomplete: list[Path]) -> None:
        """Starting anew would hide that a run has been lost."""
        if damaged:
            raise UserError(
                f"{self.root}: no checkpoint is complete: {'; '.join(damaged.values())}; expected "
                f"a copy of one that is, or another {self.key} to start anew"
            )
        unlisted = [f for f in incomplete if not is_being_saved(f)]
        if unlisted := ranks.from_main(unlisted):
            raise UserError(
                f"{self.root}: {', '.join(folder.name for folder in unlisted)}: without a "
                f"{MANIFEST_FILE}: made by another program, or it was deleted; expected "
                f"{self.asked_by} to go on from one as it is, or another {self.key} to start anew"
            )

    def check(self, step: int) -> None:
        """Look at the checkpoint that was asked for.

        Raises:
            UserError: it is not there, torn or damaged; names the newest other one.
        """
        folder = self.folder(step)
        if not folder.is_dir():
            steps = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"{self.asked_by}: got {step}; {self.root} has: {steps}")
        try:
            verify_by_all_ranks(folder)
        except UserError as error:
            others = [s for s in self.steps() if s != step and is_complete(self.folder(s))]
            hint = f"; the newest other checkpoint is step {others[0]}" if others else ""
            raise UserError(f"{error}{hint}") from None

    def set_later_aside(self, step: int) -> None:
        """Move the checkpoints after a step out of the way of a run that starts there; on rank 0.

        Args:
            step: that the run goes on from; -1 = it starts anew.
        """
        for later in self.steps():
            if later > step:
                folder = self.folder(later)
                self.set_aside(folder, f"{folder}: the run starts before it")

    def set_aside(self, folder: Path, why: str) -> None:
        """Move a checkpoint out of the way, with a warning; nothing is deleted.

        Args:
            folder: of the checkpoint.
            why: said before where it went.
        """
        logger.warning("%s; set aside as %s", why, set_aside(folder, self.aside))

    def remove_old(self, keep: int, best: Path | None = None) -> None:
        """Delete complete checkpoints but the newest `keep`, if one of those is intact.

        Incomplete folders do not count and are left alone: one may be being written.

        Args:
            keep: at least 1.
            best: kept too, as one of them where there is room beside the newest.
        """
        complete = [f for f in map(self.folder, self.steps()) if is_complete(f)]
        if best in complete[1:]:
            complete.remove(best)
            complete.insert(1, best)
            keep = max(keep, 2)
        kept, old = complete[:keep], complete[keep:]
        if old and any(_is_intact(folder) for folder in kept):
            for folder in old:
                if folder.is_symlink():
                    self.set_aside(folder, f"{folder}: a link, what it leads to is not the run's")
                elif foreign := _foreign(folder):
                    why = f"{folder}: holds {foreign}, which the run did not write"
                    self.set_aside(folder, why)
                else:
                    remove(folder)
        elif old:
            logger.warning(
                "%s: none of the newest %d checkpoints is intact; none is deleted", self.root, keep
            )


def verify_by_all_ranks(folder: Path, *, listed: bool = True) -> None:
    """Verify a checkpoint, each rank a share of its files.

    Args:
        folder: of the checkpoint.
        listed: warn where it has no manifest; models of other programs have none.

    Raises:
        UserError: on every rank, naming a file, or that its saving did not end.
    """
    complete, torn = ranks.from_main((is_complete(folder), is_being_saved(folder)))
    if torn and not complete:
        raise UserError(f"{folder}: incomplete, its saving did not end; expected a complete one")
    if not complete:
        if listed:
            logger.warning(
                "%s: has no %s; made by another program, or incomplete; its files are not verified",
                folder,
                MANIFEST_FILE,
            )
        return
    problem = _problem_of_any_rank(folder)
    if problem is not None:
        raise UserError(problem)


def remove(folder: Path) -> None:
    """Delete a checkpoint; what a kill leaves of it is no complete one."""
    with contextlib.suppress(OSError):
        begin_saving(folder)
        # the mark last: without it, what is left would be another program's
        for path in [path for path in folder.iterdir() if path.name != SAVING_FILE]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _problem_of_any_rank(folder: Path) -> str | None:
    rank, count = (dist.get_rank(), dist.get_world_size()) if ranks.several() else (0, 1)
    problem = None
    try:
        verify(folder, sorted(read_manifest(folder))[rank::count])
    except (UserError, OSError) as error:
        problem = str(error)
    return next((said for said in ranks.of_all(problem) if said), None)


def _why_incomplete(folder: Path) -> str:
    if is_being_saved(folder):
        return "incomplete, its saving did not end"
    return f"has no {MANIFEST_FILE}: incomplete, or made by another program"


def _foreign(folder: Path) -> str | None:
    """A file in a complete folder that its manifest does not list."""
    try:
        listed = read_manifest(folder).keys() | {MANIFEST_FILE, SAVING_FILE}
    except UserError:
        return None
    inside = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())
    return min((name for name in inside if name not in listed), default=None)


def _is_intact(folder: Path) -> bool:
    try:
        verify(folder)
    except (UserError, OSError):
        return False
    return True
