"""`aixsim eval`: measure a model, whatever its format."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from aixsim_cli.options import DTypeName, NoTransform, Source, TransformConfigPath

app = typer.Typer(no_args_is_help=True, help="Evaluate a model.")


@app.command()
def ppl(
    source: Source,
    dataset: Annotated[
        str, typer.Option(help="Dataset whose held-out part is scored.")
    ] = "builtin",
    dataset_path: Annotated[
        str | None, typer.Option(help="Files of the dataset; all of them are scored.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    num_batches: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many; default: score everything.")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Default: that of the model's training.")
    ] = None,
    dtype: DTypeName = "float32",
    transform_config: TransformConfigPath = None,
    no_transform: NoTransform = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Perplexity on a dataset's held-out part: exp of the mean nats per token."""
    from aixsim_cli.backends.titan import device

    run_on = device.prepare()
    import torch

    from aixsim_cli.data.loader import heldout_windows
    from aixsim_cli.data.sources import open_source
    from aixsim_cli.eval.load import load_model
    from aixsim_cli.eval.perplexity import perplexity

    rows = cast(Iterable[dict[str, Any]], open_source(dataset, dataset_path, "heldout"))
    texts = (row["text"] for row in rows)
    model = load_model(
        source,
        transform_config=transform_config,
        no_transform=no_transform,
        dtype=getattr(torch, dtype),
        device=run_on,
    )
    windows = heldout_windows(texts, model.tokenizer, seq_len or model.seq_len)
    result = perplexity(model, windows, batch_size=batch_size, num_batches=num_batches)
    if as_json:
        record = {
            "source": source,
            "dataset": dataset_path or dataset,
            "transform": model.transform,
            "seq_len": seq_len or model.seq_len,
            "dtype": dtype,
            "tokens": result.tokens,
            "nll": result.nll,
            "perplexity": result.perplexity,
        }
        typer.echo(json.dumps(record))
        return
    name = Path(dataset_path).name if dataset_path else dataset
    typer.echo(
        f"{source} on {name} ({model.transform or 'digital'}): {result.tokens:,} tokens scored, "
        f"nll {result.nll:.5f}, perplexity {result.perplexity:.4f}"
    )
