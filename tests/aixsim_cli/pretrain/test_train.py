"""Pretraining runs: launchers, recomputation, compilation, what stops a run and what it leaves."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from aixsim_cli.data.tokenizer import vocab_size
from aixsim_cli.models.titan.model import meta_model, model_args
from aixsim_cli.models.titan.saved import write_checkpoint


@pytest.fixture(scope="module")
def config(aixsim, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "c.yaml"
    aixsim(
        "generate-cfg", "--model-flavor", "debug", "--tokenizer-path", "builtin", "--dataset",
        "builtin", "--batch-size", 2, "--seq-len", 32, "--steps", 3, "--learning-rate", "1e-3",
        "--mixed-precision-param", "float32", "--save-path", path,
        "--transform-config", "configs/transforms/optical.yaml",
    )  # fmt: skip
    return path


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def pretrain(aixsim, config, folder, *options, **how):
    words = ("--config", config, "--job.dump_folder", folder, "--metrics.log_freq", 1)
    return aixsim("pretrain", *words, *options, **how)


@pytest.fixture(scope="module")
def plain(aixsim, config, tmp_path_factory):
    """The losses of a run with nothing special about it."""
    folder = tmp_path_factory.mktemp("plain")
    pretrain(aixsim, config, folder)
    return losses(folder)


@pytest.mark.parametrize("option", [[], ["--activation_checkpoint.selective_ac_option", "op"]])
def test_recomputation_changes_nothing(aixsim, config, plain, tmp_path, option):
    mode = "selective" if option else "full"
    pretrain(aixsim, config, tmp_path, "--activation_checkpoint.mode", mode, *option)
    assert losses(tmp_path) == plain


def test_compiled_blocks_train_alike(aixsim, config, plain, tmp_path):
    pretrain(aixsim, config, tmp_path, "--compile.enable", "true")
    assert losses(tmp_path) == pytest.approx(plain, rel=1e-3)


def test_bfloat16_autocast(aixsim, config, plain, tmp_path):
    pretrain(aixsim, config, tmp_path, "--training.mixed_precision_param", "bfloat16")
    assert losses(tmp_path) == pytest.approx(plain, rel=1e-2)


@pytest.mark.parametrize("how", ["no-python", "module"])
def test_under_torchrun(config, plain, tmp_path, how):
    program = {
        "no-python": ["--no-python", f"{os.path.dirname(sys.executable)}/aixsim"],
        "module": ["-m", "aixsim_cli"],
    }[how]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--standalone",
        *program, "pretrain", "--config", str(config), "--job.dump_folder", str(tmp_path),
        "--metrics.log_freq", "1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "will be overridden" not in done.stderr
    assert losses(tmp_path) == plain


def test_ranks_that_change_the_budget_are_refused(aixsim, config, tmp_path):
    done = pretrain(aixsim, config, tmp_path, "--nproc-per-node", 2, code=2)
    assert "2 rank(s) would train on 384 tokens" in done.stderr
    assert "1 rank(s) and 192 tokens" in done.stderr
    assert not list(tmp_path.iterdir())


def test_loss_that_is_not_finite_stops_the_run(aixsim, config, tmp_path):
    model = meta_model(model_args("aixsim", "debug", vocab_size("builtin")))
    weights = {name: torch.full(p.shape, 0.01) for name, p in model.named_parameters()}
    # finite itself; a sum of its products is not
    weights["layers.1.feed_forward.w3.weight"][3] = 3e38
    write_checkpoint(weights, tmp_path / "bad")
    start = ("--checkpoint.initial_load_path", tmp_path / "bad", "--transform-config")
    digital = tmp_path / "bypass.yaml"
    digital.write_text("layer_name_to_config: {default: {q_bypass: true}}\n")
    done = pretrain(aixsim, config, tmp_path / "run", *start, digital, code=1)
    assert (
        "step 1: loss is nan; first seen in the output of layers.1.feed_forward.w3" in done.stderr
    )
    assert "The weights of step 0 were not changed" in done.stderr
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_weights_to_start_from_that_are_not_finite_are_refused(aixsim, config, tmp_path):
    model = meta_model(model_args("aixsim", "debug", vocab_size("builtin")))
    weights = {name: torch.full(p.shape, 0.01) for name, p in model.named_parameters()}
    weights["layers.1.feed_forward.w3.weight"][3, 5] = float("nan")
    write_checkpoint(weights, tmp_path / "bad")
    start = ("--checkpoint.initial_load_path", tmp_path / "bad")
    done = pretrain(aixsim, config, tmp_path / "run", *start, code=2)
    assert (
        f"checkpoint.initial_load_path: {tmp_path}/bad: holds weights that are not" in done.stderr
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_checkpoint_of_another_model_is_refused(aixsim, config, tmp_path):
    pretrain(aixsim, config, tmp_path, "--training.steps", 1)
    done = pretrain(aixsim, config, tmp_path, "--model.flavor", "60M", code=2)
    assert "checkpoint/step-1 was trained with debug, this run asks for 60M" in done.stderr


def test_a_mistake_that_only_the_ranks_meet_is_named_once(aixsim, config, tmp_path):
    options = ("--model.hf_assets_path", tmp_path / "no" / "tokenizer", "--budget.num_ranks", 2)
    done = pretrain(aixsim, config, tmp_path, "--nproc-per-node", 2, *options, code=2)
    assert done.stderr.count("no/tokenizer") == 1
    assert "rank 0 refused to start (its message is above)" in done.stderr


def test_unknown_override_suggests_the_nearest(aixsim, config, tmp_path):
    done = pretrain(aixsim, config, tmp_path, "--training.step", 3, code=2)
    assert "--training.step: unknown key; did you mean 'training.steps'?" in done.stderr


@pytest.mark.parametrize("kind", ["context", "pipeline"])
def test_parallelism_that_would_be_wrong_is_refused(aixsim, config, tmp_path, kind):
    option = (f"--parallelism.{kind}_parallel_degree", 2)
    done = pretrain(aixsim, config, tmp_path, *option, code=2)
    assert f"parallelism.{kind}_parallel_degree: got 2" in done.stderr


def test_what_libraries_say_of_each_other_is_not_shown(aixsim, config, tmp_path):
    # in float32 torch refuses torchtitan's autocast, with a warning
    said = pretrain(aixsim, config, tmp_path, "--training.steps", 1).stderr
    for word in ("autocast", "Warning", "lspci", "Peak flops"):
        assert word not in said, said


def test_without_checkpoints(aixsim, config, plain, tmp_path):
    done = pretrain(aixsim, config, tmp_path, "--checkpoint.enable", "false")
    assert "checkpoint: none, checkpoint.enable is false" in done.stdout
    assert losses(tmp_path) == plain and not (tmp_path / "checkpoint").exists()


def test_dry_run_starts_nothing(aixsim, config, tmp_path):
    done = pretrain(aixsim, config, tmp_path, "--dry-run")
    plan = ["parameters       1,", "tokens per step  64\n", "steps            3 (0 warm-up)"]
    for part in [*plan, "tokens           192\n", "memory estimate", "16 modules match default"]:
        assert part in done.stdout
    assert "note:" not in done.stdout
    assert not list(tmp_path.iterdir())


def test_dry_run_refuses_what_the_run_would(aixsim, config, tmp_path):
    done = pretrain(aixsim, config, tmp_path, "--dry-run", "--nproc-per-node", 2, code=2)
    assert "2 rank(s) would train on 384 tokens" in done.stderr


@pytest.mark.parametrize(
    "option", [("--training.seq_len", 64), ("--training.global_batch_size", 4)]
)
def test_overrides_that_leave_the_budget_behind_are_noted(aixsim, config, tmp_path, option):
    done = pretrain(aixsim, config, tmp_path, "--dry-run", *option)
    assert "on 384 tokens; the steps were worked out for" in done.stdout
    assert "and 192 tokens" in done.stdout


def test_wandb_that_does_not_start_is_not_done_without(aixsim, config, tmp_path):
    online = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(tmp_path / "home")}
    done = pretrain(aixsim, config, tmp_path / "run", "--metrics.enable_wandb", code=2, **online)
    assert "metrics.enable_wandb: got true, but W&B did not start" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_hugging_face_folder_is_no_checkpoint(aixsim, config, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    start = ("--checkpoint.initial_load_path", tmp_path / "hf")
    done = pretrain(aixsim, config, tmp_path / "run", *start, code=2)
    assert (
        "is a Hugging Face folder; expected a checkpoint that `aixsim convert-ckpt`" in done.stderr
    )


def test_wandb_offline_and_tensorboard(aixsim, config, tmp_path):
    options = ("--metrics_args.enable_wandb", "true", "--metrics.enable_tensorboard")
    pretrain(aixsim, config, tmp_path, *options)
    files = [path.name for path in (tmp_path / "tb").rglob("*") if path.is_file()]
    assert any(name.endswith(".wandb") for name in files), files
    assert any(name.startswith("events.out.tfevents") for name in files), files


def test_interrupt_ends_cleanly(config, tmp_path):
    command = [
        sys.executable, "-m", "aixsim_cli", "pretrain", "--config", str(config),
        "--job.dump_folder", str(tmp_path), "--metrics.log_freq", "1", "--training.steps", "100000",
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # what starts the tests in the background may have it ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "aixsim: interrupted" in said and "Traceback" not in said


def test_resume_past_the_first_epoch(aixsim, config, tmp_path):
    words = "the quick brown fox jumps over the lazy dog and runs away from it again\n\n"
    (tmp_path / "small.txt").write_text("".join(f"{i} {words}" for i in range(12)))
    data = ("--training.dataset", "local", "--training.dataset_path", tmp_path / "small.txt")
    steps = ("--lr_scheduler.total_steps", 12, "--training.steps")
    pretrain(aixsim, config, tmp_path / "straight", *data, *steps, 12)
    # 64 tokens a step, about 250 in the file: all three stops lie in different epochs
    for stop in (2, 7, 12):
        pretrain(aixsim, config, tmp_path / "resumed", *data, *steps, stop)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")


def test_a_damaged_hugging_face_folder_to_start_from_is_refused(aixsim, config, tmp_path):
    pretrain(aixsim, config, tmp_path / "first", "--training.steps", 1)
    aixsim(
        "convert-ckpt", "aixsim", "debug", tmp_path / "first" / "checkpoint" / "step-1",
        tmp_path / "hf",
    )  # fmt: skip
    start = (
        "--checkpoint.initial_load_path", tmp_path / "hf", "--checkpoint.initial_load_in_hf",
        "true", "--training.steps", 1,
    )  # fmt: skip
    pretrain(aixsim, config, tmp_path / "whole", *start)
    assert losses(tmp_path / "whole")[0] < losses(tmp_path / "first")[0]
    (weights,) = (tmp_path / "hf").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = pretrain(aixsim, config, tmp_path / "run", *start, code=2)
    assert f"{weights}: " in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
