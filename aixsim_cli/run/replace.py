"""Writing beside, then renaming: what a kill leaves is the old or the new, whole.

A new folder is written in a workspace beside its place, `.NAME.aixsim`, which holds

- `new`: what is being written,
- `old`: what it takes the place of, between two renames and until it is deleted,
- `lock`: held (flock) by the process that writes.

What a killed process leaves there is put in order by the next one that wants the same place.
"""

import fcntl
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path

from aixsim_cli.errors import UserError
from aixsim_cli.run.folder import LOCK_FILE, first_missing, remove_empty
from aixsim_cli.run.manifest import (
    MANIFEST_FILE,
    Digest,
    begin_saving,
    digest_of,
    is_being_saved,
    is_complete,
    maker_of,
    read_beside,
    read_manifest,
    sync,
    verify,
    write_manifest,
)

_STAGED, _PUBLISHED = WORKPLACES = ".staged", ".published"

logger = logging.getLogger("aixsim")


@contextmanager
def new_folder(
    target: Path, *, maker: str, force: bool = False, source: Path | None = None
) -> Iterator[Path]:
    """A folder to write into, which takes the name `target` when the block ends without error.

    Replaced is nothing but a folder that `maker` made and nobody has changed since; a folder that
    holds nothing is no obstacle.

    Args:
        target: where the folder is wanted.
        maker: noted in its manifest.
        force: replace such a folder.
        source: what is read meanwhile; the target may not hold it, nor lie in it.

    Raises:
        UserError: the target is in the way, before the block and after it; another process writes
            it; or its parent cannot be written to.
    """
    # its own name is kept, so that a symbolic link is seen
    named = target.name not in ("", "..")
    target = target.parent.resolve() / target.name if named else target.resolve()
    if not target.name:
        raise UserError(f"{target}: is the root of all files; expected a new folder")
    _check_apart(target, source)
    with _workspace(target) as home:
        _check_target(target, maker, force)
        new = home / "new"
        new.mkdir()
        yield new
        open_to_all(new)
        known = read_manifest(new) if is_complete(new) else None
        write_manifest(new, known, maker=maker)
        _put_in_place(home, target, maker, force)


def interrupted(target: Path) -> str | None:
    """What a reader should know of a place that is empty because a process was killed."""
    target = target.absolute()
    old = _home(target) / "old" if target.name else target
    if old.is_dir() and not os.path.lexists(target):
        return (
            f"a conversion was killed while it replaced it: {old} is the folder as it was; the "
            "same conversion, or a mv, puts it back"
        )
    if (target / _PUBLISHED).is_dir():
        return (
            f"a run was killed while it put its model in place, which lies in "
            f"{target / _PUBLISHED}; the same run, resumed, completes it"
        )
    return None


def _check_apart(target: Path, source: Path | None) -> None:
    if source is None:
        return
    where, read = target.resolve(), source.resolve()
    home = _home(target)
    if home == read or home in read.parents:
        raise UserError(
            f"{target}: is written in {home}, where the source, {source}, lies; expected a target "
            "of another name, or the source to be moved away"
        )
    if where == read:
        raise UserError(f"{target}: is the source itself; expected a new folder")
    if where in read.parents:
        raise UserError(f"{target}: holds the source, {source}; expected a new folder beside it")
    if read in where.parents:
        raise UserError(f"{target}: lies in the source, {source}; expected a new folder beside it")


def _check_target(target: Path, maker: str, force: bool, *, contents: bool = True) -> None:
    problem = _in_the_way(target, maker, contents=contents)
    if problem is not None:
        asked = "" if force else "exists, and "
        raise UserError(
            f"{target}: {asked}{problem}; expected a new folder: --force replaces nothing but an "
            f"unchanged folder that {maker} made"
        )
    if not force and not _is_free(target):
        raise UserError(f"{target}: exists; expected a new folder, or --force to replace it")


def _is_free(target: Path) -> bool:
    if target.is_symlink() or not target.is_dir():
        return not os.path.lexists(target)
    return not any(target.iterdir())


def _in_the_way(target: Path, maker: str, *, contents: bool = True) -> str | None:
    """Why what is at `target` may not be replaced; None = it may be, or nothing is there."""
    if target.is_symlink():
        return "is a symbolic link"
    if not target.is_dir():
        return "exists and is no folder" if target.exists() else None
    if _is_free(target):
        return None
    try:
        listed = read_manifest(target).keys() | {MANIFEST_FILE}
        if maker_of(target) != maker:
            return f"was not made by {maker}"
        for path in sorted(target.rglob("*")):
            name = path.relative_to(target).as_posix()
            if name == LOCK_FILE and path.is_file() and not path.stat().st_size:
                # a run was refused this folder
                continue
            holds_listed = any(one.startswith(f"{name}/") for one in listed)
            if path.is_symlink() or not (name in listed or (path.is_dir() and holds_listed)):
                return f"holds {name}, which {maker} did not write"
        verify(target, contents=contents)
    except UserError as error:
        missing = not is_complete(target)
        return f"was not made by {maker}" if missing else f"was changed since ({error})"
    except OSError as error:
        return f"cannot be looked at ({error.strerror})"
    return None


def _home(target: Path) -> Path:
    return target.with_name(f".{target.name}.aixsim")


@contextmanager
def _workspace(target: Path) -> Iterator[Path]:
    home = _home(target)
    made = first_missing(home) or home
    try:
        home.mkdir(parents=True, exist_ok=True)
        inside = {path.name for path in home.iterdir()}
        # a process of ours locks before it writes, and what a kill leaves of it has the lock
        foreign = inside - {"lock", "new", "old"} if "lock" in inside else inside
        if foreign:
            raise UserError(
                f"{home}: holds {min(foreign)}, which is not ours; expected that name to be free, "
                f"to write {target.name} in"
            )
        handle = os.open(home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror}: {home}") from None
    try:
        _lock(handle, home / "lock", target)
        _put_in_order(home, target)
        try:
            yield home
        finally:
            _put_in_order(home, target, said=False)
            (home / "lock").unlink(missing_ok=True)
            remove_empty(home, made)
    finally:
        os.close(handle)


def _lock(handle: int, path: Path, target: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # who held it deletes the file in the end; a lock on what has no name any more is none
        held = path.exists() and os.path.samestat(os.fstat(handle), path.stat())
    except BlockingIOError:
        held = False
    if not held:
        raise UserError(
            f"{target}: another process is writing it; expected to wait for its end, or another "
            "target"
        )


def _put_in_order(home: Path, target: Path, *, said: bool = True) -> None:
    """Take up what a process left in its workspace, this one or one that was killed."""
    new, old = home / "new", home / "old"
    if os.path.lexists(old) and new.exists() and os.path.lexists(target):
        raise UserError(
            f"{target}: was made by somebody else while it was being replaced; {old} is what it "
            f"was before, {new} what was to replace it; expected both to be moved away"
        )
    if os.path.lexists(old) and not os.path.lexists(target):
        os.rename(old, target)
        if said:
            logger.warning("%s: put back: a process was killed while it replaced it", target)
    for left in (new, old):
        if left.exists():
            if said:
                logger.warning("%s: left by a process that was killed; deleted", left)
            shutil.rmtree(left)


def _put_in_place(home: Path, target: Path, maker: str, force: bool) -> None:
    # again: much may have happened since the first look
    _check_target(target, maker, force, contents=False)
    if not _is_free(target):
        os.rename(target, home / "old")
        # once more, now that nobody reaches it by its name
        problem = _in_the_way(home / "old", maker)
        if problem is not None:
            os.rename(home / "old", target)
            raise UserError(f"{target}: {problem}; nothing was replaced")
    try:
        # a folder takes the name of nothing, or of an empty folder; else the kernel refuses
        os.rename(home / "new", target)
    except OSError as error:
        raise UserError(
            f"{target}: appeared while it was being made ({error.strerror}); nothing was replaced"
        ) from None
    sync(target.parent)


def open_to_all(folder: Path) -> None:
    """Make a folder's files as open as the umask lets them be: safetensors makes private ones."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        # some disks know no such thing
        with suppress(OSError):
            path.chmod((path.stat().st_mode & 0o7000) | wanted)


def stage(folder: Path, aside: Path) -> Path:
    """An empty folder within `folder`, for files that `publish` puts in place all at once.

    Args:
        folder: exists, and is held by this process alone (`run.folder.locked`); what a killed
            process published in it has been completed.
        aside: takes what is in the way and not ours, as of `publish`.
    """
    staged = folder / _STAGED
    if is_being_saved(staged):
        # a process of ours was killed while it wrote
        shutil.rmtree(staged)
    elif os.path.lexists(staged):
        _told_aside(staged, "was not written by the run", aside)
    begin_saving(staged)
    return staged


def publish(folder: Path, aside: Path, *, maker: str, leave_out: Iterable[str] = ()) -> None:
    """Put what was staged in the place of the model that is in `folder`, with its manifest.

    Deleted is what was published before and nobody has changed since. Everything else that has a
    name of a file of the new model, or that tells of the old one, is moved to `aside`.

    Args:
        folder: in which files were staged.
        aside: a folder, made where it is needed.
        maker: noted in the manifest.
        leave_out: names of files that go along, but may change later: no manifest verifies them.
            One that was not staged tells of the old model.
    """
    write_manifest(folder / _STAGED, leave_out=leave_out, maker=maker)
    # from here on a kill delays, and changes nothing
    os.rename(folder / _STAGED, folder / _PUBLISHED)
    sync(folder)
    finish_publishing(folder, aside, said=False)


def finish_publishing(folder: Path, aside: Path, *, said: bool = True) -> None:
    """Complete a `publish` that was killed; without one, do nothing.

    Args:
        folder: held by this process alone.
        aside: as of `publish`.
        said: it was killed: look at what lies there, and log it.

    Raises:
        UserError: what was to be put in place has been damaged since.
    """
    whole = folder / _PUBLISHED
    if not whole.is_dir():
        return
    if is_complete(whole):
        names = _undamaged(whole) if said else read_manifest(whole).keys()
        published, beside = _published(folder), read_beside(whole)
        kept = names | {name for name, digest in beside.items() if digest is not None}
        for name in sorted((published.keys() | beside.keys()) - kept):
            _keep_aside(folder / name, published.get(name), aside)
            (folder / name).unlink(missing_ok=True)
        for path in [p for p in whole.rglob("*") if p.is_file() and p.name != MANIFEST_FILE]:
            name = path.relative_to(whole).as_posix()
            _keep_aside(folder / name, published.get(name), aside)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, folder / name)
        os.replace(whole / MANIFEST_FILE, folder / MANIFEST_FILE)
        if said:
            logger.warning("%s: the save of its model, which was killed, is completed", folder)
        for path in sorted(whole.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
                path.rmdir()
    if is_complete(folder) and not any(whole.iterdir()):
        shutil.rmtree(whole)
    else:
        _told_aside(whole, "is not what a run was about to put in place", aside)


def _undamaged(whole: Path) -> Set[str]:
    """The names that a published folder lists; those that are still in it are verified."""
    try:
        names = read_manifest(whole).keys()
        verify(whole, [name for name in names if (whole / name).exists()])
    except UserError as error:
        raise UserError(
            f"{error}; expected a complete copy of it: without {whole} the run makes its model anew"
        ) from None
    return names


def _published(folder: Path) -> dict[str, Digest]:
    """What the folder's model was published with: name -> as it was written."""
    try:
        beside = read_beside(folder)
        return read_manifest(folder) | {k: v for k, v in beside.items() if v is not None}
    except UserError:
        # none, or a damaged one: its model goes without it
        return {}


def _keep_aside(path: Path, written: Digest | None, aside: Path) -> None:
    """Move a file out of the way, unless it is what was written there."""
    if not os.path.lexists(path):
        return
    if path.is_file() and not path.is_symlink() and written == digest_of(path):
        return
    why = (
        "was changed after the model beside it was saved"
        if written
        else "was not written by the run"
    )
    _told_aside(path, why, aside)


def _told_aside(path: Path, why: str, aside: Path) -> None:
    logger.warning("%s: %s; set aside as %s", path, why, set_aside(path, aside))


def set_aside(path: Path, aside: Path) -> Path:
    """Move a file or folder into a folder, under its name or, where that is taken, with a number.

    Args:
        path: on the same disk.
        aside: made where it is not there.

    Returns:
        Where it is now.
    """
    aside.mkdir(parents=True, exist_ok=True)
    taken = {other.name for other in aside.iterdir()}
    names = (f"{path.name}{suffix}" for suffix in ["", *(f".{n}" for n in range(1, 10_000))])
    target = aside / next(name for name in names if name not in taken)
    os.rename(path, target)
    return target
