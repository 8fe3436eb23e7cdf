"""`aixsim generate-cfg`: work out a run and write its config."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def generate_cfg(
    model_flavor: Annotated[str, typer.Option(help="debug, 60M, 200M, 400M, 600M, 1.1B.")],
    save_path: Annotated[Path | None, typer.Option(help="File to write.")] = None,
    model_arch: Annotated[str, typer.Option(help="aixsim, or llama3: torchtitan's.")] = "aixsim",
    tokenizer_path: Annotated[
        str, typer.Option(help="A hub name, a folder, or builtin.")
    ] = "HuggingFaceTB/cosmo2-tokenizer",
    dataset: Annotated[
        str, typer.Option(help="fineweb-edu, fineweb, wikitext, c4, local or builtin.")
    ] = "fineweb-edu",
    dataset_path: Annotated[
        str | None, typer.Option(help="Files of dataset local: a file, a glob or a folder.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per rank and step.")] = 8,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 2048,
    gradient_accumulation: Annotated[int, typer.Option(min=1, help="Batches per step.")] = 1,
    data_parallel_replicate_degree: Annotated[int, typer.Option(min=1, help="DDP.")] = 1,
    data_parallel_shard_degree: Annotated[
        int, typer.Option(min=-1, help="FSDP; -1 = all ranks that are left of --num-gpus.")
    ] = -1,
    tensor_parallel_degree: Annotated[int, typer.Option(min=1)] = 1,
    num_gpus: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks, for a shard degree of -1; default: replicas x tensor."),
    ] = None,
    token_num_scale: Annotated[float, typer.Option(help="Tokens per parameter.")] = 22,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of computing them.")] = None,
    learning_rate: Annotated[float, typer.Option()] = 1e-4,
    seed: Annotated[int, typer.Option()] = 42,
    mixed_precision_param: Annotated[Literal["bfloat16", "float32"], typer.Option()] = "bfloat16",
    compile: Annotated[Literal["true", "false"], typer.Option(help="torch.compile.")] = "false",
    keep_last_k_ckpts: Annotated[int, typer.Option(min=0, help="0 = all.")] = 3,
    transform_config: Annotated[
        Path | None, typer.Option(help="Hardware to simulate: a transform file.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Print the plan and write nothing.")] = False,
) -> None:
    """Work out parameters, tokens and steps of a run, and write its config."""
    options = {k: v for k, v in locals().items() if k not in ("save_path", "force", "dry_run")}
    from aixsim_cli.config import generate
    from aixsim_cli.errors import UserError

    if save_path is None and not dry_run:
        raise UserError("--save-path: missing; expected the file to write, or --dry-run")
    command = f"aixsim generate-cfg {generate.shell_words(_options(options))}"
    from aixsim_cli.transforms.read import read_transform

    options["compile"] = compile == "true"
    options["transform"] = None
    if options.pop("transform_config") is not None:
        options["transform"] = dict(read_transform(transform_config or "").mapping)
    request = generate.Request(**options)
    plan = generate.make_plan(request)
    config = generate.make_config(request, plan)
    from aixsim_cli.config.pretrain import build_config
    from aixsim_cli.data.local import find_files
    from aixsim_cli.settings.load import Document

    # what pretrain would refuse is refused here, before there is a file
    checked = build_config(Document(config, "generate-cfg"))
    read: list[str | Path] = [] if transform_config is None else [transform_config]
    if dataset == "local":
        read += find_files(str(dataset_path))
    if Path(tokenizer_path).is_dir():
        read += Path(tokenizer_path).iterdir()
    if dry_run:
        from aixsim_cli.pretrain.plan import describe

        typer.echo(describe(checked, plan.num_ranks))
    elif save_path is not None:
        text = generate.render(config, plan, command)
        generate.write_new(save_path, text, force=force, read=read)
        typer.echo(str(plan))
        ranks = f" --nproc-per-node {plan.num_ranks}" if plan.num_ranks > 1 else ""
        name = generate.shell_words([str(save_path)])
        typer.echo(f"wrote {name}; next: aixsim pretrain --config {name}{ranks}")


def _options(options: dict) -> list[str]:
    """The words of the command line that makes the same config, defaults left out."""
    import inspect

    defaults = {k: p.default for k, p in inspect.signature(generate_cfg).parameters.items()}
    words = []
    for name, value in options.items():
        if value != defaults[name]:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words
