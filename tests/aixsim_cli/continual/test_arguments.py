"""The command line of continual-pretrain: run_clm's flags, NewComputeBench's, ours, mistakes."""

import dataclasses

import pytest
from transformers import TrainingArguments

from aixsim_cli.continual.arguments import parse_arguments, set_steps_and_batch
from aixsim_cli.errors import ConfigError, UserError
from aixsim_cli.transforms.read import read_transform


@pytest.fixture
def parse(tmp_path):
    required = ["--model_name_or_path", "owner/name", "--dataset_name", "builtin", "--do_train"]

    def run(*words, without=(), output=True):
        kept = [w for w in required if w not in without]
        words = [*kept, *map(str, words)]
        return parse_arguments(words + (["--output_dir", str(tmp_path / "o")] if output else []))

    return run


def test_every_training_argument_is_a_flag(parse):
    parsed = parse("--learning_rate", "5e-5", "--gradient_accumulation_steps", 50, "--max_steps", 7)
    assert parsed.training.learning_rate == 5e-5
    assert parsed.training.gradient_accumulation_steps == 50
    assert dataclasses.is_dataclass(parsed.training)
    assert type(parsed.training) is TrainingArguments


def test_kebab_case(parse):
    parsed = parse("--learning-rate=3e-4", "--per-device-train-batch-size", 3, "--block-size", 64)
    assert parsed.training.learning_rate == 3e-4
    assert parsed.training.per_device_train_batch_size == 3
    assert parsed.data.block_size == 64


def test_the_fields_flags(parse, tmp_path):
    hardware = tmp_path / "t.toml"
    hardware.write_text('transform = "optical"\n[attention]\nq_levels = 16\n', encoding="utf-8")
    parsed = parse(
        "--max_train_steps", 9, "--log_train_loss_steps", 50, "--transform_cfg", hardware,
        "--with_tracking", "--evaluation_strategy", "steps", "--eval_steps", 5,
        "--torch_dtype", "bfloat16", "--low_cpu_mem_usage", "true", "--overwrite_output_dir",
        "--warmup_ratio", 0.2, "--trust_remote_code", "--preprocessing_num_workers", 2,
    )  # fmt: skip
    assert parsed.training.max_steps == 9
    assert parsed.training.logging_steps == 50
    assert parsed.training.warmup_steps == 0.2
    assert parsed.training.eval_strategy == "steps"
    assert parsed.transform == read_transform(hardware)
    assert parsed.model.dtype == "bfloat16"
    assert parsed.model.trust_remote_code


def test_several_gpus_in_one_process_are_refused_before_anything_is_loaded(parse, monkeypatch):
    # they would also make every step of a digital model so many times larger than was asked for
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 4))
    with pytest.raises(UserError, match="n_gpu: got 4; expected one GPU a process"):
        parse()


def test_defaults_that_hide_nothing(parse):
    parsed = parse()
    assert parsed.training.logging_nan_inf_filter is False
    assert parsed.model.trust_remote_code is False


def test_config_file_and_command_line(parse, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-3\nblock-size: 32\nmax_train_steps: 4\nbf16: false\n")
    parsed = parse("--config", path, "--block_size", 48)
    assert (parsed.training.learning_rate, parsed.training.max_steps) == (1e-3, 4)
    assert parsed.data.block_size == 48


def test_unknown_key_of_a_config_file(parse, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("do_train: true\nlerning_rate: 1e-3\n")
    with pytest.raises(ConfigError, match=r"run.yaml:2: lerning_rate: unknown key; did you mean"):
        parse("--config", path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lerning_rate", "1"], "--lerning_rate: unknown flag; did you mean 'learning_rate'"),
        (["--learning_rate", "fast"], "learning.rate: invalid float value: 'fast'"),
        (["--token_num_scale", "-1"], "--token_num_scale: got -1.0; expected > 0"),
        (["--token_num_scale", "1", "--max_steps", "3"], "expected at most one of them"),
        (["--strict", "--plain"], "--strict and --plain: expected at most one"),
        (["--form", "plain", "--strict"], "--form plain and --strict: expected at most one"),
        (["--form", "plane"], "invalid choice: 'plane'"),
        (["--block_size", "1"], "--block_size: got 1; expected at least 2"),
        (["--streaming"], "--streaming: expected --max_steps"),
        (["--train_file", "x.txt"], "--dataset_name and --train_file"),
        (["--config_overrides", "n_embd=3"], "--config_overrides: only for a model from scratch"),
        (["--save_strategy", "sometimes"], "invalid choice: 'sometimes'"),
        (["--load_best_model_at_end"], "load_best_model_at_end"),
        (["--fsdp", "full_shard"], "--fsdp: accelerate shards on accelerators alone"),
        (["--config"], "--config: got nothing; expected a YAML file"),
        (["--max_steps", "3", "stray"], "stray: unknown flag"),
    ],
)
def test_mistakes(parse, words, message):
    with pytest.raises(UserError, match=message):
        parse(*words)


@pytest.mark.parametrize(
    ("without", "message"),
    [
        (["--do_train"], "nothing to do; expected --do_train"),
        (["--model_name_or_path", "owner/name"], "--model_name_or_path: missing"),
        (["--dataset_name", "builtin"], "no text; expected --dataset_name"),
    ],
)
def test_what_is_missing(parse, without, message):
    with pytest.raises(UserError, match=message):
        parse(without=without)


def test_output_dir_is_asked_for(parse):
    with pytest.raises(UserError, match="--output_dir: missing; expected a new folder"):
        parse(output=False)


@pytest.mark.parametrize(("words", "expected"), [((), False), ((True,), True)])
def test_ranks_do_not_look_for_unused_parameters(parse, words, expected):
    flags = ("--ddp_find_unused_parameters", *words) if words else ()
    assert parse(*flags).training.ddp_find_unused_parameters is expected


def test_tokens_by_parameters(parse):
    # 22 N / 100 tokens, in steps of 2 x 3 x 100
    parsed = parse(
        "--token_num_scale", 0.22, "--per_device_train_batch_size", 2,
        "--gradient_accumulation_steps", 3,
    )  # fmt: skip
    set_steps_and_batch(parsed, parameters=100_000, block_size=100)
    assert parsed.training.max_steps == 37


def test_effective_batch(parse):
    parsed = parse("--effective_batch_size", 16, "--per_device_train_batch_size", 4)
    set_steps_and_batch(parsed, parameters=1, block_size=1)
    assert parsed.training.gradient_accumulation_steps == 4
    wrong = parse("--effective_batch_size", 15, "--per_device_train_batch_size", 4)
    with pytest.raises(UserError, match=r"got 15; expected a multiple of 4 \(1 processes x 4"):
        set_steps_and_batch(wrong, parameters=1, block_size=1)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("weight_decay", -1), ("max_grad_norm", -1), ("label_smoothing_factor", 5),
        ("adam_beta1", 1.5), ("adam_beta2", -0.1), ("adam_epsilon", 0), ("optim_args", "a=nan"),
        ("lr_scheduler_kwargs", '{"min_lr": Infinity}'), ("learning_rate", -1),
    ],
)  # fmt: skip
def test_a_number_that_no_optimizer_takes_is_named(parse, flag, value):
    with pytest.raises(ConfigError, match=f"--{flag}: got .*; expected"):
        parse(f"--{flag}", value)
