"""A flag may carry true or false; nothing else is taken for its value."""

from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from aixsim_cli.commands.flags import Command

app = typer.Typer(context_settings={"token_normalize_func": lambda name: name.replace("_", "-")})


@app.command(cls=Command)
def command(
    words: Annotated[list[str] | None, typer.Argument()] = None,
    do_it: bool = False,
    force: Annotated[bool, typer.Option("--force")] = False,
    text: str = "",
) -> None:
    print(do_it, force, text, words or [])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "False False  []"),
        (["--do-it"], "True False  []"),
        (["--do-it", "true"], "True False  []"),
        (["--do_it", "True"], "True False  []"),
        (["--do-it=true"], "True False  []"),
        (["--do-it", "false"], "False False  []"),
        (["--do-it=False", "--force"], "False True  []"),
        (["--force", "false", "--do-it"], "True False  []"),
        (["--do-it", "--no-do-it"], "False False  []"),
        (["--do-it", "x", "true"], "True False  ['x', 'true']"),
        (["--text", "--do-it", "true"], "False False --do-it ['true']"),
        (["--text=true", "--", "--do-it", "true"], "False False true ['--do-it', 'true']"),
    ],
)
def test_a_flag_takes_true_and_false(words, said):
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, done.stdout) == (0, f"{said}\n")


def test_another_value_is_a_mistake():
    done = CliRunner().invoke(app, ["--do_it=maybe"])
    assert done.exit_code == 2
    assert "Invalid value for --do-it: got 'maybe'; expected true or false" in done.stderr


@pytest.mark.parametrize("words", [["--no-do-it", "true"], ["--no_do_it=false"]])
def test_a_flag_that_says_no_takes_no_value(words):
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert "--no-do-it: got" in done.stderr
    assert "expected --do-it true or --do-it false" in " ".join(done.stderr.split())
