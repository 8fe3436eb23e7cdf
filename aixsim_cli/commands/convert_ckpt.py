"""`aixsim convert-ckpt`: torchtitan checkpoint <-> Hugging Face folder."""

from pathlib import Path
from typing import Annotated

import typer

from aixsim_cli.errors import UserError
from aixsim_cli.models.form import Form, choose_form
from aixsim_cli.options import TrustRemoteCode


def convert_ckpt(
    model_arch: Annotated[str, typer.Argument(help="aixsim or llama3.")],
    model_flavor: Annotated[str, typer.Argument(help="debug, 60M, 200M, …")],
    source: Annotated[str, typer.Argument(help="A step-N folder, a HF folder or a hub name.")],
    target: Annotated[Path, typer.Argument(help="The folder to make.")],
    tokenizer_path: Annotated[
        str | None, typer.Option(help="Tokenizer to add; default: the training's.")
    ] = None,
    form: Annotated[
        Form | None,
        typer.Option(
            help="Of a Hugging Face folder: aixsim, the default; strict, which nothing loads "
            "without aixsim; plain, digital weights with the transform in files beside them."
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="The same as --form strict.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="The same as --form plain.")] = False,
    no_transform: Annotated[
        bool,
        typer.Option(
            "--no-transform", help="The weights alone, without the hardware they were trained on."
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a folder that convert-ckpt made.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Convert a checkpoint; the direction is read from SOURCE.

    The result is compared with the source, digitally and as simulated, before it gets its name.
    """
    from aixsim_cli.config.flavors import find_flavor
    from aixsim_cli.models.kind import SourceKind, find_source
    from aixsim_cli.transforms.choice import read_choice

    find_flavor(model_arch, model_flavor)
    chosen, transform = choose_form(form, strict, plain), read_choice(None, no_transform)
    kind = find_source(source)
    if kind is not SourceKind.TITAN and (chosen != "aixsim" or tokenizer_path is not None):
        raise UserError(
            f"{source}: is converted to a torchtitan checkpoint, which has one form and names its "
            "tokenizer; expected no --form, --strict, --plain or --tokenizer-path"
        )
    from aixsim_cli.models import convert

    if kind is SourceKind.TITAN:
        difference = convert.titan_to_hf(
            model_arch,
            model_flavor,
            Path(source),
            target,
            tokenizer=tokenizer_path,
            form=chosen,
            transform=transform,
            force=force,
            trust_remote_code=trust_remote_code,
        )
    else:
        difference = convert.hf_to_titan(
            model_arch,
            model_flavor,
            source,
            target,
            transform=transform,
            force=force,
            trust_remote_code=trust_remote_code,
        )
    typer.echo(f"{kind.value} {source} -> {target} (logits differ by at most {difference:.1e})")
