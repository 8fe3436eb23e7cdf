"""Conversion between torchtitan and Hugging Face: same logits, both ways, for every head layout."""

import dataclasses
import errno
import json
import shutil
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from aixsim_cli.config.flavors import FLAVORS
from aixsim_cli.data.tokenizer import resolve_tokenizer, vocab_size
from aixsim_cli.errors import RunError, Stopped, UserError
from aixsim_cli.models import convert, llama
from aixsim_cli.models.hf.saved import ranges_of, write_model
from aixsim_cli.models.titan.model import build_model, meta_model, model_args
from aixsim_cli.models.titan.saved import read_checkpoint, write_checkpoint
from aixsim_cli.models.titan.sites import StateDictAdapter
from aixsim_cli.transforms.read import parse_transform

VOCAB = vocab_size("builtin")
SEQ_LEN = 256


def random_weights(args, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator) * (p.shape[-1] ** -0.5)
        if p.dim() == 2
        else 1 + 0.1 * torch.randn(p.shape, generator=generator)
        for name, p in meta_model(args).named_parameters()
    }


@pytest.fixture
def checkpoint(tmp_path):
    weights = random_weights(model_args("aixsim", "debug", VOCAB))
    write_checkpoint(weights, tmp_path / "step-1")
    return tmp_path / "step-1", weights


def to_hf(source, target, **options):
    options = {"tokenizer": "builtin", "force": False} | options
    return convert.titan_to_hf("aixsim", "debug", source, target, **options)


@torch.no_grad()
@pytest.mark.parametrize("flavor", [name for name in FLAVORS["aixsim"]])
def test_logits_agree_at_every_position_for_every_head_layout(flavor):
    # the flavor's heads and widths with two layers and a small vocabulary
    args = dataclasses.replace(model_args("aixsim", flavor, 64), n_layers=2)
    weights = random_weights(args)
    adapter = StateDictAdapter(args)
    ffn_dim = weights["layers.0.feed_forward.w1.weight"].shape[0]
    config = llama.llama_config(args, seq_len=SEQ_LEN, ffn_dim=ffn_dim, token_ids={})
    tokens = torch.randint(64, (1, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    expected = build_model(args, weights, seq_len=SEQ_LEN)(tokens)
    exported = adapter.to_hf(weights)
    logits = llama.build_model(config, exported)(tokens).logits
    assert (logits - expected).abs().max() < 1e-4
    # without the permutation of the heads the very same comparison must fail
    plain = dict(exported)
    for layer in range(args.n_layers):
        for titan, name in (("wq", "q_proj"), ("wk", "k_proj")):
            weight = weights[f"layers.{layer}.attention.{titan}.weight"]
            plain[f"model.layers.{layer}.self_attn.{name}.weight"] = weight
    wrong = llama.build_model(config, plain)(tokens).logits
    assert (wrong - expected).abs().max() > 1e-2


def test_folder_loads_with_plain_transformers(checkpoint, tmp_path):
    source, weights = checkpoint
    assert to_hf(source, tmp_path / "hf") < 1e-4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(model.lm_head.weight, weights["output.weight"])
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
    assert {"tokenizer.json", "tokenizer_config.json"} <= names


def test_config_json_in_both_forms(checkpoint, tmp_path):
    to_hf(checkpoint[0], tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert (config["rope_theta"], config["rope_scaling"]) == (10000.0, None)
    assert config["vocab_size"] == VOCAB and config["tie_word_embeddings"] is False
    assert config["rms_norm_eps"] == 1e-5 and config["num_key_value_heads"] == 2


def test_there_and_back_is_exact(checkpoint, tmp_path):
    source, weights = checkpoint
    to_hf(source, tmp_path / "hf")
    convert.hf_to_titan("aixsim", "debug", str(tmp_path / "hf"), tmp_path / "back", force=False)
    back = read_checkpoint(tmp_path / "back").state_dict
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_the_way_back_keeps_hardware_ranges_and_length(checkpoint, tmp_path):
    tokens = AutoTokenizer.from_pretrained(resolve_tokenizer("builtin"))
    transform = {"transform": "optical", "fc": {"q_levels": 64}}
    config = parse_transform(transform, source="here")
    model, _ = convert.as_hf_model(
        "aixsim", "debug", read_checkpoint(checkpoint[0]), tokens, config
    )
    for index, module in enumerate(model.transform_state.modules.values()):
        module.ranges.copy_(torch.tensor([[-1.0 - index, 2.0 + index]]).expand(3, 2))
    write_model(model, tmp_path / "hf")
    tokens.save_pretrained(tmp_path / "hf")
    convert.hf_to_titan("aixsim", "debug", str(tmp_path / "hf"), tmp_path / "back", force=False)
    back = read_checkpoint(tmp_path / "back")
    assert back.config is not None and back.config.transform == config.mapping
    assert back.config.training.seq_len == model.config.max_position_embeddings
    to_hf(tmp_path / "back", tmp_path / "again", tokenizer=None)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.config.quantization_config.transform == config.mapping
    assert again.config.max_position_embeddings == model.config.max_position_embeddings
    before, after = ranges_of(model), ranges_of(again)
    assert before.keys() == after.keys() and len(before) > 10
    assert all(torch.equal(before[name], after[name]) for name in before)


def contents(root):
    return {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_existing_target_is_kept_without_force(checkpoint, tmp_path):
    target = tmp_path / "hf"
    to_hf(checkpoint[0], target)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="--force"):
        to_hf(checkpoint[0], target)
    assert contents(tmp_path) == before
    old = target.stat().st_ino
    to_hf(checkpoint[0], target, force=True)
    assert target.stat().st_ino != old and contents(tmp_path).keys() == before.keys()


@pytest.mark.parametrize("force", [False, True])
def test_nothing_is_deleted_that_no_conversion_made(checkpoint, tmp_path, force):
    run = tmp_path / "run"
    source = run / "checkpoint" / "step-1"
    source.parent.mkdir(parents=True)
    shutil.move(checkpoint[0], source)
    trained = shutil.copytree(source, run / "checkpoint" / "step-2")
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "thesis.txt").write_text("years")
    to_hf(source, tmp_path / "hf")
    before = contents(tmp_path)
    for target in (run, source.parent, source, source / "hf", trained, thesis, tmp_path):
        with pytest.raises(UserError, match="expected a new folder"):
            to_hf(source, target, force=force)
    for target in (tmp_path / "hf", tmp_path, tmp_path / "hf" / "titan", trained):
        with pytest.raises(UserError, match="expected a new folder"):
            convert.hf_to_titan("aixsim", "debug", str(tmp_path / "hf"), target, force=force)
    assert contents(tmp_path) == before


def test_a_target_in_the_way_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="was not made by convert-ckpt"):
        to_hf(tmp_path / "no-such-source", tmp_path / "hf", force=True)


def test_a_target_that_appears_during_the_conversion_is_kept(checkpoint, tmp_path, monkeypatch):
    real = convert.write_model

    def late(model, folder, form):
        real(model, folder, form)
        (tmp_path / "hf" / "mine").mkdir(parents=True)

    monkeypatch.setattr(convert, "write_model", late)
    with pytest.raises(UserError, match="was not made by"):
        to_hf(checkpoint[0], tmp_path / "hf")
    assert (tmp_path / "hf" / "mine").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "step-1"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), Stopped(signal.SIGTERM)])
def test_who_stops_it_finds_no_damage(checkpoint, tmp_path, monkeypatch, stop):
    def stopped(*_):
        raise stop

    # DCP wraps whatever is raised while it reads and writes
    with monkeypatch.context() as patch, pytest.raises(type(stop)):
        patch.setattr("aixsim_cli.models.titan.storage.CheckpointReader.read_data", stopped)
        read_checkpoint(checkpoint[0])
    with monkeypatch.context() as patch, pytest.raises(type(stop)):
        patch.setattr("aixsim_cli.models.titan.storage.CheckpointWriter.write_data", stopped)
        write_checkpoint(checkpoint[1], tmp_path / "step-2")


def test_a_full_disk_is_no_bug(checkpoint, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("aixsim_cli.models.titan.storage.CheckpointWriter.write_data", full)
    with pytest.raises(RunError, match=r"step-2: cannot be written: .*No space left"):
        write_checkpoint(checkpoint[1], tmp_path / "step-2")


def test_damaged_checkpoint(checkpoint, tmp_path):
    file = checkpoint[0] / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"__0_0.distcp: damaged: has 1000 bytes"):
        to_hf(checkpoint[0], tmp_path / "hf")
    file.unlink()
    with pytest.raises(UserError, match=r"__0_0.distcp: missing"):
        to_hf(checkpoint[0], tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_wrong_flavor(checkpoint, tmp_path):
    with pytest.raises(UserError, match="another architecture or flavor"):
        convert.titan_to_hf(
            "aixsim", "60M", checkpoint[0], tmp_path / "hf", tokenizer="builtin", force=False
        )
    assert not (tmp_path / "hf").exists()


def test_failed_check_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "LOGIT_TOLERANCE", -1.0)
    with pytest.raises(RunError, match="logits differ"):
        to_hf(checkpoint[0], tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_scaled_rope_is_refused(checkpoint, tmp_path):
    to_hf(checkpoint[0], tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
    }  # fmt: skip
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"rope_type.*llama3"):
        convert.hf_to_titan("aixsim", "debug", str(tmp_path / "hf"), tmp_path / "back", force=False)


def test_another_flavor_is_told_by_its_sizes(checkpoint, tmp_path):
    to_hf(checkpoint[0], tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    (tmp_path / "hf" / "manifest.json").unlink()
    with pytest.raises(UserError, match="hidden_size: got 128; this flavor has 384") as caught:
        convert.hf_to_titan("aixsim", "60M", str(tmp_path / "hf"), tmp_path / "back", force=False)
    assert "num_hidden_layers: got 2" in str(caught.value) and "norm" not in str(caught.value)


def test_more_tokens_than_the_embedding_has_rows(checkpoint, tmp_path):
    tokens = AutoTokenizer.from_pretrained(resolve_tokenizer("builtin"))
    tokens.add_tokens(["<|one|>", "<|two|>"])
    tokens.save_pretrained(tmp_path / "tokens")
    with pytest.raises(UserError, match="has 4098 tokens, and the model an embedding of 4096"):
        to_hf(checkpoint[0], tmp_path / "hf", tokenizer=str(tmp_path / "tokens"))
    assert not (tmp_path / "hf").exists()


def test_tokenizer_of_the_folder_is_the_trainings(checkpoint, tmp_path):
    to_hf(checkpoint[0], tmp_path / "hf")
    ours = (resolve_tokenizer("builtin") / "tokenizer.json").read_text()
    written = (tmp_path / "hf" / "tokenizer.json").read_text()
    assert json.loads(written)["model"] == json.loads(ours)["model"]
