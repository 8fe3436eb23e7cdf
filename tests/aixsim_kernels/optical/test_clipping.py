import math

import pytest
import torch
from aixsim_kernels.optical import clipping


def pair(lo, hi):
    return torch.tensor([lo, hi])


def test_inside_includes_the_ends():
    x = torch.tensor([-1.0001, -1.0, 0.0, 3.0, 3.0001])
    assert clipping.inside(x, pair(-1.0, 3.0)).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("shape", [(0,), (1,), (7, 3), (8, 16), (300, 701)])
def test_bits_come_back(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    bits = clipping.pack_inside(x, pair(-0.5, 1.0))
    assert bits.shape == (math.ceil(x.numel() / 8),)
    grad = clipping.mask_packed_(torch.full(shape, 2.0), bits)
    assert torch.equal(grad, 2.0 * ((x >= -0.5) & (x <= 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clipped", [0, 1, 5, 200_000])
def test_a_few_clipped_values_are_all_found(clipped, dtype):
    # most pieces are left out when few hold any; the last one is not whole
    n = 100 * clipping.PIECE + 13
    generator = torch.Generator().manual_seed(clipped)
    x = torch.randn(n, generator=generator).clamp_(-3, 3)
    places = torch.randperm(n, generator=generator)[:clipped]
    x[places] = 5 * x[places].sign()
    x[places[:1]] = math.nan
    x = x.to(dtype)
    expected = 2.0 * (x.abs() <= 4)
    bounds = pair(-4.0, 4.0)
    assert torch.equal(clipping.mask_clipped_(torch.full((n,), 2.0), x, bounds), expected)
    bits = clipping.pack_inside(x, bounds)
    assert torch.equal(clipping.mask_packed_(torch.full((n,), 2.0), bits), expected)


def test_the_ends_of_a_range_are_not_clipped_in_pieces():
    x = torch.full((clipping.PIECE,), 0.1)
    bounds = torch.stack([x.min(), x.max()])
    assert torch.equal(clipping.mask_clipped_(torch.ones_like(x), x, bounds), torch.ones_like(x))
