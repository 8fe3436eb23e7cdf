"""One transform file through every door: the same modules are simulated, and compute the same."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from aixsim_cli.config.pretrain import build_config, dump_config
from aixsim_cli.continual.arguments import ModelArguments
from aixsim_cli.continual.train import _model as model_to_continue
from aixsim_cli.data.tokenizer import vocab_size
from aixsim_cli.errors import RunError, UserError
from aixsim_cli.models import convert
from aixsim_cli.models.hf import attention, sites
from aixsim_cli.models.load import load_model
from aixsim_cli.models.names import hf_name
from aixsim_cli.models.titan.model import build_model, meta_model, model_args
from aixsim_cli.models.titan.saved import write_checkpoint
from aixsim_cli.settings.document import Document
from aixsim_cli.transforms import config as transform_config
from aixsim_cli.transforms import registry
from aixsim_cli.transforms.choice import DIGITAL, KEEP_OWN, read_choice
from aixsim_cli.transforms.read import parse_transform

DOCS = Path(__file__).parents[3] / "docs" / "transforms.md"
VOCAB, LENGTH = vocab_size("builtin"), 32
ARGS = model_args("aixsim", "debug", VOCAB)
FIRST_DIGITAL = {r"layers\.0\..*": None}
OPTICAL = {"use_regex": True, "layer_name_to_config": {**FIRST_DIGITAL, "default": {}}}
BITFLIP = {
    "transform": "bitflip",
    "use_regex": True,
    # exponents too: infinities and NaN come out
    "layer_name_to_config": {**FIRST_DIGITAL, "default": {"w_p_frac": 0.05, "x_p_exp": 0.01}},
}
EXACT = {"q_levels": 65536, "q_noise": False, "q_lut_min": None}


def docs_example():
    (example,) = re.findall(r"## The file\n\n```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    return yaml.safe_load(example)


@torch.no_grad()
def checkpoint(folder, transform, *, seed=0):
    """A checkpoint of random weights whose ranges have seen one batch."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5
        if p.dim() == 2
        else torch.ones(p.shape)
        for name, p in meta_model(ARGS).named_parameters()
    }
    config = parse_transform(transform, source="here")
    model = build_model(ARGS, weights, seq_len=LENGTH, transform=config).train()
    model(torch.randint(VOCAB, (4, LENGTH), generator=generator))
    model.transform_state.end_step()
    sections = {
        "model": {"name": "aixsim", "flavor": "debug", "hf_assets_path": "builtin"},
        "training": {"seq_len": LENGTH, "dataset": "builtin"},
        "transform": transform,
    }
    folder.mkdir()
    dump_config(build_config(Document(sections, "here")), folder / "config.yaml")
    write_checkpoint(model.state_dict(), folder)
    return folder, {hf_name(name) for name in model.transform_state.modules}


def to_hf(source, target):
    return convert.titan_to_hf("aixsim", "debug", source, target, tokenizer=None, force=False)


def to_titan(source, target):
    return convert.hf_to_titan("aixsim", "debug", str(source), target, force=False)


def names_in(model):
    return set(model.transform_state.modules)


@pytest.mark.parametrize("transform", [docs_example(), OPTICAL, BITFLIP], ids=["docs", "o", "b"])
def test_there_and_back_simulates_the_same_modules(tmp_path, transform):
    source, trained = checkpoint(tmp_path / "step-1", transform)
    assert 0 < len(trained) < 16
    assert to_hf(source, tmp_path / "hf") < convert.LOGIT_TOLERANCE
    assert names_in(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")) == trained
    assert to_titan(tmp_path / "hf", tmp_path / "back") < convert.LOGIT_TOLERANCE
    back = load_model(str(tmp_path / "back")).module
    assert {hf_name(name) for name in names_in(back)} == trained


@torch.no_grad()
def test_every_door_opens_the_same_model(tmp_path):
    transform = {"use_regex": True, "layer_name_to_config": {**FIRST_DIGITAL, "default": EXACT}}
    source, trained = checkpoint(tmp_path / "step-1", transform)
    to_hf(source, tmp_path / "hf")
    file = tmp_path / "t.yaml"
    file.write_text(yaml.safe_dump(transform))
    to_continue = ModelArguments(model_name_or_path=str(tmp_path / "hf"))
    asked = parse_transform(transform, source="here")
    doors = {
        "checkpoint": load_model(str(source)).module,
        "checkpoint, other file": load_model(str(source), read_choice(str(file))).module,
        "checkpoint, to generate": load_model(str(source), for_generation=True).module,
        "folder": load_model(str(tmp_path / "hf")).module,
        "folder, other file": load_model(str(tmp_path / "hf"), read_choice(str(file))).module,
        "transformers": AutoModelForCausalLM.from_pretrained(tmp_path / "hf"),
        "to continue": model_to_continue(to_continue, KEEP_OWN, VOCAB),
        "to continue, other file": model_to_continue(to_continue, asked, VOCAB),
    }
    tokens = torch.randint(VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    expected = doors["checkpoint"](tokens)
    digital = load_model(str(source), DIGITAL).module(tokens)
    effect = (digital - expected).abs().max()
    for door, model in doors.items():
        is_titan = door.startswith("checkpoint") and "generate" not in door
        names = names_in(model)
        assert ({hf_name(name) for name in names} if is_titan else names) == trained, door
        output = model.eval()(tokens)
        logits = output if is_titan else output.logits
        assert (logits - expected).abs().max() < 0.1 * effect, door


def lose_nulls(patch):
    real = transform_config.Transform.match

    def match(self, site):
        # transformers' sites alone, as if its names did not reach the pattern
        kept = [r for r in self.rules if r.params is not None or site.name != site.hf_name]
        if len(kept) == len(self.rules):
            return real(self, site)
        return real(transform_config.Transform(
            self.name, self.paradigm, tuple(kept), self.use_regex, self.lora, self.source
        ), site)  # fmt: skip

    patch.setattr(transform_config.Transform, "match", match)


def lose_names(patch):
    patch.setattr(sites, "aliases", lambda model, name: ())


def other_scale(patch):
    real = attention.simulated_attention_forward

    def scaled(*args, **kwargs):
        return real(*args, **{**kwargs, "scaling": kwargs["scaling"] * 1.5})

    patch.setattr(attention, "simulated_attention_forward", scaled)


def other_ranges(patch):
    real = convert.load_model

    def load(source, transform=KEEP_OWN, **options):
        model = real(source, transform, **options)
        for name, module in model.named_modules():
            if name == "model.layers.1.mlp.up_proj" and transform is not DIGITAL:
                module.ranges.mul_(1.5)
        return model

    patch.setattr(convert, "load_model", load)


@pytest.mark.parametrize(
    ("sabotage", "said"),
    [
        (lose_nulls, "simulates other modules than its source: model.layers.0.*transformers alone"),
        (lose_names, "simulates other modules than its source: model.layers.0.*transformers alone"),
        (other_scale, "is given other inputs"),
        (other_ranges, "model.layers.1.mlp.up_proj computes something else than"),
    ],
    ids=["null lost", "names lost", "another scale", "other ranges"],
)
def test_a_model_that_is_simulated_otherwise_is_not_written(tmp_path, monkeypatch, sabotage, said):
    source, _ = checkpoint(tmp_path / "step-1", OPTICAL)
    to_hf(source, tmp_path / "whole")
    sabotage(monkeypatch)
    monkeypatch.setattr(convert, "_check_ranges", lambda written, reloaded: None)
    with pytest.raises(RunError, match=said):
        to_hf(source, tmp_path / "hf")
    if sabotage is other_scale:
        with pytest.raises(RunError, match=said):
            to_titan(tmp_path / "whole", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "whole"]


def test_a_checkpoint_that_simulates_other_modules_is_not_written(tmp_path, monkeypatch):
    source, _ = checkpoint(tmp_path / "step-1", OPTICAL)
    to_hf(source, tmp_path / "hf")
    everything = parse_transform({"layer_name_to_config": {"default": {}}}, source="here")
    monkeypatch.setattr(convert, "chosen_transform", lambda checkpoint, source, choice: everything)
    with pytest.raises(RunError, match=r"model.layers.0.* in torchtitan alone"):
        to_titan(tmp_path / "hf", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "step-1"]


def test_a_paradigm_without_a_state_is_compared_too(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS.parents[1] / "tests" / "packages" / "gain"))
    monkeypatch.setitem(registry.PARADIGMS, "gain", "aixsim_gain:Gain")
    linears = r"layers\.\d+\.(attention|feed_forward)\.w."
    layers = {**FIRST_DIGITAL, linears: {"gain": 1.1}}
    transform = {"transform": "gain", "use_regex": True, "layer_name_to_config": layers}
    source, _ = checkpoint(tmp_path / "step-1", transform)
    assert to_hf(source, tmp_path / "hf") < convert.LOGIT_TOLERANCE
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    kinds = [type(layer.mlp.up_proj).__name__ for layer in loaded.model.layers]
    assert kinds == ["Linear", "GainLinear"]
    lose_names(monkeypatch)
    with pytest.raises(UserError, match="matches no linear"):
        to_hf(source, tmp_path / "again")
