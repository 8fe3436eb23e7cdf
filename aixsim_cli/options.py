"""Options that several commands share, so that each means one thing everywhere."""

from typing import Annotated, Literal

import typer

Source = Annotated[
    str, typer.Argument(help="A torchtitan step-N folder, a Hugging Face folder or a hub name.")
]
TransformConfigPath = Annotated[
    str | None, typer.Option(help="Simulate hardware as this file says, not as the source does.")
]
NoTransform = Annotated[
    bool, typer.Option("--no-transform", help="Run the weights digitally, whatever they have.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that a model or tokenizer brings; never without this.",
    ),
]
DTypeName = Annotated[
    Literal["float32", "bfloat16", "float16"], typer.Option(help="Of weights and activations.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

# of evaluations
Dataset = Annotated[str, typer.Option(help="Dataset whose held-out part is scored.")]
DatasetPath = Annotated[
    str | None,
    typer.Option(
        help="Of dataset local: .txt, .jsonl, .json, .parquet; a file, a glob or a folder. All of "
        "it is scored."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1)]
NumBatches = Annotated[
    int | None, typer.Option(min=1, help="Stop after so many; default: score everything.")
]
SeqLen = Annotated[int | None, typer.Option(min=1, help="Default: that of the model's training.")]
CalibrationBatches = Annotated[
    int,
    typer.Option(min=1, help="Batches that set ranges which training did not set."),
]
CalibrationPath = Annotated[
    str | None,
    typer.Option(help="Such files to calibrate on; default: the dataset's training part."),
]
Recalibrate = Annotated[
    bool, typer.Option("--recalibrate", help="Set all ranges so, also those that training set.")
]
