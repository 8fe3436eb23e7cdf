"""English text without a download: the documentation inside this Python installation.

Sources are `pydoc_data.topics` (the language reference) and the docstrings of the standard
library, read from its files with `ast`; no module of it is imported or run. Paragraphs that are
code rather than prose are dropped, and each paragraph is kept where it comes first, so that no
two documents, and hence no two splits, share one.
"""

import ast
import hashlib
import json
import re
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from aixsim_cli.data.cache import cache_folder, writing
from aixsim_cli.errors import UserError
from aixsim_cli.files import write_atomic

Split = Literal["train", "heldout"]

# tests and their data say little in prose; the others are not part of every installation
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "ensurepip",
    "site-packages",
    "dist-packages",
}
_HELDOUT_ONE_IN = 10
_PROSE_CHARACTERS = re.compile(r"[A-Za-z ,.'\n]")
_MIN_PROSE_SHARE = 0.85
_MIN_WORDS = 4


def builtin_documents(split: Split) -> list[str]:
    """The documents of one split, in an order that only the Python version decides.

    A document is one topic of the language reference or the docstrings of one module, paragraphs
    separated by blank lines. One document in ten, chosen by its name, is held out. The result is
    cached, because reading the whole library takes seconds.

    Args:
        split: "train" or "heldout"; they share no paragraph.

    Returns:
        Non-empty texts.

    Raises:
        UserError: this installation has no documentation, or the cache folder is unusable.
    """
    path = cache_folder() / f"corpus-{_fingerprint()}.json"
    splits = _read_cache(path)
    if splits is None:
        splits = _build()
        # several ranks may be here at once: each writes a whole file
        with writing(path):
            write_atomic(path, json.dumps(splits | {"digest": _digest(splits)}))
    return splits[split]


def _fingerprint() -> str:
    """Changes with anything the corpus depends on: the installation and this file."""
    parts = (sys.version, sysconfig.get_path("stdlib"), Path(__file__).read_text("utf-8"))
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def _read_cache(path: Path) -> dict[str, list[str]] | None:
    try:
        splits = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    # what others have put there is not used
    usable = isinstance(splits, dict) and splits.pop("digest", None) == _digest(splits)
    return splits if usable else None


def _digest(splits: dict[str, list[str]]) -> str:
    return hashlib.blake2b(json.dumps(splits).encode(), digest_size=16).hexdigest()


def _build() -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {"train": [], "heldout": []}
    seen: set[str] = set()
    # by a hash of the name: the language reference and the library mix
    for name, paragraphs in sorted(_sources(), key=lambda source: _hash(source[0])):
        kept = []
        for paragraph in paragraphs:
            key = " ".join(paragraph.split())
            if key not in seen and _is_prose(paragraph):
                seen.add(key)
                kept.append(paragraph)
        if kept:
            heldout = _hash(name) % _HELDOUT_ONE_IN == 0
            splits["heldout" if heldout else "train"].append("\n\n".join(kept))
    if not all(splits.values()):
        raise UserError(
            f"the built-in corpus is empty: {sysconfig.get_path('stdlib')} holds no Python sources;"
            " use --dataset local with --dataset-path, or a Python that ships its library as .py"
        )
    return splits


def _hash(name: str) -> int:
    return zlib.crc32(name.encode())


def _sources() -> Iterator[tuple[str, list[str]]]:
    """(name, paragraphs) of every topic and every module."""
    for name, text in _topics().items():
        yield f"topic {name}", _paragraphs(text)
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        relative = file.relative_to(library)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts):
            yield f"module {relative.as_posix()}", _docstring_paragraphs(file)


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return {}
    return topics


def _docstring_paragraphs(file: Path) -> list[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []  # a file of a later Python, or templates with the suffix .py
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = (ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, documented))
    return [paragraph for text in docstrings if text for paragraph in _paragraphs(text)]


def _paragraphs(text: str) -> list[str]:
    return [part.strip("\n").rstrip() for part in re.split(r"\n[ \t]*\n", text) if part.strip()]


def _is_prose(paragraph: str) -> bool:
    letters = len(_PROSE_CHARACTERS.findall(paragraph))
    return (
        letters >= _MIN_PROSE_SHARE * len(paragraph)
        and len(paragraph.split()) >= _MIN_WORDS
        and ">>>" not in paragraph
    )
