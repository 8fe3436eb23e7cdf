"""Dotted overrides: every spelling the field uses, and what they may not be."""

from dataclasses import dataclass, field

import pytest

from aixsim_cli.config.load import Document, build
from aixsim_cli.config.overrides import apply_overrides, parse_overrides
from aixsim_cli.errors import ConfigError


@dataclass
class Metrics:
    enable_wandb: bool = True
    log_freq: int = 10
    tags: list[str] = field(default_factory=list)


@dataclass
class Optimizer:
    lr: float = 1e-3
    name: str | None = None


@dataclass
class Config:
    metrics: Metrics = field(default_factory=Metrics)
    optimizer: Optimizer = field(default_factory=Optimizer)


@pytest.mark.parametrize(
    "words",
    [
        ["--metrics.enable_wandb", "false"],
        ["--metrics.enable_wandb=false"],
        ["--metrics.enable-wandb", "false"],
        ["--metrics_args.enable_wandb", "false"],
        ["--metrics-args.enable-wandb=false"],
    ],
)
def test_spellings(words):
    assert parse_overrides(words, Config) == {"metrics.enable_wandb": False}


def test_a_key_alone_is_true_and_lists_are_yaml():
    words = ["--metrics.enable_wandb", "--metrics.tags", "[a, b]", "--metrics.log_freq", "3"]
    assert parse_overrides(words, Config) == {
        "metrics.enable_wandb": True, "metrics.tags": ["a", "b"], "metrics.log_freq": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--metrics.enable_wandd", "1"], "did you mean 'metrics.enable_wandb'?"),
        (["--metrics.dim", "96"], "unknown key; expected one of: metrics.enable_wandb, metrics."),
        (["--optimizer.learning_rate", "1"], "expected one of: optimizer.lr, optimizer.name"),
        (["--metrics.lr", "1"], "did you mean 'optimizer.lr'?"),
        (["--metricz.tags", "1"], "did you mean 'metrics.tags'?"),
        (["--verbose"], "unknown option"),
        (["stray"], "unexpected"),
        (["--metrics.log_freq"], "--metrics.log_freq: no value; expected one after it"),
        (["--metrics.tags", "[a"], "expected a YAML value"),
    ],
)
def test_mistakes(words, said):
    with pytest.raises(ConfigError) as caught:
        parse_overrides(words, Config)
    assert said in str(caught.value)


def test_overrides_win_and_are_named_in_messages():
    document = Document({"metrics": {"log_freq": 1}}, "c.yaml")
    changed = apply_overrides(document, {"metrics.log_freq": 5})
    assert build(Config, changed).metrics.log_freq == 5
    assert document.data == {"metrics": {"log_freq": 1}}
    wrong = apply_overrides(document, {"metrics.log_freq": "x"})
    with pytest.raises(ConfigError, match=r"^--metrics\.log_freq: got 'x'"):
        build(Config, wrong)


def test_a_line_break_stays_in_a_text():
    name = "of two\nlines: 'x'"
    assert parse_overrides(["--optimizer.name", name], Config) == {"optimizer.name": name}
    assert parse_overrides(["--metrics.tags", "[a,\nb]"], Config) == {"metrics.tags": ["a", "b"]}
    assert parse_overrides(["--optimizer.name", "null"], Config) == {"optimizer.name": None}
