"""Tiny random models of many architectures."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    ViTConfig,
)

from aixsim_cli.transforms.read import parse_transform

VOCAB, LENGTH = 97, 20
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **_SPECIAL,
}
_MODERN = _SIZE | {"intermediate_size": 64, "num_key_value_heads": 2}
_HEADS = _MODERN | {"head_dim": 8}
CAUSAL = {
    "llama": LlamaConfig(**_MODERN),
    "qwen2": Qwen2Config(**_MODERN),
    "qwen3": Qwen3Config(**_HEADS),
    "mistral": MistralConfig(**_HEADS, sliding_window=8),
    "gemma": GemmaConfig(**_HEADS),
    "gemma3": Gemma3TextConfig(**_HEADS, sliding_window=8),
    "phi": PhiConfig(**_MODERN),
    "gpt_neox": GPTNeoXConfig(**_SIZE, intermediate_size=64),
    "opt": OPTConfig(**_SIZE, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, **_SPECIAL,
    ),
}  # fmt: skip
SOFT_CAPPED = Gemma2Config(**_HEADS, sliding_window=8)
ENCODERS = {
    "roberta": (
        AutoModelForMaskedLM,
        RobertaConfig(**_SIZE, intermediate_size=64, attention_probs_dropout_prob=0.0),
    ),
    "vit": (
        AutoModelForImageClassification,
        ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            image_size=32, patch_size=8,
        ),
    ),
}  # fmt: skip


def make_model(name):
    torch.manual_seed(0)
    factory, config = ENCODERS.get(name) or (AutoModelForCausalLM, CAUSAL[name])
    # a model keeps the very config it is given
    return factory.from_config(copy.deepcopy(config)).eval()


def make_inputs(name):
    """Two rows; the first tokens of the second are padding."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :5] = 0
    return {
        "input_ids": torch.randint(3, VOCAB, (2, LENGTH), generator=generator),
        "attention_mask": mask,
    }


def optical(**params):
    data = {"layer_name_to_config": {"default": params}}
    return parse_transform(data, source="t.yaml")


@pytest.fixture(params=[*CAUSAL, *ENCODERS])
def architecture(request):
    return request.param
