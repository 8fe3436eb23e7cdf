"""Shapes of models that are there: by config alone, and with the transform that they have."""

from pathlib import Path

import pytest
from transformers import GPT2Config, LlamaConfig, MixtralConfig

from aixsim_cli.config.pretrain import build_config, dump_config
from aixsim_cli.energy.account import token_energy
from aixsim_cli.energy.hardware import read_hardware
from aixsim_cli.energy.shape import shape_of_flavor
from aixsim_cli.energy.source import find_shape
from aixsim_cli.errors import UserError
from aixsim_cli.models.titan.model import meta_model, model_args
from aixsim_cli.models.titan.saved import write_checkpoint
from aixsim_cli.settings.document import Document
from aixsim_cli.transforms.choice import DIGITAL, KEEP_OWN, read_choice

OPTICAL = "configs/transforms/optical.yaml"
WORDS = 1000


def joules(shape, transform):
    return token_energy(shape, transform, read_hardware("engineered")).joules_per_token


@pytest.fixture
def llama(tmp_path):
    """The config of a 60M, without a weight."""
    LlamaConfig(
        vocab_size=WORDS, hidden_size=384, intermediate_size=1408, num_hidden_layers=22,
        num_attention_heads=6, num_key_value_heads=2, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    return str(tmp_path)


def test_a_llamas_folder_is_its_flavor(llama):
    choice = read_choice(OPTICAL)
    found, transform = find_shape(llama, choice)
    flavor = shape_of_flavor("aixsim", "60M", WORDS)
    assert transform is choice
    assert joules(found, transform) == pytest.approx(joules(flavor, transform), rel=1e-9, abs=0)
    assert (found.parameters, found.ops) == (flavor.parameters, flavor.ops)


def test_a_folder_has_its_own_transform_but_where_another_is_asked_for(llama):
    text = "transform: optical\nlayer_name_to_config: {default: {photons_per_mac: 7}}\n"
    (Path(llama) / "transform.yaml").write_text(text)
    _, own = find_shape(llama, KEEP_OWN)
    assert own.transforms[0].rules[0].params.photons_per_mac == 7
    assert find_shape(llama, DIGITAL)[1] is None
    assert find_shape(llama, read_choice(OPTICAL))[1] == read_choice(OPTICAL)


def test_a_checkpoint_is_read_without_its_weights(tmp_path):
    args = model_args("aixsim", "debug", WORDS)
    model = meta_model(args).to_empty(device="cpu")
    sections = {
        "model": {"name": "aixsim", "flavor": "debug", "hf_assets_path": "builtin"},
        "training": {"seq_len": 32, "dataset": "builtin"},
        "transform": {"transform": "optical", "fc": {}},
    }
    folder = tmp_path / "step-1"
    folder.mkdir()
    dump_config(build_config(Document(sections, "here")), folder / "config.yaml")
    write_checkpoint(model.state_dict(), folder)
    for data in folder.glob("*.distcp"):
        data.unlink()
    found, own = find_shape(str(folder), KEEP_OWN)
    assert found.sites == shape_of_flavor("aixsim", "debug", WORDS).sites
    assert found.places[-1].n == WORDS and own.name == "optical"
    assert find_shape(str(folder), DIGITAL)[1] is None


def test_other_architectures_are_walked(tmp_path):
    GPT2Config(n_layer=2, architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path / "gpt2")
    found, _ = find_shape(str(tmp_path / "gpt2"), KEEP_OWN)
    block = 768 * (3 * 768) + 768 * 768 + 2 * 768 * 3072
    linears = sum(p.k * p.n for p in found.places if hasattr(p, "k"))
    assert linears == 2 * block + 768 * 50257
    # its output projection is its embedding, which budgets count once
    assert found.parameters > linears and not found.notes


def test_what_is_not_counted_is_told(tmp_path):
    MixtralConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, architectures=["MixtralForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    found, _ = find_shape(str(tmp_path), KEEP_OWN)
    assert "model.layers.0.mlp.experts" in found.notes[0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("61M", "no flavor and no folder; did you mean '60M'"),
        ("llama3/8b", "did you mean 'llama3/8B'"),
        ("./nowhere", "no such folder"),
    ],
)
def test_a_model_that_is_not_there_is_told(name, said):
    with pytest.raises(UserError, match=said):
        find_shape(name, KEEP_OWN)


def test_words_are_the_recipes_or_as_asked_and_a_llama3_flavors_its_own(llama):
    for name, words, given in (("60M", 49152, None), ("aixsim/60M", WORDS, WORDS)):
        found, _ = find_shape(name, KEEP_OWN, vocab_size=given)
        assert found.places[-1].n == words and found.name == "60M"
    found, _ = find_shape("llama3/debugmodel", KEEP_OWN)
    assert found.places[-1].n == 2048 and found.name == "llama3/debugmodel"
    for name in ("llama3/8B", llama):
        with pytest.raises(UserError, match=r"--vocab-size: got 1000; .* has its own"):
            find_shape(name, KEEP_OWN, vocab_size=WORDS)
