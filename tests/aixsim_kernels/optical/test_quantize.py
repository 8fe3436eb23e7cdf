import math

import pytest
import torch
from aixsim_kernels import empty_ranges, merge_observed, update_ranges
from aixsim_kernels.optical import definition, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

EMPTY = [math.inf, -math.inf]
FINITE = st.floats(-1e4, 1e4, width=32)


def pair(lo, hi):
    return torch.tensor([lo, hi])


def test_empty_ranges():
    assert empty_ranges(2).tolist() == [EMPTY, EMPTY]
    assert empty_ranges(2).dtype == torch.float32
    assert quantize.is_empty(empty_ranges(2)).all()


def test_merge_observed():
    a = torch.tensor([[-1.0, 2.0], EMPTY, EMPTY])
    b = torch.tensor([[-3.0, 1.0], [0.0, 1.0], EMPTY])
    assert merge_observed(a, b).tolist() == [[-3, 2], [0, 1], EMPTY]


@pytest.mark.parametrize("attack", [0.75, torch.tensor([[0.75], [0.75], [0.75], [0.0]])])
@pytest.mark.parametrize("release", [0.5, torch.tensor([[0.5], [0.5], [0.25], [1.0]])])
def test_update_ranges(attack, release):
    ranges = torch.tensor([[-4.0, 8.0], EMPTY, [-1.0, 1.0], EMPTY])
    observed = torch.tensor([[-8.0, 4.0], [-2.0, 3.0], EMPTY, EMPTY])
    updated = update_ranges(ranges, observed, attack, release)
    assert updated.tolist() == [[-5, 6], [-2, 3], [-1, 1], EMPTY]
    # the other ends
    assert update_ranges(-ranges.flip(1), -observed.flip(1), attack, release).tolist() == [
        [-6, 5], [-3, 2], [-1, 1], EMPTY
    ]  # fmt: skip


@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_update_ranges_at_the_ends_of_smooth(smooth):
    ranges, observed = torch.tensor([[-4.0, 8.0], EMPTY]), torch.tensor([[-8.0, 4.0], [-2.0, 3.0]])
    expected = [[-4, 8], [-2, 3]] if smooth else [[-8, 4], [-2, 3]]
    assert update_ranges(ranges, observed, smooth, smooth).tolist() == expected


@pytest.mark.parametrize("attack", [0.0, 0.9])
def test_ranges_follow_activations_up_and_down(attack):
    ranges = empty_ranges(1)
    for scale in (1.0, 10.0, 0.1):
        x = scale * torch.linspace(-1, 2, 50)
        for _ in range(80):
            ranges = update_ranges(ranges, quantize.observe(x).unsqueeze(0), attack, 0.9)
        torch.testing.assert_close(
            ranges, scale * torch.tensor([[-1.0, 2.0]]), rtol=1e-2, atol=5e-3
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_observe_is_min_and_max(dtype):
    x = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert quantize.observe(x.T).tolist() == [x.min().item(), x.max().item()]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_observe_is_empty_where_not_finite(bad):
    x = torch.ones(5)
    x[2] = bad
    assert quantize.observe(x).tolist() == EMPTY


def test_observe_nothing():
    assert quantize.observe(torch.empty(0, 3)).tolist() == EMPTY


def test_observe_quantiles_exact_when_small():
    x = torch.arange(1001.0)
    assert quantize.observe(x, (0.1, 0.9)).tolist() == [100, 900]


@given(
    n=st.integers(1, 300) | st.integers(300, 20_000),
    low=st.floats(0, 0.2),
    high=st.floats(0.8, 1),
    not_numbers=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    infinite=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150, deadline=None)
def test_quantiles_are_those_of_torch(n, low, high, not_numbers, infinite, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator)
    if infinite:
        x[0] = math.inf
    x[torch.rand(n, generator=generator) < not_numbers] = math.nan
    expected = torch.nanquantile(x, torch.tensor([low, high]))
    if not expected.isfinite().all():
        expected = torch.tensor(EMPTY)
    assert torch.equal(quantize.quantile_range(x, (low, high)), expected)


@pytest.mark.parametrize("p", [0.001, 0.01, 0.25])
@pytest.mark.parametrize("columns", [1408, 2048])
def test_observe_quantiles_of_a_large_tensor(p, columns):
    # columns of very different size: a sample in step with the rows would miss most of them
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, columns, generator=generator) * torch.linspace(0.1, 5, columns)
    for bound, end in zip(quantize.observe(x, (p, 1 - p)), (p, 1 - p), strict=True):
        share = (x <= bound).double().mean().item()
        assert abs(share - end) < 4 * math.sqrt(p * (1 - p)) / 256


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
    shown = quantize.modulate(x, quantize.grid(bounds, levels), lut_min, codes)
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
    assert quantize.modulate(x, quantize.grid(pair(0.0, 4.0), 5)).tolist() == [0, 2, 2, 4]


def test_floor_lifts_small_magnitudes_and_keeps_zero():
    # grid -4, -3, ... 4 with a floor of 0.5 * 4
    x = torch.arange(-4.0, 5.0)
    shown = quantize.modulate(x, quantize.grid(pair(-4.0, 4.0), 9), 0.5)
    assert shown.tolist() == [-4, -3, -2, -2, 0, 2, 2, 3, 4]


def test_floor_sides_differ_in_a_lopsided_range():
    x = torch.arange(-2.0, 9.0)
    shown = quantize.modulate(x, quantize.grid(pair(-2.0, 8.0), 11), 0.5)
    assert shown.tolist() == [-2, -1, 0, 4, 4, 4, 4, 5, 6, 7, 8]


def test_float32_rounding_is_not_lifted_off_zero():
    lo = torch.tensor(-128 * 0.1)
    shown = quantize.modulate(torch.zeros(1), quantize.grid(pair(lo.item(), 127 * 0.1), 256), 0.02)
    assert abs(shown.item()) < 1e-5


@pytest.mark.parametrize("x", [-math.inf, -3.0, 0.0, 5.0, math.inf])
@pytest.mark.parametrize("constant", [0.0, 2.5, -7.0])
def test_no_width_gives_the_constant(x, constant):
    bounds = pair(constant, constant)
    at = quantize.grid(bounds, 256)
    assert quantize.modulate(torch.tensor([x]), at).item() == constant
    assert quantize.detect_(torch.tensor([[x]]), at, None).item() == constant


def test_too_little_width_for_float32_gives_the_constant():
    at = quantize.grid(pair(0.0, 1e-45), 256)
    assert quantize.modulate(torch.tensor([1.0]), at).item() == 0


def test_infinities_clip_and_nan_stays():
    x = torch.tensor([-math.inf, math.inf, math.nan])
    shown = quantize.modulate(x, quantize.grid(pair(-1.0, 3.0), 256))
    assert shown[:2].tolist() == [-1, 3]
    assert shown[2].isnan()
    assert quantize.inside(x, pair(-1.0, 3.0)).tolist() == [False, False, False]


def test_inside_includes_the_ends():
    x = torch.tensor([-1.0001, -1.0, 0.0, 3.0, 3.0001])
    assert quantize.inside(x, pair(-1.0, 3.0)).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("shape", [(0,), (1,), (7, 3), (8, 16), (300, 701)])
def test_bits_come_back(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    bits = quantize.pack_inside(x, pair(-0.5, 1.0))
    assert bits.shape == (math.ceil(x.numel() / 8),)
    grad = quantize.mask_packed_(torch.full(shape, 2.0), bits)
    assert torch.equal(grad, 2.0 * ((x >= -0.5) & (x <= 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clipped", [0, 1, 5, 200_000])
def test_a_few_clipped_values_are_all_found(clipped, dtype):
    # most pieces are left out when few hold any; the last one is not whole
    n = 100 * quantize.PIECE + 13
    generator = torch.Generator().manual_seed(clipped)
    x = torch.randn(n, generator=generator).clamp_(-3, 3)
    places = torch.randperm(n, generator=generator)[:clipped]
    x[places] = 5 * x[places].sign()
    x[places[:1]] = math.nan
    x = x.to(dtype)
    expected = 2.0 * (x.abs() <= 4)
    bounds = pair(-4.0, 4.0)
    assert torch.equal(quantize.mask_clipped_(torch.full((n,), 2.0), x, bounds), expected)
    bits = quantize.pack_inside(x, bounds)
    assert torch.equal(quantize.mask_packed_(torch.full((n,), 2.0), bits), expected)


def test_the_ends_of_a_range_are_not_clipped_in_pieces():
    x = torch.full((quantize.PIECE,), 0.1)
    bounds = torch.stack([x.min(), x.max()])
    assert torch.equal(quantize.mask_clipped_(torch.ones_like(x), x, bounds), torch.ones_like(x))


def test_detector_noise_is_one_level_wide():
    acc = torch.full((400, 500), 0.3)
    keys = torch.arange(400, dtype=torch.int32) * 2654435
    read = quantize.detect_(acc, quantize.grid(pair(-100.0, 155.0), 256), keys)
    assert read.unique().tolist() == [0, 1]
    assert abs(read.mean() - 0.3) < 5 * math.sqrt(0.21 / acc.numel())
