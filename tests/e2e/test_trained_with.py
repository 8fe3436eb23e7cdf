"""A torchtitan checkpoint is read with what it was trained with, or refused."""

import json
import shutil

import pytest
import yaml
from safetensors.torch import load_file

from aixsim_cli.data.tokenizer import resolve_tokenizer
from aixsim_cli.run.manifest import write_manifest


@pytest.fixture(scope="module")
def trained(aixsim, tmp_path_factory):
    """A short optical run with a tokenizer of its own, and its model as a folder."""
    home = tmp_path_factory.mktemp("trained")
    words = shutil.copytree(resolve_tokenizer("builtin"), home / "words")
    aixsim(
        "generate-cfg", "--model-flavor", "debug", "--tokenizer-path", words, "--dataset",
        "builtin", "--batch-size", 2, "--seq-len", 32, "--steps", 2, "--mixed-precision-param",
        "float32", "--transform-config", "configs/transforms/optical.yaml", "--save-path",
        home / "c.yaml",
    )  # fmt: skip
    aixsim("pretrain", "--config", home / "c.yaml", "--job.dump_folder", home / "run")
    step = home / "run" / "checkpoint" / "step-2"
    aixsim("convert-ckpt", "aixsim", "debug", step, home / "hf")
    return home


@pytest.fixture
def home(trained, tmp_path):
    """A copy that names the copy's tokenizer."""
    copy = shutil.copytree(trained, tmp_path / "copy")
    edit_config(copy, lambda config: config["model"].update(hf_assets_path=str(copy / "words")))
    return copy


def edit_config(home, change):
    folder = home / "run" / "checkpoint" / "step-2"
    (folder / "manifest.json").unlink(missing_ok=True)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    change(config)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def exchange_two_words(home):
    path = home / "words" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, last = list(vocabulary)[300], list(vocabulary)[301]
    vocabulary[first], vocabulary[last] = vocabulary[last], vocabulary[first]
    path.write_text(json.dumps(tokenizer))


def another_end(home):
    path = home / "words" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "the"}))


def commands(home, target):
    step = home / "run" / "checkpoint" / "step-2"
    return {
        "ppl": ("eval", "ppl", step, "--num-batches", 1),
        "generate": ("generate-hf", step, "--prompt", "x", "--max-new-tokens", 1),
        "convert": ("convert-ckpt", "aixsim", "debug", step, target),
    }


@pytest.mark.parametrize("change", [exchange_two_words, another_end])
@pytest.mark.parametrize("command", ["ppl", "generate", "convert"])
def test_another_tokenizer_than_the_trainings_is_refused(aixsim, home, tmp_path, change, command):
    change(home)
    done = aixsim(*commands(home, tmp_path / "hf")[command], code=2)
    assert f"tokenizer {home}/words: is not the one that {home}/run" in done.stderr
    assert not (tmp_path / "hf").exists()


def test_another_tokenizer_that_is_asked_for_is_told(aixsim, home, tmp_path):
    given = shutil.copytree(home / "words", tmp_path / "given")
    convert = commands(home, tmp_path / "same")["convert"]
    done = aixsim(*convert, "--tokenizer-path", given)
    assert "is not the one" not in done.stderr
    exchange_two_words(home)
    convert = commands(home, tmp_path / "other")["convert"]
    done = aixsim(*convert, "--tokenizer-path", home / "words")
    assert f"tokenizer {home}/words: is not the one that" in done.stderr


@pytest.mark.parametrize("command", ["ppl", "generate", "convert"])
def test_hardware_that_was_taken_out_of_a_checkpoint_is_missed(aixsim, home, tmp_path, command):
    edit_config(home, lambda config: config.update(transform=None))
    words = commands(home, tmp_path / "hf")[command]
    done = aixsim(*words, code=2)
    assert "config.yaml: transform: names no hardware, and the weights hold" in done.stderr
    aixsim(*words, "--no-transform")


def test_hardware_that_was_taken_out_of_a_folder_is_missed(aixsim, home):
    folder = home / "hf"
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    section = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    assert any(name.endswith(".ranges") for name in load_file(folder / "model.safetensors"))
    words = ("eval", "ppl", folder, "--num-batches", 1)
    done = aixsim(*words, code=2)
    assert f"{folder}/config.json: names no hardware, and the weights hold" in done.stderr
    aixsim(*words, "--no-transform")
    config["quantization_config"] = section | {"dequantize": "x"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "dequantize: got 'x'; expected true or false" in aixsim(*words, code=2).stderr


@pytest.mark.parametrize("name", ["step-3", "step-1"])
def test_no_conversion_lies_among_the_checkpoints_of_a_run(aixsim, home, name):
    step = home / "run" / "checkpoint" / "step-2"
    target = step.with_name(name)
    for words in ((step, target), (home / "hf", target)):
        done = aixsim("convert-ckpt", "aixsim", "debug", *words, code=2)
        assert f"{target}: lies among the checkpoints of a run, beside step-2" in done.stderr
    assert not target.exists()


def test_a_second_run_does_not_add_to_the_firsts_records(aixsim, home):
    records = home / "run" / "metrics.jsonl"
    first = records.read_text()
    done = aixsim(
        "pretrain", "--config", home / "c.yaml", "--job.dump_folder", home / "run",
        "--checkpoint.folder", "other", "--debug.seed", 7, "--model.hf_assets_path", home / "words",
    )  # fmt: skip
    assert f"{records}: of a run before this one; set aside" in done.stderr
    assert (home / "run" / "metrics.set-aside" / "metrics.jsonl").read_text() == first
    assert len(records.read_text().splitlines()) <= len(first.splitlines())


def test_an_expression_that_matches_for_ever_is_named(aixsim, home):
    path = home / "hf" / "tokenizer.json"
    (home / "hf" / "manifest.json").unlink()
    tokenizer = json.loads(path.read_text())
    tokenizer["pre_tokenizer"] = {
        "type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    path.write_text(json.dumps(tokenizer))
    done = aixsim("generate-hf", home / "hf", "--prompt", "x" * 30, code=1)
    assert "Traceback" not in done.stderr and "aixsim: run failed: PanicException" in done.stderr
    text = home / "x.txt"
    text.write_text("x" * 30)
    done = aixsim("eval", "ppl", home / "hf", "--dataset", "local", "--dataset-path", text, code=2)
    assert "the tokenizer cannot read 'xxx" in done.stderr


PADDING = {
    "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 32, "pad_id": 0,
    "pad_type_id": 0, "pad_token": "<|endoftext|>",
}  # fmt: skip


def edit_words(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_files_that_ask_for_padding_change_nothing_that_is_trained_on(aixsim, home):
    losses = {}
    short = home / "short.jsonl"
    short.write_text("".join(json.dumps({"text": f"the end {i}"}) + "\n" for i in range(99)))
    for run in ("plain", "padded"):
        words = ("--model.hf_assets_path", home / "words", "--job.dump_folder", home / run)
        words += ("--training.dataset", "local", "--training.dataset_path", short)
        aixsim("pretrain", "--config", home / "c.yaml", "--debug.seed", 7, *words)
        lines = (home / run / "metrics.jsonl").read_text().splitlines()
        losses[run] = [json.loads(line)["loss"] for line in lines]
        edit_words(home / "words", "tokenizer.json", padding=PADDING)
    assert losses["plain"] == losses["padded"]
    aixsim("eval", "ppl", home / "padded" / "checkpoint" / "step-2", "--num-batches", 1)


@pytest.mark.parametrize("change", [{"extra_special_tokens": ["the"]}, {"bos_token": "the"}])
def test_tokens_that_tokenizer_config_adds_are_the_tokenizers(aixsim, home, change):
    """torchtitan's own reader passes over them; transformers', which evaluates, does not."""
    words = ("--model.hf_assets_path", home / "words", "--job.dump_folder", home / "first")
    aixsim("pretrain", "--config", home / "c.yaml", *words)
    edit_words(home / "words", "tokenizer_config.json", **change)
    done = aixsim("pretrain", "--config", home / "c.yaml", *words, "--training.steps", 4, code=2)
    assert "was trained with another tokenizer" in done.stderr
    fresh = (*words[:2], "--job.dump_folder", home / "fresh")
    aixsim("pretrain", "--config", home / "c.yaml", *fresh)
    aixsim("eval", "ppl", home / "fresh" / "checkpoint" / "step-2", "--num-batches", 1)


@pytest.mark.parametrize("change", [{}, {"extra_special_tokens": ["the"]}])
def test_tokens_of_an_earlier_reader_are_told(aixsim, home, change):
    edit_words(home / "words", "tokenizer_config.json", **change)
    words = ("--model.hf_assets_path", home / "words", "--job.dump_folder", home / "first")
    aixsim("pretrain", "--config", home / "c.yaml", *words)
    step = home / "first" / "checkpoint" / "step-2"
    edit_words(step, "inputs.json", tokens=None)
    write_manifest(step)
    done = aixsim("pretrain", "--config", home / "c.yaml", *words, "--training.steps", 4)
    assert ("of an earlier version, which read" in done.stderr) == bool(change)


def test_a_tokenizer_whose_first_and_last_token_are_one_trains(aixsim, home):
    """GPT-2's, as transformers writes it."""
    edit_words(home / "words", "tokenizer_config.json", bos_token="<|endoftext|>")
    words = ("--model.hf_assets_path", home / "words", "--job.dump_folder", home / "fresh")
    aixsim("pretrain", "--config", home / "c.yaml", *words)
    step = home / "fresh" / "checkpoint" / "step-2"
    aixsim("eval", "ppl", step, "--num-batches", 1)
    aixsim("convert-ckpt", "aixsim", "debug", step, home / "converted")


@pytest.mark.parametrize("value", [{"a": 1}, 3])
def test_a_chat_template_that_is_no_text_is_named(aixsim, home, value):
    edit_words(home / "words", "tokenizer_config.json", chat_template=value)
    words = ("--model.hf_assets_path", home / "words", "--job.dump_folder", home / "fresh")
    done = aixsim("pretrain", "--config", home / "c.yaml", *words, code=2)
    assert f"tokenizer {home}/words: " in done.stderr and "chat_template" in done.stderr


@pytest.mark.parametrize("command", ["ppl", "generate", "convert"])
def test_a_tokenizer_that_has_moved_is_named_with_its_key(aixsim, home, tmp_path, command):
    (home / "words").rename(home / "moved")
    done = aixsim(*commands(home, tmp_path / "hf")[command], code=2)
    step = home / "run" / "checkpoint" / "step-2"
    assert f"{step}/config.yaml: model.hf_assets_path: tokenizer {home}/words" in done.stderr
    assert "convert-ckpt --tokenizer-path" in done.stderr
    convert = commands(home, tmp_path / "hf")["convert"]
    aixsim(*convert, "--tokenizer-path", home / "moved")


def test_stop_strings_of_a_folder_are_heeded(aixsim, home):
    (home / "hf" / "manifest.json").unlink()
    edit_words(home / "hf", "generation_config.json", stop_strings=["e"])
    aixsim("generate-hf", home / "hf", "--prompt", "x", "--max-new-tokens", 4)
