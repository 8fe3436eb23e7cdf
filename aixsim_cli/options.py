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
