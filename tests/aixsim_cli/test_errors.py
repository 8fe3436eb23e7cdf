"""Messages are for a terminal: bounded, whatever a stranger's file holds, and plain text."""

from dataclasses import dataclass

import pytest

from aixsim_cli.config.load import Document, build
from aixsim_cli.errors import ConfigError, RunError, UserError, nearest


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


def test_a_long_value_is_shown_by_its_ends():
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


def test_a_long_list_of_words_is_cut():
    said = nearest("zzz", [f"word{n:04}" for n in range(5000)])
    assert said.endswith("word0019, … (5000 in all)") and len(said) < 400
