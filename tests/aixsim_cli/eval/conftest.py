"""Small local models, and a transform to evaluate them under."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from aixsim_cli.data.tokenizer import resolve_tokenizer
from aixsim_cli.models.hf.saved import write_model
from aixsim_cli.models.hf.transform import transform_hf_model
from aixsim_cli.transforms.read import parse_transform


@pytest.fixture(scope="package")
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "clean"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, eos_token_id=0,
    )  # fmt: skip
    write_model(AutoModelForCausalLM.from_config(config), folder)
    AutoTokenizer.from_pretrained(resolve_tokenizer("builtin")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="package")
def coarse(tmp_path_factory):
    path = tmp_path_factory.mktemp("transforms") / "coarse.yaml"
    path.write_text("layer_name_to_config:\n  default: {q_levels: 16}\n")
    return str(path)


@pytest.fixture(scope="package")
def trained(clean, coarse, tmp_path_factory):
    """The clean model with ranges, as if it had been trained with the transform."""
    folder = tmp_path_factory.mktemp("models") / "trained"
    model = AutoModelForCausalLM.from_pretrained(clean)
    transform = parse_transform({"layer_name_to_config": {"default": {"q_levels": 16}}}, source="t")
    state, _ = transform_hf_model(model, transform)
    model.train()
    generator = torch.Generator().manual_seed(0)
    model(torch.randint(4096, (2, 32), generator=generator))
    state.end_step()
    write_model(model, folder)
    AutoTokenizer.from_pretrained(clean).save_pretrained(folder)
    return str(folder)
