"""Files: those of others are read within bounds, ours are written whole or not at all."""

import os
import stat
import tempfile
from pathlib import Path

from aixsim_cli.errors import UserError

NOT_THERE = "a link to a file that is not there"
_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def kind_of(path: str | Path) -> str:
    """What is at a path, links followed, as a message names it.

    Returns:
        "a file", "a folder", "a FIFO", "a device", …, or why nothing is there: "no such file".
    """
    try:
        return _KINDS.get(stat.S_IFMT(os.stat(path).st_mode), "of an unknown kind")
    except FileNotFoundError:
        return NOT_THERE if os.path.islink(path) else "no such file"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ValueError:  # a NUL in the name
        return "no such file"


def read_text(path: str | Path, *, limit: int) -> str:
    """A small text file.

    Args:
        path: of a regular file: a FIFO could make a reader wait for ever, a device read for ever.
        limit: bytes that it may have.

    Returns:
        Its text, without a byte-order mark.

    Raises:
        UserError: it is none, cannot be read, is too large or is not UTF-8.
    """
    kind = kind_of(path)
    if kind != "a file":
        if not kind.startswith("cannot be read"):
            kind = f"cannot be read: {kind}"
        raise UserError(f"{path}: {kind}; expected a text file")
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > limit:
        raise UserError(f"{path}: is too large; expected at most {limit >> 10} KiB of text")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: is not text in UTF-8 (byte {error.start}: "
            f"0x{content[error.start]:02x}); expected a text file"
        ) from None


def check_new(path: Path, key: str) -> None:
    """See, before the work that fills it, that a file can be made and takes the place of none.

    Args:
        path: of the file.
        key: the option that names it, for messages.

    Raises:
        UserError: something is there, or its folder cannot be made or written to.
    """
    if os.path.lexists(path):
        raise UserError(f"{key}: {path}: exists; expected a new file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{key}: {path}: cannot be written: {error.strerror}") from None


def write_atomic(path: str | Path, text: str) -> None:
    """Write a file whole or not at all, in the place of one that may be there.

    Args:
        path: a link or a device there would be replaced, not written through.
        text: written in UTF-8.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:50]}.{os.getpid()}.tmp")
    # not through a link that lies there
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
