"""YAML into dataclasses: types, names, lines, and all problems at once."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from aixsim_cli.errors import ConfigError, UserError
from aixsim_cli.settings.load import build, build_dataclass, load_yaml


@dataclass
class Inner:
    steps: int = 1
    rate: float = 0.1
    name: str = "x"
    maybe: int | None = None
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    items: list[str] = field(default_factory=list)
    bounds: tuple[float, float] = (0.0, 1.0)


@dataclass
class Outer:
    training: Inner = field(default_factory=Inner)
    other: Inner = field(default_factory=Inner)


def read(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    return load_yaml(tmp_path / "c.yaml")


def test_values_and_defaults(tmp_path):
    text = "training: {steps: 5, rate: 1e-4, maybe: null, kind: b, flag: true, items: [a]}\n"
    built = build(Outer, read(tmp_path, text))
    assert built.training == Inner(5, 1e-4, "x", None, "b", True, ["a"])
    assert built.other == Inner()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("stepz: 3", "c.yaml:2: training.stepz: unknown key; did you mean 'steps'?"),
        ("steps: many", "c.yaml:2: training.steps: got 'many'; expected a whole number"),
        ("steps: 1.5", "got 1.5; expected a whole number"),
        ("steps: true", "got true; expected a whole number"),
        ("rate: false", "expected a number"),
        ("rate: .nan", "c.yaml:2: training.rate: got .nan; expected a finite number"),
        ("rate: -.inf", "training.rate: got -.inf; expected a finite number"),
        ("rate: nan", "training.rate: got .nan; expected a finite number"),
        ("rate: 1e400", "training.rate: got .inf; expected a finite number"),
        ("bounds: [0, .inf]", "training.bounds: got .inf; expected a finite number"),
        ("steps: 1.0e+23", "training.steps: got 1e+23; expected a whole number"),
        (f"steps: {10**23}", "got a whole number of 77 bits; expected at most 63"),
        (f"maybe: {2**63}", "training.maybe: got a whole number of 64 bits; expected"),
        ("name: 3", "expected a text"),
        ("maybe: x", "expected a whole number or null"),
        ("kind: c", "expected one of a, b"),
        ("flag: 1", "got 1; expected true or false"),
        ("flag: 'yes'", "got 'yes'; expected true or false"),
        ("items: a", "expected a list, each a text"),
    ],
)
def test_mistakes_name_line_key_value_and_type(tmp_path, line, said):
    with pytest.raises(ConfigError) as caught:
        build(Outer, read(tmp_path, f"training:\n  {line}\n"))
    assert said in str(caught.value)


def test_all_problems_at_once(tmp_path):
    text = "traning: {}\ntraining:\n  steps: x\n  kind: c\nother: 3\n"
    with pytest.raises(ConfigError) as caught:
        build(Outer, read(tmp_path, text))
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\na: 2\n", ":2: a: given twice"),
        ("a: [1\n", "not valid YAML"),
        ("- 1\n", "expected a mapping"),
        ("", "expected a mapping"),
        ("a: !!python/object/apply:os.system [exit]\n", "not valid YAML"),
        ("? [1, 2]\n: 3\n", "expected a plain word"),
    ],
)
def test_files_that_are_no_config(tmp_path, text, said):
    with pytest.raises(UserError) as caught:
        read(tmp_path, text)
    assert said in str(caught.value)


def test_missing_file():
    with pytest.raises(UserError, match=r"nowhere\.yaml: cannot be read"):
        load_yaml("nowhere.yaml")


def test_part_of_a_file():
    assert build_dataclass(Inner, {"steps": 3}, where="here").steps == 3
    with pytest.raises(ConfigError, match="here: step: unknown key; did you mean 'steps'"):
        build_dataclass(Inner, {"step": 3}, where="here")
