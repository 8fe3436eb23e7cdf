"""Sizes: counted without building, equal to what torchtitan builds."""

import pytest

from aixsim_cli.config.flavors import FLAVORS, count_parameters, find_flavor, model_vocab_size
from aixsim_cli.errors import UserError
from aixsim_cli.models.titan.model import meta_model, model_args

ALL = [(arch, flavor) for arch, flavors in FLAVORS.items() for flavor in flavors]


@pytest.mark.parametrize(("arch", "flavor"), ALL)
def test_count_is_that_of_the_model(arch, flavor):
    words = model_vocab_size(arch, flavor, 500)
    built = sum(p.numel() for p in meta_model(model_args(arch, flavor, 500)).parameters())
    assert count_parameters(find_flavor(arch, flavor), words, embedding=True) == built


@pytest.mark.parametrize(
    ("flavor", "width"), [("60M", 1408), ("200M", 2688), ("1.1B", 5376), ("debug", 512)]
)
def test_feed_forward_width(flavor, width):
    assert find_flavor("aixsim", flavor).ffn_dim == width


def test_60m_without_its_embedding():
    assert count_parameters(find_flavor("aixsim", "60M"), 49152) == 63_226_752


def test_aixsim_trains_with_plain_rope():
    assert model_args("aixsim", "60M", 100).rope_scaling_args.scaling_factor == 1.0


def test_unknown_flavor_and_architecture():
    with pytest.raises(UserError, match="got '60m'; did you mean '60M'"):
        find_flavor("aixsim", "60m")
    with pytest.raises(UserError, match="got 'lama3'; did you mean 'llama3'"):
        find_flavor("lama3", "8B")


def test_a_tokenizer_too_large_for_a_fixed_vocabulary():
    with pytest.raises(UserError, match="llama3 debugmodel has 2048 words"):
        model_args("llama3", "debugmodel", 5000)
