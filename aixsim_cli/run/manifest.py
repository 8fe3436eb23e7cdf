"""What an intact folder holds: `manifest.json`, the size and SHA-256 of each of its files.

It is written last, so that its presence says that the folder is complete. Neither DCP nor
safetensors notices a flipped byte; this does.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from aixsim_cli.errors import UserError
from aixsim_cli.files import write_atomic

MANIFEST_FILE = "manifest.json"
# is there from before the first file is written until the manifest is: tells a torn folder from
# another program's, which never had a manifest
SAVING_FILE = ".incomplete"
_FORMAT = 1
# the files that a model is read of; transformers puts an adapter that lies beside on top of it
READ = (
    "*.safetensors", "*.index.json", "config.json", "pytorch_model*.bin", "*.distcp", ".metadata",
    "adapter_config.json", "adapter_model*", "generation_config.json", "transform.yaml",
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*",
    "merges.txt", "*.model", "*.tiktoken",
)  # fmt: skip


@dataclass(frozen=True)
class Digest:
    """What a file must be.

    Args:
        bytes: its size.
        sha256: in hexadecimal digits.
    """

    bytes: int
    sha256: str


def digest_of(path: Path) -> Digest:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return Digest(file.tell(), digest.hexdigest())


def begin_saving(folder: str | Path) -> None:
    """Declare that a folder is being written, or deleted: it is torn until it has a manifest.

    Args:
        folder: made where it is not there; one that is written over is complete no more.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SAVING_FILE).touch()
    (folder / MANIFEST_FILE).unlink(missing_ok=True)


def is_being_saved(folder: str | Path) -> bool:
    """Whether a folder's saving, or deleting, has begun and not ended.

    One that holds nothing counts: the mark follows the folder, and goes before it.
    """
    folder = Path(folder)
    begun = (folder / SAVING_FILE).exists() or (folder.is_dir() and not any(folder.iterdir()))
    return begun and not is_complete(folder)


def write_manifest(
    folder: str | Path,
    known: Mapping[str, Digest] | None = None,
    *,
    leave_out: Iterable[str] = (),
    maker: str | None = None,
) -> None:
    """Declare a folder complete, as it is now.

    Args:
        folder: every file in it is listed.
        known: relative name -> digest of files that need no reading.
        leave_out: relative names of files that may change later: they are listed apart, for
            `read_beside`, and not verified.
        maker: noted, for `maker_of`.
    """
    folder, known = Path(folder), known or {}
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (MANIFEST_FILE, SAVING_FILE)
    )
    beside = {
        name: asdict(digest_of(folder / name)) if name in names else None for name in leave_out
    }
    names = [name for name in names if name not in beside]
    files = {name: asdict(known.get(name) or digest_of(folder / name)) for name in names}
    # a power cut must not leave a manifest of files that are not there
    paths = [folder / name for name in names]
    for path in {*paths, *(path.parent for path in paths)}:
        sync(path)
    noted: dict[str, Any] = {} if maker is None else {"maker": maker}
    noted |= {"beside": beside} if beside else {}
    text = json.dumps({"format": _FORMAT, **noted, "files": files}, indent=1)
    write_atomic(folder / MANIFEST_FILE, text)
    sync(folder)
    (folder / SAVING_FILE).unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have a file, or a folder's names, on the disk: only then does it survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_complete(folder: str | Path) -> bool:
    """Whether a folder has been declared complete; its files may have been damaged since."""
    return (Path(folder) / MANIFEST_FILE).is_file()


def read_manifest(folder: str | Path) -> dict[str, Digest]:
    """The digests of a complete folder's files, by relative name.

    Raises:
        UserError: the manifest is missing, damaged, lists nothing, or names a file outside the
            folder.
    """
    path = Path(folder) / MANIFEST_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        files = {str(name): Digest(**digest) for name, digest in data["files"].items()}
        outside = [name for name in files if not _is_inside(name)]
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; expected a complete folder, whose last file it is"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: damaged: is not a manifest") from None
    if data.get("format") != _FORMAT:
        raise UserError(f"{path}: format: got {data.get('format')}; expected {_FORMAT}")
    if outside:
        raise UserError(f"{path}: damaged: names a file outside the folder: {outside[0]!r}")
    if not files:
        raise UserError(f"{path}: damaged: lists no file; expected those of an intact folder")
    return files


def read_beside(folder: str | Path) -> dict[str, Digest | None]:
    """The files that go along with a complete folder: name -> as written, or None where none was.

    Raises:
        UserError: as `read_manifest`.
    """
    try:
        return {
            name: None if digest is None else Digest(**digest)
            for name, digest in _noted(folder).get("beside", {}).items()
            if _is_inside(name)
        }
    except (TypeError, AttributeError):
        return {}


def maker_of(folder: str | Path) -> str | None:
    """Who made a complete folder, where that was noted.

    Raises:
        UserError: as `read_manifest`.
    """
    return _noted(folder).get("maker")


def _noted(folder: str | Path) -> dict[str, Any]:
    """All that a manifest says, once it has been found to be one."""
    read_manifest(folder)
    return json.loads((Path(folder) / MANIFEST_FILE).read_text(encoding="utf-8"))


def verify(
    folder: str | Path, names: Iterable[str] | None = None, *, contents: bool = True
) -> None:
    """Compare a complete folder's files with its manifest.

    Args:
        folder: with a manifest.
        names: of the files to look at; None = all that are listed.
        contents: False looks at sizes alone.

    Raises:
        UserError: naming the first file that is missing, cut or changed, or that a model would be
            read of and that is not listed.
    """
    folder = Path(folder)
    files = read_manifest(folder)
    for path in folder.iterdir():
        # what nobody hashed is not intact, whatever else is
        if path.name not in files and any(map(path.match, READ)):
            raise UserError(
                f"{path}: not in {MANIFEST_FILE}; expected every file of the model to be listed "
                f"(if it was put there on purpose, delete {MANIFEST_FILE})"
            )
    for name in files if names is None else names:
        path, expected = folder / name, files[name]
        if not path.is_file():
            raise UserError(f"{path}: missing; {MANIFEST_FILE} lists it")
        size = path.stat().st_size
        if size != expected.bytes:
            raise UserError(
                f"{path}: damaged: has {size} bytes; it was written with {expected.bytes}"
            )
        if contents and digest_of(path).sha256 != expected.sha256:
            raise UserError(
                f"{path}: damaged: its SHA-256 is not that of {MANIFEST_FILE} (if it was changed "
                f"on purpose, delete {MANIFEST_FILE})"
            )


def verify_if_listed(folder: str | Path) -> None:
    """`verify`, for a folder that another program may have made, without a manifest.

    Raises:
        UserError: naming the first file that is missing, cut or changed; or the folder, whose
            saving did not end.
    """
    if is_complete(folder):
        verify(folder)
    elif is_being_saved(folder):
        raise UserError(
            f"{folder}: incomplete, its saving did not end; expected a complete one: the command "
            "that was writing it, run again, writes the rest"
        )


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name
