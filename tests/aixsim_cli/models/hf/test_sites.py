"""One transform file, one meaning: a pattern finds the same modules in either library's model."""

import pytest
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)

from aixsim_cli.errors import ConfigError
from aixsim_cli.models.hf.sites import hf_sites
from aixsim_cli.models.hf.transform import transform_hf_model
from aixsim_cli.models.names import PAIRS
from aixsim_cli.transforms.apply import plan_transform
from aixsim_cli.transforms.protocol import Site
from aixsim_cli.transforms.read import parse_transform

from .conftest import CAUSAL, make_model

PATTERNS = [
    r"layers\.0\..*",
    r"layers\.\d+\.attention",
    r"layers\.\d+\.feed_forward\.w[13]",
    r"model\.layers\.1\.mlp\..*",
    r"(layers\.1\.attention\.wq|output)",
    r".*",
    r"layers.*|lm_head",
]


def parse(layers, **more):
    data = {"use_regex": True, "layer_name_to_config": layers} | more
    return parse_transform(data, source="t.yaml")


def simulated(model, config):
    return {place.site.hf_name for place in plan_transform(config, hf_sites(model)).simulated}


def titan_sites():
    """The sites of torchtitan's Llama of two layers, without torchtitan."""
    linears = [name for name in PAIRS if name.split(".")[-1][0] == "w" or name == "output"]
    for i in range(2):
        for name in linears[:-1]:
            yield Site(name.format(i), PAIRS[name].format(i), "linear")
        yield Site(f"layers.{i}.attention", f"model.layers.{i}.self_attn", "attention")
    yield Site("output", "lm_head", "linear", is_head=True)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("params", [None, {"q_levels": 16}], ids=["null", "params"])
def test_a_pattern_matches_the_same_modules_in_either_model(pattern, params):
    config = parse({pattern: params, "default": {}})
    there = plan_transform(config, list(titan_sites())).simulated
    here = plan_transform(config, hf_sites(make_model("llama"))).simulated
    by_name = [{p.site.hf_name: p.rule for p in places} for places in (there, here)]
    assert by_name[0] == by_name[1]
    assert (len(by_name[1]) < 16) == (params is None), "the pattern found something"


def test_a_digital_layer_survives_saving_under_either_name(tmp_path):
    for number, pattern in enumerate((r"layers\.0\..*", r"model\.layers\.0\..*")):
        model = make_model("llama")
        transform_hf_model(model, parse({pattern: None, "default": {}}))
        model.save_pretrained(tmp_path / str(number))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        names = set(loaded.transform_state.modules)
        assert len(names) == 8
        assert all(name.startswith("model.layers.1.") for name in names)


def test_a_model_without_a_head_is_simulated_as_with_one(tmp_path):
    model = make_model("llama")
    transform_hf_model(model, parse({r"layers\.0\..*": None, "default": {}}))
    model.save_pretrained(tmp_path)
    bare = AutoModel.from_pretrained(tmp_path)
    assert isinstance(bare, LlamaModel)
    assert {f"model.{name}" for name in bare.transform_state.modules} == set(
        model.transform_state.modules
    )
    sorter = LlamaForSequenceClassification.from_pretrained(tmp_path)
    assert set(sorter.transform_state.modules) == set(model.transform_state.modules)


def test_the_names_of_a_model_with_a_head_serve_any_bare_model():
    bare = make_model("gpt2").base_model
    names = simulated(bare, parse({r"transformer\.h\.0\..*": None, "default": {}}))
    assert names and all(name.startswith("h.1.") for name in names)


@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "llama"])
def test_other_architectures_have_no_names_of_torchtitan(name):
    sites = hf_sites(make_model(name))
    assert all(site.names == (site.name,) for site in sites)
    with pytest.raises(ConfigError, match="matches no linear"):
        plan_transform(parse({r"layers\..*": {}}), sites)


def test_noise_is_keyed_by_the_hugging_face_name():
    for site in hf_sites(make_model("llama")):
        assert site.hf_name == site.name


@pytest.mark.parametrize("excluded", [r"layers\.0", r"model\.layers\.0"])
def test_what_a_pattern_excludes_matches_by_its_other_name(excluded):
    model = make_model("llama")
    every = simulated(model, parse({r"(?!lm_head|output).*": {}}))
    assert simulated(model, parse({rf"(?!{excluded}|lm_head|output).*": {}})) == every
    left_out = simulated(model, parse({rf"{excluded}\..*": None, "default": {}}))
    assert {name for name in every if ".layers.0." in name} == every - left_out != set()
