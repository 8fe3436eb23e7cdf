"""Work out a pretraining config, and write it as a commented YAML file."""

import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aixsim_cli.config import budget
from aixsim_cli.config.flavors import count_parameters, find_flavor, model_vocab_size
from aixsim_cli.data.tokenizer import vocab_size
from aixsim_cli.errors import UserError
from aixsim_cli.files import NOT_THERE, kind_of, write_whole
from aixsim_cli.settings.formats import dump_yaml

# blocks of this many parameters and more recompute every second block's activations
_CHECKPOINT_FROM = 300_000_000


@dataclass(frozen=True, kw_only=True)
class Request:
    """What generate-cfg is asked for; the names are its options'."""

    model_flavor: str
    model_arch: str = "aixsim"
    tokenizer_path: str = "HuggingFaceTB/cosmo2-tokenizer"
    dataset: str = "fineweb-edu"
    dataset_path: str | None = None
    batch_size: int = 8
    seq_len: int = 2048
    gradient_accumulation: int = 1
    data_parallel_replicate_degree: int = 1
    data_parallel_shard_degree: int = -1
    tensor_parallel_degree: int = 1
    num_gpus: int | None = None
    token_num_scale: float = 22
    steps: int | None = None
    learning_rate: float = 1e-4
    seed: int = 42
    mixed_precision_param: str = "bfloat16"
    compile: bool = False
    keep_last_k_ckpts: int = 3
    transform: dict[str, Any] | None = None


@dataclass(frozen=True)
class Plan:
    """The numbers behind a config.

    Args:
        parameters: without the input embedding.
        all_parameters: with it.
        tokens: consumed by all steps.
        tokens_per_step: by one.
        steps: of the optimizer.
        warmup_steps: of the learning rate.
        data_ranks: that see different data.
        num_ranks: in all.
    """

    parameters: int
    all_parameters: int
    tokens: int
    tokens_per_step: int
    steps: int
    warmup_steps: int
    data_ranks: int
    num_ranks: int

    def __str__(self) -> str:
        rows = {
            "parameters": f"{self.parameters:,} ({self.all_parameters:,} with the embedding)",
            "ranks": f"{self.num_ranks} ({self.data_ranks} see different data)",
            "tokens per step": f"{self.tokens_per_step:,}",
            "steps": f"{self.steps:,} ({self.warmup_steps:,} warm-up)",
            "tokens": f"{self.tokens:,}",
        }
        return "\n".join(f"{name:<16} {value}" for name, value in rows.items())


def make_plan(request: Request) -> Plan:
    """Parameters, tokens and steps of a request.

    Raises:
        UserError: unknown model, or ranks that cannot be divided as asked.
    """
    flavor = find_flavor(request.model_arch, request.model_flavor)
    words = model_vocab_size(
        request.model_arch, request.model_flavor, vocab_size(request.tokenizer_path)
    )
    parameters = count_parameters(flavor, words)
    replicate, tensor = request.data_parallel_replicate_degree, request.tensor_parallel_degree
    num_ranks = request.num_gpus or replicate * tensor
    if request.data_parallel_shard_degree != -1:
        num_ranks = replicate * request.data_parallel_shard_degree * tensor
    shard = budget.shard_degree(
        request.data_parallel_shard_degree, num_ranks=num_ranks, replicate=replicate, other=tensor
    )
    per_step = budget.tokens_per_step(
        request.batch_size, replicate * shard, request.gradient_accumulation, request.seq_len
    )
    wanted = budget.token_budget(parameters, request.token_num_scale)
    steps = request.steps or budget.steps_for(wanted, per_step)
    return Plan(
        parameters=parameters,
        all_parameters=count_parameters(flavor, words, embedding=True),
        tokens=steps * per_step,
        tokens_per_step=per_step,
        steps=steps,
        warmup_steps=budget.warmup_steps(steps),
        data_ranks=replicate * shard,
        num_ranks=num_ranks,
    )


def default_dump_folder(request: Request) -> str:
    """Where a run goes: outputs/<flavor>, with the paradigm, and a seed that is not the default.

    A folder has one run: those of several seeds do not meet in one.
    """
    paradigm = request.transform and request.transform.get("transform", "optical")
    seed = f"seed{request.seed}" if request.seed != Request.seed else None
    parts = [part for part in (request.model_flavor, paradigm, seed) if part]
    return f"outputs/{'-'.join(map(str, parts))}"


def make_config(request: Request, plan: Plan) -> dict[str, Any]:
    """The config's sections; keys left out keep torchtitan's defaults."""
    sequences = -1
    if request.gradient_accumulation > 1:
        sequences = request.batch_size * plan.data_ranks * request.gradient_accumulation
    recompute = "selective" if plan.all_parameters >= _CHECKPOINT_FROM else "none"
    return {
        "job": {
            "description": f"{request.model_arch} {request.model_flavor}",
            "dump_folder": default_dump_folder(request),
        },
        "model": {
            "name": request.model_arch,
            "flavor": request.model_flavor,
            "hf_assets_path": request.tokenizer_path,
        },
        "training": {
            "dataset": request.dataset,
            "dataset_path": request.dataset_path,
            "local_batch_size": request.batch_size,
            "global_batch_size": sequences,
            "seq_len": request.seq_len,
            "steps": plan.steps,
            "max_norm": 1.0,
            "mixed_precision_param": request.mixed_precision_param,
        },
        "parallelism": {
            "data_parallel_replicate_degree": request.data_parallel_replicate_degree,
            "data_parallel_shard_degree": request.data_parallel_shard_degree,
            "tensor_parallel_degree": request.tensor_parallel_degree,
        },
        "optimizer": {"lr": request.learning_rate, **_ADAMW},
        "lr_scheduler": {
            "warmup_steps": plan.warmup_steps,
            "decay_type": "cosine",
            "min_lr_factor": 0.1,
        },
        "checkpoint": {
            "enable": True,
            "folder": "checkpoint",
            "interval": 500,
            "keep_latest_k": request.keep_last_k_ckpts,
            "last_save_model_only": False,
        },
        "reliability": {"on_nonfinite": "stop", "on_save_error": "stop", "data_retries": 8},
        "activation_checkpoint": {"mode": recompute},
        "compile": {"enable": request.compile},
        "metrics": {"log_freq": 10, "enable_wandb": False, "enable_tensorboard": False},
        "debug": {"seed": request.seed},
        "budget": {
            "parameters": plan.parameters,
            "tokens": plan.tokens,
            "num_ranks": plan.num_ranks,
        },
        "transform": request.transform,
    }


_ADAMW = {"name": "AdamW", "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
_COMMENTS = {
    "job": "where the run's files go: checkpoints, metrics.jsonl, logs",
    "model": "architecture, size, and the tokenizer (a folder, a hub name or `builtin`)",
    "training": "data; local_batch_size is per rank, global_batch_size -1 = no accumulation",
    "parallelism": "replicate = DDP, shard = FSDP (-1: all ranks that are left), both = HSDP",
    "optimizer": "AdamW",
    "lr_scheduler": "linear warm-up, then cosine decay to min_lr_factor x lr",
    "checkpoint": "every `interval` steps, and a full one at the end; keep_latest_k 0 = keep all",
    "reliability": "on_nonfinite stop, skip or rollback; on_save_error stop or continue",
    "activation_checkpoint": "none, selective or full: memory for time",
    "compile": "torch.compile of every block",
    "metrics": "log_freq in steps; W&B and TensorBoard are torchtitan's",
    "debug": "seed of initialisation",
    "budget": "what training.steps was computed from; other ranks than these are refused",
    "transform": "hardware to simulate (docs/transforms.md); null = digital",
}


def render(config: dict[str, Any], plan: Plan, command: str) -> str:
    """The config as commented YAML.

    Args:
        config: from `make_config`.
        plan: shown in the header.
        command: that makes this file, shown in the header; one line, see `shell_words`.
    """
    header = ["Pretraining config; sections and keys are torchtitan 0.2.2's. Made by:", command, ""]
    lines = [f"# {line}".rstrip() for line in [*header, *str(plan).splitlines()]]
    for section, values in config.items():
        lines += ["", f"# {_COMMENTS[section]}", dump_yaml({section: values}).rstrip()]
    return "\n".join(lines) + "\n"


def shell_words(words: list[str]) -> str:
    """A command line that a shell reads as these words, in one line of printable characters."""
    return " ".join(map(_shell_word, words))


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
        write_whole(target, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
