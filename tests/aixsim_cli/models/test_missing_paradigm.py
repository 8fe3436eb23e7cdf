"""A model whose paradigm's package is missing: its weights are read, and the reason is told."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from aixsim_cli.errors import UserError
from aixsim_cli.models import convert
from aixsim_cli.models.hf.config import transform_of
from aixsim_cli.models.load import load_model
from aixsim_cli.models.titan.saved import read_checkpoint
from aixsim_cli.transforms import registry
from aixsim_cli.transforms.choice import DIGITAL, read_choice
from aixsim_cli.transforms.state import state_of

from .test_agree import LENGTH, VOCAB, checkpoint, to_hf

FORMS = ("aixsim", "strict", "plain")
SAID = "'spiking': a paradigm that is not installed here; expected the package that brings it"


@pytest.fixture(scope="module")
def rescued(tmp_path_factory):
    """A checkpoint and folders of a paradigm that is uninstalled afterwards."""
    root = tmp_path_factory.mktemp("spiking")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.PARADIGMS, "spiking", registry.PARADIGMS["optical"])
        transform = {"transform": "spiking", "layer_name_to_config": {"default": {}}}
        checkpoint(root / "step-1", transform)
        for form in FORMS:
            convert.titan_to_hf(
                "aixsim", "debug", root / "step-1", root / form, tokenizer=None, form=form,
                force=False,
            )  # fmt: skip
    return root


@pytest.mark.parametrize("name", ["step-1", *FORMS])
@pytest.mark.parametrize("for_generation", [False, True])
def test_the_weights_alone_need_no_paradigm(rescued, name, for_generation):
    model = load_model(str(rescued / name), DIGITAL, for_generation=for_generation)
    assert model.transform is None and state_of(model.module) is None
    tokens = torch.zeros(1, LENGTH, dtype=torch.long)
    assert torch.isfinite(model.logits(tokens)).all()


@pytest.mark.parametrize("name", ["step-1", *FORMS])
def test_other_hardware_needs_none_of_the_old(rescued, tmp_path, name):
    (tmp_path / "t.yaml").write_text("fc: {w_p_frac: 0.01}\ntransform: bitflip\n")
    model = load_model(str(rescued / name), read_choice(str(tmp_path / "t.yaml")))
    assert model.transform.name == "bitflip"


@pytest.mark.parametrize("name", ["step-1", *FORMS])
def test_without_the_weights_alone_the_package_is_asked_for(rescued, name):
    with pytest.raises(UserError, match=rf"{rescued / name}.*: transform: {SAID}.*--no-transform"):
        load_model(str(rescued / name))


def test_transformers_says_the_same(rescued):
    with pytest.raises(UserError, match=SAID):
        AutoModelForCausalLM.from_pretrained(rescued / "aixsim")


def test_the_weights_alone_are_converted_both_ways(rescued, tmp_path):
    with pytest.raises(UserError, match=SAID):
        to_hf(rescued / "step-1", tmp_path / "hf")
    convert.titan_to_hf(
        "aixsim", "debug", rescued / "step-1", tmp_path / "hf", tokenizer=None, transform=DIGITAL,
        force=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert transform_of(model) is None and model.config.vocab_size == VOCAB
    convert.hf_to_titan(
        "aixsim",
        "debug",
        str(rescued / "aixsim"),
        tmp_path / "back",
        transform=DIGITAL,
        force=False,
    )
    back = read_checkpoint(tmp_path / "back")
    assert back.config is not None and back.config.transform is None
    weights = read_checkpoint(rescued / "step-1", DIGITAL).state_dict
    assert torch.equal(back.state_dict["output.weight"], weights["output.weight"])
