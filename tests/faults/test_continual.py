"""continual-pretrain is killed, starved, misled and started twice; nothing saved is lost by it.

In one process, or in a child forked from it: a kill comes at an exact place.
"""

import errno
import hashlib
import json
import logging
import os
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3TextConfig,
    MixtralConfig,
    get_scheduler,
)
from transformers.trainer_utils import SchedulerType

from aixsim_cli.continual import data, identity
from aixsim_cli.continual.arguments import parse_arguments
from aixsim_cli.continual.data import load_blocks, tokens_digest
from aixsim_cli.continual.resume import check_files, clear_the_way, find_checkpoint
from aixsim_cli.continual.train import continual_pretrain
from aixsim_cli.continual.trainer import SimulationTrainer
from aixsim_cli.data.tokenizer import resolve_tokenizer
from aixsim_cli.errors import ConfigError, RunError, UserError
from aixsim_cli.models.kind import find_source
from aixsim_cli.run.folder import locked
from aixsim_cli.run.manifest import (
    MANIFEST_FILE,
    begin_saving,
    is_complete,
    read_manifest,
    verify,
    write_manifest,
)
from tests.faults.conftest import make_model

SECRET = "hf_planted0planted0"
WORDS = "the interpreter evaluates an expression and returns its value to the caller "
RESUME = ("--resume_from_checkpoint", "true")
_SIZES = {
    "vocab_size": 4096, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """OpenMP's threads do not survive a fork: with more than one, a child crashes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def home(tmp_path_factory, one_thread):
    """A tiny model, a text, and the cache of its blocks."""
    folder = tmp_path_factory.mktemp("continual")
    make_model(folder / "model")
    (folder / "train.txt").write_text(WORDS * 300)
    patch = pytest.MonkeyPatch()
    patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    patch.setenv("HF_TOKEN", SECRET)
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def words(home):
    """The arguments of a run of four noisy optical steps, with a checkpoint every two."""

    def make(output, *flags):
        return [str(word) for word in (
            "--model_name_or_path", home / "model", "--train_file", home / "train.txt",
            "--do_train", "--max_steps", 4, "--save_steps", 2, "--logging_steps", 1,
            "--block_size", 32, "--per_device_train_batch_size", 2, "--learning_rate", "1e-2",
            "--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true",
            "--transform_config", "configs/transforms/optical.yaml", "--output_dir", output, *flags,
        )]  # fmt: skip

    return make


@pytest.fixture(scope="module")
def train(words):
    return lambda output, *flags: continual_pretrain(parse_arguments(words(output, *flags)))


@pytest.fixture(scope="module")
def base(train, tmp_path_factory):
    """The run that nothing happened to, given tokens in three ways."""
    output = tmp_path_factory.mktemp("runs") / "base"
    tokens = ("--hub_token", SECRET, f"--token={SECRET}", "--use-auth-token", SECRET)
    train(output, *tokens)
    return output


@pytest.fixture
def copy(base, tmp_path):
    return shutil.copytree(base, tmp_path / "run")


@pytest.fixture
def interrupted(copy):
    """As a kill after the last checkpoint leaves it: the finished model is not there yet."""
    for path in copy.iterdir():
        if path.is_file():
            path.unlink()
    return copy


def digests(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".run")
    }


def assert_same_model(one, two):
    verify(one)
    first, second = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def in_a_child(action, expect):
    """Run `action` in a fork; `expect` is its exit code, or minus the signal that ended it."""
    child = os.fork()
    if not child:
        code = 99
        try:
            action()
            code = 0
        except UserError:
            code = 2
        except RunError as error:
            print(error, flush=True)
            code = 1
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == expect


def killed_in(patch, place, when=lambda *arguments: True):
    """Have SIGKILL come where the function at `place` would be called."""
    module, name = place.rsplit(".", 1)
    owner = __import__(module, fromlist=[name])
    real = getattr(owner, name)

    def call(*arguments, **options):
        if when(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    patch.setattr(owner, name, call)


# one run, one folder


def test_a_finished_run_that_saved_models_only_is_finished(train, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    train(tmp_path, "--save_only_model", "true")
    before = digests(tmp_path)
    train(tmp_path, "--save_only_model", "true", *RESUME)
    assert "checkpoint-4 has all 4 steps; nothing to train" in caplog.text
    with pytest.raises(UserError, match=r"checkpoint-4: holds no scheduler.pt, no optimizer"):
        train(tmp_path, "--save_only_model", "true", *RESUME, "--max_steps", 6)
    assert digests(tmp_path) == before


_CONVERTED = {
    "mixtral": MixtralConfig(num_local_experts=4, **_SIZES),
    # its text model is what AutoModelForCausalLM would make; the folder holds the whole one
    "gemma3": Gemma3Config(
        text_config=Gemma3TextConfig(head_dim=8, **_SIZES).to_dict(),
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", _CONVERTED)
def test_a_model_whose_files_have_other_names_than_it_has_goes_on(home, train, tmp_path, kind):
    torch.manual_seed(0)
    model, folder = AutoModelForCausalLM.from_config(_CONVERTED[kind]), tmp_path / "model"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_tokenizer("builtin")).save_pretrained(folder)
    saved = load_file(folder / "model.safetensors")
    assert not saved.keys() <= model.state_dict().keys()
    best = ("--load_best_model_at_end", "true", "--eval_strategy", "steps", "--eval_steps", 2,
            "--validation_file", home / "train.txt", "--lr_scheduler_type", "constant")  # fmt: skip
    name = ("--model_name_or_path", folder, *best)
    lora = ("--transform_config", "configs/transforms/bitflip-lora.yaml", "--dtype", "bfloat16")
    for hardware in ((), lora) if kind == "mixtral" else ((),):
        whole, parts = tmp_path / f"whole{len(hardware)}", tmp_path / f"parts{len(hardware)}"
        train(whole, *name, *hardware)
        train(parts, *name, *hardware, "--max_steps", 2)
        train(parts, *name, *hardware, *RESUME)
        assert_same_model(whole, parts)


def test_a_folder_in_use_is_refused_before_anything_is_written(train, tmp_path):
    output = tmp_path / "run"
    with locked(output, "--output_dir"):
        said = rf"--output_dir: {output} is in use by another run \(process {os.getpid()} on"
        with pytest.raises(UserError, match=said):
            train(output)
    assert not [path for path in output.iterdir() if not path.name.startswith(".run")]


def test_an_output_folder_that_is_a_file_is_refused(train, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"--output_dir: .*file cannot be written to"):
        train(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# what is saved


def test_every_checkpoint_has_a_manifest_of_all_that_going_on_needs(base):
    for step in (2, 4):
        folder = base / f"checkpoint-{step}"
        verify(folder)
        needed = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
        assert (
            needed | {"trainer_state.json", "settings.json", "inputs.json"}
            <= read_manifest(folder).keys()
        )
    verify(base)
    listed = read_manifest(base).keys()
    assert {"model.safetensors", "config.json", "trainer_state.json"} <= listed
    assert not [name for name in listed if "results" in name or name == "README.md"]


def test_tokens_are_written_nowhere(base):
    files = [path for path in base.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert "--train_file" in (base / "README.md").read_text()


def test_an_evaluation_leaves_the_model_as_it_was(train, home, copy):
    before = digests(copy)
    result = continual_pretrain(
        parse_arguments(
            [
                "--model_name_or_path", str(copy), "--validation_file", str(home / "train.txt"),
                "--do_eval", "--max_eval_samples", "2", "--block_size", "32", "--report_to",
                "none", "--output_dir", str(copy),
            ]
        )
    )  # fmt: skip
    assert result.metrics["perplexity"] > 1
    find_source(str(copy))
    results = {"all_results.json", "eval_results.json"}
    assert {n: d for n, d in digests(copy).items() if n not in results} == {
        n: d for n, d in before.items() if n not in results
    }
    all_results = json.loads((copy / "all_results.json").read_text())
    assert {"train_loss", "eval_loss"} <= all_results.keys()


def test_rotation_keeps_whole_ones(train, tmp_path):
    train(tmp_path / "run", "--save_steps", 1, "--save_total_limit", 2)
    names = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert names == ["checkpoint-3", "checkpoint-4"]
    for name in names:
        verify(tmp_path / "run" / name)


# going on


def test_a_finished_run_is_finished(train, copy, caplog):
    before = digests(copy)
    with caplog.at_level(logging.INFO, logger="aixsim"):
        result = train(copy, *RESUME)
    assert result.folder is None and digests(copy) == before
    assert "checkpoint-4 has all 4 steps; nothing to train" in caplog.text
    # as for pretrain: a script over learning rates does not find the first one's model
    said = r"checkpoint-4 has all 4 steps.*lr_scheduler_type linear -> constant; nothing would be"
    with pytest.raises(UserError, match=said):
        train(copy, *RESUME, "--lr_scheduler_type", "constant")
    with pytest.raises(UserError, match=r"--max_steps: got 3; .*checkpoint-4 is beyond it"):
        train(copy, *RESUME, "--max_steps", 3)
    assert digests(copy) == before


def test_the_model_of_a_run_that_has_all_steps_is_made(train, base, interrupted):
    assert train(interrupted, *RESUME).folder == interrupted
    assert_same_model(interrupted, base)
    assert sorted(p.name for p in interrupted.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
    ]


def test_what_changed_since_is_told_and_settings_are_the_runs(train, home, copy, caplog):
    (home / "other.txt").write_text(WORDS * 200)
    changed = ("--weight_decay", 0.1, "--train_file", home / "other.txt", "--learning_rate", "4e-3")
    other_data = ("--block_size", 16, "--ignore_data_skip", "true")
    with caplog.at_level(logging.INFO, logger="aixsim"):
        train(copy, *RESUME, "--max_steps", 6, *other_data, *changed)
    said = next(r.message for r in caplog.records if r.message.startswith("resumed from"))
    for expected in (
        "weight_decay 0.0 -> 0.1", "max_steps 4 -> 6", "block_size 32 -> 16", "other.txt",
        "learning_rate 0.01 -> 0.004", "training blocks",
        "; the data are read from their start",
    ):  # fmt: skip
        assert expected in said
    state = json.loads((copy / "trainer_state.json").read_text())
    rates = [r["learning_rate"] for r in state["log_history"] if "loss" in r]
    # the linear schedule of six steps from 4e-3, not a step with the 0 that four steps end with
    assert rates[4:] == pytest.approx([4e-3 * 2 / 6, 4e-3 * 1 / 6])


@pytest.fixture
def two_steps(interrupted):
    """As a kill before the last checkpoint leaves it."""
    shutil.rmtree(interrupted / "checkpoint-4")
    return interrupted


@pytest.fixture
def others(home, tmp_path):
    """The text and the tokenizer under other names, and others of the same sizes."""
    text = WORDS * 300
    (tmp_path / "moved.txt").write_text(text)
    (tmp_path / "other.txt").write_text(text[: len(text) // 2] + text[len(text) // 2 :].upper())
    assert (tmp_path / "other.txt").stat().st_size == (home / "train.txt").stat().st_size
    for name in ("moved", "other"):
        shutil.copytree(resolve_tokenizer("builtin"), tmp_path / name)
    path = tmp_path / "other" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "NFC"}}))
    for name in ("moved model", "other weights", "other config"):
        shutil.copytree(home / "model", tmp_path / name)
    path = tmp_path / "other weights" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] *= 1.01
    save_file(tensors, path, metadata={"format": "pt"})
    path = tmp_path / "other config" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-3}))
    return tmp_path


OTHER_DATA = "trained on other data than this run's, or in another order"
ANOTHER_RUN = {
    "seed": (["--seed", 5], "--seed: {}/checkpoint-2 was trained with 42, this run asks for 5"),
    "tokenizer": (
        ["--tokenizer_name", "other"],
        "--tokenizer_name: {}/checkpoint-2 was trained with another tokenizer than this run's",
    ),
    "text": (["--train_file", "other.txt"], "--train_file: {}/checkpoint-2 was " + OTHER_DATA),
    "order": (["--data_seed", 7], f"--data_seed: {{}}/checkpoint-2 was {OTHER_DATA} (data_seed"),
    "blocks": (
        ["--block_size", 16],
        f"--block_size: {{}}/checkpoint-2 was {OTHER_DATA} (block_size 32 -> 16, training blocks",
    ),
    "batch": (
        ["--per_device_train_batch_size", 4],
        f"--per_device_train_batch_size: {{}}/checkpoint-2 was {OTHER_DATA} (sequences a step 2",
    ),
    "sampling": (
        ["--train_sampling_strategy", "sequential"],
        f"--train_sampling_strategy: {{}}/checkpoint-2 was {OTHER_DATA} (train_sampling_strategy",
    ),
    "seedable sampler": (
        ["--accelerator_config", '{"use_seedable_sampler": false}'],
        f"--accelerator_config: {{}}/checkpoint-2 was {OTHER_DATA}",
    ),
    "last batch": (
        ["--dataloader_drop_last", "true"],
        f"--dataloader_drop_last: {{}}/checkpoint-2 was {OTHER_DATA}",
    ),
    "weights": (
        ["--model_name_or_path", "other weights"],
        "--model_name_or_path: the run of {}/checkpoint-2 began with other files of weights than",
    ),
    "config": (
        ["--model_name_or_path", "other config"],
        "--model_name_or_path: {}/checkpoint-2 was trained with another model than",
    ),
    "from scratch": (
        ["--config_name", "other weights"],
        "--model_name_or_path: the run of {}/checkpoint-2 began with other files of weights than",
    ),
    "source": (
        ["--dataset_name", "builtin"],
        f"--dataset_name: {{}}/checkpoint-2 was {OTHER_DATA} (dataset_name None -> builtin",
    ),
}


@pytest.mark.parametrize("what", ANOTHER_RUN)
def test_another_run_does_not_go_on(words, two_steps, others, what):
    flags, said = ANOTHER_RUN[what]
    flags = [others / flag if str(flag).startswith("other") else flag for flag in flags]
    command = words(two_steps, *RESUME, *flags)
    replaced = {"source": "--train_file", "from scratch": "--model_name_or_path"}.get(what)
    if replaced is not None:
        place = command.index(replaced)
        del command[place : place + 2]
    before = digests(two_steps)
    with pytest.raises(UserError, match=re.escape(said.format(two_steps))):
        continual_pretrain(parse_arguments(command))
    assert digests(two_steps) == before


def test_the_same_run_goes_on_wherever_its_files_lie(train, base, two_steps, others, caplog):
    moved = ("--train_file", others / "moved.txt", "--tokenizer_name", others / "moved")
    moved += ("--model_name_or_path", others / "moved model")
    with caplog.at_level(logging.INFO, logger="aixsim"):
        train(two_steps, *RESUME, *moved)
    assert "changed since: train_file" in caplog.text and "from their start" not in caplog.text
    assert_same_model(two_steps, base)


def test_other_data_are_read_from_their_start_if_asked_for(
    train, two_steps, others, caplog, monkeypatch
):
    def skip(loader, batches):
        raise AssertionError(f"{batches} batches are skipped")

    monkeypatch.setattr("transformers.trainer.skip_first_batches", skip)
    with pytest.raises(AssertionError, match="2 batches are skipped"):
        train(two_steps, *RESUME)
    asked = ("--train_file", others / "other.txt", "--ignore_data_skip", "true")
    with caplog.at_level(logging.INFO, logger="aixsim"):
        train(two_steps, *RESUME, *asked)
    assert "checkpoint-2; changed since: train_file" in caplog.text
    assert "; the data are read from their start" in caplog.text
    verify(two_steps)


def test_a_checkpoint_that_does_not_know_its_run_goes_on(train, base, two_steps, caplog):
    """Of an older version, or of plain Trainer."""
    checkpoint = two_steps / "checkpoint-2"
    for name in ("inputs.json", "settings.json"):
        (checkpoint / name).unlink()
    write_manifest(checkpoint)
    with caplog.at_level(logging.INFO, logger="aixsim"):
        train(two_steps, *RESUME)
    assert f"resumed from {checkpoint}\n" in caplog.text
    assert_same_model(two_steps, base)


DAMAGE = {
    "a flipped byte": lambda f: flip(f / "model.safetensors"),
    "no optimizer": lambda f: (f / "optimizer.pt").unlink(),
    "no scheduler": lambda f: (f / "scheduler.pt").unlink(),
    "no random state": lambda f: (f / "rng_state.pth").unlink(),
    "half an optimizer": lambda f: os.truncate(f / "optimizer.pt", 5000),
    "cut counters": lambda f: os.truncate(f / "trainer_state.json", 10),
    "nothing in it": lambda f: [path.unlink() for path in f.iterdir()],
    "torn": begin_saving,
}


def flip(path):
    data = bytearray(path.read_bytes())
    data[-200] ^= 64
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_newest_whole_checkpoint_is_taken(words, interrupted, damage, caplog):
    DAMAGE[damage](interrupted / "checkpoint-4")
    with caplog.at_level(logging.WARNING, logger="aixsim"):
        found = find_checkpoint(parse_arguments(words(interrupted, *RESUME)))
    assert found == interrupted / "checkpoint-2"
    aside = interrupted / "checkpoint.set-aside" / "checkpoint-4"
    assert aside.is_dir() and f"set aside as {aside}" in caplog.text


def test_the_run_goes_on_from_it_to_the_same_end(train, base, interrupted):
    flip(interrupted / "checkpoint-4" / "model.safetensors")
    train(interrupted, *RESUME)
    assert_same_model(interrupted, base)


def spoil_weight(folder, name="model.layers.1.mlp.up_proj.weight", value=torch.nan):
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[0] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_moment(folder):
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    state["state"][3]["exp_avg_sq"].view(-1)[0] = torch.inf
    torch.save(state, folder / "optimizer.pt")


SPOILT = {
    "weight": (spoil_weight, "model.layers.1.mlp.up_proj.weight: 1 of 512 numbers are NaN"),
    "range": (
        lambda folder: spoil_weight(folder, "model.layers.0.mlp.up_proj.ranges"),
        "model.layers.0.mlp.up_proj.ranges: got the range [",
    ),
    "moment": (spoil_moment, "optimizer.pt: state 3 exp_avg_sq: 1 of "),
}


@pytest.mark.parametrize("what", SPOILT)
def test_one_that_holds_what_is_no_number_is_not_gone_on_from(words, interrupted, what, caplog):
    """Saved so by an older version: its files are whole."""
    spoil, said = SPOILT[what]
    newest = interrupted / "checkpoint-4"
    spoil(newest)
    write_manifest(newest)
    asked = parse_arguments(words(interrupted, "--resume_from_checkpoint", newest))
    with pytest.raises(UserError, match=re.escape(f"{newest}: {said}")):
        find_checkpoint(asked)
    verify(newest)
    arguments = parse_arguments(words(interrupted, *RESUME))
    with caplog.at_level(logging.WARNING, logger="aixsim"):
        assert find_checkpoint(arguments) == interrupted / "checkpoint-2"
    aside = interrupted / "checkpoint.set-aside" / "checkpoint-4"
    assert said in caplog.text and f"set aside as {aside}" in caplog.text
    verify(aside)
    spoil(interrupted / "checkpoint-2")
    write_manifest(interrupted / "checkpoint-2")
    with pytest.raises(
        UserError, match=r"no checkpoint is complete: .*checkpoint-2: .*another --out"
    ):
        find_checkpoint(arguments)
    assert (interrupted / "checkpoint-2").is_dir()


def test_the_model_of_a_run_that_has_all_steps_is_not_one_of_no_numbers(train, interrupted):
    for step in (2, 4):
        spoil_weight(interrupted / f"checkpoint-{step}")
        write_manifest(interrupted / f"checkpoint-{step}")
    with pytest.raises(UserError, match=r"no checkpoint is complete: .* numbers are NaN"):
        train(interrupted, *RESUME)
    assert not (interrupted / "config.json").exists()


@pytest.mark.parametrize("damage", DAMAGE)
def test_one_that_is_asked_for_is_looked_at_too(words, tmp_path, interrupted, damage):
    asked = interrupted / "checkpoint-4"
    DAMAGE[damage](asked)
    arguments = words(tmp_path / "new", "--resume_from_checkpoint", asked)
    with pytest.raises(UserError, match=re.escape(str(asked))):
        find_checkpoint(parse_arguments(arguments))
    assert asked.is_dir()


def test_nothing_is_begun_anew_where_all_are_damaged(words, interrupted):
    for step in (2, 4):
        flip(interrupted / f"checkpoint-{step}" / "model.safetensors")
    with pytest.raises(UserError, match=r"no checkpoint is complete: .*another --output_dir"):
        find_checkpoint(parse_arguments(words(interrupted, *RESUME)))
    assert (interrupted / "checkpoint-4").is_dir()


def test_checkpoints_of_another_program_are_said(words, tmp_path, interrupted, caplog):
    for step in (2, 4):
        (interrupted / f"checkpoint-{step}" / MANIFEST_FILE).unlink()
    with pytest.raises(
        UserError, match=r"checkpoint-4, .*without a manifest.json.*checkpoint PATH"
    ):
        find_checkpoint(parse_arguments(words(interrupted, *RESUME)))
    asked = interrupted / "checkpoint-4"
    arguments = parse_arguments(words(tmp_path / "new", "--resume_from_checkpoint", asked))
    with caplog.at_level(logging.WARNING, logger="aixsim"):
        assert find_checkpoint(arguments) == asked
    assert "checkpoint-4: has no manifest.json" in caplog.text
    (asked / "optimizer.pt").unlink()
    with pytest.raises(UserError, match=r"checkpoint-4: holds no optimizer .*begin anew"):
        check_files(asked, arguments)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_what_cannot_be_read_is_named(train, tmp_path, interrupted, name):
    asked = interrupted / "checkpoint-4"
    (asked / MANIFEST_FILE).unlink()
    os.truncate(asked / name, 3000)
    asked_for = ("--resume_from_checkpoint", asked, "--max_steps", 6)
    with pytest.raises(UserError, match=rf"{asked}.*: cannot be loaded into this run: \w+"):
        train(tmp_path / "new", *asked_for)
    assert not (tmp_path / "new" / "config.json").exists()


def test_a_checkpoint_of_another_model_is_refused(train, tmp_path, copy):
    make_model(tmp_path / "deeper", layers=3)
    deeper = ("--model_name_or_path", tmp_path / "deeper", *RESUME, "--max_steps", 6)
    with pytest.raises(UserError, match=r"another model .*\(num_hidden_layers 2 -> 3\)"):
        train(copy, *deeper)


@pytest.mark.parametrize("change", ["lacks", "holds"])
def test_a_checkpoint_of_other_weights_than_its_config_says_is_refused(train, copy, change):
    folder, name = copy / "checkpoint-4", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors["more" if change == "holds" else "rest"] = tensors[name].clone()
    if change == "lacks":
        del tensors[name], tensors["rest"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / MANIFEST_FILE).unlink()
    said = f"checkpoint-4: cannot be loaded into this run: {change} "
    with pytest.raises(UserError, match=said):
        train(copy, "--resume_from_checkpoint", folder, "--max_steps", 6)


def test_checkpoints_whose_names_were_exchanged_are_not_gone_on_from(words, interrupted, caplog):
    two, four, aside = (interrupted / f"checkpoint-{name}" for name in ("2", "4", "x"))
    two.rename(aside)
    four.rename(two)
    before = digests(interrupted)
    said = f"{two}: is the checkpoint of step 4, by its trainer_state.json"
    with pytest.raises(UserError, match=said):
        find_checkpoint(parse_arguments(words(interrupted, "--resume_from_checkpoint", two)))
    # it alone is there: starting anew would hide a loss
    with pytest.raises(UserError, match=f"no checkpoint is complete: {said}"):
        find_checkpoint(parse_arguments(words(interrupted, *RESUME)))
    assert digests(interrupted) == before
    aside.rename(four)
    with pytest.raises(UserError, match="no checkpoint is complete"):
        find_checkpoint(parse_arguments(words(interrupted, *RESUME)))


def test_later_checkpoints_are_not_written_over(words, interrupted):
    asked = interrupted / "checkpoint-2"
    arguments = words(interrupted, "--resume_from_checkpoint", asked)
    before = digests(interrupted)
    for another in (["--seed", "5"], ["--train_file", "nowhere.txt"], ["--block_size", "16"]):
        with pytest.raises((UserError, RunError)):
            continual_pretrain(parse_arguments(arguments + another))
        # a mistake moves nothing
        assert digests(interrupted) == before
    continual_pretrain(parse_arguments([*arguments, "--max_steps", "3"]))
    assert not (interrupted / "checkpoint-4").exists()
    verify(interrupted / "checkpoint.set-aside" / "checkpoint-4")


# kills


def test_a_kill_within_a_checkpoint_costs_that_checkpoint(train, base, tmp_path):
    output = tmp_path / "run"

    def fault():
        patch = pytest.MonkeyPatch()
        there = "checkpoint-4/optimizer.pt"
        killed_in(patch, "torch.save", lambda data, path: str(path).endswith(there))
        train(output)

    in_a_child(fault, expect=-signal.SIGKILL)
    assert (output / "checkpoint-4").is_dir() and not is_complete(output / "checkpoint-4")
    train(output, *RESUME)
    assert_same_model(output, base)
    assert (output / "checkpoint.set-aside" / "checkpoint-4").is_dir()


def place_files_until(patch, output, count):
    """Have SIGKILL come where the file after the first `count` would be put in place."""
    moved = []

    def is_next(source, target):
        if Path(source).parent == output / ".published":
            moved.append(target)
        return len(moved) > count

    killed_in(patch, "os.replace", is_next)


@pytest.mark.parametrize("moment", ["last checkpoint", "model written", "three files in place"])
def test_a_kill_at_the_end_of_a_first_run_leaves_no_half_model(train, base, tmp_path, moment):
    output = tmp_path / "run"

    def fault():
        patch = pytest.MonkeyPatch()
        if moment == "last checkpoint":
            killed_in(patch, "aixsim_cli.continual.trainer.write_manifest")
        elif moment == "model written":
            killed_in(patch, "aixsim_cli.models.hf.saved.finish_folder")
        else:
            place_files_until(patch, output, 3)
        train(output, "--save_steps", 4)

    in_a_child(fault, expect=-signal.SIGKILL)
    said = "put its model in place" if "place" in moment else "holds neither"
    with pytest.raises(UserError, match=said):
        find_source(str(output))
    # with or without a complete checkpoint
    train(output, *RESUME, "--save_steps", 4)
    assert_same_model(output, base)
    assert not (output / ".staged").exists() and not (output / ".published").exists()


@pytest.mark.parametrize("files", [0, 3])
def test_a_kill_over_an_older_model_leaves_the_old_or_the_new(train, tmp_path, copy, files):
    """Before the first file is put in place, and in the midst of it."""
    old = shutil.copytree(copy, tmp_path / "old")

    def fault():
        patch = pytest.MonkeyPatch()
        if files:
            place_files_until(patch, copy, files)
        else:
            killed_in(patch, "aixsim_cli.models.hf.saved.finish_folder")
        train(copy, *RESUME, "--max_steps", 5)

    in_a_child(fault, expect=-signal.SIGKILL)
    if files:
        with pytest.raises(UserError, match="put its model in place"):
            find_source(str(copy))
    else:
        assert_same_model(copy, old)
    train(copy, *RESUME, "--max_steps", 5)
    verify(copy)
    assert json.loads((copy / "trainer_state.json").read_text())["global_step"] == 5
    assert digests(copy / "checkpoint-2") == digests(old / "checkpoint-2")


def test_a_place_that_is_taken_meanwhile_costs_nobody_anything(train, copy, monkeypatch, caplog):
    longer = (*RESUME, "--max_steps", 5)
    (copy / "tokenizer.json").unlink()
    (copy / MANIFEST_FILE).unlink()
    real = SimulationTrainer.train

    def meanwhile(trainer, **options):
        (copy / "tokenizer.json").mkdir()
        (copy / "README.md").write_text("years of work")
        return real(trainer, **options)

    with monkeypatch.context() as patch:
        patch.setattr(SimulationTrainer, "train", meanwhile)
        train(copy, *longer)
    verify(copy)
    aside = copy / "checkpoint.set-aside"
    assert (aside / "tokenizer.json").is_dir() and (copy / "tokenizer.json").is_file()
    assert (aside / "README.md").read_text() == "years of work"
    assert f"{copy / 'README.md'}: was not written by the run; set aside" in caplog.text


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "tokenizer.model", "vocab.txt"])
@pytest.mark.parametrize("asked", [(), ("--resume_from_checkpoint", "false")])
def test_files_of_others_are_not_written_over(words, tmp_path, name, asked):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("years of work")
    with pytest.raises(UserError, match=f"--output_dir: {tmp_path / 'run'} holds {name} already"):
        continual_pretrain(parse_arguments(words(tmp_path / "run", *asked)))
    assert (tmp_path / "run" / name).read_text() == "years of work"


@pytest.mark.parametrize("do", ["--do_train", "--do_eval"])
@pytest.mark.parametrize("name", ["all_results.json", "eval_results.json"])
@pytest.mark.parametrize("text", ["mine", "[1]", '{"accuracy": 1}'])
def test_results_of_others_are_not_written_over(words, home, tmp_path, name, text, do):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text(text)
    command = words(tmp_path / "run", "--validation_file", home / "train.txt")
    command[command.index("--do_train")] = do
    with pytest.raises(UserError, match=f"{name}: holds no results of a training"):
        continual_pretrain(parse_arguments(command))
    assert (tmp_path / "run" / name).read_text() == text


def test_an_edited_card_is_kept_when_the_run_goes_on(train, copy):
    (copy / "README.md").write_text("what I found out")
    train(copy, *RESUME, "--max_steps", 5)
    assert (copy / "checkpoint.set-aside" / "README.md").read_text() == "what I found out"
    assert not (copy / "checkpoint.set-aside" / "all_results.json").exists()


# disks


def test_a_full_disk_ends_the_run_and_keeps_what_is_whole(train, tmp_path, capfd):
    output = tmp_path / "run"

    def starved():
        # the optimizer's moments take about twice the model's 300 kB
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
        train(output)

    in_a_child(starved, expect=1)
    said = capfd.readouterr().out
    assert f"{output}: checkpoint-2 could not be written to disk: " in said
    assert "there is no checkpoint yet" in said
    assert not list(output.glob("checkpoint-*"))


@pytest.mark.parametrize("place", ["checkpoint-4/optimizer.pt", ".staged/training_args.bin"])
def test_earlier_checkpoints_outlive_a_full_disk(train, tmp_path, monkeypatch, place):
    save = torch.save

    def full(data, path, *arguments, **options):
        if str(path).endswith(place):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(data, path, *arguments, **options)

    monkeypatch.setattr(torch, "save", full)
    newest = "checkpoint-2" if "checkpoint" in place else "checkpoint-4"
    said = rf"could not be written to disk: No space left on device; the newest complete .*{newest}"
    with pytest.raises(RunError, match=said):
        train(tmp_path / "run")
    verify(tmp_path / "run" / newest)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left - {".run.lock"} <= {"checkpoint-2", newest}


def test_a_disk_too_small_for_a_checkpoint_is_refused_at_the_start(train, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(
        UserError, match=r"--output_dir: the disk of .* MiB left; a checkpoint takes"
    ):
        train(tmp_path / "run")


# texts


BAD = {
    "latin.txt": (WORDS.encode() + b"\xff\n", "latin.txt: is not UTF-8"),
    "bad.jsonl": (b'{"text": "a b"}\n{"text": \n', "bad.jsonl: cannot be read: line 2"),
    "short.txt": (b"too short", "the train text is shorter than one block of 32 tokens"),
    "latin.csv": (
        b"text\na\n\xff\n",
        "latin.csv: cannot be read: is not UTF-8: line 3: byte 0xff at 7",
    ),
    "quote.csv": (b'text\n"unclosed\n', "quote.csv: cannot be read: .*row 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_text_is_named(words, tmp_path, name):
    text, said = BAD[name]
    (tmp_path / name).write_bytes(text)
    arguments = parse_arguments(words(tmp_path / "run", "--train_file", tmp_path / name))
    tokenizer = AutoTokenizer.from_pretrained(resolve_tokenizer("builtin"))
    with pytest.raises(UserError, match=said) as caught:
        load_blocks(arguments, tokenizer, 32)
    assert "DatasetGenerationError" not in str(caught.value)


def test_a_cache_that_cannot_be_written_is_named(words, home, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    (tmp_path / "t.txt").write_text(WORDS * 20)
    arguments = parse_arguments(words(tmp_path / "run", "--train_file", tmp_path / "t.txt"))
    tokenizer = AutoTokenizer.from_pretrained(resolve_tokenizer("builtin"))
    with pytest.raises(
        RunError, match=r"file/cache: the blocks .* cannot be kept: Not a directory"
    ):
        load_blocks(arguments, tokenizer, 32)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max_steps", 0], "--max_steps: got 0; expected at least 1"),
        (["--max_steps", -5], "--max_steps: got -5; expected at least 1"),
        (["--max_steps", -1, "--num_train_epochs", 0], "--num_train_epochs: got 0.0; expected > 0"),
        (["--per_device_train_batch_size", 0], "--per_device_train_batch_size: got 0; expected at"),
        (["--gradient_accumulation_steps", -1], "--gradient_accumulation_steps: got -1"),
        (["--effective_batch_size", -4], "--effective_batch_size: got -4; expected at least 1"),
        (["--max_train_samples", 0], "--max_train_samples: got 0; expected at least 1"),
        (["--learning_rate", "nan"], "--learning_rate: got nan; expected a number"),
        (["--adam_beta2", "inf"], "--adam_beta2: got inf; expected a number"),
        (["--seed", 10**23], "--seed: got 1000000"),
        (["--hub_strategy", "every_save"], "--hub_strategy: got every_save; expected end"),
    ],
)
def test_numbers_that_train_nothing_are_refused(words, tmp_path, flags, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse_arguments(words(tmp_path / "run", *flags))


DIVERGES = ("--learning_rate", "3e38", "--max_grad_norm", 0, "--logging_steps", 100)


@pytest.mark.parametrize(
    "strategy", [("steps", "--save_steps", 1), ("epoch", "--max_train_samples", 2)]
)
def test_weights_that_are_not_finite_are_saved_at_no_occasion(train, tmp_path, strategy):
    """The loss is finite: it is the step before the save that spoils them."""
    said = r"not finite at step 1; .*there is no checkpoint yet"
    with pytest.raises(RunError, match=said):
        train(tmp_path / "run", *DIVERGES, "--save_strategy", *strategy)
    assert not list((tmp_path / "run").glob("checkpoint*"))


@pytest.mark.parametrize("damage", ["a flipped byte", "no folder"])
def test_the_best_checkpoint_is_verified_before_its_weights_are_taken(
    train, home, tmp_path, monkeypatch, damage
):
    output = tmp_path / "run"
    best = output / "checkpoint-2"
    flags = (
        "--load_best_model_at_end", "true", "--eval_strategy", "steps", "--eval_steps", 2,
        "--greater_is_better", "true", "--validation_file", home / "train.txt",
        "--max_eval_samples", 2,
    )  # fmt: skip

    def fault(folder):
        write_manifest(folder)
        if folder.name == "checkpoint-4":
            flip(best / "model.safetensors") if damage == "a flipped byte" else shutil.rmtree(best)

    monkeypatch.setattr("aixsim_cli.continual.trainer.write_manifest", fault)
    said = "model.safetensors: damaged" if damage == "a flipped byte" else "no such folder"
    said = rf"the best checkpoint cannot be taken: {best}.*{said}.*--load_best_model_at_end false"
    with pytest.raises(RunError, match=said):
        train(output, *flags)
    # the same where nothing is left to train
    with pytest.raises(RunError, match=said):
        train(output, *flags, *RESUME)
    assert not (output / "config.json").exists()
    train(output, *flags, *RESUME, "--load_best_model_at_end", "false")
    verify(output)


@pytest.mark.parametrize("asked", ["false", "elsewhere"])
def test_a_finished_model_is_not_written_over_by_another_run(train, base, copy, asked):
    before = digests(copy)
    holds = "a model"
    if asked == "elsewhere":
        asked, holds = base / "checkpoint-2", "checkpoints"
    with pytest.raises(UserError, match=f"--output_dir: {copy} holds {holds} already"):
        train(copy, "--resume_from_checkpoint", asked)
    assert digests(copy) == before


def test_checkpoints_are_not_mixed_with_those_of_another_run(words, base, interrupted):
    elsewhere = words(interrupted, "--resume_from_checkpoint", base / "checkpoint-2")
    with pytest.raises(UserError, match="holds checkpoints already"):
        find_checkpoint(parse_arguments(elsewhere))
    anew = words(interrupted, "--resume_from_checkpoint", "false")
    assert find_checkpoint(parse_arguments(anew)) is None
    clear_the_way(interrupted, None)
    aside = interrupted / "checkpoint.set-aside"
    assert sorted(path.name for path in aside.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    # what was moved aside is still this run's
    own = words(interrupted, "--resume_from_checkpoint", aside / "checkpoint-2")
    assert find_checkpoint(parse_arguments(own)) == aside / "checkpoint-2"


@pytest.mark.parametrize(
    ("place", "wanted"),
    [("checkpoint.set-aside", "folder"), (".staged", "folder"), ("README.md", "file"),
     ("model.safetensors", "file"), ("eval_results.json", "file"), ("training_args.bin", "file"),
     ("tokenizer_config.json", "file"), ("transform.yaml", "file"),
     ("model-00001-of-00002.safetensors", "file")],
)  # fmt: skip
def test_what_is_in_the_way_is_named_before_training(train, tmp_path, place, wanted):
    output = tmp_path / "run"
    output.mkdir()
    (output / place).touch() if wanted == "folder" else (output / place).mkdir()
    with pytest.raises(UserError, match=f"--output_dir: {output / place}: got .* a {wanted}, or"):
        train(output)
    assert not list(output.glob("checkpoint-*"))


@pytest.mark.parametrize("processes", [2, 1])
def test_every_process_needs_its_own_random_state(
    words, interrupted, monkeypatch, caplog, processes
):
    """Of a checkpoint of two processes, one of whose states is missing."""
    asked = interrupted / "checkpoint-4"
    (asked / "rng_state.pth").rename(asked / "rng_state_0.pth")
    settings = json.loads((asked / "settings.json").read_text())
    (asked / "settings.json").write_text(json.dumps(settings | {"processes": 2}))
    write_manifest(asked)
    arguments = parse_arguments(words(interrupted, "--resume_from_checkpoint", asked))
    monkeypatch.setattr("transformers.TrainingArguments.world_size", processes)
    if processes == 2:
        with pytest.raises(UserError, match=r"checkpoint-4: holds no rng_state_1\.pth "):
            check_files(asked, arguments)
        shutil.copy(asked / "rng_state_0.pth", asked / "rng_state_1.pth")
        write_manifest(asked)
    with caplog.at_level(logging.WARNING, logger="aixsim"):
        assert find_checkpoint(arguments) == asked
        check_files(asked, arguments)
    said = "checkpoint-4: holds the random states of 2 processes, and this run has 1"
    assert (said in caplog.text) == (processes == 1)


def test_half_precision_needs_its_scale(words, interrupted):
    arguments = parse_arguments(words(interrupted, *RESUME))
    arguments.training.fp16 = True
    for step in (2, 4):
        path = interrupted / f"checkpoint-{step}" / "settings.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fp16": True}))
        write_manifest(path.parent)
    with pytest.raises(UserError, match=r"checkpoint-4: holds no scaler\.pt"):
        check_files(find_checkpoint(arguments), arguments)


def test_a_damaged_model_is_not_called_finished(train, copy):
    flip(copy / "model.safetensors")
    before = digests(copy)
    with pytest.raises(UserError, match=r"model\.safetensors: damaged: .*checkpoint-4"):
        train(copy, *RESUME)
    assert digests(copy) == before
    (copy / MANIFEST_FILE).unlink()
    train(copy, *RESUME)
    verify(copy)


def test_a_text_that_cannot_be_read_is_no_full_cache(words, tmp_path, monkeypatch):
    text = tmp_path / "denied.csv"
    text.write_text("text\na b c\n")

    def denied(path, *arguments, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(text))

    monkeypatch.setattr("pandas.read_csv", denied)
    arguments = parse_arguments(words(tmp_path / "run", "--train_file", text))
    tokenizer = AutoTokenizer.from_pretrained(resolve_tokenizer("builtin"))
    with pytest.raises(UserError, match=r"denied\.csv: cannot be read: Permission denied"):
        load_blocks(arguments, tokenizer, 32)


def test_a_checkpoint_of_another_program_with_a_broken_config_is_named(train, tmp_path, copy):
    asked = copy / "checkpoint-2"
    (asked / MANIFEST_FILE).unlink()
    (asked / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match=r"checkpoint-2/config\.json:1: is no JSON"):
        train(tmp_path / "new", "--resume_from_checkpoint", asked)


def test_rows_without_text_are_counted(words, tmp_path, caplog):
    text = tmp_path / "rows.csv"
    text.write_text("id,text\n" + f"1,{WORDS * 20}\n2,\n3,{WORDS}\n4,\n")
    arguments = parse_arguments(words(tmp_path / "run", "--train_file", text))
    tokenizer = AutoTokenizer.from_pretrained(resolve_tokenizer("builtin"))
    with caplog.at_level(logging.WARNING, logger="aixsim"):
        assert len(load_blocks(arguments, tokenizer, 32)["train"]) > 3
    assert f"{text}: 2 rows without text are skipped" in caplog.text
    text.write_text("text\n1\n2\n")
    with pytest.raises(UserError, match=rf"{text}: column 'text': got int64; expected strings"):
        load_blocks(arguments, tokenizer, 32)


def test_a_cache_is_not_read_where_it_is_to_be_overwritten(words, tmp_path, monkeypatch):
    text, made = tmp_path / "some.txt", []
    text.write_text(WORDS * 40)
    real = data.DocumentEncoder.__call__

    def encode(encoder, document):
        if document:  # the empty one tells the frame
            made.append(document)
        return real(encoder, document)

    monkeypatch.setattr(data.DocumentEncoder, "__call__", encode)
    tokenizer = AutoTokenizer.from_pretrained(resolve_tokenizer("builtin"))
    counts = []
    for overwrite in ("false", "false", "true"):
        flags = ("--train_file", text, "--overwrite_cache", overwrite)
        load_blocks(parse_arguments(words(tmp_path / "run", *flags)), tokenizer, 32)
        counts.append(len(made))
    assert counts == [1, 1, 2]


@pytest.fixture
def rows(tmp_path):
    """A folder that is named as a data set of the hub is."""
    (tmp_path / "rows").mkdir()

    def write(*texts):
        lines = [json.dumps({"text": text}) for text in texts]
        (tmp_path / "rows" / "train.jsonl").write_text("\n".join(lines))

    write(WORDS * 150, WORDS * 150)
    return tmp_path / "rows", write


def test_a_folder_in_the_place_of_a_hub_name_is_told_by_its_contents(words, rows, tmp_path):
    folder, write = rows
    command = words(tmp_path / "run", "--dataset_name", folder)
    place = command.index("--train_file")
    del command[place : place + 2]
    continual_pretrain(parse_arguments([*command, "--max_steps", "2"]))
    swapped = (
        WORDS.replace("returns", "x").replace("evaluates", "returns").replace("x", "evaluates")
    )
    write(WORDS * 150, WORDS * 100 + swapped * 50)
    goes_on = [*command, *RESUME]
    with pytest.raises(UserError, match=r"--dataset_name: .*checkpoint-2 was trained on other"):
        continual_pretrain(parse_arguments(goes_on))
    write(WORDS * 150, WORDS * 150)
    goes_on[goes_on.index("--dataset_name") + 1] = str(folder.rename(tmp_path / "elsewhere"))
    continual_pretrain(parse_arguments(goes_on))


def test_what_save_to_disk_wrote_is_named(words, tmp_path):
    Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "saved"))
    command = words(tmp_path / "run", "--dataset_name", tmp_path / "saved")
    place = command.index("--train_file")
    del command[place : place + 2]
    with pytest.raises(UserError, match="what `save_to_disk` of datasets wrote; expected its"):
        continual_pretrain(parse_arguments(command))


# what a fresh reader and a hostile user found


def test_an_evaluation_in_half_precision_leaves_the_weights(train, home, base, tmp_path):
    flags = ("--do_eval", "--validation_file", home / "train.txt", "--max_eval_samples", 2)
    train(tmp_path / "run", *flags, "--bf16_full_eval", "true")
    assert_same_model(tmp_path / "run", base)


def test_a_finished_run_is_finished_however_often_it_is_asked(train, interrupted):
    assert train(interrupted, *RESUME).folder == interrupted
    before = digests(interrupted)
    assert train(interrupted, *RESUME).folder is None
    assert digests(interrupted) == before
    # as an earlier version wrote it
    (interrupted / "all_results.json").write_text("{}")
    train(interrupted, *RESUME, "--max_steps", 5)


def test_a_run_that_was_killed_before_its_first_checkpoint_starts(train, base, tmp_path, caplog):
    train(tmp_path / "run", *RESUME)
    assert "holds no checkpoint-N; the run starts anew" in caplog.text
    assert_same_model(tmp_path / "run", base)
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    with pytest.raises(UserError, match=r"holds a model already; .*no checkpoint to go on from"):
        train(tmp_path / "run", *RESUME)


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_follows_the_loss_cannot_be_changed(train, home, tmp_path, kind):
    evaluate = ("--eval_strategy", "steps", "--eval_steps", 1, "--max_eval_samples", 2)
    flags = ("--lr_scheduler_type", kind, "--validation_file", home / "train.txt", *evaluate)
    train(tmp_path / "run", *flags)
    with pytest.raises(UserError, match=r"--learning_rate: .*a schedule that follows the loss"):
        train(tmp_path / "run", *flags, *RESUME, "--max_steps", 6, "--learning_rate", "1e-5")
    with pytest.raises(UserError, match=r"--lr_scheduler_type: .*a schedule that follows"):
        train(tmp_path / "run", *flags, *RESUME, "--max_steps", 6, "--lr_scheduler_type", "linear")
    train(tmp_path / "run", *flags, *RESUME, "--max_steps", 6, "--weight_decay", 0.5)
    saved = torch.load(tmp_path / "run" / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert {group["weight_decay"] for group in saved["param_groups"]} <= {0.5, 0.0}
    assert 0.5 in {group["weight_decay"] for group in saved["param_groups"]}


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_counts_evaluations_goes_on(train, home, tmp_path, kind):
    flags = ("--lr_scheduler_type", kind, "--validation_file", home / "train.txt")
    flags += ("--eval_strategy", "steps", "--eval_steps", 2, "--max_eval_samples", 2)
    train(tmp_path / "run", *flags)
    train(tmp_path / "run", *flags, *RESUME, "--max_steps", 6)
    verify(tmp_path / "run")


def test_every_schedule_is_one_that_can_be_set_or_one_that_follows():
    weight = torch.nn.Parameter(torch.zeros(1))
    for kind in SchedulerType:
        extra = {"num_decay_steps": 1} if kind.value == "warmup_stable_decay" else {}
        extra |= {"min_lr": 0.0} if "min_lr" in kind.value else {}
        options = {
            "num_warmup_steps": 1,
            "num_training_steps": 4,
            "scheduler_specific_kwargs": extra,
        }
        made = get_scheduler(kind, torch.optim.AdamW([weight], lr=1.0), **options)
        assert isinstance(made, LambdaLR) == (kind.value not in identity._FOLLOWING), kind


def test_another_optimizer_does_not_go_on_with_these_moments(train, copy):
    for kind in ("adafactor", "sgd"):
        with pytest.raises(UserError, match=f"--optim: .*this run asks for {kind}"):
            train(copy, *RESUME, "--max_steps", 6, "--optim", kind)


def test_the_best_checkpoint_has_to_be_there_at_a_resume(train, home, tmp_path):
    flags = ("--load_best_model_at_end", "true", "--eval_strategy", "steps", "--eval_steps", 2)
    flags += ("--validation_file", home / "train.txt", "--max_eval_samples", 2)
    train(tmp_path / "run", *flags)
    best = json.loads((tmp_path / "run" / "trainer_state.json").read_text())[
        "best_model_checkpoint"
    ]
    state = tmp_path / "run" / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text().replace(best, f"{tmp_path}/gone"))
    (state.parent / MANIFEST_FILE).unlink()
    begin_saving(state.parent)
    write_manifest(state.parent)
    with pytest.raises(UserError, match=r"the best checkpoint cannot be taken: .*gone: no such"):
        train(tmp_path / "run", *flags, *RESUME, "--max_steps", 6)


def test_the_best_checkpoint_moves_with_the_run(train, home, tmp_path):
    flags = ("--load_best_model_at_end", "true", "--eval_strategy", "steps", "--eval_steps", 2)
    flags += ("--validation_file", home / "train.txt", "--max_eval_samples", 2)
    flags += ("--learning_rate", "1e-3")
    train(tmp_path / "run", *flags)
    (tmp_path / "run").rename(tmp_path / "moved")
    train(tmp_path / "moved", *flags, *RESUME, "--max_steps", 6)
    counters = json.loads((tmp_path / "moved" / "trainer_state.json").read_text())
    assert counters["best_model_checkpoint"].startswith(str(tmp_path / "moved"))
    best = Path(counters["best_model_checkpoint"])
    assert_same_model(tmp_path / "moved", best)


@pytest.fixture
def best(home):
    """Flags of a run that ends with its best checkpoint's weights, which is the last one's."""
    return (
        "--load_best_model_at_end", "true", "--eval_strategy", "steps", "--eval_steps", 2,
        "--validation_file", home / "train.txt", "--max_eval_samples", 2, "--learning_rate", "1e-3",
    )  # fmt: skip


def test_the_best_checkpoint_of_another_run_is_not_taken(train, best, tmp_path):
    train(tmp_path / "run", *best)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    for path in moved.iterdir():
        if path.is_file():
            path.unlink()
    # where the best checkpoint was, there is another one's now
    train(tmp_path / "run", *best, "--seed", 7)
    gone = shutil.copytree(moved, tmp_path / "gone")
    train(moved, *best, *RESUME)
    assert_same_model(moved, moved / "checkpoint-4")
    train(gone, *best, *RESUME, "--max_steps", 6)
    shutil.rmtree(gone / "checkpoint-6")
    (gone / "checkpoint-4").rename(gone / "checkpoint-3")
    with pytest.raises(UserError, match=r"expected the name that it was saved under"):
        train(gone, *best, "--resume_from_checkpoint", gone / "checkpoint-3", "--max_steps", 6)


def test_a_copied_run_needs_nothing_of_the_original(train, best, tmp_path):
    train(tmp_path / "run", *best)
    copied = shutil.copytree(tmp_path / "run", tmp_path / "copied")
    flip(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    train(copied, *best, *RESUME, "--max_steps", 6)
    verify(copied)


def test_the_best_checkpoint_stays_where_a_run_goes_on_elsewhere(train, best, tmp_path):
    train(tmp_path / "run", *best)
    elsewhere = ("--resume_from_checkpoint", tmp_path / "run" / "checkpoint-4", "--max_steps", 6)
    train(tmp_path / "new", *best, *elsewhere)
    counters = json.loads((tmp_path / "new" / "trainer_state.json").read_text())
    assert_same_model(tmp_path / "new", Path(counters["best_model_checkpoint"]))


def test_a_finished_model_is_the_best_or_the_last_as_is_asked_for(train, best, tmp_path):
    no = ("--load_best_model_at_end", "false")
    train(tmp_path / "last", *best, *no, "--metric_for_best_model", "loss")
    with pytest.raises(UserError, match=r"got true; .*last holds the model of .* last step's"):
        train(tmp_path / "last", *best, *RESUME)
    train(tmp_path / "none", *best, *no)
    with pytest.raises(UserError, match=r"best checkpoint by None -> smallest loss"):
        train(tmp_path / "none", *best, *RESUME)
    train(tmp_path / "best", *best)
    with pytest.raises(UserError, match=r"got false; .*best holds the model of .* the best "):
        train(tmp_path / "best", *best, *no, *RESUME)
    train(tmp_path / "best", *best, *RESUME)


def test_what_is_best_by_another_measure_is_forgotten(train, best, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    train(tmp_path, *best)
    train(tmp_path, *best, *RESUME, "--max_steps", 6, "--greater_is_better", "true")
    assert re.search(
        r"best checkpoint by smallest loss on (\w+) -> greatest loss on \1", caplog.text
    )
    counters = json.loads((tmp_path / "trainer_state.json").read_text())
    assert counters["best_global_step"] == 6


def test_what_is_best_on_another_text_is_forgotten(train, best, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    train(tmp_path, *best)
    train(tmp_path, *best, *RESUME, "--max_steps", 6, "--max_eval_samples", 3)
    assert "best checkpoint by smallest loss on" in caplog.text


GREATEST = ("--greater_is_better", "true", "--lr_scheduler_type", "constant")


def unfinished(folder):
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
    return folder


def test_a_run_that_is_asked_for_its_best_at_its_end_ends_with_it(train, best, tmp_path):
    last = ("--load_best_model_at_end", "false", "--metric_for_best_model", "loss", *GREATEST)
    train(tmp_path, *best, *last)
    unfinished(tmp_path)
    train(tmp_path, *best, *GREATEST, *RESUME)
    assert_same_model(tmp_path, tmp_path / "checkpoint-2")


@pytest.mark.parametrize("finished", [False, True])
def test_the_best_of_another_line_of_the_run_is_not_taken(train, best, tmp_path, finished):
    flags = (*best, *GREATEST)
    train(tmp_path, *flags, "--max_steps", 6)
    first = tmp_path / "checkpoint-2"
    other = ("--resume_from_checkpoint", first, "--learning_rate", "5e-3")
    train(tmp_path, *flags, *other)
    # the first line's checkpoints are aside now; its best one was damaged, or is whole
    aside = tmp_path / "checkpoint.set-aside"
    shutil.copytree(first, aside / "checkpoint-2")
    state = first / "trainer_state.json"
    counters = json.loads(state.read_text())
    counters["log_history"][0]["loss"] += 1.0
    state.write_text(json.dumps(counters))
    write_manifest(first)
    if finished:
        shutil.rmtree(aside / "checkpoint-2")
    back = ("--resume_from_checkpoint", aside / "checkpoint-6", "--max_steps", 6 if finished else 8)
    unfinished(tmp_path)
    if finished:
        with pytest.raises(RunError, match=r"checkpoint-2/trainer_state.json: is of another run"):
            train(tmp_path, *flags, *back)
    else:
        train(tmp_path, *flags, *back)
        assert_same_model(tmp_path, aside / "checkpoint-2")


def test_a_finished_run_in_which_nothing_was_ever_best_is_finished(train, best, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    train(tmp_path, *best, "--eval_delay", 100)
    train(tmp_path, *best, "--eval_delay", 100, *RESUME)
    assert "nothing to train" in caplog.text


def test_a_best_checkpoint_that_nobody_asks_for_may_be_damaged(train, best, tmp_path):
    flags = (*best, "--load_best_model_at_end", "false", "--metric_for_best_model", "loss")
    train(tmp_path, *flags, *GREATEST)
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{")
    train(tmp_path, *flags, *GREATEST, *RESUME, "--max_steps", 6)
    verify(tmp_path)


def test_a_best_checkpoint_that_is_lost_is_not_remembered(train, best, tmp_path, caplog):
    chosen = (*best, *GREATEST, "--metric_for_best_model", "loss")
    train(tmp_path, *chosen)
    shutil.rmtree(tmp_path / "checkpoint-2")
    last = ("--load_best_model_at_end", "false", *RESUME)
    train(tmp_path, *chosen, *last, "--max_steps", 6)
    assert "checkpoint-2: no such folder: the best checkpoint is lost" in caplog.text
    train(tmp_path, *chosen, *RESUME, "--max_steps", 8)
    counters = json.loads((tmp_path / "trainer_state.json").read_text())
    assert_same_model(tmp_path, Path(counters["best_model_checkpoint"]))


def test_what_is_best_stays_so_while_nothing_is_chosen(train, best, tmp_path):
    train(tmp_path, *best, *GREATEST)
    last = ("--load_best_model_at_end", "false", *RESUME)
    train(tmp_path, *best, *last, "--max_steps", 6)
    train(tmp_path, *best, *GREATEST, *RESUME, "--max_steps", 8)
    assert_same_model(tmp_path, tmp_path / "checkpoint-2")


def test_a_finished_run_is_evaluated_on_another_text(train, best, tmp_path, monkeypatch):
    train(tmp_path, *best, *GREATEST)
    before = load_file(tmp_path / "model.safetensors")
    loaded, load = [], SimulationTrainer._load_from_checkpoint
    monkeypatch.setattr(
        SimulationTrainer,
        "_load_from_checkpoint",
        lambda self, folder, *others: (loaded.append(folder), load(self, folder, *others)),
    )
    train(tmp_path, *best, *GREATEST, *RESUME, "--max_eval_samples", 3)
    # the results are of the model that they lie beside
    assert loaded == [str(tmp_path / "checkpoint-2")]
    after = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_results_of_others_are_no_obstacle(train, copy):
    (copy / "mmlu_results.json").write_text('{"acc": 0.3}')
    train(copy, *RESUME, "--max_steps", 6)
    assert json.loads((copy / "mmlu_results.json").read_text()) == {"acc": 0.3}


def test_a_finished_run_is_finished_however_a_step_is_shared_out(train, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    step = ("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 1)
    train(tmp_path, *step)
    before = digests(tmp_path)
    step = ("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2)
    train(tmp_path, *step, *RESUME, "--num_train_epochs", 1, "--optim", "adamw_torch_fused")
    assert "nothing to train" in caplog.text and digests(tmp_path) == before


def test_a_checkpoint_that_is_a_link_is_not_emptied(train, copy, tmp_path):
    whole = (copy / "checkpoint-4").rename(tmp_path / "big")
    before = digests(whole)
    (copy / "checkpoint-4").symlink_to(whole)
    train(copy, *RESUME, "--max_steps", 8, "--save_total_limit", 1)
    assert digests(whole) == before
    assert (copy / "checkpoint.set-aside" / "checkpoint-4").is_symlink()


def test_a_line_that_cannot_be_read_is_no_damaged_cache(train, tmp_path, caplog):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{')
    for name in ("one", "two"):
        with pytest.raises(UserError, match=r"bad\.jsonl"):
            train(tmp_path / name, "--train_file", tmp_path / "bad.jsonl")
    assert "damaged" not in caplog.text


@pytest.mark.parametrize("damage", ["cut", "emptied", "zeros"])
def test_a_damaged_cache_of_tokens_is_made_anew(train, home, tmp_path, caplog, monkeypatch, damage):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    train(tmp_path / "one")
    (path,) = (tmp_path / "cache").rglob("generator-train.arrow")
    size = {"cut": 1000, "emptied": 0, "zeros": path.stat().st_size}[damage]
    path.write_bytes(path.read_bytes()[:size] if damage == "cut" else bytes(size))
    train(tmp_path / "two")
    assert f"{path.parent.parent}: damaged" in caplog.text
    assert_same_model(tmp_path / "one", tmp_path / "two")
    caplog.clear()
    train(tmp_path / "three")
    assert "damaged" not in caplog.text


@pytest.fixture
def folder(tmp_path):
    """A folder that datasets reads, of more rows than it takes at once."""
    path = tmp_path / "many"
    path.mkdir()
    lines = (json.dumps({"text": f"the row {i} {'of ' * (i % 7)}{WORDS}"}) for i in range(2500))
    (path / "train.jsonl").write_text("\n".join(lines))
    return path


def test_what_is_trained_on_does_not_depend_on_who_tokenises(words, folder, monkeypatch, tmp_path):
    found = set()
    for workers in (1, 2, 3):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / f"cache{workers}")
        flags = ("--dataset_name", folder, "--preprocessing_num_workers", workers)
        command = words(tmp_path / "run", *flags)
        at = command.index("--train_file")
        arguments = parse_arguments(command[:at] + command[at + 2 :])
        tokenizer = AutoTokenizer.from_pretrained(resolve_tokenizer("builtin"))
        found.add(tokens_digest(load_blocks(arguments, tokenizer, 32)["train"]))
    assert len(found) == 1


def test_a_streamed_folder_is_told_by_the_files_that_are_read(words, folder, tmp_path):
    def run(*flags):
        command = words(tmp_path / "run", "--dataset_name", folder, "--streaming", *flags)
        at = command.index("--train_file")
        continual_pretrain(parse_arguments(command[:at] + command[at + 2 :]))

    run("--max_steps", 2)
    (folder / "README.md").write_text("of the rows")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.metadata").write_text("when it was fetched")
    run("--max_steps", 4, *RESUME, "--dataloader_num_workers", 1)
    with pytest.raises(UserError, match=r"--max_train_samples: .*streamed samples None -> 10"):
        run("--max_steps", 6, *RESUME, "--max_train_samples", 10)
    with (folder / "train.jsonl").open("a") as file:
        file.write('\n{"text": "one more"}')
    with pytest.raises(UserError, match=f"was {OTHER_DATA}"):
        run("--max_steps", 6, *RESUME)


def test_a_weight_without_moments_is_one_that_no_gradient_reached(train, two_steps):
    folder = two_steps / "checkpoint-2"
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    del saved["state"][3]
    torch.save(saved, folder / "optimizer.pt")
    (folder / MANIFEST_FILE).unlink()
    train(two_steps, "--resume_from_checkpoint", folder)


def test_a_lock_of_a_disk_without_flock_is_ours(train, base, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.lock").write_text("999999\nsomewhere\n")
    train(tmp_path / "run")
    assert_same_model(tmp_path / "run", base)


def test_the_model_alone_is_pushed_and_pushed_until_it_is(train, tmp_path, monkeypatch):
    pushed = []

    def upload(**how):
        pushed.append(how)
        if len(pushed) == 1:
            raise OSError("no connection")

    monkeypatch.setattr("aixsim_cli.continual.save.upload_folder", upload)
    monkeypatch.setattr(SimulationTrainer, "init_hf_repo", lambda self, **how: None)
    monkeypatch.setattr(SimulationTrainer, "hub_model_id", "me/model", raising=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "patients.jsonl").write_text("private")
    with pytest.raises(RunError, match="is saved, but was not pushed"):
        train(tmp_path / "run", "--push_to_hub", "true")
    train(tmp_path / "run", "--push_to_hub", "true", *RESUME)
    assert len(pushed) == 2
    names = pushed[1]["allow_patterns"]
    assert {"model.safetensors", "config.json", "README.md", "tokenizer.json"} <= set(names)
    assert not {"patients.jsonl", "training_args.bin"} & set(names)


@pytest.mark.parametrize("form", ["--strict", "--plain"])
def test_a_finished_model_is_not_taken_for_one_of_another_form(train, copy, form, caplog):
    with pytest.raises(UserError, match=f"in the form aixsim, and this run asks for {form[2:]}"):
        train(copy, *RESUME, form)
    with caplog.at_level(logging.INFO, logger="aixsim"):
        train(copy, *RESUME, form, "--max_steps", 5)
    assert f"max_steps 4 -> 5, form aixsim -> {form[2:]}" in caplog.text


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json", "vocab.json"])
def test_a_file_beside_a_whole_model_that_it_would_be_read_of_is_refused(copy, name):
    (copy / name).write_text("{}")
    with pytest.raises(UserError, match=f"{name}: not in {MANIFEST_FILE}"):
        find_source(str(copy))


def test_another_models_results_do_not_lie_beside_a_model(words, home, copy):
    command = words(copy, "--validation_file", home / "train.txt")
    command[command.index("--do_train")] = "--do_eval"
    with pytest.raises(UserError, match="holds a model, and this run evaluates"):
        continual_pretrain(parse_arguments(command))


def test_what_is_saved_is_as_open_as_the_umask_lets_it_be(base):
    mask = os.umask(0)
    os.umask(mask)
    files = [p for f in (base, base / "checkpoint-2") for p in f.glob("*.safetensors")]
    assert len(files) == 2
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask}


@pytest.mark.parametrize("trainer", ["run", "checkpoint"])
def test_what_lies_under_our_names_and_is_not_ours_is_kept(train, tmp_path, trainer):
    run = tmp_path / "run"
    run.mkdir()
    name = ".run.json" if trainer == "run" else ".run.lock"
    (run / name).write_text('{"my": "precious"}')
    with pytest.raises(UserError, match=f"--output_dir: {run / name} is not of a run"):
        train(run)
    assert (run / name).read_text() == '{"my": "precious"}'


def test_a_checkpoint_with_a_file_of_somebody_elses_is_not_deleted(train, copy, caplog):
    (copy / "checkpoint-2" / "notes.txt").write_text("years")
    train(copy, *RESUME, "--max_steps", 6, "--save_total_limit", 1)
    assert (copy / "checkpoint.set-aside" / "checkpoint-2" / "notes.txt").read_text() == "years"
    assert "holds notes.txt, which the run did not write; set aside" in caplog.text
    assert sorted(p.name for p in copy.glob("checkpoint-*")) == ["checkpoint-6"]


def test_results_are_not_written_through_a_link(words, home, copy, tmp_path):
    (tmp_path / "precious").write_text("years")
    (copy / ".all_results.json.tmp").symlink_to(tmp_path / "precious")
    command = words(copy, "--validation_file", home / "train.txt", "--model_name_or_path", copy)
    command[command.index("--do_train")] = "--do_eval"
    continual_pretrain(parse_arguments(command))
    assert (tmp_path / "precious").read_text() == "years"


def test_a_precision_that_the_environment_asks_for_is_no_secret(words, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match="ACCELERATE_MIXED_PRECISION: got bf16, the flags ask"):
        parse_arguments(words(tmp_path))


def spoil(folder, change):
    path = folder / "optimizer.pt"
    if change == "schedule":
        path = folder / "scheduler.pt"
    saved = torch.load(path, weights_only=True)
    if change == "no moments":
        saved["state"] = {}
    elif change == "shapes":
        saved["state"][3]["exp_avg"] = torch.zeros(3)
    else:
        saved["last_epoch"] = 1000
    torch.save(saved, path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("no moments", "optimizer.pt holds no moments"),
        ("shapes", "holds moments of the shapes"),
        ("schedule", "scheduler.pt is at step 1000, and trainer_state.json at 2"),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_refused(train, tmp_path, two_steps, change, said):
    spoil(two_steps / "checkpoint-2", change)
    (two_steps / "checkpoint-2" / MANIFEST_FILE).unlink()
    with pytest.raises(UserError, match=said):
        train(two_steps, "--resume_from_checkpoint", two_steps / "checkpoint-2")


def test_a_text_is_tokenised_once_by_all_processes(words, home, tmp_path):
    cache = home / "cache"

    def caches():
        return {path for path in cache.rglob("*.arrow")}

    def run(name):
        in_a_child(lambda: continual_pretrain(parse_arguments(words(tmp_path / name))), expect=0)

    run("one")
    before = caches()
    run("two")
    assert caches() == before and before


def test_the_cache_of_a_text_knows_what_closes_a_document(words, home, tmp_path):
    rows = [json.dumps({"text": WORDS * 20})] * 9
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    command = parse_arguments(words(tmp_path / "run", "--train_file", tmp_path / "t.jsonl"))
    one = load_blocks(command, _tokens(), 32)["train"]
    other = _tokens()
    other.eos_token = "the"
    two = load_blocks(command, other, 32)["train"]
    assert identity.tokens_digest(one) != identity.tokens_digest(two)


def test_a_text_that_takes_anothers_place_and_time_is_read(words, home, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text(WORDS * 300)
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    command = words(tmp_path / "run", "--train_file", path)
    one = load_blocks(parse_arguments(command), _tokens(), 32)["train"][0]["input_ids"]
    path.write_text((WORDS * 300).swapcase())
    os.utime(path, ns=times)
    two = load_blocks(parse_arguments(command), _tokens(), 32)["train"][0]["input_ids"]
    assert one != two


def _tokens():
    return AutoTokenizer.from_pretrained(resolve_tokenizer("builtin"))
