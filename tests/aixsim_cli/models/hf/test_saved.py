"""A simulated model as a folder: three forms, every way of reading them, and their damages."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from aixsim_cli.errors import UserError
from aixsim_cli.models.hf.saved import load_model, ranges_of, write_model
from aixsim_cli.models.hf.transform import transform_hf_model
from aixsim_cli.transforms.choice import DIGITAL
from aixsim_cli.transforms.read import parse_transform

from .conftest import make_inputs, make_model, optical

FORMS = ["aixsim", "strict", "plain"]


@pytest.fixture
def model():
    model = make_model("llama")
    state, _ = transform_hf_model(model, optical(q_levels=64))
    model.train()
    with torch.no_grad():
        model(**make_inputs("llama"))
    state.end_step()
    return model.eval()


def logits(model):
    state = getattr(model, "transform_state", None)
    if state is not None:
        state.begin_step(1)
    with torch.no_grad():
        return model.eval()(**make_inputs("llama")).logits


def in_plain_transformers(folder):
    code = (
        "import sys; from transformers import AutoModelForCausalLM; "
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r}); "
        "print(type(model.model.layers[0].mlp.up_proj).__name__); "
        "assert 'aixsim_cli' not in sys.modules"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_model_back(model, tmp_path, form):
    write_model(model, tmp_path, form)
    loaded = load_model(str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_can_be_read_digitally(model, tmp_path, form):
    write_model(model, tmp_path, form)
    loaded = load_model(str(tmp_path), DIGITAL)
    assert not ranges_of(loaded)
    assert torch.equal(logits(loaded), logits(make_model("llama")))


@pytest.mark.parametrize("form", FORMS)
def test_another_transform_keeps_the_ranges(model, tmp_path, form):
    write_model(model, tmp_path, form)
    loaded = load_model(str(tmp_path), optical(q_levels=16))
    assert loaded.model.layers[0].mlp.up_proj.params.q_levels == 16
    expected = ranges_of(model)
    assert all(torch.equal(v, expected[k]) for k, v in ranges_of(loaded).items())
    assert len(expected) == len(ranges_of(loaded)) == 16


@pytest.mark.parametrize("form", FORMS)
def test_written_again_it_is_the_same(model, tmp_path, form):
    write_model(model, tmp_path / "a", form)
    write_model(load_model(str(tmp_path / "a")), tmp_path / "b", form)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_strict_is_refused_without_aixsim(model, tmp_path):
    write_model(model, tmp_path, "strict")
    done = in_plain_transformers(tmp_path)
    assert done.returncode != 0 and "model type `aixsim`" in done.stderr


@pytest.mark.parametrize("form", ["aixsim", "plain"])
def test_the_other_forms_load_digitally_without_aixsim(model, tmp_path, form):
    write_model(model, tmp_path, form)
    done = in_plain_transformers(tmp_path)
    assert done.stdout.split() == ["Linear"], done.stderr
    assert ("Unknown quantization type, got aixsim" in done.stderr) == (form == "aixsim")


def test_plain_auto_classes_restore_a_strict_folder(model, tmp_path):
    write_model(model, tmp_path, "strict")
    assert type(AutoConfig.from_pretrained(tmp_path)).__name__ == "LlamaConfig"
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_the_first_pattern_wins_in_a_folder_too(tmp_path, form, several):
    # transformers sorts the keys of config.json
    rules = {r".*\.up_proj": {"q_levels": 16}, r".*\.mlp\..*": {"q_levels": 64}, "default": None}
    data = {"use_regex": True, "layer_name_to_config": rules}
    data = {"transforms": [data]} if several else data
    model = make_model("llama")
    transform_hf_model(model, parse_transform(data, source="t.yaml"))
    for folder in (tmp_path / "a", tmp_path / "b"):
        write_model(model, folder, form)
        model = load_model(str(folder))
        mlp = model.model.layers[0].mlp
        assert (mlp.up_proj.params.q_levels, mlp.down_proj.params.q_levels) == (16, 64)


def test_sharded_plain_folder(model, tmp_path):
    write_model(model, tmp_path, "plain", max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert not [name for name in index["weight_map"] if name.endswith(".ranges")]
    assert torch.equal(logits(load_model(str(tmp_path))), logits(model))


@pytest.mark.parametrize("form", ["aixsim", "strict"])
def test_ranges_stay_float32_in_a_bfloat16_model(model, tmp_path, form):
    write_model(model, tmp_path, form)
    loaded = load_model(str(tmp_path), dtype=torch.bfloat16, device_map="cpu")
    assert loaded.dtype == torch.bfloat16
    expected = ranges_of(model)
    assert all(torch.equal(v, expected[k]) for k, v in ranges_of(loaded).items())


def test_a_digital_folder_under_a_transform_starts_without_ranges(tmp_path):
    write_model(make_model("llama"), tmp_path)
    loaded = load_model(str(tmp_path), optical())
    assert all(not r.isfinite().any() for r in ranges_of(loaded).values())


@pytest.fixture
def said(caplog, monkeypatch):
    """What transformers says while it loads."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog


@pytest.mark.parametrize(("saved", "asked"), [("up_proj", ".*"), (".*", "up_proj")])
def test_ranges_of_one_hardware_alone_are_no_alarm(tmp_path, said, saved, asked):
    def on(pattern):
        # what another pattern matches stays digital
        rules = {f".*{pattern}": {"q_levels": 64}, "default": None}
        return parse_transform({"use_regex": True, "layer_name_to_config": rules}, source="t")

    model = make_model("llama")
    transform_hf_model(model, on(saved))
    write_model(model, tmp_path)
    said.clear()
    loaded = load_model(str(tmp_path), on(asked))
    assert ranges_of(loaded).keys() != ranges_of(model).keys()
    assert "LOAD REPORT" not in said.text
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    lost = "model.layers.1.mlp.up_proj.weight"
    tensors["model.extra.weight"] = tensors.pop(lost)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lacks 1 weights: {lost}"):
        load_model(str(tmp_path), on(asked))
    assert "model.extra.weight" in said.text and ".ranges" not in said.text


def test_missing_ranges_are_an_error(model, tmp_path):
    write_model(model, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.ranges"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack model\.layers\.0\.mlp\.up_proj\.ranges"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("modules", 15, "saved with 15 simulated modules.*has 16"),
        ("schema_version", 2, "schema_version: got 2"),
        ("transform", {"transform": "optic"}, "'optic': a paradigm that is not installed"),
    ],
)
def test_a_config_that_does_not_fit(model, tmp_path, key, value, message):
    write_model(model, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"][key] = value
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["transform.yaml", "transform.safetensors"])
def test_half_of_a_plain_transform(model, tmp_path, name):
    write_model(model, tmp_path, "plain")
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{name}: missing"):
        load_model(str(tmp_path))


def test_no_such_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(tmp_path))
