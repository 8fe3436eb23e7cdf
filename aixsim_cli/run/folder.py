"""The folder of a run: one run at a time in it, and which of its checkpoints can be trusted."""

import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from filelock import FileLock, Timeout

from aixsim_cli.errors import UserError
from aixsim_cli.run.manifest import MANIFEST_FILE, is_complete, read_manifest, verify

LOCK_FILE = ".run.lock"
OWNER_FILE = ".run.json"

logger = logging.getLogger("aixsim")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder, on rank 0, while the block runs.

    The lock is the kernel's (flock): it ends with the process that holds it, however that ends, so
    a lock file that lies about is no lock.

    Raises:
        UserError: another run holds the folder, or it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK_FILE, timeout=0)
        lock.acquire()
    except Timeout:
        raise UserError(
            f"job.dump_folder: {folder} is in use by another run{_owner(folder)}; expected to wait "
            "for its end, or another folder"
        ) from None
    except OSError as error:
        raise UserError(
            f"job.dump_folder: {folder} cannot be written to: {error.strerror}"
        ) from None
    try:
        owner = folder / OWNER_FILE
        if owner.is_file():
            logger.info("the run before this one ended early%s; its lock is void", _owner(folder))
        owner.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        try:
            yield
        finally:
            # what is left of it tells of a run that was killed
            owner.unlink(missing_ok=True)
    finally:
        lock.release()


def _owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / OWNER_FILE).read_text(encoding="utf-8"))
        return f" (process {owner['pid']} on {owner['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def check_free_space(folder: Path, needed: int) -> None:
    """Refuse to start where not even one checkpoint would fit.

    Args:
        folder: exists.
        needed: bytes of a checkpoint.

    Raises:
        UserError: with both numbers.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"job.dump_folder: the disk of {folder} has {free / 2**20:,.0f} MiB left; a checkpoint "
            f"takes about {needed / 2**20:,.0f} MiB"
        )


def steps_in(root: Path) -> list[int]:
    """The steps of all checkpoint folders, complete or not, newest first."""
    found = (re.fullmatch(r"step-(\d+)", path.name) for path in root.glob("step-*"))
    return sorted((int(match[1]) for match in found if match), reverse=True)


def newest_complete(root: Path) -> Path | None:
    """The newest checkpoint that was declared complete; its files are not looked at."""
    folders = [root / f"step-{step}" for step in steps_in(root)]
    return next((folder for folder in folders if is_complete(folder)), None)


def agree_on_step(root: Path, step: int = -1) -> int | None:
    """The checkpoint that a run loads: the newest that is whole, the same on all ranks.

    Folders that are incomplete or damaged are moved to `<root>.set-aside` with a warning, so that
    they are neither loaded nor mixed with what this run writes.

    Args:
        root: of the `step-N` folders.
        step: -1 = look for the newest; else this one.

    Returns:
        The step; None = there is no checkpoint.

    Raises:
        UserError: the step asked for is damaged, or all complete checkpoints are.
    """
    if step >= 0:
        _verify_wanted(root, step)
        return step
    damaged: dict[Path, str] = {}
    incomplete: list[Path] = []
    found = None
    for candidate in _from_main(steps_in(root)):
        folder = root / f"step-{candidate}"
        if not _from_main(is_complete(folder)):
            incomplete.append(folder)
            continue
        problem = _problem_of_any_rank(folder)
        if problem is None:
            found = candidate
            break
        damaged[folder] = problem
    if found is None and damaged:
        # starting anew would hide that a run has been lost
        raise UserError(
            f"{root}: no checkpoint is whole: {'; '.join(damaged.values())}; expected a copy of "
            "one that is, or another job.dump_folder to start anew"
        )
    if _is_main():
        for folder in incomplete:
            _set_aside(folder, f"{folder}: incomplete, its saving did not end")
        for folder, problem in damaged.items():
            _set_aside(folder, problem)
    return found


def _verify_wanted(root: Path, step: int) -> None:
    folder = root / f"step-{step}"
    if not folder.is_dir():
        steps = ", ".join(map(str, steps_in(root))) or "none"
        raise UserError(f"checkpoint.load_step: got {step}; {root} has: {steps}")
    try:
        verify_by_all_ranks(folder)
    except UserError as error:
        others = [s for s in steps_in(root) if s != step and is_complete(root / f"step-{s}")]
        hint = f"; the newest other checkpoint is step {others[0]}" if others else ""
        raise UserError(f"{error}{hint}") from None


def verify_by_all_ranks(folder: Path) -> None:
    """Verify a checkpoint, each rank a share of its files.

    Raises:
        UserError: on every rank, naming a file.
    """
    if not _from_main(is_complete(folder)):
        logger.warning(
            "%s: has no %s; made by another program, or incomplete; its files are not verified",
            folder,
            MANIFEST_FILE,
        )
        return
    problem = _problem_of_any_rank(folder)
    if problem is not None:
        raise UserError(problem)


def _problem_of_any_rank(folder: Path) -> str | None:
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    problem = None
    try:
        verify(folder, sorted(read_manifest(folder))[rank::ranks])
    except (UserError, OSError) as error:
        problem = str(error)
    problems: list[str | None] = [problem] * ranks
    if ranks > 1:
        dist.all_gather_object(problems, problem)
    return next((said for said in problems if said), None)


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _from_main(value):
    """Rank 0's value on every rank: the others may see a shared folder a little later."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _set_aside(folder: Path, why: str) -> None:
    home = folder.parent.with_name(f"{folder.parent.name}.set-aside")
    home.mkdir(exist_ok=True)
    taken = {path.name for path in home.iterdir()}
    names = (f"{folder.name}{suffix}" for suffix in ["", *(f".{n}" for n in range(1, 10_000))])
    target = home / next(name for name in names if name not in taken)
    os.rename(folder, target)
    logger.warning("%s; set aside as %s", why, target)


def remove(folder: Path) -> None:
    """Delete a checkpoint; what a kill leaves of it is no complete one."""
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def remove_old(root: Path, keep: int) -> None:
    """Delete complete checkpoints but the newest `keep`, if one of those is whole.

    Incomplete folders do not count and are left alone: one may be being written.
    """
    complete = [s for s in steps_in(root) if is_complete(root / f"step-{s}")]
    kept, old = complete[:keep], complete[keep:]
    if old and any(_is_whole(root / f"step-{step}") for step in kept):
        for step in old:
            remove(root / f"step-{step}")
    elif old:
        logger.warning(
            "%s: none of the newest %d checkpoints is whole; none is deleted", root, keep
        )


def _is_whole(folder: Path) -> bool:
    try:
        verify(folder)
    except (UserError, OSError):
        return False
    return True
