"""YAML into dataclasses: types, names, lines, and all problems at once."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from aixsim_cli.errors import ConfigError, UserError
from aixsim_cli.settings.build import build, build_dataclass
from aixsim_cli.settings.document import load_yaml


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
        ("bounds: [0, true]", "got [0, True]; expected [a number, a number]"),
        ("bounds: [0, x]", "got [0, 'x']; expected [a number, a number]"),
        ("3: 4", "c.yaml:2: training.3: unknown key; expected one of: bounds"),
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
    # as they stand in the file
    lines = [int(problem.split(":")[1]) for problem in caught.value.problems]
    assert lines == [1, 3, 4, 5]


@dataclass
class Even:
    steps: int = 0

    def __post_init__(self):
        if self.steps % 2:
            raise ValueError(f"steps: got {self.steps}; expected an even number")


@dataclass
class Both:
    a: Even = field(default_factory=Even)
    b: Even = field(default_factory=Even)


def test_what_a_section_says_of_itself_is_told_with_the_rest(tmp_path):
    with pytest.raises(ConfigError) as caught:
        build(Both, read(tmp_path, "a: {steps: 3}\nb: {steps: x}\n"))
    first, second = caught.value.problems
    assert first.endswith("c.yaml:1: a: steps: got 3; expected an even number")
    assert second.endswith("c.yaml:2: b.steps: got 'x'; expected a whole number")
    with pytest.raises(ConfigError, match=r"^here: steps: got 1; expected an even number"):
        build_dataclass(Even, {"steps": 1}, where="here")


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
