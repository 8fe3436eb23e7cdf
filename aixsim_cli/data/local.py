"""Texts in local files: which files a path means, and the documents in them."""

import codecs
import glob
import json
import logging
import os
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from aixsim_cli.errors import UserError, shown
from aixsim_cli.files import kind_of

logger = logging.getLogger("aixsim")

# characters after which the next blank line, or failing that the next line, ends a document
_SOFT_LIMIT = 4096
_HARD_LIMIT = 65536
# names that a message shows of many
_FEW = 5


def find_files(path: str) -> list[str]:
    """The files that a path means, in a fixed order, each checked for text.

    What a folder or a glob holds beside them is named once on the log.

    Args:
        path: a file, a glob (`**` crosses folders) or a folder, read with all its subfolders;
            linked files are read, linked folders are not.

    Returns:
        At least one file name.

    Raises:
        UserError: nothing there, a format that is not read, or a file that gives no text.
    """
    root, formats = Path(os.path.expanduser(path)), ", ".join(_READERS)
    left_out: list[str] = []
    if root.is_dir():
        found = sorted(_in_folder(root, left_out))
    elif os.path.lexists(root):
        found = [str(root)]
    else:
        matches = sorted(glob.glob(str(root), recursive=True))
        found = [name for name in matches if kind_of(name) == "a file"]
        # a glob that crosses folders reads what is in them
        left_out = [name for name in matches if name not in found and "**" not in path]
    if not found and (left_out or root.is_dir()):
        where = " in this folder" if root.is_dir() else ""
        only = f", only {_few(left_out)}" if left_out else ""
        raise UserError(f"dataset_path {path}: no {formats} file{where}{only}")
    for file in found or [str(root)]:
        if kind_of(file) != "a file":
            where = f"dataset_path {path}: {kind_of(file)}"
            raise UserError(f"{where}; expected a file, a glob, or a folder of files")
        if _suffix(file) not in _READERS:
            raise UserError(f"dataset_path {file}: cannot read this format; expected {formats}")
        # every later row is read when its turn comes; the first text tells a wrong file now
        next(row for row in read_files([file]) if has_text(row))
    if left_out:
        _say_once(f"dataset_path {path}: not read, as only {formats} files are: {_few(left_out)}")
    return found


def _in_folder(root: Path, left_out: list[str]) -> Iterator[str]:
    """The files of a folder that can be read; `left_out` gets the rest, hidden ones aside."""
    for folder, names, files in os.walk(root, onerror=_refuse):
        for name in [n for n in names if os.path.islink(os.path.join(folder, n))] + files:
            path = os.path.join(folder, name)
            if _suffix(name) in _READERS and kind_of(path) == "a file":
                yield path
            elif not any(part.startswith(".") for part in Path(path).relative_to(root).parts):
                left_out.append(path)


def _refuse(error: OSError) -> None:
    raise UserError(f"dataset_path {error.filename}: cannot be read: {error.strerror}") from error


def _few(names: list[str]) -> str:
    rest = f", … ({len(names)} in all)" if len(names) > _FEW else ""
    return ", ".join(sorted(names)[:_FEW]) + rest


def _suffix(file: str) -> str:
    return Path(file).suffix.lower()


@cache
def _say_once(message: str) -> None:
    """Log a message once in a process, and once over all ranks."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning("%s", message)


def read_files(files: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of files, one after the other.

    Rows whose "text" is no string are named on the log: the first of a file where it comes, their
    number at the file's end.

    Args:
        files: names with a suffix of .txt, .jsonl, .json or .parquet, of any case.

    Yields:
        {"text": value}; the value of a row without text is whatever the file has, or None.

    Raises:
        UserError: a file is unreadable, is not what its suffix says, or no row of it has text;
            with the line of what cannot be read.
    """
    for file in files:
        any_text, without = False, 0
        for place, value in _places(file):
            row = {"text": value}
            any_text = any_text or has_text(row)
            if not isinstance(value, str):
                without += 1
                if without == 1:
                    got = f"got {shown(value)}; expected a string; such rows are skipped"
                    _say_once(f"{file}: {place}: text: {got}")
            yield row
        if not any_text:
            raise UserError(
                f"{file}: holds no text; expected prose in a .txt, rows with a field 'text' "
                "that is not empty in the other formats"
            )
        if without > 1:
            _say_once(f"{file}: {without} rows without text are skipped")


def _places(file: str) -> Iterator[tuple[str, Any]]:
    """(place in the file, text) of its rows; whatever can go wrong in reading them is worded."""
    try:
        yield from _READERS[_suffix(file)](Path(file))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: is not UTF-8: {undecodable(file)}; expected text in UTF-8"
        ) from error
    except RecursionError as error:
        raise UserError(f"{file}: is nested too deeply; expected rows with a 'text'") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error


def undecodable(file: str) -> str:
    """Where a file stops being UTF-8; the decoder itself counts within its buffer alone."""
    decoder, line, offset = codecs.getincrementaldecoder("utf-8")(), 1, 0
    with open(file, "rb") as stream:
        while True:
            chunk = stream.read(1 << 20)
            waiting = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                place = offset - waiting + error.start
                return f"line {line}: byte 0x{error.object[error.start]:02x} at {place}"
            if not chunk:
                return "it has changed since"
            line, offset = line + chunk.count(b"\n"), offset + len(chunk)


def has_text(row: dict[str, Any]) -> bool:
    """Whether a row's "text" is a string with more than white space in it."""
    text = row.get("text")
    return isinstance(text, str) and bool(text.strip())


def _read_txt(file: Path) -> Iterator[tuple[str, str]]:
    """Paragraphs grouped into documents of 4 kB or a little more.

    A blank line alone says nothing about where a document ends, and a document for every
    paragraph would make the end-of-text token a mark of paragraphs.
    """
    lines: list[str] = []
    size = 0
    # utf-8-sig: UTF-8, with or without the byte-order mark that some editors write
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            lines.append(line)
            size += len(line)
            if size >= _HARD_LIMIT or (size >= _SOFT_LIMIT and not line.strip()):
                yield f"line {number}", "".join(lines).strip()
                lines, size = [], 0
    if size:
        yield "its end", "".join(lines).strip()


def _read_jsonl(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield f"line {number}", _text_of(_json_line(line, number))


def _json_line(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
    except RecursionError:
        reason = "is nested too deeply"
    except ValueError as error:  # a number of thousands of digits
        reason = str(error)
    raise ValueError(f"line {number}: {reason}; expected a JSON object a line")


def _read_json(file: Path) -> Iterator[tuple[str, Any]]:
    """A list of objects, or one object a line as many tools write it under this suffix."""
    with file.open(encoding="utf-8-sig") as stream:
        is_list = stream.read(4096).lstrip().startswith("[")
    if not is_list:
        yield from _read_jsonl(file)
        return
    for number, row in enumerate(json.loads(file.read_text("utf-8-sig")), start=1):
        yield f"item {number}", _text_of(row)


def _text_of(row: Any) -> Any:
    text = row.get("text") if isinstance(row, dict) else None
    if isinstance(text, str) and not text.isascii():
        # JSON can escape half of a surrogate pair, which is no character and cannot be tokenised
        return text.encode("utf-8", "replace").decode("utf-8")
    return text


def _read_parquet(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as parquet:
        if "text" not in parquet.schema_arrow.names:
            columns = ", ".join(parquet.schema_arrow.names)
            raise ValueError(f"has the columns {columns}; expected a column 'text'")
        batches = parquet.iter_batches(columns=["text"])
        texts = chain.from_iterable(batch.column("text").to_pylist() for batch in batches)
        for number, text in enumerate(texts, start=1):
            yield f"row {number}", text


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
