"""Runs that are fault while they train, and what they leave."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from aixsim_cli.data.tokenizer import resolve_tokenizer

REPOSITORY = Path(__file__).parent.parent.parent
SECRETS, PLANTED = ("HF_TOKEN", "WANDB_API_KEY"), "planted0" * 5
STEPS, INTERVAL = 40, 5
SHORT = ("--metrics.log_freq", 1, "--checkpoint.interval", 2, "--training.steps", 4)
# scripts/test_long.sh runs these too
long = pytest.mark.skipif("AIXSIM_TEST_LONG" not in os.environ, reason="AIXSIM_TEST_LONG=1 runs it")


@pytest.fixture(scope="package")
def config(aixsim, tmp_path_factory):
    """An optical debug run with noise on, of 40 short steps and a checkpoint every 5."""
    path = tmp_path_factory.mktemp("config") / "c.yaml"
    aixsim(
        "generate-cfg", "--model-flavor", "debug", "--tokenizer-path", "builtin", "--dataset",
        "builtin", "--batch-size", 2, "--seq-len", 32, "--steps", STEPS, "--learning-rate", "1e-3",
        "--mixed-precision-param", "float32", "--keep-last-k-ckpts", 0, "--save-path", path,
        "--transform-config", "configs/transforms/optical.yaml",
    )  # fmt: skip
    return path


@pytest.fixture
def train(aixsim, config):
    """`train(folder, *options, code=0, fault=…, ranks=…)`: a short run; what it said."""

    def pretrain(folder, *options, env=None, **how):
        words = ("pretrain", "--config", config, "--job.dump_folder", folder, *SHORT, *options)
        done = aixsim(*words, **how, **(env or {}))
        assert "Traceback" not in done.stdout + done.stderr, done.stderr
        return done.stdout + done.stderr

    return pretrain


def make_model(folder, layers=2):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=16, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_tokenizer("builtin")).save_pretrained(folder)


class Run:
    """`aixsim pretrain` in a process of its own, to be fault."""

    def __init__(self, config, folder, *options, program=("-m", "aixsim_cli"), limit_files=None):
        self.folder = Path(folder)
        command = [
            sys.executable, *map(str, program), "pretrain", "--config", config,
            "--job.dump_folder", folder, "--metrics.log_freq", 1, "--checkpoint.interval",
            INTERVAL, *options,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            list(map(str, command)),
            cwd=REPOSITORY,
            env=os.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: self._prepare(limit_files),
        )

    @staticmethod
    def _prepare(limit_files):
        # what starts the tests in the background may have SIGINT ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if limit_files is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_files, limit_files))

    def until(self, condition, what):
        """Wait for `condition()`, while the run lives."""
        deadline = time.monotonic() + 200
        while not condition():
            assert self.process.poll() is None, f"ended before {what}: {self.end()}"
            assert time.monotonic() < deadline, f"no {what} in 200 s"
            time.sleep(0.001)

    def until_step(self, step):
        self.until(lambda: len(steps(self.folder)) >= step, f"step {step}")

    def end(self, code=None):
        """Wait for the end; what it said."""
        out, err = self.process.communicate(timeout=250)
        if code is not None:
            assert self.process.returncode == code, f"{self.process.returncode}\n{out}\n{err}"
            assert "Traceback" not in err or code == -signal.SIGKILL, err
        return out + err

    def kill(self):
        self.process.kill()
        return self.end()


@pytest.fixture
def start(config):
    """Start a run: `start(folder, *options)`; what is left of it is killed after the test."""
    runs = []

    def begin(folder, *options, **how):
        runs.append(Run(config, folder, *options, **how))
        return runs[-1]

    yield begin
    for run in runs:
        with contextlib.suppress(OSError):
            run.process.kill()
        run.process.wait()


def steps(folder):
    """The steps in a run's metrics, as they were written."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        return []
    # a kill may cut the last line
    lines = [line for line in path.read_text().split("\n")[:-1] if line]
    return [json.loads(line)["step"] for line in lines]


def curve(folder):
    """step -> (loss, gradient norm, learning rate, kept mass); the later record of a step holds."""
    found = {}
    for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            keys = ("loss", "grad_norm", "lr", "attention_kept_mass")
            found[record["step"]] = tuple(record[key] for key in keys)
    return found


@pytest.fixture(scope="package")
def whole(config, tmp_path_factory):
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    patch = pytest.MonkeyPatch()
    for name in SECRETS:
        patch.setenv(name, PLANTED)
    said = Run(config, folder, "--metrics.enable_wandb", "true").end(code=0)
    patch.undo()
    assert PLANTED not in said
    assert sorted(curve(folder)) == list(range(1, STEPS + 1))
    return folder


@pytest.fixture(scope="package")
def models(tmp_path_factory):
    """Small whole models: `titan` (a step-N folder with its config), `digital` and `optical`."""

    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from aixsim_cli.data.tokenizer import resolve_tokenizer, vocab_size
    from aixsim_cli.models.convert import hf_to_titan
    from aixsim_cli.models.hf.saved import write_model
    from aixsim_cli.models.hf.transform import transform_hf_model
    from aixsim_cli.transforms.read import parse_transform

    root = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(resolve_tokenizer("builtin"))
    torch.manual_seed(0)
    # what the flavor debug is
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size("builtin"), hidden_size=128, intermediate_size=512,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=0,
        )
    )  # fmt: skip
    folders = {name: root / name for name in ("digital", "optical", "titan")}
    write_model(model, folders["digital"])
    tokenizer.save_pretrained(folders["digital"])
    hf_to_titan("aixsim", "debug", str(folders["digital"]), folders["titan"], force=False)
    data = {"transform": "optical", "layer_name_to_config": {"default": {}}}
    state, _ = transform_hf_model(model, parse_transform(data, source="t.yaml"))
    with torch.no_grad():
        model.train()(torch.arange(64)[None])
    state.end_step()
    write_model(model.eval(), folders["optical"])
    tokenizer.save_pretrained(folders["optical"])
    return folders
