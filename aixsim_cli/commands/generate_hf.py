"""`aixsim generate-hf`: continue a text with a model."""

from typing import Annotated

import typer

from aixsim_cli.options import DTypeName, NoTransform, Source, TransformConfigPath, TrustRemoteCode

# below it the likeliest token is drawn anyway, until scores overflow in float32
_LOWEST_TEMPERATURE = 1e-4
_SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}


def generate_hf(
    source: Source,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    do_sample: Annotated[
        bool, typer.Option(help="Draw each token; otherwise the likeliest is taken.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Of the sampling, 0.0001 or more; default: 1.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Of the sampling; 0 = all tokens; default: 50.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Of the sampling; default: 1.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the sampling.")] = 0,
    dtype: DTypeName = "float32",
    transform_config: TransformConfigPath = None,
    no_transform: NoTransform = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Print the prompt and its continuation."""
    from aixsim_cli.errors import UserError

    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    given = {name: value for name, value in asked.items() if value is not None}
    if do_sample and temperature is not None and temperature < _LOWEST_TEMPERATURE:
        raise UserError(
            f"--temperature: got {temperature}; expected {_LOWEST_TEMPERATURE} or more, or "
            "--do-sample false for the likeliest"
        )
    if given and not do_sample:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        typer.echo(f"aixsim: {names}: not used without --do-sample true", err=True)
    from aixsim_cli.eval.generate import generate
    from aixsim_cli.eval.measure import load_for_generation
    from aixsim_cli.transforms.choice import read_choice

    transform = read_choice(transform_config, no_transform)
    model = load_for_generation(source, transform, dtype=dtype, trust_remote_code=trust_remote_code)
    sampling = _SAMPLING | given if do_sample else {}
    text = generate(
        model, prompt, max_new_tokens=max_new_tokens, do_sample=do_sample, seed=seed, **sampling
    )
    typer.echo(text)
