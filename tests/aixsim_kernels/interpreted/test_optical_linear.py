"""The optical linear's Triton kernels compute what the CPU computes."""

import pytest
import torch
import triton
from aixsim_kernels import (
    are_known_set,
    clipped_in,
    empty_ranges,
    empty_seen,
    observed_in,
    uniform_noise,
)
from aixsim_kernels.common import triton_noise
from aixsim_kernels.common.noise import Place, placed, row_keys, seed_word
from aixsim_kernels.optical.linear import cpu
from aixsim_kernels.optical.linear import triton as gpu
from aixsim_kernels.optical.settings import Settings
from triton import language as tl

KEY = torch.tensor(-987654321987654)
STREAM = 0x123456789ABC
HOW = Settings(STREAM, levels=256, lut_min=0.02, noise=True)
SET = torch.tensor([[-3.0, 2.5], [-0.12, 0.14], [-1.1, 1.2]])


def operands(rows, depth, columns, dtype):
    generator = torch.Generator().manual_seed(rows + depth)
    x = torch.randn(rows, depth, generator=generator)
    weight = torch.randn(columns, depth, generator=generator) * 0.05 + 0.003
    bias = torch.randn(columns, generator=generator)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def compare(
    run,
    x,
    weight,
    bias,
    ranges,
    levels=256,
    lut_min=0.02,
    noise=True,
    out_dtype=torch.float32,
    key=KEY,
    **physics,
):
    """Differences of the outputs in levels; everything else is checked here."""
    how = (ranges, key, Settings(STREAM, levels, lut_min, noise, **physics), out_dtype)
    found = run(gpu.forward, x, weight, bias, *how)
    expected = cpu.forward(x, weight, bias, *how)
    y, seen, used, code, inside = expected
    assert torch.equal(found[3], code) and torch.equal(found[4], inside)
    mine, clipped = clipped_in(found[1]), clipped_in(seen)
    assert torch.allclose(mine[:2], clipped[:2], rtol=1e-6, atol=0)
    # a last bit decides whether a sum lies beyond the end of a range, which may be its own
    assert (mine[2] - clipped[2]).abs() <= (0.01 if levels > 256 else 2.1 / y.numel())
    observed = observed_in(seen)
    assert torch.equal(observed_in(found[1])[:2], observed[:2])
    scale = observed[2].abs().max().clamp(max=1e6)
    for mine, theirs in ((observed_in(found[1]), observed), (found[2], used)):
        assert torch.allclose(mine, theirs, rtol=0, atol=float(scale) * 1e-5)
    step = (used[2, 1] - used[2, 0]) / (how[2].detector_levels - 1)
    return (found[0] - y).abs() / step


@pytest.mark.parametrize("place", [Place(7, 30, 5), Place(42, 50, 8, first_column=12)])
def test_a_part_of_a_whole(run, place):
    operand = operands(42, 50, 33, torch.float32)
    difference = compare(run, *operand, SET, key=placed(KEY, place))
    assert difference.max() <= 0.01


LIGHTS = [
    {"photons": 0.5},
    {"photons": 2.0, "offset": True, "levels_out": 64},
    {"photons": 1.0, "read_noise": 2.0, "levels_out": 1000},
    {"photons": 3.0, "offset": True, "read_noise": 5.0, "noise": False},
]


@pytest.mark.parametrize("unset", [(), (3,), (0, 1, 2, 3), (2, 3)])
@pytest.mark.parametrize("light", LIGHTS, ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16])
def test_light(run, light, unset, out_dtype):
    ranges = torch.cat([SET, torch.tensor([[0.04, 0.06]])])
    ranges[list(unset)] = empty_ranges(1)
    x, weight, bias = operands(37, 130, 34, torch.float32)
    difference = compare(run, x, weight, bias, ranges, out_dtype=out_dtype, **light)
    # noise of many levels, made of a logarithm: a last bit moves some across a tie
    assert difference.max() < 1.5
    rare = 2e-2 if out_dtype == torch.float16 or light.get("levels_out") == 1000 else 2e-3
    assert (difference > 0.5).float().mean() <= rare


def test_light_on_a_part_of_a_whole(run):
    operand = operands(42, 50, 33, torch.float32)
    ranges = torch.cat([SET, torch.tensor([[0.04, 0.06]])])
    key = placed(KEY, Place(7, 30, 5, first_column=12))
    assert (compare(run, *operand, ranges, key=key, photons=1.0) > 0.5).float().mean() < 2e-3


def test_light_of_a_nan_sets_no_lamp(run):
    x, weight, _ = operands(6, 10, 4, torch.float32)
    x[2, 3] = float("nan")
    how = (empty_ranges(4), KEY, HOW._replace(photons=1.0), torch.float32)
    for forward in (gpu.forward, cpu.forward):
        seen = run(forward, x, weight, None, *how)[1]
        assert torch.equal(seen[3, :2], empty_seen(1)[0, :2])


@pytest.mark.parametrize("unset", [False, True])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((37, 50, 33), {}),
        ((1, 16, 40), {"levels": 16, "lut_min": 0.0, "noise": False}),
        ((9, 33, 17), {"levels": 65536}),
        ((70, 64, 5), {"levels": 2}),
    ],
)
def test_float32_codes_are_equal(run, shape, options, unset):
    ranges = empty_ranges(3) if unset else SET
    x, weight, bias = operands(*shape, torch.float32)
    assert compare(run, x, weight, bias, ranges, **options).max() < 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_16_bit_codes_are_at_most_one_apart_and_rarely(run, dtype):
    """The operands are 16 bits where the result is, whatever the inputs (autocast)."""
    x, weight, bias = operands(96, 130, 120, dtype)
    # float16, which tells the levels apart beside the bias
    difference = compare(run, x, weight, bias, SET, out_dtype=torch.float16)
    assert difference.max() < 1.5
    # of 11,520 elements
    assert (difference > 0.5).float().mean() <= 2e-4


def test_non_contiguous_operands(run):
    x, weight, bias = operands(20, 24, 18, torch.float32)
    x, weight = x.T.contiguous().T, weight.T.contiguous().T
    assert compare(run, x, weight, bias, SET).max() < 0.5


def test_no_bias_no_rows(run):
    x, weight, _ = operands(0, 8, 5, torch.float32)
    y, seen, _, code, inside = run(
        gpu.forward, x, weight, None, empty_ranges(3), KEY, HOW, torch.bfloat16
    )
    assert (y.shape, y.dtype) == ((0, 5), torch.bfloat16)
    assert code.shape == (0, 8) and inside.numel() == 0
    assert torch.equal(seen[[0, 2]], empty_seen(2))


@pytest.mark.parametrize("unset", [[], [2], [0, 1, 2]])
@pytest.mark.parametrize("where", ["input", "weight"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_shares_that_are_clipped_where_something_is_not_finite(run, bad, where, unset):
    x, weight, _ = operands(6, 10, 4, torch.float32)
    (x if where == "input" else weight)[2, 3] = bad
    ranges = SET.clone()
    ranges[unset] = empty_ranges(1)
    found = run(gpu.forward, x, weight, None, ranges, KEY, HOW, torch.float32)[1]
    expected = cpu.forward(x, weight, None, ranges, KEY, HOW, torch.float32)[1]
    found, expected = clipped_in(found), clipped_in(expected)
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)
    assert not expected[unset].any() and ((expected >= 0) & (expected <= 1)).all()
    # what is not finite is clipped by a range that was set
    assert (expected[0 if where == "input" else 1] > 0) == (len(unset) < 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite(run, bad):
    x, weight, _ = operands(6, 10, 4, torch.float32)
    x[2, 3] = bad
    y, seen, *_ = run(gpu.forward, x, weight, None, SET, KEY, HOW, torch.float32)
    # NaN in, NaN out in its own row; an infinity is clipped; neither gets into a range
    assert torch.equal(y.isnan().any(1), torch.arange(6) == 2) == (bad != bad)
    assert torch.equal(seen[0, :2], empty_seen(1)[0, :2])
    assert seen[2].isfinite().all() == (bad == float("inf"))
    weight[1, 0] = float("nan")
    y, *_ = run(gpu.forward, x, weight, None, SET, KEY, HOW, torch.float32)
    assert y[:, 1].isnan().all()


def test_a_range_without_width(run):
    x, weight, _ = operands(6, 10, 4, torch.float32)
    flat = torch.tensor([[1.0, 1.0], [-0.1, 0.1], [0.5, 0.5]])
    how = HOW._replace(lut_min=0.0)
    y, *_ = run(gpu.forward, x, weight, None, flat, KEY, how, torch.float32)
    assert (y == 0.5).all()


def test_what_lies_beyond_a_range_without_width(run):
    """As a layer whose weights are zero leaves it; the next weights are small."""
    x, weight, _ = operands(6, 10, 4, torch.float32)
    flat = torch.tensor([[-3.0, 2.5], [-3e-6, 3e-6], [0.0, 0.0]])
    how = (1e-5 * weight, None, flat, KEY, HOW, torch.float16)
    found, expected = run(gpu.forward, x, *how), cpu.forward(x, *how)
    mine, theirs = found[1][2], expected[1][2]
    assert torch.allclose(mine, theirs, rtol=1e-3, atol=0) and mine[2] == theirs[2] == 1


@pytest.mark.parametrize("shape", [(0, 8, 5), (3, 8, 0)])
def test_gradients_of_nothing_while_no_range_was_ever_set(run, shape):
    x, weight, _ = operands(*shape, torch.float32)
    unset = empty_ranges(3)
    y, _, used, code, inside = run(gpu.forward, x, weight, None, unset, KEY, HOW, torch.float32)
    grads = run(gpu.backward, y, code, inside, weight, used, KEY, HOW, torch.float32, True)
    for grad, shape in zip(grads, (x.shape, weight.shape, (len(weight),)), strict=True):
        assert grad.shape == shape and not grad.any()


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_gradients(run, dtype, rel):
    x, weight, bias = operands(24, 40, 18, dtype)
    *_, used, code, inside = cpu.forward(x, weight, bias, SET, KEY, HOW, torch.float32)
    grad = torch.randn(24, 18, generator=torch.Generator().manual_seed(3)).to(dtype)
    saved = (code, inside, weight, used, KEY, HOW, dtype, True)
    for mine, theirs in zip(
        run(gpu.backward, grad, *saved), cpu.backward(grad, *saved), strict=True
    ):
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).float().norm() <= rel * theirs.float().norm()


@triton.jit
def _keys_of(rows_ptr, key_ptr, seed, out_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    word = triton_noise.row_keys(tl.load(rows_ptr + offsets), tl.load(key_ptr), seed)
    tl.store(out_ptr + offsets, word.to(tl.int32, bitcast=True))


def test_row_keys_of_large_rows(run):
    rows = torch.tensor([0, 1, 2**31, 2**40 + 7], dtype=torch.int64)
    seed = seed_word(STREAM, 3)

    def keys_of(rows, key):
        out = torch.empty(4, dtype=torch.int32, device=rows.device)
        _keys_of[(1,)](rows, key, seed, out, N=4)
        return out

    assert torch.equal(run(keys_of, rows, KEY), row_keys(rows, KEY, seed))


@pytest.mark.parametrize("paired", [True, False])
def test_noise_is_bit_equal(run, paired):
    keys = row_keys(torch.arange(32), KEY, seed_word(STREAM, 0))

    def noise_of(keys):
        out = torch.empty(32, 64, device=keys.device)
        _noise_of[(1,)](keys, out, ROWS=32, PAIRS=32, PAIRED=paired)
        return out

    assert torch.equal(run(noise_of, keys), uniform_noise(32, 64, KEY, STREAM))


@triton.jit
def _noise_of(keys_ptr, out_ptr, ROWS: tl.constexpr, PAIRS: tl.constexpr, PAIRED: tl.constexpr):
    rows = tl.arange(0, ROWS)
    keys = tl.load(keys_ptr + rows).to(tl.uint32, bitcast=True)
    columns = tl.arange(0, 2 * PAIRS)[None, :]
    if PAIRED:
        found = triton_noise.digits_of_pairs(keys, tl.arange(0, PAIRS))
    else:
        found = triton_noise.digits(keys[:, None], columns)
    tl.store(out_ptr + rows[:, None] * (2 * PAIRS) + columns, triton_noise.uniform(found))


@pytest.mark.parametrize("unset", [[], [1], [2]])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16])
def test_what_the_host_knows_of_ranges_changes_no_bit(run, unset, out_dtype):
    ranges, inputs = SET.clone(), [*operands(37, 50, 33, torch.float32)]
    ranges[unset] = empty_ranges(1)
    known = []

    def forward(ranges, *inputs):
        known.append(are_known_set(ranges))
        return gpu.forward(*inputs, ranges, KEY, HOW, out_dtype)

    found = run(forward, ranges, *inputs)
    expected = run(lambda ranges, *rest: forward(ranges.clone(), *rest), ranges, *inputs)
    assert known == [not unset, False]
    assert all(map(torch.equal, found, expected))
