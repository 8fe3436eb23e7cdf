import math

import pytest
import torch
from aixsim_kernels.optical import clipping, definition, grid
from hypothesis import given, settings
from hypothesis import strategies as st

FINITE = st.floats(-1e4, 1e4, width=32)


def pair(lo, hi):
    return torch.tensor([lo, hi])


@given(
    lo=FINITE,
    width=st.just(0.0) | st.floats(2.0**-30, 1e4, width=32),
    levels=st.integers(2, 65536),
    lut_min=st.sampled_from([0.0, 0.02]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150, deadline=None)
def test_modulate_is_the_definition(lo, width, levels, lut_min, seed):
    bounds = pair(lo, lo + width)
    spread = torch.rand(64, generator=torch.Generator().manual_seed(seed)) * 1.4 - 0.2
    x = (bounds[0] + spread * (bounds[1] - bounds[0])).float()
    codes = torch.zeros(64, dtype=torch.int32)
    shown = grid.modulate(x, grid.grid(bounds, levels), lut_min, codes)
    exact = definition.modulate(x.double(), bounds.double(), levels, lut_min)
    position = definition.position(x.double(), bounds.double(), levels)
    tie = (position.frac().abs() - 0.5).abs() <= 1e-6 * levels
    lo, hi = bounds.tolist()
    if hi > lo:
        code = position.clamp(0, levels - 1).round().int()
        assert ((codes == code) | tie).all()
    tolerance = 4e-7 * max(abs(lo), abs(hi))
    assert ((shown.double() - exact).abs() <= tolerance).logical_or(tie).all()


def test_rounds_half_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, 3.5])
    assert grid.modulate(x, grid.grid(pair(0.0, 4.0), 5)).tolist() == [0, 2, 2, 4]


def test_floor_lifts_small_magnitudes_and_keeps_zero():
    # grid -4, -3, ... 4 with a floor of 0.5 * 4
    x = torch.arange(-4.0, 5.0)
    shown = grid.modulate(x, grid.grid(pair(-4.0, 4.0), 9), 0.5)
    assert shown.tolist() == [-4, -3, -2, -2, 0, 2, 2, 3, 4]


def test_floor_sides_differ_in_a_lopsided_range():
    x = torch.arange(-2.0, 9.0)
    shown = grid.modulate(x, grid.grid(pair(-2.0, 8.0), 11), 0.5)
    assert shown.tolist() == [-2, -1, 0, 4, 4, 4, 4, 5, 6, 7, 8]


def test_float32_rounding_is_not_lifted_off_zero():
    lo = torch.tensor(-128 * 0.1)
    shown = grid.modulate(torch.zeros(1), grid.grid(pair(lo.item(), 127 * 0.1), 256), 0.02)
    assert abs(shown.item()) < 1e-5


@pytest.mark.parametrize("x", [-math.inf, -3.0, 0.0, 5.0, math.inf])
@pytest.mark.parametrize("constant", [0.0, 2.5, -7.0])
def test_no_width_gives_the_constant(x, constant):
    bounds = pair(constant, constant)
    at = grid.grid(bounds, 256)
    assert grid.modulate(torch.tensor([x]), at).item() == constant
    assert grid.detect_(torch.tensor([[x]]), at, None).item() == constant


def test_too_little_width_for_float32_gives_the_constant():
    at = grid.grid(pair(0.0, 1e-45), 256)
    assert grid.modulate(torch.tensor([1.0]), at).item() == 0


def test_infinities_clip_and_nan_stays():
    x = torch.tensor([-math.inf, math.inf, math.nan])
    shown = grid.modulate(x, grid.grid(pair(-1.0, 3.0), 256))
    assert shown[:2].tolist() == [-1, 3]
    assert shown[2].isnan()
    assert clipping.inside(x, pair(-1.0, 3.0)).tolist() == [False, False, False]


def test_detector_noise_is_one_level_wide():
    acc = torch.full((400, 500), 0.3)
    keys = torch.arange(400, dtype=torch.int32) * 2654435
    read = grid.detect_(acc, grid.grid(pair(-100.0, 155.0), 256), keys)
    assert read.unique().tolist() == [0, 1]
    assert abs(read.mean() - 0.3) < 5 * math.sqrt(0.21 / acc.numel())
