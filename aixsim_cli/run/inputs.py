"""What a run reads, told by its contents: files that have moved are the same, others are not.

Each checkpoint keeps it in `inputs.json`, and a run that goes on compares.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from aixsim_cli.run.manifest import digest_of, is_complete, read_manifest

INPUTS_FILE = "inputs.json"
# of each file of data this many pieces are hashed, evenly spread from its first byte to its last
_PIECES = 16
_PIECE_BYTES = 4096
_MOST_BYTES = 4 << 30
RANDOM = "random"
# of tokenizer.json, what decides which token has which number
_TOKENIZER_PARTS = ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor")


@dataclass(frozen=True)
class Inputs:
    """Digests of what a run reads, in hexadecimal digits; None = not known.

    Args:
        tokenizer: of `tokenizer_digest` or `definition_digest`.
        data: of `files_digest`, or what else tells the data apart.
        start: of the weights it began with, by `weights_digest`; or `RANDOM`.
        frame: the tokens that every document is put between, see `DocumentEncoder.frame`.
        tokens: `DocumentEncoder.digest`: what a document becomes, by all files of the tokenizer.
        text: of all bytes of the data, where they are not too many.
        blocks: of all tokens that are trained on, where they are cut before the training.
    """

    tokenizer: str | None = None
    data: str | None = None
    start: str | None = None
    frame: str | None = None
    tokens: str | None = None
    text: str | None = None
    blocks: str | None = None

    def differing(self, other: "Inputs") -> list[str]:
        """What both know and have otherwise: "tokenizer", "data", "start".

        Data are told by their tokens where both know them: files may be cut otherwise. So are
        tokenizers by what they make of a document.
        """
        mine, theirs = asdict(self), asdict(other)
        known = [name for name in mine if None not in (mine[name], theirs[name])]
        others = [name for name in known if mine[name] != theirs[name]]
        data = next((name for name in ("blocks", "text") if name in known), "data")
        tokenizer = ("tokens",) if "tokens" in known else ("tokenizer", "frame")
        others = [name for name in others if name in (*tokenizer, "start", data)]
        names = (_OF_THE_SAME.get(name, name) for name in others)
        return list(dict.fromkeys(names))


_OF_THE_SAME = {"frame": "tokenizer", "tokens": "tokenizer", "blocks": "data", "text": "data"}


def files_digest(files: Iterable[str | Path]) -> str:
    """Tells data apart without reading all of it: sizes and samples of files, in order.

    16 pieces of 4 KiB of each file, its first and its last bytes among them: a change between two
    pieces that keeps the size is not seen. Names are not looked at.

    Args:
        files: in the order in which they are read.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in files:
        with Path(path).open("rb") as file:
            size = file.seek(0, 2)
            digest.update(size.to_bytes(8, "little"))
            last = max(0, size - _PIECE_BYTES)
            for start in sorted({last * i // (_PIECES - 1) for i in range(_PIECES)}):
                file.seek(start)
                digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()


def contents_digest(files: Iterable[str | Path]) -> str | None:
    """Tells data apart by all of their bytes; None where there are more than 4 GiB.

    Args:
        files: in the order in which they are read.

    Raises:
        OSError: a file cannot be read.
    """
    paths = [Path(path) for path in files]
    if sum(path.stat().st_size for path in paths) > _MOST_BYTES:
        return None
    return hashlib.sha256("".join(digest_of(path).sha256 for path in paths).encode()).hexdigest()


def tokenizer_digest(folder: Path) -> str:
    """Tells tokenizers apart by what their tokenizer.json makes of a text, not by their names.

    Args:
        folder: with a tokenizer.json.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    return definition_digest((folder / "tokenizer.json").read_text(encoding="utf-8"))


def definition_digest(definition: str) -> str:
    """As `tokenizer_digest`, of a tokenizer that is not, or not alone, in a folder.

    Args:
        definition: JSON, as in a tokenizer.json.

    Raises:
        ValueError: it is no JSON.
    """
    data: Any = json.loads(definition)
    parts = {name: data.get(name) for name in _TOKENIZER_PARTS}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def weights_digest(folder: Path) -> str:
    """Tells folders of weights apart: by their manifests, or by the files where there is none.

    Args:
        folder: of a checkpoint or a Hugging Face model.

    Raises:
        OSError: a file cannot be read.
        UserError: its manifest is damaged.
    """
    if not is_complete(folder):
        return files_digest(sorted(path for path in folder.rglob("*") if path.is_file()))
    listed = {name: digest.sha256 for name, digest in read_manifest(folder).items()}
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def write_inputs(inputs: Inputs, folder: Path) -> None:
    """Keep a run's inputs in a checkpoint, before it is declared whole."""
    text = json.dumps(asdict(inputs), indent=1)
    (folder / INPUTS_FILE).write_text(text, encoding="utf-8")


def read_inputs(folder: Path) -> Inputs:
    """The inputs of the run that wrote a checkpoint; nothing is known where it holds none."""
    try:
        data = json.loads((folder / INPUTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Inputs()
    known = data if isinstance(data, Mapping) else {}
    texts = {field.name: known.get(field.name) for field in fields(Inputs)}
    return Inputs(**{k: v if isinstance(v, str) else None for k, v in texts.items()})
