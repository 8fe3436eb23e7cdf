"""`aixsim schema`: JSON Schema of the files that aixsim reads, for editors."""

from typing import Annotated, Any, Literal

import typer

from aixsim_cli.commands.output import to_json


def schema(
    file: Annotated[
        Literal["pretrain", "transform"],
        typer.Argument(help="Of pretraining configs, or of transform files."),
    ],
) -> None:
    """Print the JSON Schema of a kind of file, by which an editor completes, explains and checks.

    \b
    aixsim schema pretrain > pretrain.schema.json
    and in a config: # yaml-language-server: $schema=pretrain.schema.json
    """
    from aixsim_cli.transforms.schema import transform_schema

    found = transform_schema() if file == "transform" else _pretrain_schema(transform_schema())
    typer.echo(to_json(found, indent=2, ensure_ascii=False))


def _pretrain_schema(transform: dict[str, Any]) -> dict[str, Any]:
    from aixsim_cli.config.pretrain import PretrainConfig
    from aixsim_cli.settings.build import json_schema

    found = json_schema(PretrainConfig)
    described = found["properties"]["transform"]["description"]
    either = {"anyOf": [*transform["anyOf"], {"type": "null"}], "default": None}
    found["properties"]["transform"] = either | {"description": described}
    found["$defs"] |= transform["$defs"]
    return found
