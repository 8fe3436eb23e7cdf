"""Transforms in transformers models: the same hardware as in torchtitan, and the same masks."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from aixsim_cli.models import llama
from aixsim_cli.models.hf.sites import hf_sites
from aixsim_cli.models.hf.transform import transform_hf_model
from aixsim_cli.models.titan.model import build_model, meta_model, model_args
from aixsim_cli.models.titan.sites import StateDictAdapter, titan_sites
from aixsim_cli.transforms.read import parse_transform

VOCAB, LENGTH = 64, 24
ARGS = model_args("aixsim", "debug", VOCAB)


def transform(**params):
    data = {"layer_name_to_config": {"default": params}}
    return parse_transform(data, source="t.yaml")


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(p.shape, generator=generator) * 0.1
        if p.dim() == 2
        else torch.ones(p.shape)
        for name, p in meta_model(ARGS).named_parameters()
    }


@pytest.fixture
def model(weights):
    ffn_dim = weights["layers.0.feed_forward.w1.weight"].shape[0]
    config = llama.llama_config(ARGS, seq_len=LENGTH, ffn_dim=ffn_dim, token_ids={})
    return llama.build_model(config, StateDictAdapter(ARGS).to_hf(weights))


@pytest.fixture
def tokens():
    return torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def test_sites_are_those_of_torchtitan(model):
    ours = {(site.hf_name, site.kind, site.is_head) for site in hf_sites(model)}
    theirs = {(s.hf_name, s.kind, s.is_head) for s in titan_sites(meta_model(ARGS))}
    assert ours == theirs


@torch.no_grad()
def test_bypass_is_the_untouched_model(model, tokens):
    expected = model(tokens).logits
    transform_hf_model(model, transform(q_bypass=True))
    assert torch.equal(model(tokens).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("attention_range", ["unit", "rowmax"])
def test_same_hardware_as_in_torchtitan(model, weights, tokens, attention_range):
    # fine levels, because one rounding that falls the other way spreads through all that follows;
    # a coarse floor, to be far from the digital model
    hardware = {"q_noise": False, "q_levels": 65536, "q_lut_min": 0.3}
    config = transform(**hardware, attention_range=attention_range)
    titan = build_model(ARGS, weights, seq_len=LENGTH, transform=config)
    expected = titan(tokens)
    digital = model(tokens).logits
    transform_hf_model(model, config)
    logits = model(tokens, use_cache=False).logits
    assert (digital - expected).abs().mean() > 0.1
    assert (logits - expected).pow(2).mean() < 1e-3 * (digital - expected).pow(2).mean()


@torch.no_grad()
def test_optical_model_is_causal(model, tokens):
    transform_hf_model(model, transform(q_noise=False))
    model.train()(tokens)
    model.transform_state.end_step()
    model.eval()
    logits = model(tokens).logits
    changed = tokens.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % VOCAB
    torch.testing.assert_close(model(changed).logits[:, :15], logits[:, :15], rtol=0, atol=0)


@torch.no_grad()
def test_padding_is_not_seen(model, tokens):
    transform_hf_model(model, transform(q_noise=False))
    model.train()(tokens)
    model.transform_state.end_step()
    model.eval()
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    other = tokens.clone()
    other[0, :5] = (other[0, :5] + 7) % VOCAB
    options = {"attention_mask": mask, "position_ids": positions}
    ours, theirs = model(tokens, **options).logits, model(other, **options).logits
    torch.testing.assert_close(ours[0, 5:], theirs[0, 5:], rtol=0, atol=0)


@pytest.mark.parametrize("optical", [False, True])
def test_generation_with_the_cache_is_generation_without(model, tokens, optical):
    if optical:
        # without noise and with ranges set, the hardware computes a position alike in both ways
        transform_hf_model(model, transform(q_noise=False, q_levels=65536, q_lut_min=None))
        with torch.no_grad():
            model.train()(tokens)
        model.transform_state.end_step()
        model.eval()
    prompt = tokens[:1, :6]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(prompt, use_cache=True, **options)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))


def test_an_optical_model_trains(model, tokens):
    state, _ = transform_hf_model(model, transform())
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(8):
        state.begin_step(step)
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state.end_step()
        losses.append(loss.detach())
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.isfinite(m.ranges).all() for m in state.modules.values())


def test_gradient_checkpointing_recomputes_the_same(model, tokens):
    transform_hf_model(model, transform())
    other = copy.deepcopy(model)
    gradients = []
    for net, recompute in ((model, False), (other, True)):
        net.train()
        if recompute:
            net.gradient_checkpointing_enable()
        net.transform_state.begin_step(1)
        net(tokens, labels=tokens).loss.backward()
        gradients.append(net.model.layers[0].mlp.up_proj.weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_one_backward_of_two_forwards_is_the_backward_of_each(model, tokens, reentrant):
    state, _ = transform_hf_model(model.train(), transform())

    def gradients(together):
        model.zero_grad()
        state.begin_step(1)
        losses = []
        for batch in (tokens, tokens.flip(1)):
            losses.append(model(batch, labels=batch).loss)
            if not together:
                losses.pop().backward()
        if together:
            with torch.no_grad():
                model(tokens)
            sum(losses).backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients(together=False)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for ours, theirs in zip(gradients(together=True), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_plain_attention_of_a_config_without_attention(tokens):
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    only_linears = parse_transform({"fc": {"q_noise": False}}, source="t.yaml")
    transform_hf_model(model, only_linears)
    assert model.config._attn_implementation == "sdpa"
