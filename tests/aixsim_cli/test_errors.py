"""Messages are for a terminal: bounded, whatever a stranger's file holds, and plain text."""

import signal
from dataclasses import dataclass

import pytest

from aixsim_cli import main
from aixsim_cli.errors import (
    ConfigError,
    RunError,
    SaidElsewhere,
    Stopped,
    UserError,
    first_line,
    nearest,
)
from aixsim_cli.run.resume import listing
from aixsim_cli.settings.build import build
from aixsim_cli.settings.document import Document


@dataclass
class Config:
    steps: int = 1


@pytest.mark.timeout(20)
def test_thousands_of_problems_are_counted():
    with pytest.raises(ConfigError) as caught:
        build(Config, Document({f"key{n}": 1 for n in range(20_000)}, "c.yaml"))
    lines = str(caught.value).splitlines()
    assert len(lines) == 21 and lines[-1] == "… and 19980 more"
    assert lines[0].startswith("c.yaml: key0: unknown key; expected one of")
    assert len(caught.value.problems) == 20_000


def test_a_long_value_is_simulated_class_its_ends():
    with pytest.raises(ConfigError) as caught:
        build(Config, Document({"steps": ["x" * 100_000] * 100}, "c.yaml"))
    said = str(caught.value)
    assert said.startswith("c.yaml: steps: got ['xxx") and said.endswith("expected a whole number")
    assert "…" in said and len(said) < 300


@pytest.mark.parametrize("kind", [UserError, RunError])
def test_any_message_is_bounded_and_keeps_its_ends(kind):
    said = str(kind("where: " + "x" * 10**6 + "; expected words"))
    assert said.startswith("where: x") and said.endswith("x; expected words") and len(said) < 3000


@pytest.mark.parametrize("kind", [UserError, RunError])
def test_characters_that_steer_a_terminal_are_shown_as_codes(kind):
    assert str(kind("a \x1b]0;title\x07 b\rc\n\ud800 ü 🙂")) == (
        "a \\x1b]0;title\\x07 b\\rc\n\\ud800 ü 🙂"
    )


def test_an_error_nobody_expected_is_no_other(monkeypatch, capsys):
    def fail(**keywords):
        raise ValueError("where \x1b]0;title\x07 " + "x" * 10**6 + "\nmore")

    monkeypatch.setattr(main, "app", fail)
    monkeypatch.delenv("AIXSIM_DEBUG", raising=False)
    with pytest.raises(SystemExit) as ended:
        main.main()
    said = capsys.readouterr().err
    assert ended.value.code == 1 and len(said) < 1200 and said.count("\n") == 1
    assert said.startswith("aixsim: run failed: ValueError: where \\x1b]0;title\\x07 x")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (Stopped(signal.SIGTERM), 75, ""),
        (Stopped(signal.SIGINT), 130, "aixsim: interrupted\n"),
        (SaidElsewhere(), 2, ""),
    ],
)
def test_what_was_told_already_is_an_exit_code(monkeypatch, capsys, error, code, said):
    def fail(**keywords):
        raise error

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == code and capsys.readouterr().err == said


def test_settings_of_a_checkpoint_are_told_within_bounds():
    said = listing({"a": ("\x1b]0;title\x07\nresumed", "x" * 10**6), "optimizer.lr": (0.1, 1e-5)})
    assert said.startswith("a \\x1b]0;title\\x07\\nresumed -> xxx")
    assert said.endswith(", optimizer.lr 0.1 -> 1e-05") and len(said) < 300


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("\n  first \nsecond"), "first"),
        (ValueError(), "ValueError"),
        (ValueError(" \n "), "ValueError"),
        (ValueError("what failed:\n\n    why it did\nmore"), "what failed: why it did"),
    ],
)
def test_the_first_line_of_an_error_is_never_empty(error, said):
    assert first_line(error) == said


def test_a_long_list_of_words_is_cut():
    said = nearest("zzz", [f"word{n:04}" for n in range(5000)])
    assert said.endswith("word0019, … (5000 in all)") and len(said) < 400
