"""`aixsim continual-pretrain`: train any Hugging Face causal language model further."""

import math

import typer

from aixsim_cli.errors import loss_not_finite


def continual_pretrain(context: typer.Context) -> None:
    """Train a Hugging Face causal language model further, on simulated hardware.

    Takes every flag of HF's run_clm and of its TrainingArguments, --transform-config, and
    --config FILE.yaml with the same keys. --help lists them all.

    Runs alone, under torchrun --no-python and under accelerate launch --no_python.
    """
    from aixsim_cli.continual import arguments

    if not context.args or "--help" in context.args or "-h" in context.args:
        arguments.print_help()
        raise typer.Exit
    parsed = arguments.parse_arguments(context.args)
    from aixsim_cli.continual.train import continual_pretrain as run

    result = run(parsed)
    if parsed.training.process_index != 0:
        return
    for key in ("train_loss", "eval_loss", "perplexity"):
        if key in result.metrics:
            typer.echo(f"{key}: {result.metrics[key]:.4f}")
    if result.folder is not None:
        typer.echo(f"saved {result.folder}; next: aixsim eval ppl {result.folder}")
    if not math.isfinite(result.metrics.get("eval_loss", 0.0)):
        raise loss_not_finite("the loss of the evaluation")
