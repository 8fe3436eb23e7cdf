"""Text for HF's Trainer: documents become tokens as in pretraining, and tokens become blocks."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import uuid4

from aixsim_cli.continual.arguments import Arguments, DataArguments
from aixsim_cli.data.local import find_files, undecodable
from aixsim_cli.data.sources import articles, open_source, text_digest
from aixsim_cli.data.tokenizer import DocumentEncoder
from aixsim_cli.errors import RunError, UserError, first_line
from aixsim_cli.run.inputs import files_digest

logger = logging.getLogger("aixsim")


def load_blocks(arguments: Arguments, tokenizer: Any, block_size: int) -> dict[str, Any]:
    """The training and evaluation sets that the run needs.

    Args:
        arguments: of the run.
        tokenizer: transformers tokenizer with an end-of-text token.
        block_size: tokens a block; what is left at the end of a split is dropped.

    Returns:
        "train" and "validation", whichever is needed: rows of `input_ids` and `labels`, both
        (block_size,) int64; map-style, or iterable when streaming.

    Raises:
        UserError: the text cannot be read, has no column to read, or is shorter than a block.
    """
    data, training = arguments.data, arguments.training
    wanted = [
        split
        for split, needed in (
            ("train", training.do_train),
            ("validation", training.do_eval or training.eval_strategy != "no"),
        )
        if needed
    ]
    blocks = {}
    for split in wanted:
        files = data.train_file if split == "train" else data.validation_file
        with _causes_named(files, split, block_size):
            rows = _open(data, split, files, arguments.model.token)
        encoder = DocumentEncoder(tokenizer)
        # the main process tokenises, the others read its cache
        with training.main_process_first(desc="tokenise"), _causes_named(files, split, block_size):
            found = _cut(rows, encoder, data, files, block_size)
        limit = data.max_train_samples if split == "train" else data.max_eval_samples
        blocks[split] = _first(found, limit, split, block_size)
    return blocks


def tokens_digest(blocks: Any) -> str | None:
    """Tells what is trained on from everything else: SHA-256 of all its tokens, in order.

    Args:
        blocks: of `load_blocks`.

    Returns:
        None where they are streamed.
    """
    from datasets import Dataset

    if not isinstance(blocks, Dataset):
        return None
    digest = hashlib.sha256()
    tables: Any = blocks.select_columns(["input_ids"]).with_format("arrow")
    for batch in tables.iter(batch_size=1000):
        for piece in batch["input_ids"].chunks:
            digest.update(piece.flatten().cast("int64").to_numpy())
    return digest.hexdigest()


def data_digest(data: DataArguments) -> str:
    """Tells the training text from others by its contents, the hub's by name and config.

    Raises:
        UserError, OSError: it cannot be read.
    """
    if data.dataset_name is None:
        path = str(data.train_file)
        return files_digest([path]) if _is_csv(path) else text_digest("local", path)
    if data.dataset_name == "builtin":
        return text_digest("builtin", None)
    folder = Path(data.dataset_name)
    if folder.is_dir():
        return files_digest(_files_in(folder, data.dataset_config_name))
    return f"{data.dataset_name} {data.dataset_config_name}"


def _is_csv(path: str) -> bool:
    return Path(path).suffix == ".csv"


@contextmanager
def _causes_named(files: str | None, split: str, block_size: int) -> Iterator[None]:
    """What went wrong while `datasets` wrote its cache: it tells neither what nor where."""
    from datasets.arrow_writer import SchemaInferenceError
    from datasets.config import HF_DATASETS_CACHE
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowInvalid

    try:
        yield
    except (DatasetGenerationError, OSError, ArrowInvalid) as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, UserError | OSError):
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise UserError(str(cause)) from error
        if isinstance(cause, SchemaInferenceError):
            raise _too_short(split, block_size) from error
        if isinstance(error, ArrowInvalid) or (isinstance(error, OSError) and not error.errno):
            raise RunError(
                f"{HF_DATASETS_CACHE}: what it holds of the {split} text is damaged: "
                f"{first_line(error)}; expected it to be deleted, or another HF_DATASETS_CACHE"
            ) from error
        if isinstance(cause, OSError) and not (files and cause.filename == files):
            raise RunError(
                f"{HF_DATASETS_CACHE}: the blocks of the {split} text cannot be kept: "
                f"{cause.strerror or cause}; expected room there, or another HF_DATASETS_CACHE"
            ) from error
        first = first_line(cause)
        if isinstance(cause, OSError):
            first = cause.strerror
        if isinstance(cause, UnicodeDecodeError):
            first = f"is not UTF-8: {undecodable(str(files))}"
        raise UserError(f"{files}: cannot be read: {first}") from error


def _too_short(split: str, block_size: int) -> UserError:
    return UserError(
        f"the {split} text is shorter than one block of {block_size} tokens; expected more text "
        "or a smaller --block_size"
    )


def _open(data: DataArguments, split: str, files: str | None, token: str | None) -> Any:
    """Rows of one split, each with its text in the column "text"."""
    if data.dataset_name is None:
        if files is None:
            raise UserError(
                "--validation_file: missing; expected text to evaluate on"
                if split == "validation"
                else "--train_file: missing; expected text to train on"
            )
        return _local(files)
    if data.dataset_name == "builtin":
        return open_source("builtin", None, "train" if split == "train" else "heldout")
    return _hub(data, split, token)


def _local(path: str) -> Any:
    if _is_csv(path):
        from datasets import load_dataset

        if not Path(path).is_file():
            raise UserError(
                f"{path}: no such file; expected one .csv file: only .txt, .jsonl, .json and "
                ".parquet files may be a glob or a folder"
            )
        rows = load_dataset("csv", data_files=path, split="train", cache_dir=_cache_of([path]))
        return _text_column(rows, path)
    return open_source("local", path, "train")


def _hub(data: DataArguments, split: str, token: str | None) -> Any:
    from datasets import get_dataset_split_names, load_dataset

    name, config = str(data.dataset_name), data.dataset_config_name
    _check_folder(Path(name))
    try:
        splits = get_dataset_split_names(name, config, token=token)
        held_out = f"train[:{data.validation_split_percentage}%]"
        if split == "validation" and split not in splits:
            if data.streaming:
                raise UserError(f"{name}: has no validation split; expected a --validation_file")
            wanted = held_out
        elif split == "train" and "validation" not in splits and not data.streaming:
            wanted = f"train[{data.validation_split_percentage}%:]"
        else:
            wanted = split
        options: Any = {"split": wanted, "streaming": data.streaming, "token": token}
        if Path(name).is_dir():
            options["cache_dir"] = _cache_of(_files_in(Path(name), config))
        rows = load_dataset(name, config, **options)
    except UserError:
        raise
    except Exception as error:  # what a failed connection raises differs between hub versions
        first = first_line(error)
        raise UserError(
            f"--dataset_name {name}: cannot be loaded from the hub: {first}; check the name and "
            "the connection, or use --dataset_name builtin or --train_file"
        ) from error
    rows = _text_column(rows, name)
    # its rows are lines; the documents are articles
    is_lines = name.rpartition("/")[2] == "wikitext"
    return rows.map(articles, batched=True) if is_lines else rows


def _files_in(folder: Path, config: str | None) -> list[Path]:
    """The files that datasets reads of a folder: no card, nothing hidden."""
    from datasets import load_dataset_builder

    found: Any = load_dataset_builder(str(folder), config).config.data_files or {}
    listed = (Path(str(path)) for paths in found.values() for path in paths)
    # a card may name some that lie elsewhere
    return sorted(path for path in listed if path.is_file())


def _check_folder(path: Path) -> None:
    """What lies under a name of the hub is taken for it; not everything there can be read."""
    if not path.is_dir():
        return
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise UserError(
            f"--dataset_name {path}: what `save_to_disk` of datasets wrote; expected its "
            f'`to_parquet("{path}.parquet")`, and --train_file {path}.parquet'
        )


def _text_column(rows: Any, where: str) -> Any:
    from datasets import Dataset

    columns = rows.column_names or list(next(iter(rows)))
    name = "text" if "text" in columns else columns[0]
    if name != "text" and len(columns) > 1:
        raise UserError(f"{where}: has no column 'text', but {', '.join(columns)}")
    got = getattr((rows.features or {}).get(name), "dtype", "string")
    if got not in ("string", "large_string"):
        raise UserError(f"{where}: column '{name}': got {got}; expected strings")
    rows = rows.select_columns([name])
    if name != "text":
        rows = rows.rename_column(name, "text")
    if isinstance(rows, Dataset) and (without := rows.data.column("text").null_count):
        logger.warning("%s: %d rows without text are skipped", where, without)
    return rows


def _cut(
    rows: Any, encoder: DocumentEncoder, data: DataArguments, path: str | None, block_size: int
) -> Any:
    from datasets import Dataset, Features, IterableDataset, List, Value

    def to_tokens(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = (text if isinstance(text, str) else "" for text in batch["text"])
        return {"tokens": [encoder(text) if text else [] for text in texts]}

    def to_blocks(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        stream = list(chain.from_iterable(batch["tokens"]))
        starts = range(0, len(stream) - block_size + 1, block_size)
        blocks = [stream[start : start + block_size] for start in starts]
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    if isinstance(rows, IterableDataset) and not data.streaming:
        # a local file is read as a stream; the Trainer shuffles a whole. The cache that datasets
        # keeps of it is named by all that it depends on, alike in every process
        is_known = encoder.definition is not None and not data.overwrite_cache
        version = _version(find_files(str(path))) if is_known else uuid4().hex
        named = json.dumps([version, encoder.digest, block_size])
        source = {"rows": rows, "to_tokens": to_tokens, "to_blocks": to_blocks}
        return _cached(source, hashlib.sha256(named.encode()).hexdigest())
    cached: dict[str, Any] = {}
    workers: dict[str, Any] = {}
    if isinstance(rows, Dataset):
        cached = {"load_from_cache_file": not data.overwrite_cache}
        workers = {"num_proc": data.preprocessing_num_workers, "desc": "tokens"}
    # half the room that datasets gives to whole numbers
    features = Features({"tokens": List(Value("int32"))})
    # several processes share out the rows: what is cut must not depend on their number
    found = rows.map(
        to_tokens, batched=True, remove_columns=["text"], features=features, **cached, **workers
    )
    return found.map(to_blocks, batched=True, remove_columns=["tokens"], **cached)


def _cached(source: dict[str, Any], name: str) -> Any:
    """Blocks as datasets caches them; a cache that cannot be read is made anew."""
    from datasets import Dataset
    from datasets.config import HF_DATASETS_CACHE

    folder = Path(HF_DATASETS_CACHE) / "generator" / f"default-fingerprint={name}"
    # one that was made to its end: what goes wrong then is reading it
    was_there = any(folder.rglob("dataset_info.json"))
    try:
        return Dataset.from_generator(_whole, gen_kwargs=source, fingerprint=name)
    except Exception as error:  # of pyarrow, json, datasets
        if not was_there or isinstance(error, MemoryError):
            raise
        logger.warning("%s: damaged: %s; it is made anew", folder, first_line(error))
        shutil.rmtree(folder)
        return Dataset.from_generator(_whole, gen_kwargs=source, fingerprint=name)


def _version(paths: Iterable[str | Path]) -> list[list[str | int]]:
    """Tells files from others that take their place: not by times that a copy takes along."""
    return [[str(p), s.st_size, s.st_ino, s.st_ctime_ns] for p in paths for s in [Path(p).stat()]]


def _cache_of(paths: Iterable[str | Path]) -> str:
    """A folder for the cache of files: datasets goes by their names and times."""
    from datasets.config import HF_DATASETS_CACHE

    digest = hashlib.sha256(json.dumps(_version(paths)).encode()).hexdigest()
    return str(Path(HF_DATASETS_CACHE) / f"aixsim-{digest[:16]}")


def _whole(rows: Any, to_tokens: Any, to_blocks: Any) -> Iterator[dict[str, list[int]]]:
    for batch in rows.iter(batch_size=1000):
        found = to_blocks(to_tokens(batch))
        for tokens, labels in zip(found["input_ids"], found["labels"], strict=True):
            yield {"input_ids": tokens, "labels": labels}


def _first(blocks: Any, limit: int | None, split: str, block_size: int) -> Any:
    from datasets import Dataset

    if not isinstance(blocks, Dataset):
        return blocks if limit is None else blocks.take(limit)
    if not len(blocks):
        raise _too_short(split, block_size)
    return blocks if limit is None else blocks.select(range(min(limit, len(blocks))))
