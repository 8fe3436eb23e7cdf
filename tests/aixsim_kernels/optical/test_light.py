"""Light: the noise of counted photons, what is taken for it, and pixels that differ."""

import math

import pytest
import torch
from aixsim_kernels import Defects, Light, optical_attention, optical_linear
from aixsim_kernels.common.noise import Place, normal_noise, normal_table, placed
from aixsim_kernels.optical import definition
from aixsim_kernels.optical.light import margins
from aixsim_kernels.optical.pixels import brightness
from aixsim_kernels.optical.settings import Settings, with_physics
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("passes")
KEY = torch.tensor(2**40 + 3)
UNSET = [math.inf, -math.inf]
LINEAR = torch.tensor([[-3.0, 3.5], [-2.5, 3.0], [-40.0, 50.0], [0.5, 0.7]])
ATTENTION = torch.tensor(
    [[-3.0, 3.5], [-2.5, 3.0], [-12.0, 11.0], [-3.0, 2.5], [-2.0, 2.5], [0.5, 0.7], [0.1, 0.1]]
)
LIGHTS = [
    Light(0.3),
    Light(5.0, is_offset=True),
    Light(1.0, read_noise=3.0),
    Light(2.0, is_offset=True, read_noise=9.0),
]
DEFECTS = [None, Defects(0.1, 0.02, 77)]


def signed(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(x, w, ranges=LINEAR, key=KEY, bias=None, **how):
    how = {"stream": 3, "levels": 256, "lut_min": 0.02, "noise": True} | how
    return optical_linear(x, w, bias, ranges, key, **how)


def attention(q, k, v, mask=None, ranges=ATTENTION, key=KEY, **how):
    how = {"stream": 3, "levels": 256, "lut_min": 0.02, "noise": True} | how
    how = {"scale": 0.35, "is_causal": True, "attention_range": "rowmax"} | how
    return optical_attention(q, k, v, mask, ranges, key, **how)


def with_offset(defects, light):
    return defects and defects._replace(is_offset=light is not None and light.is_offset)


# --- the normal numbers


def test_normal_numbers_are_the_inverse_of_the_distribution():
    i = torch.arange(-32768, 32768, dtype=torch.float64)
    exact = torch.special.ndtri((i + 32768.5) / 65536)
    found = normal_table(torch.device("cpu")).double()
    assert (found - exact).abs().max() < 3e-4
    assert torch.equal(found.flip(0), -found)
    assert abs(found.square().mean() - 1) < 2e-4
    assert abs(found.pow(4).mean() / found.square().mean() ** 2 - 3) < 1e-3


def test_normal_noise_is_one_number_an_output():
    z = normal_noise(400, 301, KEY, 9)
    assert z.shape == (400, 301) and z.dtype == torch.float32
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.01
    assert not torch.equal(z, normal_noise(400, 301, KEY, 10))
    part = normal_noise(3, 100, placed(KEY, Place(3, 400, 7, first_column=20)), 9)
    assert torch.equal(part, z[7:10, 20:120])


# --- photons, one by one


def operands(kind, k):
    """Rows and columns of a product: what both modulators show, float64."""
    a, b = signed(24, k, seed=1).double(), signed(k, 20, seed=2).double() / k**0.5
    if kind == "relu":
        a = a.relu()
    if kind == "outliers":
        a[:, : max(1, k // 32)] *= 12
    return a, b


def counted(a, b, photons, is_offset, draws):
    """Decoded sums of Poisson counts, (draws, M, N), and the light's mean a multiplication."""
    generator = torch.Generator().manual_seed(7)
    if is_offset:
        lo_a, lo_b = a.min(), b.min()
        rails = [(1, a - lo_a, b - lo_b)]
        # what the offsets add is known exactly
        known = a @ b - (a - lo_a) @ (b - lo_b)
    else:
        rails = [
            (sign_a * sign_b, (sign_a * a).relu(), (sign_b * b).relu())
            for sign_a in (1, -1)
            for sign_b in (1, -1)
        ]
        known = torch.zeros_like(a @ b)
    light = sum(one @ other for _, one, other in rails)
    electron = light.mean() / a.shape[1] / photons
    total = known.expand(draws, -1, -1).clone()
    for sign, one, other in rails:
        intensity = (one @ other / electron).expand(draws, -1, -1)
        total += sign * electron * torch.poisson(intensity, generator)
    return total, light, electron


@pytest.mark.parametrize("kind", ["signed", "relu", "outliers"])
@pytest.mark.parametrize("is_offset", [False, True])
@pytest.mark.parametrize("k", [16, 64, 384])
@pytest.mark.parametrize("photons", [0.05, 1.0, 100.0])
def test_the_variance_is_that_of_counted_photons(kind, is_offset, k, photons):
    """Light that makes noise is what the definition says it is, in all four passes or in one."""
    draws = 400
    a, b = operands(kind, k)
    total, light, electron = counted(a, b, photons, is_offset, draws)
    how = Settings(3, 256, 0.0, True, photons=photons, offset=is_offset)
    lit = definition.light(a, b.mT, a.min(), b.min(), how)
    assert torch.allclose(lit, light)
    ratio = total.var(0) / (electron * lit)
    # a variance of n draws scatters by sqrt(2 / n), more where few photons come: kurtosis 3 + 1 / n
    few = 1 / (electron * lit).mul(1 / electron**2).mean()
    error = math.sqrt((2 + few) / draws / ratio.numel())
    assert abs(ratio.mean() - 1) < 5 * error
    assert (total.mean(0) - a @ b).abs().mul((draws / (electron * lit)).sqrt()).max() < 6


@pytest.mark.parametrize("photons", [0.3, 5.0])
@pytest.mark.parametrize("read_noise", [0.0, 4.0])
@pytest.mark.parametrize("is_offset", [False, True])
def test_an_operation_scatters_as_counts_do(is_offset, read_noise, photons):
    """The noise that comes out of the operation, beside the counts' own."""
    x, w = signed(16, 96, seed=1), signed(12, 96, seed=2)
    light = Light(photons, is_offset, read_noise)
    ranges = torch.tensor([[-4.0, 4.0], [-4.0, 4.0], [-4000.0, 4000.0], UNSET])
    how = {"light": light, "levels": 65536, "lut_min": 0.0, "ranges": ranges}
    still = linear(x, w, **how, noise=False)[0].double()
    many = torch.stack([linear(x, w, **how, key=KEY + i)[0].double() - still for i in range(400)])
    lo = torch.tensor(-4.0, dtype=torch.float64)
    settings_ = Settings(3, 65536, 0.0, True, photons=photons, offset=is_offset)
    lit = definition.light(x.double(), w.double(), lo, lo, settings_)
    electron = lit.mean() / 96 / photons
    reads = 1 if is_offset else 4
    expected = electron * lit + reads * (electron * read_noise) ** 2
    ratio = many.var(0) / expected
    assert abs(ratio.mean() - 1) < 0.03
    # margins take the rest: by 10 % of the deviation where nothing else scatters
    assert (ratio.sqrt() - 1).square().mean().sqrt() < 0.12
    assert many.mean().abs() < 5 * expected.mean().sqrt() / math.sqrt(many.numel())


@pytest.mark.parametrize("kind", ["signed", "relu", "outliers"])
@pytest.mark.parametrize(("k", "most"), [(64, 0.1), (384, 0.05), (1408, 0.03)])
def test_margins_make_the_light_to_a_tenth_of_the_noise(kind, k, most):
    a, b = operands(kind, k)
    exact = a.abs() @ b.abs()
    mean, of_column = margins(b.mT.float())
    taken = (a.float().abs() @ mean)[:, None] * of_column
    error = (taken / exact).sqrt() - 1
    assert error.square().mean().sqrt() < most
    # rows have the light that they have
    assert torch.allclose(taken.sum(1).double(), exact.sum(1), rtol=1e-4)


# --- the operations against the definition


def levels_of(y, bounds, levels):
    lo, hi = bounds.double()
    return (y.double() - lo) / (hi - lo) * (levels - 1)


@pytest.mark.parametrize("light", [*LIGHTS, None], ids=str)
@pytest.mark.parametrize("defects", DEFECTS, ids=["", "pixels"])
@pytest.mark.parametrize("levels_out", [0, 64, 1000])
@pytest.mark.parametrize("is_set", [True, False])
def test_linear_is_the_definition(light, defects, levels_out, is_set):
    x, w, bias = signed(33, 70, seed=1), signed(18, 70, seed=2), signed(18, seed=3)
    defects = with_offset(defects, light)
    ranges = LINEAR.clone()
    if not is_set:
        ranges[-1] = torch.tensor(UNSET)
    ranges = ranges if light else ranges[:3]
    how = {"light": light, "defects": defects, "levels_out": levels_out}
    y, seen = linear(x, w, ranges, **how)
    s = with_physics(Settings(3, 256, 0.02, True, levels_out=levels_out), light, defects)
    expected, _ = definition.optical_linear(x.double(), w.double(), None, ranges.double(), KEY, s)
    off = levels_of(y, ranges[2], s.detector_levels) - levels_of(
        expected, ranges[2], s.detector_levels
    )
    assert (off.abs() > 0.01).double().mean() < 0.01, off.abs().max()
    assert off.abs().max() < 1.01
    if light:
        lit = definition.light(
            definition.modulate(x.double(), ranges[0].double(), 256),
            definition.shown_by_pixels(
                definition.modulate(w.double(), ranges[1].double(), 256, 0.02),
                ranges[1].double(),
                brightness(w, KEY, s).double(),
                s,
            ),
            ranges[0, 0].double(), ranges[1, 0].double(), s,
        )  # fmt: skip
        low, high, _ = seen[3].tolist()
        assert -low == high == pytest.approx(float(lit.mean()) / 70, rel=1e-5)
    # digital, behind the detector
    assert torch.allclose(linear(x, w, ranges, bias=bias, **how)[0], y + bias, atol=1e-5)


@pytest.mark.parametrize("light", [*LIGHTS, None], ids=str)
@pytest.mark.parametrize("defects", DEFECTS, ids=["", "pixels"])
@pytest.mark.parametrize("rowmax", ["rowmax", "unit"])
@pytest.mark.parametrize("is_set", [True, False])
def test_attention_is_the_definition(light, defects, rowmax, is_set):
    q, k, v = signed(2, 4, 13, 8), signed(2, 2, 13, 8, seed=1), signed(2, 2, 13, 6, seed=2)
    defects, ranges = with_offset(defects, light), ATTENTION.clone()
    if not is_set:
        ranges[-2:] = torch.tensor(UNSET)
    ranges = ranges if light else ranges[:5]
    how = {"light": light, "defects": defects, "levels_out": 1000}
    out, seen, kept = attention(q, k, v, ranges=ranges, attention_range=rowmax, **how)
    s = Settings(3, 256, 0.02, True, None, 0.35, True, rowmax == "rowmax", 1000)
    s = with_physics(s, light, defects)
    expected, _, kept_expected = definition.optical_attention(
        q.double(), k.double(), v.double(), None, ranges.double(), KEY, s
    )
    # a probability at a tie moves one output a little
    close = (out - expected).abs() < 2e-3
    assert close.double().mean() > 0.98, (out - expected).abs().max()
    assert kept == pytest.approx(float(kept_expected), rel=1e-3)
    if light:
        assert (seen[5:, 0] == -seen[5:, 1]).all() and (seen[5:, 1] > 0).all()


def test_the_light_of_an_attention_is_what_its_mask_lets_through():
    """Keys that nobody attends to shine on nothing; padding changes no lamp."""
    q, k, v = signed(1, 2, 9, 8), signed(1, 2, 9, 8, seed=1), signed(1, 2, 9, 8, seed=2)
    light = {"light": Light(1.0), "noise": False}
    _, seen, _ = attention(q[:, :, :6], k[:, :, :6], v[:, :, :6], **light)
    mask = torch.zeros(9, 9, dtype=torch.bool)
    mask[:6, :6] = True
    _, own, _ = attention(q, k, v, mask, **light)
    assert torch.allclose(own[5:, :2], seen[5:, :2], rtol=1e-4)
    k[:, :, 6:] *= 100
    assert torch.allclose(attention(q, k, v, mask, **light)[1][5:, :2], seen[5:, :2], rtol=1e-4)
    k[:, :, :6] *= 3
    assert not torch.allclose(attention(q, k, v, mask, **light)[1][5:, :2], seen[5:, :2], rtol=0.1)


def test_without_end_of_light_nothing_changes():
    x, w = signed(9, 40), signed(7, 40, seed=1)
    y, seen = linear(x, w, LINEAR[:3])
    again, seen_again = linear(x, w, LINEAR[:3], levels_out=256, defects=Defects(0.0, 0.0, 5))
    assert torch.equal(y, again) and torch.equal(seen, seen_again)
    # a little less of it is nearly without noise
    quiet, _ = linear(x, w, LINEAR, light=Light(1e9))
    still, _ = linear(x, w, LINEAR[:3], noise=False)
    assert torch.equal(quiet, still)
    # without noise there is none of light either
    assert torch.equal(linear(x, w, LINEAR, light=Light(0.01), noise=False)[0], still)


@pytest.mark.parametrize("levels_out", [0, 2, 5, 3000])
def test_detectors_have_levels_of_their_own(levels_out):
    x, w = signed(60, 40), signed(50, 40, seed=1)
    ranges = torch.tensor([[-4.0, 4.0], [-4.0, 4.0], [-30.0, 30.0]])
    how = {"levels": 16, "lut_min": 0.0, "levels_out": levels_out}
    y, _ = linear(x, w, ranges, **how)
    found = len(y.unique())
    assert found == levels_out if 0 < levels_out < 99 else found <= 16 if not levels_out else True
    assert levels_out != 3000 or 256 < found <= 3000
    q, k, v = (signed(1, 2, 30, 8, seed=i) for i in range(3))
    bounds = torch.tensor([[-4.0, 4.0], [-4.0, 4.0], [-20.0, 20.0], [-4.0, 4.0], [-3.0, 3.0]])
    out, *_ = attention(q, k, v, ranges=bounds, **how, attention_range="unit")
    found = len(out.unique())
    assert found == levels_out if 0 < levels_out < 6 else found <= (levels_out or 16)
    assert levels_out != 3000 or found > 100


def test_less_light_is_more_noise():
    x, w = signed(64, 128), signed(64, 128, seed=1)
    still, _ = linear(x, w, LINEAR[:3], noise=False)
    found = [
        float((linear(x, w, LINEAR, light=Light(photons), levels_out=65536)[0] - still).std())
        for photons in (0.1, 1.0, 10.0)
    ]
    assert found[0] / found[1] == pytest.approx(math.sqrt(10), rel=0.1)
    assert found[1] / found[2] == pytest.approx(math.sqrt(10), rel=0.15)


# --- gradients, recomputation, parts


@pytest.mark.parametrize("defects", DEFECTS, ids=["", "pixels"])
@pytest.mark.parametrize("light", LIGHTS[:2], ids=str)
def test_gradients_are_the_definitions(light, defects):
    x, w = signed(20, 30).requires_grad_(), signed(12, 30, seed=1).requires_grad_()
    defects = with_offset(defects, light)
    g = signed(20, 12, seed=4)
    found = torch.autograd.grad(linear(x, w, light=light, defects=defects)[0], (x, w), g)
    s = with_physics(Settings(3, 256, 0.02, True), light, defects)
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, w))
    y, _ = definition.optical_linear(x64, w64, None, LINEAR.double(), KEY, s)
    for mine, theirs in zip(found, torch.autograd.grad(y, (x64, w64), g.double()), strict=True):
        assert torch.allclose(mine.double(), theirs, atol=1e-4)


@pytest.mark.parametrize("defects", DEFECTS, ids=["", "pixels"])
@pytest.mark.parametrize("light", LIGHTS[:2], ids=str)
def test_gradients_of_attention_are_the_definitions(light, defects):
    tensors = [signed(2, 4, 11, 8), signed(2, 2, 11, 8, seed=1), signed(2, 2, 11, 8, seed=2)]
    tensors = [t.requires_grad_() for t in tensors]
    defects, g = with_offset(defects, light), signed(2, 4, 11, 8, seed=4)
    found = torch.autograd.grad(attention(*tensors, light=light, defects=defects)[0], tensors, g)
    s = with_physics(Settings(3, 256, 0.02, True, None, 0.35, True, True), light, defects)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    out, *_ = definition.optical_attention(*doubles, None, ATTENTION.double(), KEY, s)
    for mine, theirs in zip(found, torch.autograd.grad(out, doubles, g.double()), strict=True):
        assert (mine - theirs).norm() < 2e-2 * theirs.norm()


def test_recomputation_sees_the_same_photons():
    tensors = [signed(1, 2, 9, 8, seed=i).requires_grad_() for i in range(3)]
    x, w = signed(9, 8).requires_grad_(), signed(8, 8, seed=1).requires_grad_()
    ranges = torch.cat([LINEAR[:3], torch.tensor([UNSET])])

    def layer(x):
        return linear(x, w, ranges, light=Light(1.0))[0]

    def attend(*qkv):
        return attention(*qkv, light=Light(1.0))[0]

    for call, inputs in ((layer, [x]), (attend, tensors)):
        plain = torch.autograd.grad(call(*inputs).sum(), inputs)
        again = checkpoint(call, *inputs, use_reentrant=False)
        for a, b in zip(plain, torch.autograd.grad(again.sum(), inputs), strict=True):
            assert torch.equal(a, b)


@settings(max_examples=20)
@given(st.integers(0, 9), st.integers(0, 7), st.booleans())
def test_a_part_of_a_linear_has_the_noise_of_the_whole(row, pair, is_offset):
    """Of one light: margins are those of the columns that are there, so all of them are."""
    x, w = torch.randint(-16, 17, (10, 16)) / 8, torch.randint(-16, 17, (16, 16)) / 8
    how = {"light": Light(1.0, is_offset), "lut_min": 0.0, "levels_out": 64}
    whole, _ = linear(x, w, **how)
    key = placed(KEY, Place(10 - row, 10, row))
    part, _ = linear(x[row:], w, **how, key=key)
    # sums in another order seldom move a level
    assert (part == whole[row:]).double().mean() > 0.97
    specimen = Defects(0.2, 0.1, 5)
    whole, _ = linear(x, w, LINEAR[:3], lut_min=0.0, defects=specimen)
    key = placed(KEY, Place(10 - row, 10, row, first_column=2 * pair))
    part, _ = linear(x[row:], w[2 * pair :], LINEAR[:3], lut_min=0.0, defects=specimen, key=key)
    assert (part == whole[row:, 2 * pair :]).double().mean() > 0.97


# --- pixels


@pytest.mark.parametrize("shape", [(64, 96), (2, 3, 50, 16)])
def test_pixels_are_those_of_the_specimen(shape):
    x = torch.empty(shape)
    s = Settings(1, 256, 0.0, True, gain_std=0.1, dead=0.05, device=9)
    bright = brightness(x, KEY, s)
    assert bright.shape == (shape if len(shape) == 2 else shape[1:])
    assert torch.equal(bright, brightness(x, KEY + 1, s._replace(stream=2)))
    assert not torch.equal(bright, brightness(x, KEY, s._replace(device=10)))
    assert not torch.equal(bright, brightness(x, KEY, s, array=1))
    dark = bright == 0
    assert abs(dark.double().mean() - 0.05) < 4 * math.sqrt(0.05 / bright.numel())
    assert abs(bright[~dark].std() - 0.1) < 0.005 and abs(bright[~dark].mean() - 1) < 0.01
    # a pixel is the same however many there are of them
    longer = brightness(torch.empty(*shape[:-2], shape[-2] + 7, shape[-1]), KEY, s)
    assert torch.equal(longer[..., : shape[-2], :], bright)


def test_rare_dead_pixels_are_rare():
    s = Settings(1, 256, 0.0, True, dead=2e-6, device=3)
    dead = sum(
        int((brightness(torch.empty(1000, 1000), KEY, s._replace(device=i)) == 0).sum())
        for i in range(8)
    )
    assert 5 <= dead <= 30


def test_pixels_of_some_heads():
    s = Settings(1, 256, 0.0, True, gain_std=0.1, device=9)
    whole = brightness(torch.empty(1, 6, 5, 4), KEY, s, repeats=2)
    key = placed(KEY, Place(5, 5, 0, 12, 4))
    assert torch.equal(brightness(torch.empty(1, 2, 5, 4), key, s, repeats=2), whole[2:4])


def test_a_dark_pixel_stands_for_no_light():
    x, w = signed(5, 12), signed(4, 12, seed=1)
    ranges = LINEAR[:3]
    for is_offset, value in ((False, 0.0), (True, -2.5)):
        specimen = Defects(0.0, 0.3, 4, is_offset)
        s = with_physics(Settings(3, 256, 0.0, False), None, specimen)
        dark = brightness(w, KEY, s) == 0
        assert 0 < dark.sum() < dark.numel()
        how = {"noise": False, "lut_min": 0.0, "levels": 65536}
        found, _ = linear(x, w, ranges, defects=specimen, **how)
        expected, _ = linear(x, w.masked_fill(dark, value), ranges, **how)
        assert torch.allclose(found, expected, atol=2e-3)
