"""The `aixsim` command: its subcommands, and the one place where errors become exit codes."""

import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from aixsim_cli.commands import (
    aliases,
    continual_pretrain,
    convert_ckpt,
    energy,
    eval,
    generate_cfg,
    generate_hf,
    pretrain,
    schema,
    transforms,
)
from aixsim_cli.commands.flags import Command
from aixsim_cli.errors import (
    EXIT_CODES,
    RunError,
    SaidElsewhere,
    Stopped,
    UserError,
    first_line,
    printable,
    shorten,
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # the boxes of rich cut long names off on a narrow terminal
    rich_markup_mode=None,
    # --model_flavor is --model-flavor, everywhere
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
)
app.command("generate-cfg", cls=Command)(generate_cfg.generate_cfg)
# what no option takes is a dotted override of the config
app.command(
    "pretrain",
    cls=Command,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(pretrain.pretrain)
# every word is for HF's parser, --help too
app.command(
    "continual-pretrain",
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    },
)(continual_pretrain.continual_pretrain)
app.command("convert-ckpt", cls=Command)(convert_ckpt.convert_ckpt)
app.add_typer(eval.app, name="eval")
app.command("generate-hf", cls=Command)(generate_hf.generate_hf)
app.command("energy", cls=Command)(energy.energy)
app.add_typer(transforms.app, name="transforms")
app.command("schema")(schema.schema)


def _print_version(value: bool) -> None:
    if not value:
        return
    from importlib.metadata import version

    from aixsim_kernels.common.library import library

    from aixsim_cli import __version__
    from aixsim_cli.run.device import device_type

    found = {name: version(name) for name in ("torch", "torchtitan", "transformers")}
    typer.echo(" ".join([f"aixsim {__version__}", *(f"{k} {v}" for k, v in found.items())]))
    typer.echo(f"device: {device_type()}")
    compiled = library()
    told = f"PyTorch, slower: {compiled}" if isinstance(compiled, str) else "C"
    typer.echo(f"simulated operations on a CPU: {told}")
    raise typer.Exit


@app.callback()
def aixsim(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show versions."),
    ] = False,
) -> None:
    """Train language models on simulated hardware."""


def main() -> NoReturn:
    """Run the command line; exit code 2 for a user's mistake, 1 for a run that failed.

    A run that a signal stopped ends with the code of that signal.
    """
    try:
        app(args=aliases.translate(sys.argv[1:]))
    except Stopped as stop:
        if stop.signal == signal.SIGINT:
            print("aixsim: interrupted", file=sys.stderr)
        sys.exit(EXIT_CODES.get(stop.signal, 1))
    except SaidElsewhere:
        sys.exit(2)
    except UserError as error:
        _fail(f"aixsim: error: {error}", 2, error)
    except RunError as error:
        _fail(f"aixsim: run failed: {error}", 1, error)
    except SystemExit as end:
        # typer turns Ctrl-C into this exit code, without a word
        if end.code == 130:
            print("aixsim: interrupted", file=sys.stderr)
        raise
    except BaseException as error:  # what tokenizers' Rust raises in a panic is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        first = printable(shorten(first_line(error), 1000))
        hint = "set AIXSIM_DEBUG=1 for the traceback"
        _fail(f"aixsim: run failed: {type(error).__name__}: {first} ({hint})", 1, error)
    sys.exit(0)


def _fail(message: str, code: int, error: BaseException | None) -> NoReturn:
    if error is not None and os.environ.get("AIXSIM_DEBUG") == "1":
        raise error
    print(message, file=sys.stderr)
    sys.exit(code)
