"""The folder of a run: one run at a time in it, and room for a checkpoint."""

import contextlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from aixsim_cli.errors import UserError
from aixsim_cli.files import kind_of, write_atomic

LOCK_FILE = ".run.lock"
OWNER_FILE = ".run.json"

logger = logging.getLogger("aixsim")


@contextmanager
def locked(folder: Path, key: str) -> Iterator[None]:
    """Hold a run's folder, on rank 0, while the block runs.

    The lock is the kernel's (flock): it ends with the process that holds it, however that ends, so
    a lock file that lies about is no lock.

    Args:
        folder: made where it is not there.
        key: the setting that names it, for messages.

    Raises:
        UserError: another run holds the folder, or it cannot be written to.
    """
    made = first_missing(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_ours(folder, key)
        lock = FileLock(folder / LOCK_FILE, timeout=0)
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{key}: {folder} is in use by another run{_owner(folder)}; expected to wait "
            "for its end, or another folder"
        ) from None
    except OSError as error:
        raise UserError(f"{key}: {folder} cannot be written to: {error.strerror}") from None
    refused = False
    try:
        owner = folder / OWNER_FILE
        if owner.is_file():
            logger.info("the run before this one ended early%s; its lock is void", _owner(folder))
        _write_owner(owner, key)
        try:
            yield
        finally:
            # what is left of it tells of a run that was killed
            owner.unlink(missing_ok=True)
    except UserError:
        refused = True
        raise
    finally:
        if refused and made is not None:
            _unmake(folder, made)
        lock.release()


def _check_ours(folder: Path, key: str) -> None:
    """What has the names of these files and is somebody else's is not written over."""
    lock, owner, foreign = folder / LOCK_FILE, folder / OWNER_FILE, []
    # ours is empty, or, where there is no flock, begins with the number of a process; filelock
    # would empty another
    with contextlib.suppress(OSError):
        words = lock.read_bytes()[:200].split()
        foreign = [lock] if words and not words[0].isdigit() else []
    if os.path.lexists(owner) and not _owner(folder):
        # a kill may cut it, but `write_atomic` writes it whole
        foreign.append(owner)
    if foreign:
        raise UserError(
            f"{key}: {foreign[0]} is not of a run; expected that name to be free, or another folder"
        )


def first_missing(folder: Path) -> Path | None:
    """The first of a folder's parents, or itself, that making it has to make; None = none."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    return missing[-1] if missing else None


def _unmake(folder: Path, made: Path) -> None:
    """Take away a folder that was made for a run which then was refused, where nothing is in it.

    Args:
        folder: the run's, locked.
        made: the first of its parents that was made, or itself.
    """
    inside = sorted(folder.rglob("*"), reverse=True)
    if any(path.name != LOCK_FILE and not path.is_dir() for path in inside):
        return
    with contextlib.suppress(OSError):
        for path in inside:
            path.rmdir() if path.is_dir() else path.unlink()
    remove_empty(folder, made)


def remove_empty(folder: Path, made: Path) -> None:
    """Remove a folder and its parents up to one of them, as long as nothing is in them.

    Args:
        folder: the innermost.
        made: the outermost.
    """
    with contextlib.suppress(OSError):
        for path in (folder, *folder.parents):
            path.rmdir()
            if path == made:
                break


def check_places(places: Mapping[Path, Sequence[str]], key: str) -> None:
    """Refuse a run that would find what is in its way when it has something to write.

    Args:
        places: where it writes -> what may be there, as `files.kind_of` names it; or nothing.
        key: the setting that names the folder, for messages.

    Raises:
        UserError: naming the first that is something else.
    """
    for path, kinds in places.items():
        kind = kind_of(path)
        if kind not in kinds and kind != "no such file":
            raise UserError(f"{key}: {path}: got {kind}; expected {kinds[0]}, or nothing there")


def _write_owner(path: Path, key: str) -> None:
    text = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
    try:
        write_atomic(path, text)
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be written: {error.strerror}") from None


def _owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / OWNER_FILE).read_text(encoding="utf-8"))
        return f" (process {owner['pid']} on {owner['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def check_free_space(folder: Path, needed: int, key: str) -> None:
    """Refuse to start where not even one checkpoint would fit.

    Args:
        folder: exists.
        needed: bytes of a checkpoint.
        key: the setting that names the folder, for messages.

    Raises:
        UserError: with both numbers.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{key}: the disk of {folder} has {free / 2**20:,.0f} MiB left; a checkpoint "
            f"takes about {needed / 2**20:,.0f} MiB"
        )
