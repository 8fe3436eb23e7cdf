"""Simulated attention sees what transformers' sdpa sees: caches, masks, biases, packed sequences;
what it would have to ignore is refused by name."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    LlamaConfig,
    StaticCache,
    T5Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention

from aixsim_cli.errors import ConfigError, UserError
from aixsim_cli.models.hf import attention
from aixsim_cli.models.hf.attention import ATTENTION_NAME, simulated_attention_forward
from aixsim_cli.models.hf.callback import SimulationCallback
from aixsim_cli.models.hf.source_code import multiplied_by, unknown_terms
from aixsim_cli.models.hf.transform import transform_hf_model
from aixsim_cli.transforms.optical import OpticalAttention, OpticalParams
from aixsim_cli.transforms.protocol import Site
from aixsim_cli.transforms.read import parse_transform
from aixsim_cli.transforms.state import TransformState

from .conftest import LENGTH, VOCAB, make_inputs, make_model, optical
from .tiny import make_inputs as tiny_inputs
from .tiny import make_tiny

FINE = {"q_levels": 65536, "q_lut_min": None, "q_noise": False}
# windows of 8 of 20 tokens, and none
CACHED = ["llama", "mistral", "gemma3", "gpt2"]


def simulated(name, **params):
    """A simulated model, its ranges set."""
    model = make_model(name)
    state, _ = transform_hf_model(model, optical(q_noise=False, **params))
    model.train()
    with torch.no_grad():
        model(input_ids=prompt())
    state.end_step()
    return model.eval()


def prompt():
    return make_inputs("llama")["input_ids"]


def static_logits(model, tokens, length=LENGTH + 6):
    cache = StaticCache(config=model.config, max_cache_len=length)
    return model(input_ids=tokens, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("name", CACHED)
@torch.no_grad()
def test_a_static_caches_prefill_is_the_dynamic_caches_and_no_caches(name):
    model = simulated(name)
    expected = model(input_ids=prompt(), use_cache=False).logits
    assert torch.equal(model(input_ids=prompt(), use_cache=True).logits, expected)
    assert torch.equal(static_logits(model, prompt()), expected)


@torch.no_grad()
def test_in_a_static_cache_no_token_sees_a_later_one():
    model, tokens = simulated("llama"), prompt()
    before = static_logits(model, tokens)
    tokens[:, -1] = (tokens[:, -1] + 1) % VOCAB
    after = static_logits(model, tokens)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CACHED[:3])
@torch.no_grad()
def test_generation_with_a_static_cache_is_generation_with_a_dynamic_one(name, padded):
    model = simulated(name)
    inputs = make_inputs(name) if padded else {"input_ids": prompt()}
    shared = {"max_new_tokens": 5, "do_sample": False, "output_logits": True}
    found = {
        cache: model.generate(
            **inputs, **shared, cache_implementation=cache, return_dict_in_generate=True
        )
        for cache in ("static", "dynamic")
    }
    for static, dynamic in zip(found["static"].logits, found["dynamic"].logits, strict=True):
        # one query at a time is computed over the empty slots too: the sums' order differs
        assert (static - dynamic).abs().max() < 1e-5


@torch.no_grad()
def test_sequences_packed_into_a_row_do_not_see_each_other():
    model, row = simulated("llama"), prompt()[:1]
    positions = torch.cat([torch.arange(12), torch.arange(LENGTH - 12)])[None]
    packed = model(input_ids=row, position_ids=positions, use_cache=False).logits
    alone = model(input_ids=row[:, 12:]).logits
    assert (packed[:, 12:] - alone).abs().max() < 1e-5


# the attention function itself, against the one that it stands for


class Owner(nn.Module):
    """What an attention module of transformers shows to its attention function."""

    def __init__(self, *, is_causal=True, groups=2):
        super().__init__()
        self.is_causal, self.num_key_value_groups = is_causal, groups
        params = OpticalParams(**FINE)
        self.inner_attention = OpticalAttention(params, Site("a", "a", "attention"))


def operands(queries=6, keys=6, heads=4, groups=2):
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randn(2, h, length, 8, generator=generator)
        for h, length in ((heads, queries), (heads // groups, keys), (heads // groups, keys))
    ]


def agree(owner, tensors, mask=None, **keywords):
    expected, _ = sdpa_attention_forward(owner, *tensors, mask, **keywords)
    found, _ = simulated_attention_forward(owner, *tensors, mask, **keywords)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-3


@pytest.mark.parametrize("is_causal", [None, True, False])
@pytest.mark.parametrize("of_module", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (6, 9), (9, 6), (1, 6), (1, 1)])
def test_without_a_mask_causality_is_sdpas(queries, keys, of_module, is_causal):
    agree(Owner(is_causal=of_module), operands(queries, keys), is_causal=is_causal)


@pytest.mark.parametrize("shape", [(2, 1, 6, 9), (2, 4, 6, 9), (1, 1, 6, 9), (2, 1, 1, 9)])
@pytest.mark.parametrize("kind", ["bool", "additive", "minimum", "infinite"])
def test_a_mask_of_any_kind_is_sdpas(kind, shape):
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.6
    seen[..., 0] = True
    mask = {
        "bool": seen,
        "additive": seen * 2.0 - 1.0,
        "minimum": torch.where(seen, 0.0, torch.finfo(torch.float32).min),
        "infinite": torch.where(seen, 0.0, -torch.inf),
    }[kind]
    agree(Owner(), operands(6, 9), mask)


@pytest.mark.parametrize("shape", [(2, 4, 6, 9), (1, 4, 6, 9), (1, 1, 1, 9)])
@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
def test_a_position_bias_is_added_under_every_mask(mask, shape):
    generator = torch.Generator().manual_seed(4)
    bias = torch.randn(shape, generator=generator)
    seen = torch.rand(2, 1, 6, 9, generator=generator) < 0.6
    seen[..., 0] = True
    given = {"none": None, "bool": seen, "additive": torch.where(seen, 0.0, -1e9)}[mask]
    for of_module in (True, False):
        agree(Owner(is_causal=of_module), operands(6, 9), given, position_bias=bias)


@pytest.mark.parametrize("name", ["s_aux", "softcap", "indices", "of_tomorrow"])
def test_an_unknown_keyword_is_refused_by_its_name(name):
    with pytest.raises(ConfigError, match=rf"^Owner of .*test_attention: {name}: .*keyword"):
        simulated_attention_forward(Owner(), *operands(), None, **{name: torch.ones(4)})
    for nothing in (None, False):
        simulated_attention_forward(Owner(), *operands(), None, **{name: nothing})


def test_a_mask_that_cannot_be_read_is_refused():
    blocks = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 6, 6, device="cpu")
    for mask, said in ((blocks, "BlockMask"), (torch.ones(2, 1, 6, 6).long(), "int64")):
        with pytest.raises(ConfigError, match=f"attention_mask: got .*{said}"):
            simulated_attention_forward(Owner(), *operands(), mask)


def test_sequences_that_only_their_lengths_keep_apart_are_refused():
    lengths = torch.tensor([0, 4, 6])
    with pytest.raises(ConfigError, match=r"cu_seq_lens_q: got 2 sequences in a row and no mask"):
        simulated_attention_forward(Owner(), *operands(), None, cu_seq_lens_q=lengths)
    simulated_attention_forward(Owner(), *operands(), None, cu_seq_lens_q=lengths[::2])


# where it is put


class Strange(LlamaAttention):
    """An attention whose scores hold something of its own."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            layer(hidden_states).view(shape).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        output, weights = interface(
            self, q, k, v, attention_mask, scaling=self.scaling, of_tomorrow=torch.ones(4)
        )
        return self.o_proj(output.flatten(2)), weights


def strange_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn = Strange(config, index)
    return model.eval()


def test_an_attention_with_terms_of_its_own_stays_digital_and_its_terms_are_said(caplog):
    assert unknown_terms(Strange) == {"of_tomorrow"}
    assert not unknown_terms(LlamaAttention)
    with caplog.at_level(logging.WARNING, logger="aixsim"):
        state, _ = transform_hf_model(strange_model(), optical(q_noise=False))
    assert not any(name.endswith("inner_attention") for name in state.modules)
    assert "2 x Strange (of_tomorrow) stay digital" in caplog.text


def test_a_rule_for_an_attention_with_terms_of_its_own_is_refused():
    asked = {"attention": {"q_levels": 256}, "fc": {"q_levels": 256}}
    with pytest.raises(ConfigError, match=r"self_attn, but Strange .*of_tomorrow"):
        transform_hf_model(strange_model(), parse_transform(asked, source="t.yaml"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (T5Config(dropout_rate=0.1), "6 x T5Attention have a dropout of 0.1"),
        (
            BertConfig(attention_probs_dropout_prob=0.2),
            "2 x BertSelfAttention have a dropout of 0.2",
        ),
        (LlamaConfig(attention_dropout=0.3), "2 x LlamaAttention have a dropout of 0.3"),
        (LlamaConfig(), None),
    ],
    ids=["t5", "bert", "llama", "none"],
)
def test_a_dropout_that_is_not_simulated_is_said(settings, said, caplog):
    small = {"vocab_size": VOCAB, "num_hidden_layers": 2, "num_layers": 2, "num_heads": 4}
    small |= {"d_model": 32, "d_ff": 32, "d_kv": 8, "num_attention_heads": 4}
    small |= {"hidden_size": 32, "intermediate_size": 32, "num_key_value_heads": 4}
    settings = copy.deepcopy(settings)
    for key, value in small.items():
        if hasattr(settings, key):
            setattr(settings, key, value)
    settings.num_decoder_layers = 2
    with caplog.at_level(logging.WARNING, logger="aixsim"):
        transform_hf_model(AutoModel.from_config(settings), optical())
    assert (said in caplog.text) if said else "dropout" not in caplog.text


def test_a_linear_with_a_forward_of_its_own_stays_digital_and_is_said(caplog):
    model = make_tiny("llama4_text", "causal")
    inputs = tiny_inputs("causal", padded=False)
    with caplog.at_level(logging.WARNING, logger="aixsim"):
        state, _ = transform_hf_model(model, optical(**FINE))
    assert "x Llama4Router (its forward is its own) stay digital" in caplog.text
    assert not any("router" in name for name in state.modules)
    with torch.no_grad():
        model(**inputs)


def test_a_linear_that_is_written_otherwise_is_simulated():
    """Falcon's linears are a class with a forward of its own, and the same product."""
    model = make_tiny("falcon", "causal")
    expected = {n for n, m in model.named_modules() if type(m).__name__ == "FalconLinear"}
    state, _ = transform_hf_model(model, optical(**FINE))
    assert expected and expected <= state.modules.keys()


def test_an_sdpa_of_a_files_own_is_out_of_reach(monkeypatch):
    module = __import__("transformers.models.doge.modeling_doge", fromlist=["x"])
    monkeypatch.setitem(
        module.ALL_ATTENTION_FUNCTIONS._local_mapping, ATTENTION_NAME, sdpa_attention_forward
    )
    state, _ = transform_hf_model(make_tiny("doge", "causal"), optical(**FINE))
    assert not any(name.endswith("inner_attention") for name in state.modules)


@torch.no_grad()
def test_a_digital_model_beside_a_simulated_one_stays_what_it_was():
    digital = make_model("llama")
    expected = digital(input_ids=prompt()).logits
    simulated("llama")
    assert torch.equal(digital(input_ids=prompt()).logits, expected)
    found = ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME]
    attention.register()
    assert ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME] is found


@torch.no_grad()
def test_an_attention_that_no_rule_simulates_is_digital():
    """With keywords that the simulation would refuse, too."""
    model, rule = make_model("llama"), {"use_regex": True}
    expected = copy.deepcopy(model)(input_ids=prompt()).logits
    rule["layer_name_to_config"] = {r"model\.layers\.1\.mlp\.up_proj": FINE}
    transform_hf_model(model, parse_transform(rule, source="t.yaml"))
    found = model(input_ids=prompt(), softcap=None, of_tomorrow=1.0).logits
    assert 0 < (found - expected).abs().max() < 2e-4


@torch.no_grad()
def test_a_choice_of_keys_by_the_model_is_kept():
    """DeepSeek-V3.2 attends to 4 of 20 tokens, and looks at the attention's name for how."""
    model, inputs = make_tiny("deepseek_v32", "causal"), tiny_inputs("causal", padded=False)
    assert model.config.index_topk == 4
    expected = model(**inputs).logits
    dense = copy.deepcopy(model)
    for layer in dense.model.layers:
        layer.self_attn.indexer.index_topk = LENGTH
    dense_logits = dense(**inputs).logits
    transform_hf_model(model, optical(**FINE))
    difference = (model(**inputs).logits - expected).abs().max() / expected.abs().max()
    assert difference < 3e-3 < 0.1 < (dense_logits - expected).abs().max() / expected.abs().max()


@torch.no_grad()
def test_t5_without_its_position_bias_would_be_another_model(monkeypatch):
    model, inputs = make_tiny("t5", "seq2seq"), tiny_inputs("seq2seq", padded=True)
    expected = model(**inputs).logits
    transform_hf_model(model, optical(**FINE))
    scale = expected.abs().max()
    assert (model(**inputs).logits - expected).abs().max() < 3e-3 * scale
    forward = attention.simulated_attention_forward

    def without_bias(*arguments, position_bias=None, **keywords):
        return forward(*arguments, **keywords)

    monkeypatch.setattr(attention, "simulated_attention_forward", without_bias)
    assert (model(**inputs).logits - expected).abs().max() > 0.05 * scale


@pytest.mark.parametrize(("name", "kind"), [("t5", "seq2seq"), ("umt5", "seq2seq")])
def test_a_learned_position_bias_gets_its_gradient(name, kind):
    digital, inputs = make_tiny(name, kind), tiny_inputs(kind, padded=True)
    model = copy.deepcopy(digital)
    transform_hf_model(model, optical(**FINE))
    for each in (digital, model):
        each(**inputs).logits.logsumexp(-1).sum().backward()
    expected = dict(digital.named_parameters())
    learned = [(n, p) for n, p in model.named_parameters() if "relative_attention_bias" in n]
    assert learned
    for parameter_name, parameter in learned:
        assert parameter.grad is not None, f"{parameter_name} got no gradient"
        distance = (parameter.grad - expected[parameter_name].grad).norm()
        assert distance < 0.02 * expected[parameter_name].grad.norm()


def test_a_linear_that_its_owner_multiplies_stays_digital_and_is_said(caplog):
    """Replacing it would not be noticed; the other projections are simulated."""
    with caplog.at_level(logging.WARNING, logger="aixsim"):
        state, _ = transform_hf_model(make_tiny("mamba", "causal"), optical(**FINE))
    names = {name.rpartition(".")[2] for name in state.modules}
    assert names == {"in_proj", "x_proj", "out_proj"}
    assert "2 x Linear (multiplied by MambaMixer) stay digital" in caplog.text
    assert "4 linears of MambaMixer are digital where it multiplies their weights" in caplog.text


def test_only_a_product_past_a_linears_forward_counts():
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.asked, self.both = (nn.Linear(2, 2) for _ in range(3))

        def forward(self, x):
            x = self.asked(x.to(self.asked.weight.dtype)) @ self.read.weight
            return nn.functional.linear(x, self.both.weight) if self.training else self.both(x)

    assert multiplied_by(Owner) == {"read": False, "both": True}
    assert multiplied_by(nn.MultiheadAttention) == {"out_proj": False}


def test_every_paradigms_attention_is_asked_alike():
    """A third party's gets the mask whole, and causality only where it is as long as wide."""
    asked = []

    class Recorder(nn.Module):
        def forward(self, q, k, v, *, attn_mask=None, scale=None, is_causal=False):
            asked.append((q.shape[2], k.shape[2], attn_mask, is_causal))
            groups = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
            return nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=attn_mask, scale=scale, is_causal=is_causal
            )

    owner = Owner()
    owner.inner_attention = Recorder()
    bias = torch.randn(1, 4, 6, 9, requires_grad=True)
    for queries, keys in ((6, 6), (6, 9), (9, 6), (1, 6)):
        agree(owner, operands(queries, keys))
    agree(owner, operands(6, 9), position_bias=bias)
    assert all(m == n for m, n, _, causal in asked if causal)
    assert asked[-1][2].requires_grad and asked[-1][2].shape == (1, 4, 6, 6)


def test_sequences_split_between_ranks_are_refused():
    layout = SimpleNamespace(cp_enabled=True, cp_size=2)
    arguments = SimpleNamespace(parallelism_config=layout, n_gpu=1)
    SimulationCallback().on_train_begin(arguments, None, None, nn.Linear(2, 2))
    callback = SimulationCallback(TransformState({}))
    with pytest.raises(UserError, match=r"parallelism_config: cp_size: got 2; expected 1"):
        callback.on_train_begin(arguments, None, None)
    layout.cp_enabled = False
    callback.on_train_begin(arguments, None, None)
