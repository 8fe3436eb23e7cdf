"""The folder for what is made once on a machine and can be made again at any time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aixsim_cli.errors import UserError


def cache_folder() -> Path:
    """This user's cache folder, made if absent.

    Returns:
        `$AIXSIM_CACHE`, else `$XDG_CACHE_HOME/aixsim`, else `~/.cache/aixsim`.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    chosen = os.environ.get("AIXSIM_CACHE")
    if chosen:
        folder = Path(os.path.expanduser(chosen))
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aixsim"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(folder, error.strerror) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unusable(folder, "no permission to write there")
    return folder


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Word what goes wrong while `path`, a part of the cache, is made.

    Raises:
        UserError: with the path, the reason and the remedy.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # `tokenizers` raises no class of its own for a full disk
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise _unusable(path, f"cannot be written: {reason}") from error


def _unusable(path: Path, reason: str | None) -> UserError:
    return UserError(f"cache {path}: {reason}; set AIXSIM_CACHE to a folder that can be written to")
