"""continual-pretrain through its entry point: saved folders, exact resume, mistakes, divergence."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

from aixsim_cli.continual.arguments import parse_arguments
from aixsim_cli.continual.train import continual_pretrain
from aixsim_cli.data.tokenizer import resolve_tokenizer
from aixsim_cli.errors import UserError
from aixsim_cli.models.hf.saved import load_model
from aixsim_cli.transforms.choice import DIGITAL
from aixsim_cli.transforms.read import read_transform

OPTICAL = "configs/transforms/optical.yaml"
BITFLIP = "configs/transforms/bitflip-fc.yaml"


def load_config(path):
    return read_transform(path)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny Llama with the built-in tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        eos_token_id=0, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_tokenizer("builtin")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    words = "the interpreter evaluates an expression and returns its value to the caller "
    for name, count in (("train", 300), ("heldout", 60)):
        (folder / f"{name}.txt").write_text(words * count)
        rows = "\n".join(json.dumps({"text": words * 20}) for _ in range(count // 10))
        (folder / f"{name}.jsonl").write_text(rows)
        (folder / f"{name}.csv").write_text("text\n" + "\n".join([words * 20] * (count // 10)))
    return folder


@pytest.fixture(scope="module")
def train(aixsim, model_folder, texts):
    """Run a short training; its output folder."""

    def run(output, *flags, code=0, steps=4, **options):
        return aixsim(
            "continual-pretrain", "--model_name_or_path", model_folder, "--train_file",
            texts / "train.txt", "--do_train", "--max_steps", steps, "--logging_steps", 1,
            "--block_size", 32, "--per_device_train_batch_size", 4, "--learning_rate", "1e-2",
            "--report_to", "none", "--disable_tqdm", "true", "--output_dir", output, *flags,
            code=code, **options,
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def whole(train, texts, tmp_path_factory):
    """An optical run of four steps with a checkpoint in the middle."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    done = train(
        output, "--transform_config", OPTICAL, "--save_steps", 2, "--do_eval",
        "--validation_file", texts / "heldout.txt", "--seed", 3,
    )  # fmt: skip
    return output, done


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_what_is_said_and_saved(whole):
    output, done = whole
    assert f"saved {output}" in done.stdout and "perplexity: " in done.stdout
    saved = {path.name for path in output.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= saved
    assert {"checkpoint-2", "checkpoint-4", "all_results.json"} <= saved
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "aixsim"
    assert config["quantization_config"]["modules"] == 16
    records = [r for r in history(output) if "loss" in r]
    assert len(records) == 4 and records[-1]["loss"] < records[0]["loss"]
    assert all(0 < r["attention_kept_mass"] <= 1 for r in records)
    assert all(0 <= r["clipped_x/q_proj"] < 0.2 for r in records)
    assert all(r["clipped_score/attention"] <= 1 for r in records)
    # a number for every kind of layer is for files and plots
    assert "attention_kept_mass" in done.stdout and "clipped_" not in done.stdout + done.stderr


def test_clipped_weights_are_told_though_nothing_is_logged(train, tmp_path):
    done = train(
        tmp_path / "o", "--transform_config", OPTICAL, "--learning_rate", "3e-1", "--save_strategy",
        "no", "--logging_strategy", "no", steps=2,
    )  # fmt: skip
    assert done.stderr.count("of its weight lies beyond the range and is clipped") == 1
    record = history(tmp_path / "o")[-1]
    assert "train_loss" in record and not any(key.startswith("clipped_") for key in record)


def test_the_model_card_names_hardware_command_and_results(whole):
    card = (whole[0] / "README.md").read_text()
    for expected in ("import aixsim_cli", "transform: optical", "--transform_config", "perplexity"):
        assert expected in card


def test_resume_is_exact(whole, train, tmp_path):
    output, _ = whole
    shutil.copytree(output / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    train(
        tmp_path / "again", "--transform_config", OPTICAL, "--save_steps", 2, "--seed", 3,
        "--resume_from_checkpoint", "true",
    )  # fmt: skip
    expected, found = (load_file(f / "model.safetensors") for f in (output, tmp_path / "again"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    losses = [[r["loss"] for r in history(f) if "loss" in r] for f in (output, tmp_path / "again")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("began", "goes_on", "message"),
    [
        (OPTICAL, None, "run on optical, and this run is on digital hardware; expected"),
        (OPTICAL, BITFLIP, "run on optical, and this run is on bitflip;"),
        (
            OPTICAL,
            "other.yaml",
            "on optical (default: q_levels 256), and this run is on optical (d",
        ),
        (OPTICAL, "lora.yaml", "on optical (lora None), and this run is on optical (lora {'r': 4"),
        (None, OPTICAL, "run on digital hardware, and this run is on optical;"),
        (OPTICAL, "same.yaml", None),
        ("lora.yaml", "lora.yaml", None),
    ],
)
def test_resuming_takes_the_same_hardware(
    train_in_process, dataset_folder, tmp_path, monkeypatch, began, goes_on, message
):
    optical = Path(OPTICAL).read_text()
    for name, text in {
        "other.yaml": optical.replace("q_levels: 256", "q_levels: 16"),
        "lora.yaml": optical + "lora: {r: 4, alpha: 8}\n",
        "same.yaml": "use_regex: true\nlayer_name_to_config: {default: {q_lut_min: 0.020040}}\n",
    }.items():
        (tmp_path / name).write_text(text)
    output, save = tmp_path / "o", ("--save_strategy", "steps", "--save_steps", 1)

    def train(transform, *flags):
        path = tmp_path / transform if transform in os.listdir(tmp_path) else transform
        return train_in_process(output, dataset_folder, *save, *flags, transform=path)

    train(began, "--max_steps", 1)
    resumed = ("--max_steps", 2, "--resume_from_checkpoint", "true")
    if message is None:
        assert len(train(goes_on, *resumed)) == 2
        return
    saved = (output / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        train(goes_on, *resumed)
    assert f"{output}/checkpoint-1" in str(caught.value) and "\n" not in str(caught.value)
    assert (output / "model.safetensors").read_bytes() == saved


def test_accumulated_batches_are_one_large_batch(train, tmp_path):
    noiseless = tmp_path / "t.yaml"
    noiseless.write_text("layer_name_to_config:\n  default: {q_noise: false, q_levels: 65536}\n")
    transform = ("--transform_config", noiseless)
    train(tmp_path / "whole", *transform, steps=1)
    train(
        tmp_path / "parts", *transform, "--per_device_train_batch_size", 2,
        "--gradient_accumulation_steps", 2, steps=1,
    )  # fmt: skip
    one, two = (history(tmp_path / name)[0] for name in ("whole", "parts"))
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "parts"))
    # the first layer's inputs do not depend on how later ranges were set
    for key in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{key}.ranges"
        assert torch.allclose(first[name][:2], second[name][:2], rtol=1e-5), name


@pytest.mark.parametrize("form", ["--strict", "--plain"])
def test_forms(train, aixsim, tmp_path, form):
    train(tmp_path / "o", "--transform_config", OPTICAL, form, steps=1)
    done = aixsim("eval", "ppl", tmp_path / "o", "--num-batches", 1, "--json")
    assert json.loads(done.stdout)["transform"] == "optical"
    assert not json.loads(done.stdout)["calibrated"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_other_files(train, texts, tmp_path, suffix):
    output = tmp_path / "o"
    train(output, "--train_file", texts / f"train.{suffix}", steps=1)
    assert history(output)[0]["loss"] > 0


@pytest.fixture(scope="module")
def dataset_folder(texts, tmp_path_factory):
    """A data set as the hub would have it: load_dataset reads a folder by the same code."""
    folder = tmp_path_factory.mktemp("dataset")
    shutil.copy(texts / "train.jsonl", folder / "train.jsonl")
    shutil.copy(texts / "heldout.jsonl", folder / "validation.jsonl")
    return folder


@pytest.mark.parametrize(
    "flags",
    [
        ["--streaming", "--do_eval", "--max_eval_samples", "4"],
        ["--gradient_checkpointing", "true", "--preprocessing_num_workers", "2"],
        ["--bf16", "--dtype", "bfloat16"],
    ],
    ids=["streaming", "checkpointing", "bfloat16"],
)
def test_datasets_by_name(train_in_process, dataset_folder, tmp_path, flags):
    plain = train_in_process(tmp_path / "a", dataset_folder)
    other = train_in_process(tmp_path / "b", dataset_folder, *flags)
    assert len(plain) == len(other) == 2
    if flags[0] == "--gradient_checkpointing":
        # recomputation draws the same noise and records the same extremes
        assert plain == other
    elif flags[0] == "--bf16":
        assert plain == pytest.approx(other, rel=1e-2)


@pytest.fixture
def train_in_process(model_folder, tmp_path, monkeypatch):
    """Train two optical steps; the losses."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run(output, dataset, *flags, transform=OPTICAL):
        hardware = [] if transform is None else ["--transform_config", transform]
        words = [
            "--model_name_or_path", model_folder, "--dataset_name", dataset, "--do_train",
            "--max_steps", 2, "--block_size", 32, "--per_device_train_batch_size", 4,
            "--logging_steps", 1, "--report_to", "none", "--save_strategy", "no",
            "--output_dir", output, *hardware, *flags,
        ]  # fmt: skip
        continual_pretrain(parse_arguments([str(word) for word in words]))
        return [record["loss"] for record in history(output) if "loss" in record]

    return run


def test_push_sends_the_finished_folder(train_in_process, dataset_folder, tmp_path, monkeypatch):
    sent = {}

    def upload(repo_id, folder_path, **options):
        config = json.loads((folder_path / "config.json").read_text())
        sent.update(repo_id=repo_id, config=config, card=(folder_path / "README.md").read_text())

    def create(trainer, *arguments):
        trainer.hub_model_id = "owner/model"

    monkeypatch.setattr("aixsim_cli.continual.save.upload_folder", upload)
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", create)
    train_in_process(
        tmp_path / "o", dataset_folder, "--push_to_hub", "--hub_token", "hf_secret", "--strict"
    )
    assert sent["repo_id"] == "owner/model" and sent["config"]["model_type"] == "aixsim"
    assert "hf_secret" not in sent["card"] and "it does not load at all" in sent["card"]


def test_builtin_data_and_a_model_from_scratch(aixsim, tmp_path):
    config = GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    config.save_pretrained(tmp_path / "config")
    aixsim(
        "continual-pretrain", "--config_name", tmp_path / "config", "--tokenizer_name", "builtin",
        "--config_overrides", "n_layer=2", "--dataset_name", "builtin", "--do_train",
        "--max_train_samples", 8, "--num_train_epochs", 1, "--per_device_train_batch_size", 4,
        "--block_size", 32, "--transform_config", OPTICAL, "--report_to", "none",
        "--output_dir", tmp_path / "o",
    )  # fmt: skip
    saved = json.loads((tmp_path / "o" / "config.json").read_text())
    assert (saved["n_layer"], saved["vocab_size"]) == (2, 4096)
    # 4 Conv1D and an attention in each of two layers
    assert saved["quantization_config"]["modules"] == 10


def test_a_diverging_run_fails_and_saves_nothing_of_it(train, tmp_path):
    done = train(
        tmp_path / "o", "--transform_config", OPTICAL, "--learning_rate", "1e30",
        "--save_steps", 1, "--max_grad_norm", 0, "--optim", "sgd", steps=30, code=1,
    )  # fmt: skip
    assert "not finite at step" in done.stderr and "lower --learning_rate" in done.stderr
    saves = list((tmp_path / "o").glob("checkpoint-*/model.safetensors"))
    assert saves
    for saved in saves:
        assert all(tensor.isfinite().all() for tensor in load_file(saved).values()), saved


def test_an_output_folder_is_not_trained_over(whole, train):
    done = train(whole[0], code=2)
    assert "holds checkpoints already; expected a new folder, or --resume" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--transform_config", "nowhere.yaml"], "nowhere.yaml: no such transform config"),
        (["--train_file", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--train_file", "*.csv"], "*.csv: no such file; expected one .csv file: only .txt, .jso"),
        (["--block_size", "65"], "the model's longest sequence is 64"),
        (["--block_size", "64", "--train_file", "README.md"], "cannot read this format"),
        (["--do_eval"], "--validation_file: missing"),
        (["--effective_batch_size", "6"], "expected a multiple of 4"),
        (["--tokenizer_name", "./nowhere"], "no such folder"),
    ],
)
def test_mistakes(model_folder, texts, tmp_path, monkeypatch, flags, message):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = [
        "--model_name_or_path", model_folder, "--train_file", texts / "train.txt", "--do_train",
        "--max_steps", 1, "--block_size", 32, "--per_device_train_batch_size", 4,
        "--report_to", "none", "--output_dir", tmp_path / "o", *flags,
    ]  # fmt: skip
    with pytest.raises(UserError, match=re.escape(message)):
        continual_pretrain(parse_arguments([str(word) for word in words]))


def test_a_hub_that_is_out_of_reach(train, tmp_path):
    # in a process of its own: the hub's library reads HF_HUB_OFFLINE when it is imported
    done = train(tmp_path / "o", "--model_name_or_path", "nobody/nothing", code=2)
    expected = "aixsim: error: nobody/nothing: no such folder, and not loaded from the hub"
    assert expected in done.stderr


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--config_name"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "./nowhere: no such folder"),
        ("docs/nowhere", "docs/nowhere: no such folder"),
        ("a/b/c", "a/b/c: no such folder"),
        (
            "step-30",
            "step-30: a torchtitan checkpoint; expected a Hugging Face folder or hub name: ",
        ),
        ("run", "did you mean"),
    ],
)
def test_what_is_no_model(texts, tmp_path, flag, name, message):
    for folder in ("step-30", "run/checkpoint/step-30"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / ".metadata").touch()
    model = name if "/" in name else tmp_path / name
    words = [flag, model, "--train_file", texts / "train.txt", "--do_train", "--output_dir"]
    words.append(tmp_path / "o")
    with pytest.raises(UserError, match=re.escape(message)):
        continual_pretrain(parse_arguments([str(word) for word in words]))


def test_help_lists_all_flags(aixsim):
    shown = aixsim("continual-pretrain", "--help").stdout
    for flag in ("--transform_config", "--learning_rate", "--block_size", "--token_num_scale"):
        assert flag in shown


def test_a_launch_whose_ranks_do_not_meet_is_refused(train, tmp_path):
    env = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "-1"}
    done = train(tmp_path / "o", "--use_cpu", "false", code=2, **env)
    assert "LOCAL_RANK: got '-1'; expected 0 to 1" in done.stderr


def test_sweep_records_a_divergence_and_goes_on(train, model_folder, texts, tmp_path):
    def sweep(*rates):
        command = [
            sys.executable, "scripts/sweep_lr.py", tmp_path / "s", *rates, "--",
            "--model_name_or_path", model_folder, "--train_file", texts / "train.txt",
            "--validation_file", texts / "heldout.txt", "--do_train", "--do_eval",
            "--max_steps", "2", "--block_size", "32", "--optim", "sgd", "--max_grad_norm", "0",
            "--report_to", "none", "--logging_steps", "1", "--transform_config", OPTICAL,
        ]  # fmt: skip
        env = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
        env["PATH"] = f"{os.path.dirname(sys.executable)}:{env['PATH']}"
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=250)
        assert done.returncode == 0, done.stderr
        return done.stdout

    table = sweep("1e-2", "1e30")
    assert "| 1e+30 | diverged |" in table and "| 0.01 | " in table
    assert (tmp_path / "s" / "loss.png").stat().st_size > 1000
    again = sweep("1e-3", "1e-2", "1e30")
    # what is done is not done again
    assert [line for line in again.splitlines() if line.startswith("learning rate ")] == [
        "learning rate 0.001"
    ]
    assert "| 0.001 | " in again and "| 0.01 | " in again and "| 1e+30 | diverged" in again


@pytest.mark.parametrize("paradigm", ["optical", "bitflip"])
def test_low_rank_updates_are_merged_when_they_are_saved(
    train_in_process, model_folder, dataset_folder, tmp_path, paradigm
):
    transform = tmp_path / "t.yaml"
    params = "{q_levels: 64}" if paradigm == "optical" else "{w_p_frac: 0.001}"
    transform.write_text(
        f"transform: {paradigm}\nlayer_name_to_config:\n  default: {params}\n"
        "lora: {r: 4, alpha: 8}\n"
    )
    output = tmp_path / "o"
    train_in_process(
        output, dataset_folder, "--save_strategy", "steps", "--save_steps", 2,
        "--learning_rate", "1e-2", transform=transform,
    )  # fmt: skip
    saved = json.loads((output / "config.json").read_text())["quantization_config"]["transform"]
    assert saved["transform"] == paradigm and "lora" not in saved
    before, after = (load_file(f / "model.safetensors") for f in (model_folder, output))
    weights = {name for name in before if "_proj" in name}
    assert all(not torch.equal(before[name], after[name]) for name in weights)
    frozen = set(before) - weights
    assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)
    # the last checkpoint holds the same model, its updates apart
    merged = load_model(str(output))
    apart = load_model(str(output / "checkpoint-2"))
    tokens = torch.arange(32)[None]
    found = []
    for model in (merged, apart):
        model.eval().transform_state.begin_step(0)
        with torch.no_grad():
            found.append(model(tokens).logits)
    if paradigm == "optical":
        assert torch.allclose(found[0], found[1], atol=1e-4)
    apart = str(output / "checkpoint-2")
    for other in (DIGITAL, load_config(OPTICAL)):
        with pytest.raises(UserError, match=r"checkpoint within a low-rank run.* own transform"):
            load_model(apart, other)
    # trained on, it is the updates that move, whether its hardware is named again or not
    for flags in ([], ["--transform_config", transform]):
        further = tmp_path / f"further-{len(flags)}"
        train_in_process(
            further, dataset_folder, "--model_name_or_path", apart, *flags, transform=None
        )
        final = load_file(further / "model.safetensors")
        assert all(torch.equal(before[name], final[name]) for name in frozen)
        assert all(not torch.equal(after[name], final[name]) for name in weights)


@pytest.mark.parametrize("form", [[], ["--strict"], ["--plain"]], ids=["aixsim", "strict", "plain"])
def test_low_rank_updates_of_a_simulated_model(train_in_process, dataset_folder, tmp_path, form):
    optical = tmp_path / "optical"
    train_in_process(optical, dataset_folder, *form)
    before = load_file(optical / "model.safetensors")
    same = tmp_path / "t.yaml"
    same.write_text(Path(OPTICAL).read_text() + "lora: {r: 4, alpha: 8}\n")
    for transform in (same, "configs/transforms/bitflip-lora.yaml"):
        output = tmp_path / Path(transform).stem
        train_in_process(
            output, dataset_folder, "--model_name_or_path", optical, "--learning_rate", "1e-2",
            transform=transform,
        )  # fmt: skip
        after = load_file(output / "model.safetensors")
        weights = {name for name in before if name.endswith("_proj.weight")}
        frozen = {name for name in before if name.endswith(".weight")} - weights
        assert weights and all(not torch.equal(before[name], after[name]) for name in weights)
        assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)
        # an evaluation takes the hardware of the file, and no update
        model = load_model(str(optical), load_config(transform))
        assert not [name for name in model.state_dict() if "parametrizations" in name]
