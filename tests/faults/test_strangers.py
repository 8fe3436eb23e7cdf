"""A stranger's checkpoint, model or tokenizer runs no code, whatever it asks and stdin says."""

import json
import shutil

import pytest
import yaml
from typer.testing import CliRunner

from aixsim_cli.errors import UserError
from aixsim_cli.main import app
from aixsim_cli.models.hf.saved import load_config

CODE = """
from pathlib import Path
Path({mark!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "planted"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokens(PreTrainedTokenizerFast):
    pass
"""
asked = []


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """The file that planted code writes; whoever is asked for leave to run it says yes."""
    asked.clear()
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    # what ran once stays imported, and its cache is shared
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    return tmp_path / "ran"


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def plant(folder, mark, *kinds):
    (folder / "planted.py").write_text(CODE.format(mark=str(mark)))
    if "model" in kinds:
        auto = {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"}
        edit(folder / "config.json", auto_map=auto, model_type="planted")
    if "tokenizer" in kinds:
        auto = {"AutoTokenizer": ["planted.Tokens", "planted.Tokens"]}
        edit(folder / "tokenizer_config.json", auto_map=auto, tokenizer_class="Tokens")


@pytest.fixture
def planted(models, tmp_path, mark):
    """Folders with code: in a model, in a tokenizer, in the tokenizer that a checkpoint names."""
    folders = {}
    for kind in ("model", "tokenizer"):
        folders[kind] = tmp_path / kind
        shutil.copytree(models["digital"], folders[kind], ignore=shutil.ignore_patterns("manif*"))
        plant(folders[kind], mark, kind)
    titan = shutil.copytree(models["titan"], tmp_path / "step-1")
    (titan / "manifest.json").unlink()
    config = yaml.safe_load((titan / "config.yaml").read_text())
    config["model"]["hf_assets_path"] = str(folders["tokenizer"])
    (titan / "config.yaml").write_text(yaml.safe_dump(config))
    return folders | {"titan": titan, "good": models["titan"], "out": tmp_path / "out"}


LAST = ("--num-batches", "1", "--batch-size", "1")
COMMANDS = {
    "ppl-model": ("eval", "ppl", "{model}", *LAST),
    "ppl-tokenizer": ("eval", "ppl", "{tokenizer}", *LAST),
    "ppl-titan": ("eval", "ppl", "{titan}", *LAST),
    "compare": ("eval", "compare", "{tokenizer}", *LAST),
    "lm-eval": ("eval", "lm-eval", "{model}", "--tasks", "wikitext"),
    "generate": ("generate-hf", "{tokenizer}", "--prompt", "x", "--max-new-tokens", "1"),
    "generate-titan": ("generate-hf", "{titan}", "--prompt", "x", "--max-new-tokens", "1"),
    "convert": ("convert-ckpt", "aixsim", "debug", "{model}", "{out}"),
    "convert-titan": ("convert-ckpt", "aixsim", "debug", "{titan}", "{out}"),
    "convert-tokenizer": (
        "convert-ckpt", "aixsim", "debug", "{good}", "{out}", "--tokenizer-path", "{tokenizer}",
    ),
    "lm-eval's own": (
        "eval", "lm-eval", "--", "run", "--model", "aixsim", "--model_args", "pretrained={model}",
        "--tasks", "wikitext",
    ),
    "check": ("transforms", "check", "configs/transforms/optical.yaml", "--model", "{model}"),
    "continual": (
        "continual-pretrain", "--model_name_or_path", "{model}", "--dataset_name", "builtin",
        "--do_train", "--max_steps", "1", "--output_dir", "{out}", "--report_to", "none",
        "--tokenizer_name", "{tokenizer}",
    ),
}  # fmt: skip


def run(words, folders):
    return CliRunner().invoke(app, [word.format(**folders) for word in words])


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_it_nor_asks(planted, mark, command):
    done = run(COMMANDS[command], planted)
    assert not mark.exists() and not asked
    assert isinstance(done.exception, UserError), done.exception
    assert "--trust-remote-code" in str(done.exception)
    assert not (planted["out"] / "config.json").exists()


@pytest.mark.parametrize("command", ["ppl-tokenizer", "generate-titan", "convert-tokenizer"])
def test_who_trusts_it_may_run_it(planted, mark, command):
    done = run((*COMMANDS[command], "--trust-remote-code"), planted)
    assert done.exit_code == 0 and mark.exists() and not asked, done.exception


def test_commands_that_need_none_of_it_run_none_of_it(aixsim, planted, mark, tmp_path):
    """generate-cfg and pretrain read a tokenizer, and the weights of a folder."""
    config = tmp_path / "c.yaml"

    def generate(tokenizer, code=0):
        return aixsim(
            "generate-cfg", "--model-flavor", "debug", "--tokenizer-path", tokenizer,
            "--dataset", "builtin", "--batch-size", 1, "--seq-len", 16, "--steps", 1,
            "--mixed-precision-param", "float32", "--save-path", config, code=code,
        )  # fmt: skip

    def pretrain(*words, code=0):
        return aixsim(
            "pretrain", "--config", config, "--job.dump_folder", tmp_path / "run", *words,
            "--checkpoint.initial_load_path", planted["model"], "--checkpoint.initial_load_in_hf",
            code=code,
        )  # fmt: skip

    said = f"tokenizer {planted['tokenizer']}: cannot be loaded: it needs Python code of its own"
    assert said in generate(planted["tokenizer"], code=2).stderr
    generate("builtin")
    assert said in pretrain("--model.hf_assets_path", planted["tokenizer"], code=2).stderr
    pretrain()
    assert not mark.exists()


def test_code_beside_what_transformers_knows_itself_is_left_alone(planted, mark):
    edit(planted["model"] / "config.json", model_type="llama")
    edit(planted["tokenizer"] / "tokenizer_config.json", tokenizer_class="TokenizersBackend")
    for command in ("ppl-model", "ppl-tokenizer", "ppl-titan"):
        done = run(COMMANDS[command], planted)
        assert not mark.exists() and not asked
        assert done.exit_code == 0 or isinstance(done.exception, UserError), done.exception


@pytest.mark.parametrize("named", ["evil/attention", {"": "evil/attention"}])
def test_kernels_of_the_hub_are_code(planted, mark, named):
    edit(planted["model"] / "config.json", model_type="llama", attn_implementation=named)
    done = run(COMMANDS["ppl-model"], planted)
    assert isinstance(done.exception, UserError)
    assert "attn_implementation: got evil/attention" in str(done.exception)


def test_kernels_that_a_part_of_a_model_names_are_code_too(tmp_path):
    named = {"model_type": "gemma3", "attn_implementation": {"text_config": "evil/attention"}}
    (tmp_path / "config.json").write_text(json.dumps(named))
    with pytest.raises(UserError, match="text_config: attn_implementation: got evil/attention, co"):
        load_config(str(tmp_path))
    load_config(str(tmp_path), trust_remote_code=True)


def test_a_config_names_no_callable_of_transformers(planted, mark):
    edit(planted["model"] / "config.json", model_type="llama", architectures=["pipeline"])
    done = run(COMMANDS["check"], planted)
    assert done.exit_code == 0, done.exception


def test_a_script_in_the_place_of_a_dataset_is_no_dataset(tmp_path, mark):
    from datasets import load_dataset

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text(CODE.format(mark=str(mark)))
    with pytest.raises(Exception, match="scripts are no longer supported"):
        load_dataset(str(tmp_path / "data"))
    assert not mark.exists()
