"""The whole chain as a user runs it: generate, pretrain, resume, convert, evaluate, sample.

Each command runs once in a process that starts as a user's does.
"""

import json

import pytest
import yaml

STEPS = 12


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def generate(aixsim, folder, transform, *extra):
    options = ["--transform-config", "configs/transforms/optical.yaml"] if transform else []
    aixsim(
        "generate-cfg", "--model_flavor", "debug", "--tokenizer-path", "builtin", "--dataset",
        "builtin", "--batch-size", 4, "--seq-len", 64, "--steps", STEPS, "--learning-rate", "3e-3",
        "--mixed-precision-param", "float32", "--save-path", folder / "c.yaml", *options, *extra,
        fresh=transform,
    )  # fmt: skip
    return folder / "c.yaml"


@pytest.fixture(scope="module", params=["optical", "digital"])
def run(request, aixsim, tmp_path_factory):
    """A finished run and its Hugging Face folder."""
    folder = tmp_path_factory.mktemp(request.param)
    fresh = request.param == "optical"
    config = generate(aixsim, folder, fresh)
    done = aixsim(
        "pretrain", "--config", config, "--job.dump_folder", folder / "run",
        "--metrics.log_freq=1", "--checkpoint.interval", 5, fresh=fresh,
    )  # fmt: skip
    checkpoint = folder / "run" / "checkpoint" / f"step-{STEPS}"
    aixsim("convert-ckpt", "aixsim", "debug", checkpoint, folder / "hf", fresh=fresh)
    return request.param, folder, checkpoint, done


def test_loss_falls_and_is_recorded(run):
    _, folder, _, done = run
    logged = records(folder / "run")
    assert [record["step"] for record in logged] == list(range(1, STEPS + 1))
    assert logged[-1]["loss"] < logged[0]["loss"] - 0.3
    assert logged[-1]["tokens"] == STEPS * 4 * 64
    assert {"grad_norm", "lr", "tokens_per_second", "seconds"} <= logged[0].keys()
    assert f"step {STEPS}/{STEPS}  loss {logged[-1]['loss']:.4f}" in done.stderr
    assert done.stdout.strip() == f"trained; checkpoint: {run[2]}"


def test_transform_is_reported_once_and_its_metric_logged(run):
    kind, folder, _, done = run
    said = done.stderr.count("modules match default")
    assert said == (1 if kind == "optical" else 0)
    logged = records(folder / "run")
    assert ("attention_kept_mass" in logged[0]) == (kind == "optical")
    clipped = {key: [r[key] for r in logged] for key in logged[0] if key.startswith("clipped_")}
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    expected = {f"clipped_{t}/{name}" for name in linears for t in "xwy"}
    expected |= {f"clipped_{t}/attention" for t in ("q", "k", "score", "v", "y")}
    assert set(clipped) == (expected if kind == "optical" else set())
    # the first step sets the ranges; then something grows beyond them, but never much
    assert all(shares[0] == 0 for shares in clipped.values())
    assert all(0 <= share < 0.05 for key in clipped for share in clipped[key] if key[8] in "xw")
    assert max(map(max, clipped.values()), default=1) > 0
    assert "are clipped" not in done.stderr


def test_clipped_weights_are_told_between_records_too(run, aixsim, tmp_path):
    done = aixsim(
        "pretrain", "--config", run[1] / "c.yaml", "--job.dump_folder", tmp_path,
        "--optimizer.lr", "0.1", "--metrics.log_freq", 100,
    )  # fmt: skip
    assert [record["step"] for record in records(tmp_path)] == [1, STEPS]
    told = done.stderr.count("of its weight lies beyond the range and is clipped")
    assert told == (run[0] == "optical")


def test_checkpoints_are_full_and_know_their_config(run):
    _, _, checkpoint, _ = run
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == [
        "step-10", f"step-{STEPS}", "step-5",
    ]  # fmt: skip
    config = yaml.safe_load((checkpoint / "config.yaml").read_text())
    assert config["training"]["seq_len"] == 64
    assert bool(config["transform"]) == (run[0] == "optical")


def test_both_doors_give_one_perplexity(run, aixsim):
    kind, folder, checkpoint, _ = run
    results = [
        json.loads(aixsim("eval", "ppl", source, "--num-batches", 20, "--json").stdout)
        for source in (checkpoint, folder / "hf")
    ]
    assert results[0]["tokens"] == results[1]["tokens"] == 20 * 8 * 64
    assert [result["transform"] for result in results] == [kind if kind == "optical" else None] * 2
    # digital models agree to rounding; the detectors of an optical one draw other noise for the
    # channels that the two layouts of the heads permute
    tolerance = 1e-4 if kind == "optical" else 1e-6
    assert results[1]["nll"] == pytest.approx(results[0]["nll"], rel=tolerance)


def test_no_transform_is_the_digital_model(run, aixsim):
    kind, folder, _, _ = run
    command = ("eval", "ppl", folder / "hf", "--num-batches", 2, "--json")
    plain = json.loads(aixsim(*command, "--no-transform").stdout)
    simulated = json.loads(aixsim(*command, fresh=kind == "optical").stdout)
    assert plain["transform"] is None
    assert (plain["nll"] == simulated["nll"]) == (kind == "digital")


def test_generation_is_reproducible(run, aixsim):
    kind, folder, _, _ = run
    options = ("--prompt", "The function", "--max_new_tokens", 8, "--do-sample", "true", "--seed")
    first = aixsim("generate-hf", folder / "hf", *options, 1, fresh=kind == "optical").stdout
    assert first.startswith("The function") and len(first) > len("The function\n")
    assert aixsim("generate-hf", folder / "hf", *options, 1).stdout == first
    assert aixsim("generate-hf", folder / "hf", *options, 2).stdout != first


def test_resume_equals_an_uninterrupted_run(run, aixsim):
    _, folder, _, _ = run
    again = folder / "again"
    options = ("--job.dump_folder", again, "--metrics.log_freq", 1)
    for steps in (7, STEPS):
        aixsim(
            "pretrain", "--config", folder / "c.yaml", "--training.steps", steps,
            "--lr_scheduler.total_steps", STEPS, *options,
        )  # fmt: skip
    resumed, straight = records(again), records(folder / "run")
    assert [record["step"] for record in resumed] == list(range(1, STEPS + 1))
    # ranges, noise, data, optimizer and learning rate all continue: the same to the last bit
    assert [r["loss"] for r in resumed] == [r["loss"] for r in straight]
    assert [r["grad_norm"] for r in resumed] == [r["grad_norm"] for r in straight]


def test_a_converted_folder_starts_a_run(run, aixsim):
    _, folder, _, _ = run
    back = folder / "back"
    aixsim("convert-ckpt", "aixsim", "debug", folder / "hf", back)
    aixsim(
        "pretrain", "--config", folder / "c.yaml", "--job.dump_folder", folder / "from-hf",
        "--checkpoint.initial_load_path", back, "--training.steps", 1, "--metrics.log_freq", 1,
    )  # fmt: skip
    assert records(folder / "from-hf")[0]["loss"] < records(folder / "run")[0]["loss"] - 0.3
