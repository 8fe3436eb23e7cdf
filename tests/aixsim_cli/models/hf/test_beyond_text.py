"""Models that hear or see, and whose attention has position terms of its own, are simulated whole.

The walk of `test_walk.py` takes models of text alone.
"""

import pytest
import torch
from transformers import (
    Pix2StructConfig,
    Pix2StructForConditionalGeneration,
    Pop2PianoConfig,
    Pop2PianoForConditionalGeneration,
    UdopConfig,
    UdopForConditionalGeneration,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
)

from aixsim_cli.models.hf.transform import transform_hf_model
from aixsim_cli.transforms.read import parse_transform

from .walk import FINE, TOLERANCE

WORDS, LENGTH, BATCH = 50, 12, 2


def _sound(positions):
    config = Wav2Vec2BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        feature_projection_input_dim=8, output_hidden_size=32, layerdrop=0.0, hidden_dropout=0.0,
        position_embeddings_type=positions, num_adapter_layers=1, vocab_size=WORDS,
    )  # fmt: skip
    return Wav2Vec2BertModel(config), {"input_features": torch.randn(BATCH, LENGTH, 8)}


def sound_by_distance():
    return _sound("relative_key")


def sound_by_relative_positions():
    return _sound("relative")


T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": WORDS,
    "decoder_start_token_id": 0, "dropout_rate": 0.0,
}  # fmt: skip
ANSWER = {"decoder_input_ids": torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % WORDS}


def piano():
    model = Pop2PianoForConditionalGeneration(Pop2PianoConfig(**T5, composer_vocab_size=3))
    return model, {"inputs_embeds": torch.randn(BATCH, LENGTH, 32), **ANSWER}


def page():
    model = UdopForConditionalGeneration(UdopConfig(**T5, image_size=32, patch_size=16))
    boxes = torch.rand(BATCH, LENGTH, 4).sort(-1).values
    words = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % WORDS
    return model, {"input_ids": words, "bbox": boxes, **ANSWER}


def chart():
    sizes = {"hidden_size": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "dropout_rate": 0.0}
    config = Pix2StructConfig(
        text_config={**sizes, "num_layers": 2, "vocab_size": WORDS},
        vision_config={
            **sizes, "num_hidden_layers": 2, "num_attention_heads": 4, "seq_len": 16,
            "patch_embed_hidden_size": 16,
        },
    )  # fmt: skip
    patches = torch.randn(BATCH, LENGTH, 2 + 16)
    patches[..., :2] = torch.arange(LENGTH)[:, None] % 4 + 1.0
    return Pix2StructForConditionalGeneration(config), {"flattened_patches": patches, **ANSWER}


def first(output):
    logits = getattr(output, "logits", None)
    return output[0] if logits is None else logits


def _gradients(output, terms):
    """Of those that the model uses."""
    found = torch.autograd.grad(output.sum(), list(terms.values()), allow_unused=True)
    return {name: one for name, one in zip(terms, found, strict=True) if one is not None}


MODELS = {sound_by_distance: 2, sound_by_relative_positions: 2, piano: 6, page: 6, chart: 6}


@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_it_computes_what_the_digital_model_does(make):
    torch.manual_seed(0)
    model, inputs = make()
    model.eval()
    # what starts at zero, or tiny, would hide that it is left out
    terms = {
        name: torch.nn.init.normal_(parameter, std=0.5)
        for name, parameter in model.named_parameters()
        if any(word in name for word in ("relative_attention_bias", "distance", "pos_bias"))
    }
    assert terms
    digital = first(model(**inputs))
    weights = torch.randn_like(digital)
    gradients = _gradients(digital * weights, terms)
    assert gradients
    transform = parse_transform({"layer_name_to_config": {"default": FINE}}, source="t")
    state, _ = transform_hf_model(model, transform)
    simulated = first(model(**inputs))
    assert sum(name.endswith("inner_attention") for name in state.modules) == MODELS[make]
    assert (simulated - digital).abs().max() <= TOLERANCE * digital.abs().max()
    found = _gradients(simulated * weights, terms)
    assert found.keys() == gradients.keys()
    for name, expected in gradients.items():
        assert expected.abs().max() > 0, name
        assert (found[name] - expected).abs().max() <= 0.02 * expected.abs().max(), name
