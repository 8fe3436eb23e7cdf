"""Data sets by name: hub streams, local files and the built-in corpus.

Every source has a "train" and a "heldout" part and yields rows `{"text": str}`:

- `wikitext` and `c4` hold out the hub's own validation split; `fineweb` and `fineweb-edu` have
  none, so one text in 100, chosen by a hash of the text, is held out and never trained on.
- `local` reads the same files for both parts: give `eval` other files than `pretrain`.
- `builtin` splits by document, see `corpus.py`.

Hub sources are streamed; `STREAM_HF_DATA=0` downloads them first.
"""

import hashlib
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aixsim_cli.data.corpus import Split, builtin_documents
from aixsim_cli.data.local import find_files, read_files
from aixsim_cli.errors import UserError, nearest
from aixsim_cli.run.inputs import files_digest

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_HELDOUT_ONE_IN = 100
_ARTICLE_TITLE = re.compile(r"\s*= [^=](.*[^=])? =\s*")


@dataclass(frozen=True)
class HubSource:
    """A data set on the Hugging Face hub with a column "text".

    Args:
        repo: owner/name.
        config: the hub's name for the part that is used.
        validation: the hub's split that is held out; None = a hash decides, text by text.
        regroup: turns the texts of consecutive rows into whole documents; None = a row is one.
    """

    repo: str
    config: str
    validation: str | None = None
    regroup: Callable[[dict[str, list[str]]], dict[str, list[str]]] | None = None

    def open(self, split: Split) -> "Dataset | IterableDataset":
        """The rows of one part.

        Raises:
            UserError: the hub cannot be reached, or does not have it.
        """
        from datasets import load_dataset

        hub_split = self.validation if split == "heldout" and self.validation else "train"
        streaming = _wants_stream()
        try:
            data: Any = load_dataset(self.repo, self.config, split=hub_split, streaming=streaming)
        except Exception as error:  # what a failed connection raises differs between hub versions
            raise UserError(
                f"dataset {self.repo} ({self.config}): cannot be loaded from the hub: {error}; "
                "check the connection, or use --dataset builtin or --dataset local"
            ) from error
        data = data.select_columns(["text"])
        if self.validation is None:
            data = data.filter(_is_heldout if split == "heldout" else _is_trained)
        if self.regroup is not None:
            data = data.map(self.regroup, batched=True)
        return data


def open_source(name: str, path: str | None, split: Split) -> "Dataset | IterableDataset":
    """Open one part of a data set.

    Args:
        name: a key of `SOURCES`.
        path: for `local`: a .txt, .jsonl, .json or .parquet file, a glob, or a folder of these.
            None for every other source.
        split: "train" or "heldout".

    Returns:
        Rows with a "text" each; a row's text may still be empty or None.

    Raises:
        UserError: unknown name, path missing or not wanted, files absent, unreadable or without
            text, hub out of reach.
    """
    if name not in SOURCES:
        raise UserError(f"dataset: got '{name}'{nearest(name, SOURCES)}")
    if path is not None and name != "local":
        raise UserError(
            f"dataset_path: got '{path}' with dataset '{name}'; only dataset 'local' has a path"
        )
    return SOURCES[name](path, split)


def text_digest(name: str, path: str | None) -> str:
    """Tells the training text of one source from another, wherever its files lie.

    Args:
        name: as of `open_source`; a hub's data set is told by its name alone.
        path: likewise.

    Raises:
        UserError, OSError: the text cannot be read.
    """
    if name == "local":
        return files_digest(find_files(str(path)))
    if name == "builtin":
        # another Python has another documentation
        text = "\0".join(builtin_documents("train"))
        return f"builtin {hashlib.sha256(text.encode()).hexdigest()}"
    return name


def articles(rows: dict[str, list[str]]) -> dict[str, list[str]]:
    """Join wikitext's rows, which are lines, into articles; a line ` = Title = ` opens one.

    Args:
        rows: {"text": lines} of consecutive rows; an article that goes on in the next batch of
            rows is cut there.

    Returns:
        {"text": articles}.
    """
    documents: list[list[str]] = []
    for line in rows["text"]:
        if not documents or _ARTICLE_TITLE.fullmatch(line):
            documents.append([])
        documents[-1].append(line)
    return {"text": ["".join(lines) for lines in documents]}


def _builtin(path: str | None, split: Split) -> "Dataset":
    from datasets import Dataset

    return Dataset.from_dict({"text": builtin_documents(split)})


def _local(path: str | None, split: Split) -> "IterableDataset":
    from datasets import IterableDataset

    if path is None:
        raise UserError(
            "dataset_path: missing; dataset 'local' needs a .txt, .jsonl, .json or .parquet file, "
            "a glob or a folder"
        )
    return IterableDataset.from_generator(read_files, gen_kwargs={"files": find_files(path)})


def _on_hub(source: HubSource) -> "Callable[[str | None, Split], Dataset | IterableDataset]":
    return lambda path, split: source.open(split)


SOURCES: "dict[str, Callable[[str | None, Split], Dataset | IterableDataset]]" = {
    "builtin": _builtin,
    "local": _local,
    "fineweb-edu": _on_hub(HubSource("HuggingFaceFW/fineweb-edu", "sample-10BT")),
    "fineweb": _on_hub(HubSource("HuggingFaceFW/fineweb", "sample-10BT")),
    "wikitext": _on_hub(
        HubSource("Salesforce/wikitext", "wikitext-103-raw-v1", "validation", articles)
    ),
    "c4": _on_hub(HubSource("allenai/c4", "en", "validation")),
}


def _wants_stream() -> bool:
    value = os.environ.get("STREAM_HF_DATA", "1")
    if value not in ("0", "1"):
        raise UserError(f"STREAM_HF_DATA: got '{value}'; expected 1 (stream) or 0 (download)")
    return value == "1"


def _is_heldout(row: dict[str, Any]) -> bool:
    return zlib.crc32((row["text"] or "").encode()) % _HELDOUT_ONE_IN == 0


def _is_trained(row: dict[str, Any]) -> bool:
    return not _is_heldout(row)
