"""Shapes: multiplications are those that torch counts, sites those of the built model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from aixsim_cli.config.flavors import FLAVORS, count_parameters, find_flavor, model_vocab_size
from aixsim_cli.energy.account import token_energy
from aixsim_cli.energy.hardware import read_hardware
from aixsim_cli.energy.layout import SCORES, VALUES
from aixsim_cli.energy.shape import shape_of_flavor
from aixsim_cli.models.titan.model import meta_model, model_args
from aixsim_cli.models.titan.sites import titan_sites

ALL = [(arch, flavor) for arch, flavors in FLAVORS.items() for flavor in flavors]
WORDS, LENGTH = 500, 32


@pytest.fixture(params=ALL, ids="/".join)
def pair(request):
    """A shape, and the model that is built of its flavor."""
    arch, flavor = request.param
    words = model_vocab_size(arch, flavor, WORDS)
    return shape_of_flavor(arch, flavor, words), meta_model(model_args(arch, flavor, WORDS))


def test_multiplications_are_half_of_torchs_flops(pair):
    shape, model = pair
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, LENGTH, dtype=torch.long))
    for decode in (False, True):
        energy = token_energy(
            shape, None, read_hardware("engineered"), seq_len=LENGTH, decode=decode
        )
        by_kind = {row.kind: row.macs for row in energy.rows}
        attention = by_kind.pop(SCORES) + by_kind.pop(VALUES)
        # torch counts what is masked too: every token with all, where (L + 1) / 2 are seen
        seen = LENGTH if decode else (LENGTH + 1) / 2
        macs = sum(by_kind.values()) + attention * LENGTH / seen
        assert 2 * macs * LENGTH == counter.get_total_flops()


def test_places_are_the_models(pair):
    shape, model = pair
    assert set(shape.sites) == set(titan_sites(model))


def test_parameters_are_those_of_budgets():
    for arch, flavor in ALL:
        found = shape_of_flavor(arch, flavor, WORDS).parameters
        assert found == count_parameters(find_flavor(arch, flavor), WORDS)
