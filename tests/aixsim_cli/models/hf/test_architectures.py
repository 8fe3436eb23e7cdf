"""Any architecture: bypassed it is the untouched model, finely quantised it is nearly that, with
256 levels it is another one that trains; its mask, its cache and its files are its own."""

import copy
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from aixsim_cli.errors import ConfigError
from aixsim_cli.models.hf.transform import transform_hf_model
from aixsim_cli.transforms.read import parse_transform

from .conftest import ENCODERS, SOFT_CAPPED, make_inputs, make_model, optical

FINE = {"q_levels": 65536, "q_lut_min": None, "q_noise": False}


@torch.no_grad()
def test_bypass_is_the_untouched_model(architecture):
    model, inputs = make_model(architecture), make_inputs(architecture)
    expected = model(**inputs).logits
    transform_hf_model(model, optical(q_bypass=True))
    assert (model(**inputs).logits - expected).abs().max() <= 1e-6


@torch.no_grad()
def test_fine_levels_are_nearly_digital_under_the_models_own_mask(architecture):
    # padding, sliding windows (8 of 20 tokens) and both directions of an encoder
    model, inputs = make_model(architecture), make_inputs(architecture)
    expected = model(**inputs).logits
    state, _ = transform_hf_model(model, optical(**FINE))
    assert any(name.endswith("inner_attention") for name in state.modules)
    difference = (model(**inputs).logits - expected).abs()
    if "attention_mask" in inputs:
        difference = difference[inputs["attention_mask"].bool()]
    assert 0 < difference.max() < 2e-4


def test_optical_is_different_and_trains(architecture):
    digital, inputs = make_model(architecture), make_inputs(architecture)
    model = copy.deepcopy(digital)
    state, _ = transform_hf_model(model, optical())
    model.train()
    is_image = "pixel_values" in inputs
    labels = torch.tensor([0, 1]) if is_image else inputs["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(8):
        state.begin_step(step)
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        losses.append(loss.item())
        for name in state.modules:
            weight = model.get_submodule(name)._parameters.get("weight")
            assert weight is None or weight.grad is not None, f"{name} got no gradient"
        optimizer.step()
        optimizer.zero_grad()
        state.end_step()
    assert all(torch.isfinite(torch.tensor(losses))) and losses[-1] < losses[0]
    for name, module in state.modules.items():
        assert module.ranges.isfinite().all(), f"{name} was never reached by the forward"


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma3"])
@torch.no_grad()
def test_generation_with_a_cache_is_generation_without(name):
    model, inputs = make_model(name), make_inputs(name)
    state, _ = transform_hf_model(model, optical(**FINE))
    _calibrate(model, state, inputs)
    rows = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
    found = {
        use_cache: model.generate(
            **inputs, **rows, use_cache=use_cache, return_dict_in_generate=True
        )
        for use_cache in (True, False)
    }
    for cached, whole in zip(found[True].logits, found[False].logits, strict=True):
        assert (cached - whole).abs().max() < 2e-4


def _calibrate(model, state, inputs):
    model.train()
    model(**inputs)
    state.end_step()
    model.eval()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "roberta", "vit"])
@torch.no_grad()
def test_a_saved_folder_gives_the_same_model(name, tmp_path):
    model, inputs = make_model(name), make_inputs(name)
    state, _ = transform_hf_model(model, optical())
    _calibrate(model, state, inputs)
    state.begin_step(3)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path, max_shard_size="20KB" if name == "llama" else "5GB")
    factory = ENCODERS[name][0] if name in ENCODERS else AutoModelForCausalLM
    loaded = factory.from_pretrained(tmp_path).eval()
    loaded.transform_state.begin_step(3)
    assert torch.equal(loaded(**inputs).logits, expected)


def test_conv1d_keeps_its_layout(tmp_path):
    model = make_model("gpt2")
    before = {name: p.clone() for name, p in model.named_parameters()}
    transform_hf_model(model, optical())
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    layer = model.transformer.h[0].attn.c_attn
    assert layer.weight.shape == (96, 32) and layer._parameters["weight"].shape == (32, 96)


@pytest.mark.parametrize("form", ["attention", "pattern"])
def test_attention_out_of_reach_is_refused_where_it_is_asked_for(form):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SOFT_CAPPED)
    asked = {"attention": {"q_levels": 256}, "fc": {"q_levels": 256}}
    if form == "pattern":
        asked = {
            "use_regex": True,
            "layer_name_to_config": {r"model\.layers\.\d+\.self_attn": {"q_levels": 256}},
        }
    with pytest.raises(ConfigError, match=r"self_attn, but Gemma2Attention \(softcap\) cannot be"):
        transform_hf_model(model, parse_transform(asked, source="t.yaml"))


def test_what_stays_digital_is_said(caplog):
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING, logger="aixsim"):
        transform_hf_model(AutoModelForCausalLM.from_config(SOFT_CAPPED), optical())
        experts = MixtralConfig(
            vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=2,
        )  # fmt: skip
        transform_hf_model(AutoModelForCausalLM.from_config(experts), optical())
    assert "2 x Gemma2Attention (softcap) stay digital" in caplog.text
    assert "2 x MixtralExperts stay digital" in caplog.text


def test_the_head_stays_digital(architecture):
    model = make_model(architecture)
    state, report = transform_hf_model(model, optical())
    prefix = f"{model.base_model_prefix}."
    assert all(name.startswith(prefix) for name in state.modules)
    assert all(not name.startswith(prefix) for name in report.digital)
