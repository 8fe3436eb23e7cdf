"""A pretraining config as a commented YAML file."""

import dataclasses
import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aixsim_cli.config.budget import Plan
from aixsim_cli.config.pretrain import PretrainConfig
from aixsim_cli.errors import UserError
from aixsim_cli.files import NOT_THERE, kind_of, write_atomic
from aixsim_cli.settings.formats import dump_yaml

# the sections and keys of a file, in its order; all others keep their defaults
_WRITTEN: dict[str, tuple[str, ...]] = {
    "job": ("description", "dump_folder"),
    "model": ("name", "flavor", "hf_assets_path"),
    "training": (
        "dataset",
        "dataset_path",
        "local_batch_size",
        "global_batch_size",
        "seq_len",
        "steps",
        "max_norm",
        "mixed_precision_param",
    ),
    "parallelism": (
        "data_parallel_replicate_degree",
        "data_parallel_shard_degree",
        "tensor_parallel_degree",
    ),
    "optimizer": ("lr", "name", "beta1", "beta2", "eps", "weight_decay"),
    "lr_scheduler": ("warmup_steps", "decay_type", "min_lr_factor"),
    "checkpoint": ("enable", "folder", "interval", "keep_latest_k", "last_save_model_only"),
    "reliability": ("on_nonfinite", "on_save_error", "data_retries"),
    "activation_checkpoint": ("mode",),
    "compile": ("enable",),
    "metrics": ("log_freq", "enable_wandb", "enable_tensorboard"),
    "debug": ("seed",),
    "budget": ("parameters", "tokens", "num_ranks"),
    "transform": (),
}


def written(config: PretrainConfig) -> dict[str, Any]:
    """What a file of the config holds: section -> its keys, and the transform whole."""
    values = dataclasses.asdict(config)
    return {
        section: {key: values[section][key] for key in keys} if keys else values[section]
        for section, keys in _WRITTEN.items()
    }


def render(config: PretrainConfig, plan: Plan, command: str) -> str:
    """The config as YAML, with the meaning of every section.

    Args:
        config: of which `written` is shown.
        plan: shown in the header.
        command: that makes this file, shown in the header; one line, see `shell_line`.
    """
    header = ["Pretraining config; sections and keys are torchtitan 0.2.2's. Made by:", command, ""]
    lines = [f"# {line}".rstrip() for line in [*header, *str(plan).splitlines()]]
    meanings = {f.name: f.metadata.get("description") for f in dataclasses.fields(config)}
    for section, values in written(config).items():
        lines += ["", f"# {meanings[section]}", dump_yaml({section: values}).rstrip()]
    return "\n".join(lines) + "\n"


def shell_line(argv: list[str]) -> str:
    """A command line that a shell reads as these arguments, in one line of printable characters."""
    return " ".join(map(_shell_word, argv))


def _shell_word(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    # the bytes of what a comment cannot hold, as bash's $'…' has them; names need not be UTF-8
    pieces = [
        c if c.isprintable() and c not in "'\\" else "".join(f"\\x{b:02x}" for b in os.fsencode(c))
        for c in word
    ]
    return f"$'{''.join(pieces)}'"


def write_new(path: Path, text: str, *, force: bool, read: Iterable[str | Path] = ()) -> None:
    """Write a file whole or not at all; a link is followed.

    Args:
        path: where.
        text: all of it.
        force: replace a file that is there.
        read: files that the text was made of: none of them is replaced, whatever it is called.

    Raises:
        UserError: it exists and `force` is not given, is something else than a file, or cannot be
            written.
    """
    if os.path.lexists(path) and kind_of(path) not in ("a file", NOT_THERE):
        raise UserError(f"{path}: {kind_of(path)}; expected a file, new or to be replaced")
    if os.path.exists(path) and not force:
        raise UserError(f"{path}: exists; expected a new file, or --force to replace it")
    for source in read if os.path.exists(path) else ():
        if os.path.exists(source) and os.path.samefile(path, source):
            raise UserError(f"{path}: is {source}, which is read; expected another file to write")
    try:
        # where a link points: it would otherwise be replaced, and its target left as it was
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
