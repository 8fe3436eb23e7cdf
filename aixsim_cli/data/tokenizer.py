"""Tokenizers: a folder, a hub name, or one trained on the built-in corpus.

Importing this module costs nothing; `vocab_size` of a known name needs neither files nor network.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from aixsim_cli.data.cache import cache_folder, writing
from aixsim_cli.data.corpus import builtin_documents
from aixsim_cli.errors import Stopped, UserError, first_line, reason_of, shown
from aixsim_cli.run.inputs import definition_digest
from aixsim_cli.run.manifest import verify, write_manifest
from aixsim_cli.settings.json_object import load_json_object

BUILTIN = "builtin"
END_OF_TEXT = "<|endoftext|>"

KNOWN_VOCAB_SIZES = {BUILTIN: 4096, "HuggingFaceTB/cosmo2-tokenizer": 49152}

_LONG_DOCUMENT = 5_000_000

logger = logging.getLogger("aixsim")

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]


def resolve_tokenizer(path: str) -> Path:
    """The local folder of a tokenizer, downloaded or trained if need be.

    Args:
        path: "builtin", a folder, or a hub name such as "HuggingFaceTB/cosmo2-tokenizer".

    Returns:
        A folder with tokenizer.json, and tokenizer_config.json where the tokenizer has one.

    Raises:
        UserError: no such folder or hub name, the hub cannot be reached, or no tokenizer.json.
    """
    if path == BUILTIN:
        return _builtin_tokenizer()
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir():
        if folder.exists() or not _HUB_NAME.fullmatch(path):
            raise UserError(
                f"tokenizer {path}: no such folder; expected a folder with tokenizer.json, "
                "a hub name (owner/name) or 'builtin'"
            )
        folder = _download(path)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"tokenizer {path}: tokenizer.json is missing; expected tokenizer.json and "
            "tokenizer_config.json, as `save_pretrained` of a fast tokenizer writes them"
        )
    return folder


def vocab_size(path: str) -> int:
    """How many tokens a tokenizer has, those that its files add to its model included.

    Args:
        path: as for `resolve_tokenizer`; a name in `KNOWN_VOCAB_SIZES` is looked up there.

    Raises:
        UserError: as `resolve_tokenizer` and `load_tokenizer`.
    """
    return KNOWN_VOCAB_SIZES.get(path) or len(load_tokenizer(resolve_tokenizer(path)))


def load_tokenizer(source: str | Path, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """A transformers tokenizer; everything that needs one loads it here.

    Args:
        source: folder or hub name.
        trust_remote_code: run Python code that comes with it.
        options: of `from_pretrained`: revision, token, cache_dir, ….

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    for name in _FILES:
        if (Path(source) / name).is_file():
            load_json_object(Path(source) / name)
    try:
        # False, not None: transformers would ask, and take what stdin says for an answer
        loaded = AutoTokenizer.from_pretrained(
            str(source), trust_remote_code=bool(trust_remote_code), **options
        )
    except Exception as error:  # `tokenizers` raises no class of its own
        raise UserError(
            f"tokenizer {source}: cannot be loaded: {reason_of(error)}; expected tokenizer.json "
            "and tokenizer_config.json, as `save_pretrained` of a fast tokenizer writes them"
        ) from error
    templates = getattr(loaded, "chat_template", None) or ""
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        if not isinstance(template, str):
            raise UserError(
                f"tokenizer {source}: chat_template: got {shown(template)}; expected a text"
            )
    return loaded


def check_vocabulary(tokenizer: Any, rows: int, where: str | Path) -> None:
    """See that a model knows every token of a tokenizer.

    Args:
        tokenizer: transformers tokenizer.
        rows: of the model's embedding.
        where: the tokenizer comes from, for the message.

    Raises:
        UserError: it has more tokens than the embedding has rows.
    """
    if len(tokenizer) > rows:
        raise UserError(
            f"tokenizer {where}: has {len(tokenizer)} tokens, and the model an embedding of {rows};"
            " expected the model's own tokenizer"
        )


class DocumentEncoder:
    """Turns one document of a training or evaluation text into tokens, in every command.

    The end-of-text token closes every document. A beginning-of-text token opens it if, and only
    if, tokenizer.json adds one. The flag `add_bos_token` of tokenizer_config.json is not heeded:
    transformers 5 ignores and drops it where there is a tokenizer.json, and a model must be
    evaluated on what it was trained on. Nothing is cut and nothing padded, whatever its files say.

    Args:
        tokenizer: transformers tokenizer. torchtitan's reads tokenizer.json otherwise: it pads,
            and knows no tokens that tokenizer_config.json adds.

    Raises:
        UserError: the tokenizer has no end-of-text token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        eos = tokenizer.eos_token_id
        if eos is None:
            raise UserError(
                "the tokenizer has no end-of-text token, so documents would run into each other; "
                "expected 'eos_token' in tokenizer_config.json"
            )
        self._closing = [] if eos in self._encode("") else [eos]

    def __call__(self, text: str) -> list[int]:
        """The token ids of a document."""
        if len(text) > _LONG_DOCUMENT:
            # a tokenizer cannot be given it in pieces: where they meet, other tokens may come out
            logger.warning(
                "a document of %s characters becomes tokens as a whole: a second each half million",
                f"{len(text):,}",
            )
        return self._encode(text) + self._closing

    @property
    def definition(self) -> str | None:
        """What decides a document's tokens but its frame: JSON, as in a tokenizer.json.

        None for a tokenizer that is written in Python.
        """
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return None if backend is None else backend.to_str()

    @property
    def frame(self) -> str:
        """The tokens that every document is put between, in decimal digits: "0", "1 2".

        " split" follows where special tokens within a document are read as the text that they are.
        """
        split = " split" if getattr(self._tokenizer, "split_special_tokens", False) else ""
        return " ".join(map(str, self(""))) + split

    @property
    def digest(self) -> str:
        """Tells tokenizers apart by the tokens that they make of a document.

        Of one that is written in Python the tokens that it knows are told.
        """
        definition = self.definition or json.dumps({"model": self._tokenizer.get_vocab()})
        told = [definition_digest(definition), self.frame]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def _encode(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text, verbose=False)
        except BaseException as error:
            # a panic of the library, of an expression that takes for ever for instance
            if isinstance(error, Exception | KeyboardInterrupt | Stopped):
                raise
            raise UserError(
                f"the tokenizer cannot read {shown(text)}: {first_line(error)}; expected a "
                "tokenizer.json whose expressions match in time"
            ) from None


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except RepositoryNotFoundError as error:
        raise UserError(
            f"tokenizer {name}: neither a folder nor a name on the hub; "
            "use --tokenizer-path builtin or a folder"
        ) from error
    except Exception as error:  # what a failed connection raises differs between hub versions
        raise UserError(
            f"tokenizer {name}: not on this machine, and the hub cannot be reached "
            f"({type(error).__name__}); use --tokenizer-path builtin or a folder"
        ) from error


def _builtin_tokenizer() -> Path:
    """The byte-level BPE of the built-in training text, trained by whoever comes first."""
    texts = builtin_documents("train")
    # named by the text it was trained on: another Python version has another one
    text_hash = hashlib.blake2b("\0".join(texts).encode(), digest_size=8).hexdigest()
    folder = cache_folder() / f"tokenizer-{text_hash}"
    if _is_intact(folder):
        return folder
    from filelock import FileLock

    with writing(folder), FileLock(f"{folder}.lock"):
        if not _is_intact(folder):  # else another rank trained it meanwhile
            with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
                partial = Path(aside) / folder.name
                _train(texts, partial)
                write_manifest(partial)
                shutil.rmtree(folder, ignore_errors=True)
                partial.replace(folder)
    return folder


def _is_intact(folder: Path) -> bool:
    """Whether it holds what was trained, byte for byte."""
    try:
        verify(folder, _FILES[:2])
    except (UserError, KeyError):
        return False
    return True


def _train(texts: list[str], folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=KNOWN_VOCAB_SIZES[BUILTIN],
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)
    fast.save_pretrained(folder)
