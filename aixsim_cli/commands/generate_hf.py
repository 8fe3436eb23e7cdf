"""`aixsim generate-hf`: continue a text with a model."""

from typing import Annotated

import typer

from aixsim_cli.options import DTypeName, NoTransform, Source, TransformConfigPath


def generate_hf(
    source: Source,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    do_sample: Annotated[
        str, typer.Option(help="true: draw each token; false: take the likeliest.")
    ] = "false",
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
    top_k: Annotated[int, typer.Option(min=0)] = 50,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: DTypeName = "float32",
    transform_config: TransformConfigPath = None,
    no_transform: NoTransform = False,
) -> None:
    """Print the prompt and its continuation."""
    from aixsim_cli.eval.generate import generate
    from aixsim_cli.eval.measure import load_for_generation

    sample = _boolean(do_sample)
    model = load_for_generation(source, transform_config, no_transform, dtype)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p} if sample else {}
    text = generate(
        model, prompt, max_new_tokens=max_new_tokens, do_sample=sample, seed=seed, **sampling
    )
    typer.echo(text)


def _boolean(text: str) -> bool:
    # the field writes `--do-sample true`, which a flag would not accept
    if text.lower() not in ("true", "false"):
        raise typer.BadParameter(f"got {text!r}; expected true or false", param_hint="--do-sample")
    return text.lower() == "true"
