"""`aixsim pretrain`: train from scratch with torchtitan, digitally or on simulated hardware."""

import os
from pathlib import Path
from typing import Annotated

import typer

from aixsim_cli.errors import UserError, closest


def pretrain(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(help="Pretraining config, from generate-cfg; needed.")
    ] = None,
    transform_config: Annotated[
        Path | None, typer.Option(help="Simulate hardware as this file says, whatever the config.")
    ] = None,
    nproc_per_node: Annotated[
        int | None, typer.Option(min=1, help="Start so many ranks on this machine.")
    ] = None,
    max_restarts: Annotated[
        int,
        typer.Option(
            min=0, help="With --nproc-per-node: start all ranks again so often when one fails."
        ),
    ] = 0,
    dry_run: Annotated[bool, typer.Option(help="Print the plan and start nothing.")] = False,
) -> None:
    """Pretrain a model.

    Any key of the config file can be overridden by its dotted name: --training.steps 20.
    Runs alone, with --nproc-per-node, or under a launcher:

    \b
    torchrun --nproc-per-node 2 --no-python aixsim pretrain --config …
    """
    options = [name for parameter in context.command.params for name in parameter.opts]
    if config is None:
        raise UserError(_without_config(context.args, options))
    from aixsim_cli.config import pretrain
    from aixsim_cli.config.budget import check_ranks
    from aixsim_cli.pretrain import launch
    from aixsim_cli.transforms.choice import read_choice

    with launch.errors_of_rank_zero():
        overrides = pretrain.parse_overrides(context.args, options)
        loaded = pretrain.load_config(config, overrides, transform=read_choice(transform_config))
    if dry_run:
        from aixsim_cli.pretrain.plan import describe
        from aixsim_cli.run import launcher

        ranks = nproc_per_node or ("WORLD_SIZE" in os.environ and launcher.complete_environment())
        if ranks:
            check_ranks(loaded, ranks)
        typer.echo(describe(loaded, ranks or max(1, loaded.budget.num_ranks)))
        return
    if nproc_per_node is not None and "RANK" not in os.environ:
        launch.launch(loaded, nproc_per_node, max_restarts)
        return
    done = launch.run(loaded)
    if os.environ["RANK"] == "0":
        what = "trained" if done.trained else "nothing was trained"
        typer.echo(f"{what}; checkpoint: {done.folder or 'none, checkpoint.enable is false'}")


def _without_config(argv: list[str], options: list[str]) -> str:
    """What is wrong where there is no --config: a misspelling of it, if there is one."""
    for word in (word.partition("=")[0] for word in argv):
        if word.startswith("--") and closest(word, options) == "--config":
            return f"{word}: unknown option; did you mean '--config'?"
    return "--config: missing; expected a pretraining config, from aixsim generate-cfg"
