"""Dotted overrides: every spelling NewComputeBench uses, and what they may not be."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aixsim_cli.config import pretrain
from aixsim_cli.continual.arguments import parse_arguments
from aixsim_cli.errors import ConfigError, UserError
from aixsim_cli.main import app
from aixsim_cli.settings.build import build
from aixsim_cli.settings.document import Document
from aixsim_cli.settings.overrides import apply_overrides, parse_overrides
from aixsim_cli.transforms.read import read_transform

REPOSITORY = Path(__file__).parents[3]


def read_flags(path):
    return parse_arguments(["--config", str(path)])


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
        (["--optimizer.learning_rate", "1"], "did you mean 'optimizer.lr'?"),
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--optimizer.learning_rate", "1"], "unknown key; did you mean 'optimizer.lr'?"),
        (["--optimizer.lrr", "1"], "unknown key; did you mean 'optimizer.lr'?"),
        (["--model.dim", "96"], "unknown key; sizes have names, expected model.flavor: debug, 60M"),
        (["--training.batch_size", "96"], "did you mean 'training.local_batch_size'?"),
        (["--training.qqq", "96"], "expected one of: training.dataloader"),
        (["--trainnig.steps", "96"], "did you mean 'training.steps'?"),
        (["--dry-rum"], "--dry-rum: unknown option; did you mean '--dry-run'?"),
        (["--confg=x"], "--confg: unknown option; did you mean '--config'?"),
        (["--verbose", "5"], "--verbose: unknown option; keys of the config are dotted"),
    ],
)
def test_hints_lead_to_what_was_meant(words, said):
    with pytest.raises(ConfigError) as caught:
        pretrain.parse_overrides(words, ["--config", "--dry-run"])
    assert said in str(caught.value) and len(caught.value.problems) == 1


def test_a_command_without_its_config_says_which_word_was_meant():
    run = CliRunner().invoke
    for words, said in {
        ("--confg", "x"): "--confg: unknown option; did you mean '--config'?",
        ("--dry-run",): "--config: missing; expected a pretraining config",
    }.items():
        assert said in str(run(app, ["pretrain", *words]).exception)


PRETRAINING = REPOSITORY / "configs/pretrain/debug.yaml"
TRANSFORM = REPOSITORY / "configs/transforms/optical.yaml"
FLAGS = "model_name_or_path: x\noutput_dir: y\n"


@pytest.mark.parametrize(
    ("read", "text", "is_it", "expected"),
    [
        (pretrain.load_config, TRANSFORM.read_text(), "a transform file", "a pretraining config"),
        (pretrain.load_config, "fc: {}\n", "a transform file", "a pretraining config"),
        (pretrain.load_config, FLAGS, "flags of aixsim cont", "a pretraining config"),
        (read_transform, PRETRAINING.read_text(), "a pretraining config", "a transform file"),
        (read_transform, FLAGS, "flags of aixsim cont", "a transform file"),
        (read_flags, TRANSFORM.read_text(), "a transform file", "flags of aixsim cont"),
        (read_flags, PRETRAINING.read_text(), "a pretraining config", "flags of aixsim cont"),
    ],
)
def test_a_file_for_something_else_is_called_what_it_is(tmp_path, read, text, is_it, expected):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: is {is_it}") and f"; expected {expected}" in said


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
