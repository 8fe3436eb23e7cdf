"""Texts in local files: which files a path means, and the documents in them."""

import glob
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aixsim_cli.errors import UserError

# characters after which the next blank line, or failing that the next line, ends a document
_SOFT_LIMIT = 4096
_HARD_LIMIT = 65536


def find_files(path: str) -> list[str]:
    """The files that a path means, in a fixed order, each checked for text.

    Args:
        path: a file, a glob (`**` crosses folders) or a folder, read with all its subfolders.

    Returns:
        At least one file name.

    Raises:
        UserError: nothing there, a format that is not read, or a file that gives no text.
    """
    root = Path(os.path.expanduser(path))
    if root.is_dir():
        found = [file for file in root.rglob("*") if file.suffix in _READERS]
    elif root.exists():
        found = [root]
    else:
        found = [Path(name) for name in glob.glob(str(root), recursive=True)]
    files = sorted(str(file) for file in found if file.is_file())
    formats = ", ".join(_READERS)
    if not files and root.is_dir():
        raise UserError(f"dataset_path {path}: no {formats} file in this folder")
    if not files:
        raise UserError(
            f"dataset_path {path}: no such file; expected a file, a glob, or a folder of files"
        )
    for file in files:
        if Path(file).suffix not in _READERS:
            raise UserError(f"dataset_path {file}: cannot read this format; expected {formats}")
        # every later row is read when its turn comes; the first text tells a wrong file now
        next(row for row in read_files([file]) if has_text(row))
    return files


def read_files(files: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of files, one after the other.

    Args:
        files: names with a suffix of .txt, .jsonl, .json or .parquet.

    Yields:
        {"text": value}; the value of a row without text is whatever the file has, or None.

    Raises:
        UserError: a file is unreadable, is not what its suffix says, or no row of it has text.
    """
    for file in files:
        any_text = False
        try:
            for value in _READERS[Path(file).suffix](Path(file)):
                row = {"text": value}
                any_text = any_text or has_text(row)
                yield row
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: is not UTF-8: {error}; expected text in UTF-8") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read: {error}") from error
        if not any_text:
            raise UserError(
                f"{file}: holds no text; expected prose in a .txt, rows with a field 'text' "
                "that is not empty in the other formats"
            )


def has_text(row: dict[str, Any]) -> bool:
    """Whether a row's "text" is a string with more than white space in it."""
    text = row.get("text")
    return isinstance(text, str) and bool(text.strip())


def _read_txt(file: Path) -> Iterator[str]:
    """Paragraphs grouped into documents of 4 kB or a little more.

    A blank line alone says nothing about where a document ends, and a document for every
    paragraph would make the end-of-text token a mark of paragraphs.
    """
    lines: list[str] = []
    size = 0
    # utf-8-sig: UTF-8, with or without the byte-order mark that some editors write
    with file.open(encoding="utf-8-sig") as stream:
        for line in stream:
            lines.append(line)
            size += len(line)
            if size >= _HARD_LIMIT or (size >= _SOFT_LIMIT and not line.strip()):
                yield "".join(lines).strip()
                lines, size = [], 0
    if size:
        yield "".join(lines).strip()


def _read_jsonl(file: Path) -> Iterator[Any]:
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                yield _text_of(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"line {number}: {error}; expected a JSON object a line"
                ) from error


def _read_json(file: Path) -> Iterator[Any]:
    """A list of objects, or one object a line as many tools write it under this suffix."""
    with file.open(encoding="utf-8-sig") as stream:
        is_list = stream.read(4096).lstrip().startswith("[")
    if not is_list:
        yield from _read_jsonl(file)
        return
    for row in json.loads(file.read_text("utf-8-sig")):
        yield _text_of(row)


def _text_of(row: Any) -> Any:
    text = row.get("text") if isinstance(row, dict) else None
    if isinstance(text, str) and not text.isascii():
        # JSON can escape half of a surrogate pair, which is no character and cannot be tokenised
        return text.encode("utf-8", "replace").decode("utf-8")
    return text


def _read_parquet(file: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as parquet:
        if "text" not in parquet.schema_arrow.names:
            columns = ", ".join(parquet.schema_arrow.names)
            raise ValueError(f"has the columns {columns}; expected a column 'text'")
        for batch in parquet.iter_batches(columns=["text"]):
            yield from batch.column("text").to_pylist()


_READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
