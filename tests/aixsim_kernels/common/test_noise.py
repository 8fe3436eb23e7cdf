import pytest
import torch
from aixsim_kernels import Place, placed, uniform_noise
from aixsim_kernels.common.noise import random_int16, row_keys, seed_word

KEY = torch.tensor(0x123456789ABCDEF)


@pytest.mark.parametrize("key", [0, 1, -1, 0x123456789ABCDEF, -(2**63)])
@pytest.mark.parametrize("stream", [0, 7, 2**40 + 3])
def test_integers_are_those_of_the_definition(integers, key, stream):
    for op in (0, 1):
        ours = uniform_noise(9, 13, torch.tensor(key), stream, op=op)
        assert torch.equal(ours.double(), torch.from_numpy(integers.noise(9, 13, key, stream, op)))


def test_a_block_of_rows_is_the_slice_of_the_whole():
    whole = uniform_noise(50, 11, KEY, 3)
    assert torch.equal(whole[20:37], uniform_noise(17, 11, placed(KEY, Place(17, 99, 20)), 3))
    assert torch.equal(whole[:, :6], uniform_noise(50, 6, KEY, 3))


def test_rows_beyond_32_bits_differ():
    low, high = (row_keys(torch.tensor([r]), KEY, 1) for r in (5, 5 + 2**32))
    assert low != high


def test_uniform_over_all_values():
    u = uniform_noise(1024, 1024, KEY, 0)
    n = u.numel()
    assert u.abs().max() < 0.5
    assert abs(u.double().mean()) < 5 * (1 / 12 / n) ** 0.5
    # the variance of u^2 is 1/180
    assert abs(u.double().square().mean() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    counts = torch.bincount(((u + 0.5) * 256).long().flatten(), minlength=256).double()
    chi2 = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi2 - 255) < 5 * (2 * 255) ** 0.5, "buckets are not equally likely"


def test_every_bit_is_fair():
    bits = random_int16(row_keys(torch.arange(512), KEY, seed_word(0, 0)), 512).int()
    for bit in range(16):
        share = (bits >> bit & 1).double().mean()
        assert abs(share - 0.5) < 5 * 0.5 / bits.numel() ** 0.5, f"bit {bit}"


def _other(what):
    shift = {"column": (0, 1), "pair": (0, 2), "row": (1, 0), "tile": (64, 64)}
    u = uniform_noise(577, 577, KEY, 5)[:512, :512]
    if what in shift:
        i, j = shift[what]
        return u, uniform_noise(577, 577, KEY, 5)[i : i + 512, j : j + 512]
    key, stream, op = {
        "call": (KEY + 1, 5, 0),
        "rank": (KEY + (1 << 40), 5, 0),
        "layer": (KEY, 6, 0),
        "op": (KEY, 5, 1),
    }[what]
    return u, uniform_noise(512, 512, key, stream, op=op)


@pytest.mark.parametrize("what", ["column", "pair", "row", "tile", "call", "rank", "layer", "op"])
def test_uncorrelated(what):
    a, b = (t.double().flatten() for t in _other(what))
    correlation = (a * b).mean() * 12
    assert abs(correlation) < 5 / a.numel() ** 0.5
    magnitude = ((a.abs() - 0.25) * (b.abs() - 0.25)).mean() * 48
    assert abs(magnitude) < 5 / a.numel() ** 0.5


def test_columns_whose_numbers_differ_in_one_bit_are_uncorrelated():
    """What a weak hash fails first: every pair of bits of the two numbers, and the numbers."""
    columns = torch.arange(512)
    bits = random_int16(row_keys(torch.arange(1024), KEY, seed_word(3, 0)), len(columns)).int()
    u = (bits + 0.5) / 65536
    signs = torch.stack([(bits >> i & 1) * 2.0 - 1 for i in range(16)])
    # each pair of columns is seen twice
    n = u.numel() / 2
    for bit in range(9):
        other = columns ^ (1 << bit)
        assert abs((u * u[:, other]).mean() * 12) < 5 / n**0.5, f"columns {1 << bit} apart"
        pairs = signs.flatten(1) @ signs[:, :, other].flatten(1).T / u.numel()
        # the largest of 256
        assert pairs.abs().max() < 6 / n**0.5, f"bits of columns {1 << bit} apart"


def test_global_generator_is_left_alone():
    before = torch.get_rng_state()
    uniform_noise(4, 4, KEY, 0)
    assert torch.equal(before, torch.get_rng_state())
