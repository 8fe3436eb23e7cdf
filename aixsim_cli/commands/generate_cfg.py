"""`aixsim generate-cfg`: work out a run and write its config."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from aixsim_cli.config.recipe import RECIPE, default_dump_folder, follow
from aixsim_cli.errors import UserError

if TYPE_CHECKING:
    from aixsim_cli.config.pretrain import PretrainConfig

# what a command line says beside the config
_NOT_OF_THE_CONFIG = ("save_path", "force", "dry_run")


def generate_cfg(
    context: typer.Context,
    model_flavor: Annotated[str, typer.Option(help="debug, 60M, 200M, 400M, 600M, 1.1B.")],
    save_path: Annotated[Path | None, typer.Option(help="File to write.")] = None,
    model_arch: Annotated[
        str, typer.Option(help="aixsim, or llama3: torchtitan's.")
    ] = RECIPE.model.name,
    tokenizer_path: Annotated[
        str, typer.Option(help="A hub name, a folder, or builtin.")
    ] = RECIPE.model.hf_assets_path,
    dataset: Annotated[
        str, typer.Option(help="fineweb-edu, fineweb, wikitext, c4, local or builtin.")
    ] = RECIPE.training.dataset,
    dataset_path: Annotated[
        str | None, typer.Option(help="Files of dataset local: a file, a glob or a folder.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Sequences per rank and step.")
    ] = RECIPE.training.local_batch_size,
    seq_len: Annotated[
        int, typer.Option(min=1, help="Tokens per sequence.")
    ] = RECIPE.training.seq_len,
    gradient_accumulation: Annotated[int, typer.Option(min=1, help="Batches per step.")] = 1,
    data_parallel_replicate_degree: Annotated[
        int, typer.Option(min=1, help="DDP.")
    ] = RECIPE.parallelism.data_parallel_replicate_degree,
    data_parallel_shard_degree: Annotated[
        int, typer.Option(min=-1, help="FSDP; -1 = all ranks that are left of --num-gpus.")
    ] = RECIPE.parallelism.data_parallel_shard_degree,
    tensor_parallel_degree: Annotated[
        int, typer.Option(min=1, help="Ranks that share every layer.")
    ] = RECIPE.parallelism.tensor_parallel_degree,
    num_gpus: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks, for a shard degree of -1; default: replicas x tensor."),
    ] = None,
    token_num_scale: Annotated[float, typer.Option(help="Tokens per parameter.")] = 22,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of computing them.")] = None,
    learning_rate: Annotated[float, typer.Option(help="The peak.")] = RECIPE.optimizer.lr,
    seed: Annotated[
        int | None, typer.Option(help="Of weights and data order; noise has its own.")
    ] = RECIPE.debug.seed,
    mixed_precision_param: Annotated[
        Literal["bfloat16", "float32"], typer.Option(help="What FSDP and autocast compute in.")
    ] = RECIPE.training.mixed_precision_param,
    compile: Annotated[bool, typer.Option(help="torch.compile.")] = RECIPE.compile.enable,
    keep_last_k_ckpts: Annotated[
        int, typer.Option(min=0, help="0 = all.")
    ] = RECIPE.checkpoint.keep_latest_k,
    transform_config: Annotated[
        Path | None, typer.Option(help="Hardware to simulate: a transform file.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Print the plan and write nothing.")] = False,
) -> None:
    """Work out parameters, tokens and steps of a run, and write its config."""
    if save_path is None and not dry_run:
        raise UserError("--save-path: missing; expected the file to write, or --dry-run")
    from aixsim_cli.config import budget, render
    from aixsim_cli.config.pretrain import PretrainConfig, build_config
    from aixsim_cli.settings.document import Document
    from aixsim_cli.transforms.read import read_transform

    config = follow(PretrainConfig())
    config.model.name = model_arch
    config.model.flavor = model_flavor
    config.model.hf_assets_path = tokenizer_path
    config.training.dataset = dataset
    config.training.dataset_path = dataset_path
    config.training.local_batch_size = batch_size
    config.training.seq_len = seq_len
    config.training.mixed_precision_param = mixed_precision_param
    config.parallelism.data_parallel_replicate_degree = data_parallel_replicate_degree
    config.parallelism.data_parallel_shard_degree = data_parallel_shard_degree
    config.parallelism.tensor_parallel_degree = tensor_parallel_degree
    config.optimizer.lr = learning_rate
    config.checkpoint.keep_latest_k = keep_last_k_ckpts
    config.compile.enable = compile
    config.debug.seed = seed
    if transform_config is not None:
        config.transform_config = read_transform(transform_config)
        config.transform = dict(config.transform_config.mapping)
    config.job.description = f"{model_arch} {model_flavor}"
    config.job.dump_folder = default_dump_folder(config)
    plan = budget.fit_to_budget(
        config,
        token_num_scale=token_num_scale,
        steps=steps,
        gradient_accumulation=gradient_accumulation,
        num_gpus=num_gpus,
    )
    # what pretrain would refuse is refused here, before there is a file
    checked = build_config(Document(render.written(config), "generate-cfg"))
    read = _files_read(checked, transform_config)
    if dry_run:
        from aixsim_cli.pretrain.plan import describe

        typer.echo(describe(checked, plan.num_ranks))
    elif save_path is not None:
        command = f"aixsim generate-cfg {render.shell_line(_argv(context))}"
        render.write_new(save_path, render.render(config, plan, command), force=force, read=read)
        typer.echo(str(plan))
        ranks = f" --nproc-per-node {plan.num_ranks}" if plan.num_ranks > 1 else ""
        name = render.shell_line([str(save_path)])
        typer.echo(f"wrote {name}; next: aixsim pretrain --config {name}{ranks}")


def _files_read(config: "PretrainConfig", transform_config: Path | None) -> list[str | Path]:
    """The files that a config is made of, or will be trained on."""
    from aixsim_cli.data.local import find_files

    read: list[str | Path] = [] if transform_config is None else [transform_config]
    if config.training.dataset == "local":
        read += find_files(str(config.training.dataset_path))
    tokenizer = Path(config.model.hf_assets_path)
    return [*read, *(tokenizer.iterdir() if tokenizer.is_dir() else ())]


def _argv(context: typer.Context) -> list[str]:
    """The words of the command line that makes the same config, defaults left out."""
    argv = []
    for option in context.command.params:
        value = context.params.get(str(option.name))
        if option.name not in _NOT_OF_THE_CONFIG and value not in (None, option.default):
            argv += [option.opts[0], str(value).lower() if value is True else str(value)]
    return argv
