"""`aixsim transforms`: which paradigms exist, their parameters, and what a file does to a model."""

from typing import Annotated, Any

import typer

from aixsim_cli.commands.flags import Command
from aixsim_cli.commands.output import print_table, to_json
from aixsim_cli.errors import UserError
from aixsim_cli.options import AsJson, TrustRemoteCode

app = typer.Typer(no_args_is_help=True, help="What can be simulated, and what a file does.")


@app.command("list", cls=Command)
def list_paradigms(as_json: AsJson = False) -> None:
    """The paradigms that `transform:` accepts."""
    from aixsim_cli.transforms.registry import describe_paradigms

    rows = describe_paradigms()
    if as_json:
        typer.echo(to_json(rows))
        return
    print_table(("name", "simulates", "what", "from"), [row.values() for row in rows], "paradigms")


@app.command(cls=Command)
def show(
    paradigm: Annotated[str, typer.Argument(help="A name from `aixsim transforms list`.")],
    as_json: AsJson = False,
) -> None:
    """A paradigm's parameters: type, default, unit, source."""
    from aixsim_cli.transforms.protocol import Lora
    from aixsim_cli.transforms.registry import describe_params, get_paradigm

    rows = describe_params(get_paradigm(paradigm).params)
    lora = describe_params(Lora)
    if as_json:
        typer.echo(to_json({"transform": paradigm, "parameters": rows, "lora": lora}))
        return
    columns = ("parameter", "type", "default", "unit", "meaning", "source")
    print_table(columns, [row.values() for row in rows], f"transform: {paradigm}")
    print_table(columns, [row.values() for row in lora], "lora: {…}, for any transform")


@app.command(cls=Command)
def check(
    file: Annotated[str, typer.Argument(help="A transform file.")],
    flavor: Annotated[
        str | None, typer.Option(help="Against this size of the architecture: debug, 60M, ….")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Against this Hugging Face folder or hub name.")
    ] = None,
    model_arch: Annotated[str, typer.Option(help="aixsim, or llama3: torchtitan's.")] = "aixsim",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """What a transform file would do to a model; no weight is read, nothing is trained."""
    if (flavor is None) == (model is None):
        raise UserError("--flavor, --model: expected one of them")
    from aixsim_cli.models import preview
    from aixsim_cli.transforms.read import read_transform

    config = read_transform(file)
    if model is not None:
        report = preview.of_source(config, model, trust_remote_code=trust_remote_code)
    else:
        report = preview.of_flavor(config, model_arch, str(flavor))
    rows = [_row(place) for place in report.simulated]
    if as_json:
        typer.echo(to_json({"simulated": rows, "digital": report.digital, "notes": report.notes}))
        return
    columns = ("module", "kind", "transform", "pattern", "parameters", "lora")
    print_table(columns, [_words(row) for row in rows], f"{file} on {model or flavor}")
    typer.echo(str(report))


def _row(place: Any) -> dict[str, Any]:
    from dataclasses import asdict

    lora = place.transform.lora if place.site.kind == "linear" else None
    return {
        "module": place.site.name,
        "kind": place.site.kind,
        "transform": place.transform.name,
        "pattern": place.rule.pattern,
        "parameters": asdict(place.rule.params),
        "lora": lora and asdict(lora),
    }


def _words(row: dict[str, Any]) -> list[str]:
    from aixsim_cli.transforms.protocol import as_in_file

    shown = row | {
        key: ", ".join(f"{k}={as_in_file(v)}" for k, v in (row[key] or {}).items() if v is not None)
        for key in ("parameters", "lora")
    }
    return [str(value) for value in shown.values()]
