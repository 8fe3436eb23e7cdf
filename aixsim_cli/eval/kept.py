"""What a sweep has measured, kept in a folder, so that one that was interrupted goes on.

`sweep.json` says what is measured; each line of `losses.jsonl` is one loss. A line that a kill cut
off is measured again; nothing else there is ever written over.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aixsim_cli.errors import RunError, UserError
from aixsim_cli.eval.perplexity import Perplexity
from aixsim_cli.files import kind_of, write_atomic
from aixsim_cli.run.folder import check_places, locked
from aixsim_cli.settings.json_object import load_json_object

IDENTITY_FILE = "sweep.json"
LOSSES_FILE = "losses.jsonl"


class Kept:
    """Losses by what was evaluated and by noise seed.

    Args:
        path: the file of losses; None = they are kept in memory alone.

    Raises:
        UserError: the file cannot be read, or a line of it is no loss.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._losses: dict[str, Perplexity] = {}
        if path is not None and path.exists():
            self._read(path)

    def get(self, values: Mapping[str, Any] | None, repeat: int) -> Perplexity | None:
        """The loss at a point; None = not measured yet.

        Args:
            values: of the point; none = under the transform unchanged, None = of the digital model.
            repeat: the noise seed.
        """
        return self._losses.get(_key(values, repeat))

    def add(self, values: Mapping[str, Any] | None, repeat: int, loss: Perplexity) -> None:
        """Keep a loss, on the disk before this returns.

        Raises:
            RunError: it cannot be written.
        """
        self._losses[_key(values, repeat)] = loss
        if self._path is None:
            return
        row = {"values": values, "repeat": repeat, "tokens": loss.tokens, "nll": _finite(loss.nll)}
        line = json.dumps(row | {"windows": list(map(_finite, loss.windows))}, allow_nan=False)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"{self._path}: cannot be written: {error.strerror}") from error

    def _read(self, path: Path) -> None:
        try:
            whole = path.read_bytes()
        except OSError as error:
            raise UserError(f"--output: {path}: cannot be read: {error.strerror}") from None
        end = whole.rfind(b"\n") + 1
        for number, line in enumerate(whole[:end].splitlines(), start=1):
            try:
                row = json.loads(line)
                windows = tuple(map(_number, row["windows"]))
                loss = Perplexity(int(row["tokens"]), _number(row["nll"]), windows)
                self._losses[_key(row["values"], row["repeat"])] = loss
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{path}:{number}: not a loss of a sweep; expected the file as it was written, "
                    "or another --output"
                ) from None
        if end < len(whole):
            # the next line must not be added to half of one
            os.truncate(path, end)


@contextmanager
def kept_in(folder: Path | None, identity: Mapping[str, Any]) -> Iterator[Kept]:
    """The losses of a folder, which no other process adds to while the block runs.

    Args:
        folder: made where it is not there; None = keep nothing.
        identity: what is measured, on what: what is kept must be of the same. Plain values, by the
            names that a message gives them.

    Raises:
        UserError: the folder is of another sweep, of something else, in use, or cannot be used.
    """
    if folder is None:
        yield Kept()
        return
    path, losses = folder / IDENTITY_FILE, folder / LOSSES_FILE
    check_places({folder: ["a folder"], path: ["a file"], losses: ["a file"]}, "--output")
    with locked(folder, "--output"):
        if kind_of(path) == "a file":
            _check_same(folder, load_json_object(path), identity)
        elif kind_of(losses) == "a file":
            raise UserError(f"--output: {losses}: has no {IDENTITY_FILE} beside it; expected both")
        else:
            _write(path, identity)
        yield Kept(losses)


def _write(path: Path, identity: Mapping[str, Any]) -> None:
    try:
        write_atomic(path, json.dumps(identity, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--output: {path}: cannot be written: {error.strerror}") from None


def _check_same(folder: Path, kept: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    # as a file has it
    asked = json.loads(json.dumps(asked))
    names = [name for name in {**asked, **kept} if asked.get(name) != kept.get(name)]
    if names:
        told = [
            f"{name} ({kept.get(name)} there, {asked.get(name)} here)"
            if _is_short(kept.get(name)) and _is_short(asked.get(name))
            else name
            for name in names
        ]
        raise UserError(
            f"--output: {folder}: holds a sweep of another {', '.join(told)}; expected the same, "
            "or another folder"
        )


def _is_short(value: Any) -> bool:
    return len(str(value)) <= 40 and not isinstance(value, dict | list)


def _key(values: Mapping[str, Any] | None, repeat: int) -> str:
    return json.dumps([values, repeat], sort_keys=True)


def _finite(value: float) -> float | None:
    # JSON has no word for what is no number
    return value if math.isfinite(value) else None


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
