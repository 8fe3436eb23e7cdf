"""Two ranks of HF's Trainer train the model that one rank trains on the same global batch."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from aixsim_cli.data.tokenizer import resolve_tokenizer
from aixsim_cli.run.manifest import read_manifest, verify

STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, and hardware with and without noise."""
    folder = tmp_path_factory.mktemp("ddp")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(resolve_tokenizer("builtin")).save_pretrained(folder / "model")
    for name, noise in (("optical", "false"), ("noisy", "true")):
        text = f"layer_name_to_config:\n  default: {{q_noise: {noise}}}\n"
        (folder / f"{name}.yaml").write_text(text)
    return folder


def launcher(ranks):
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return command if ranks > 1 else []


@pytest.fixture(scope="module")
def runs(aixsim, folder):
    """(hardware, ranks) -> (logged records, final tensors)."""
    results = {}
    for hardware in ("digital", "optical", "noisy"):
        for ranks in (1, 2):
            output = folder / f"{hardware}-{ranks}"
            transform = ["--transform_config", folder / f"{hardware}.yaml"]
            aixsim(
                "continual-pretrain", "--model_name_or_path", folder / "model", "--dataset_name",
                "builtin", "--do_train", "--max_train_samples", 64, "--max_steps", STEPS,
                "--block_size", 32, "--per_device_train_batch_size", 4 // ranks,
                "--logging_steps", 1, "--learning_rate", "1e-3", "--max_grad_norm", "1e9",
                "--report_to", "none", "--output_dir", output,
                *(transform if hardware != "digital" else []),
                ranks=ranks,
            )  # fmt: skip
            state = json.loads((output / "trainer_state.json").read_text())
            records = [r for r in state["log_history"] if "loss" in r]
            results[hardware, ranks] = records, load_file(output / "model.safetensors")
    return results


@pytest.mark.parametrize(("hardware", "rel"), [("digital", 1e-4), ("optical", 1e-3)])
def test_loss_and_gradient_norm_agree(runs, hardware, rel):
    one, two = runs[hardware, 1][0], runs[hardware, 2][0]
    assert len(one) == len(two) == STEPS
    for first, second in zip(one, two, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=rel)
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=10 * rel)


def test_ranges_agree(runs):
    one, two = runs["optical", 1][1], runs["optical", 2][1]
    # unset ranges are calibrated rank by rank in the first call; its inputs agree in layer 0
    for key in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{key}.ranges"
        assert torch.allclose(one[name][:2], two[name][:2], rtol=1e-3), name
    for name, tensor in two.items():
        assert tensor.isfinite().all(), name


def test_noise_differs_between_ranks(runs):
    # the same noise on both ranks' halves would be another run than one rank's four rows
    one, two = runs["noisy", 1][0], runs["noisy", 2][0]
    assert one[0]["loss"] != two[0]["loss"]
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], rel=1e-3)


@pytest.mark.parametrize(("name", "ranks"), [("SIGTERM", 1), ("SIGINT", 1), ("SIGTERM", 2)])
def test_a_signal_writes_a_checkpoint(aixsim, folder, tmp_path, name, ranks):
    steps, output, said = 40, tmp_path / "o", tmp_path / "said"
    command = [
        "continual-pretrain", "--model_name_or_path", folder / "model", "--dataset_name", "builtin",
        "--do_train", "--max_train_samples", 128, "--block_size", 32, "--max_steps", steps,
        "--per_device_train_batch_size", 4, "--logging_steps", 1, "--report_to", "none",
        "--disable_tqdm", "true", "--save_strategy", "no", "--transform_config",
        folder / "noisy.yaml", "--output_dir",
    ]  # fmt: skip
    with said.open("w") as file:
        run = subprocess.Popen(
            [sys.executable, *launcher(ranks), "-m", "aixsim_cli", *map(str, [*command, output])],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            # what starts the tests in the background may have SIGINT ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        deadline = time.monotonic() + 200
        while said.read_text().count("'loss'") < 2:
            assert run.poll() is None and time.monotonic() < deadline, said.read_text()
            time.sleep(0.01)
        run.send_signal(getattr(signal, name))
        # torch's launcher has a code of its own
        expected = {"SIGTERM": 75, "SIGINT": 130}[name] if ranks == 1 else 1
        assert run.wait(timeout=100) == expected, said.read_text()
    finally:
        run.kill()
    (checkpoint,) = output.glob("checkpoint-*")
    assert {path.name for path in output.iterdir()} == {checkpoint.name, ".run.lock"}
    # declared whole when the files of all ranks were there
    states = ["rng_state.pth"] if ranks == 1 else ["rng_state_0.pth", "rng_state_1.pth"]
    verify(checkpoint)
    assert [n for n in read_manifest(checkpoint) if n.startswith("rng_state")] == states
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    stopped = state["global_step"]
    assert checkpoint.name == f"checkpoint-{stopped}" and stopped < steps
    expected = f"stopped by {name} after step {stopped}, checkpoint {checkpoint}; the same command"
    assert said.read_text().count(expected) == 1
    assert "find_unused_parameters" not in said.read_text()
    if (name, ranks) != ("SIGTERM", 1):
        return
    aixsim(*command, output, "--resume_from_checkpoint", "true")
    aixsim(*command, tmp_path / "whole")
    found, whole = (load_file(f / "model.safetensors") for f in (output, tmp_path / "whole"))
    assert all(torch.equal(found[key], whole[key]) for key in whole)
