import math

import pytest
import torch
import torch.nn.functional as F
from aixsim_kernels import clipped_in, empty_ranges, observed_in, optical_linear
from aixsim_kernels.optical import definition
from aixsim_kernels.optical.blocks import BLOCK
from aixsim_kernels.optical.linear import cpu
from aixsim_kernels.optical.settings import Settings
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("passes")
KEY = torch.tensor(0x123456789ABCDEF)
RANGES = torch.tensor([[-2.5, 2.0], [-2.0, 2.5], [-12.0, 14.0]])
NONE_SEEN = [math.inf, -math.inf]


def tensors(m, k, n, dtype=torch.float32, seed=0, bias=True):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(m, k), (n, k), (n,)]
    x, w, b = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return x, w, b if bias else None


def run(x, w, b=None, ranges=RANGES, key=KEY, **settings):
    defaults = {"stream": 3, "levels": 256, "lut_min": 0.02004, "noise": True}
    y, seen = optical_linear(x, w, b, ranges, key, **{**defaults, **settings})
    return y, observed_in(seen)


def clipped(x, w, ranges=RANGES, **settings):
    how = {"stream": 3, "levels": 256, "lut_min": 0.02004, "noise": True} | settings
    return clipped_in(optical_linear(x, w, None, ranges, KEY, **how)[1]).tolist()


def defined(x, w, b=None, ranges=RANGES, levels=256, lut_min=0.02004, noise=True):
    """By the definition, in float64: outputs, raw accumulator, its noise."""
    x, w, b = (None if t is None else t.double() for t in (x, w, b))
    how = Settings(3, levels, lut_min, noise)
    y, (_, _, acc) = definition.optical_linear(x, w, b, ranges.double(), KEY, how)
    return y, acc, definition.noise(acc, KEY, how, op=0)


def exact_positions(x, w, ranges, levels, lut_min, noise):
    """Where each output lies on the detector's grid before it is rounded, in float64."""
    _, acc, u = defined(x, w, None, ranges, levels, lut_min, noise)
    return definition.position(acc, ranges[2].double(), levels) + u


def codes_of(y, ranges, levels):
    lo, hi = ranges[2].double()
    return (y.double() - lo) / (hi - lo) * (levels - 1)


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("m,k,n", [(1, 1, 1), (33, 65, 17), (64, 384, 100), (20, 1408, 31)])
def test_codes_are_the_definitions(m, k, n, noise):
    x, w, _ = tensors(m, k, n)
    ranges = RANGES * torch.tensor([[1.0], [1.0], [k**0.5 / 8]])
    y, _ = run(x, w, ranges=ranges, noise=noise)
    codes = codes_of(y, ranges, 256)
    assert (codes - codes.round()).abs().max() < 1e-3
    position = exact_positions(x, w, ranges, 256, 0.02004, noise)
    tie = (position.frac().abs() - 0.5).abs() < 1e-6 * 256
    wrong = (codes.round() != position.round().clamp(0, 255)) & ~tie
    assert not wrong.any(), f"{wrong.sum()} of {wrong.numel()} codes differ"
    expected, *_ = defined(x, w, ranges=ranges, noise=noise)
    assert ((codes.round() == codes_of(expected, ranges, 256).round()) | tie).all()
    assert tie.double().mean() < 0.01


@given(
    m=st.integers(1, 40),
    k=st.integers(1, 40),
    n=st.integers(1, 40),
    levels=st.integers(2, 65536),
    lut_min=st.sampled_from([0.0, 0.02, 0.3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bounds=st.lists(st.tuples(st.floats(-8, 8), st.floats(0.01, 8)), min_size=3, max_size=3),
)
@settings(max_examples=80, deadline=None)
def test_any_shape_range_level_and_type(m, k, n, levels, lut_min, dtype, bounds):
    x, w, _ = tensors(m, k, n, dtype)
    ranges = torch.tensor([[lo, lo + width] for lo, width in bounds])
    y, seen = optical_linear(
        x, w, None, ranges, KEY, stream=3, levels=levels, lut_min=lut_min, noise=True
    )
    assert y.dtype == dtype
    assert observed_in(seen)[0].tolist() == [x.min().item(), x.max().item()]
    y, _ = run(x.float(), w.float(), ranges=ranges, levels=levels, lut_min=lut_min)
    codes = codes_of(y, ranges, levels)
    position = exact_positions(x, w, ranges, levels, lut_min, True)
    # how far float32 may be off: its rounding of K products, and operands that were ties
    size = ranges[:2].abs().amax(1)
    step = (ranges[:, 1] - ranges[:, 0]) / (levels - 1)
    tied = sum(
        (definition.position(t.double(), r.double(), levels).frac().abs())
        .sub(0.5)
        .abs()
        .lt(1e-6 * levels)
        .sum()
        for t, r in ((x, ranges[0]), (w, ranges[1]))
    )
    off = k * 4e-7 * size[0] * size[1] + tied * (step[0] * size[1] + step[1] * size[0])
    off = off + tied * lut_min * size[1] * size[0]
    tolerance = 0.5 + off / step[2] + 1e-6 * levels
    assert ((codes - position.clamp(0, levels - 1)).abs() <= tolerance).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_only_rounds_inputs_and_result(dtype):
    x, w, b = tensors(19, 70, 23, dtype)
    y, observed = run(x, w, b)
    full, full_observed = run(x.float(), w.float(), b.float())
    assert torch.equal(y, full.to(dtype))
    assert torch.equal(observed, full_observed)


def test_bias_is_added_after_the_detector():
    x, w, b = tensors(5, 6, 7)
    with_bias, seen = run(x, w, b)
    without, seen_without = run(x, w)
    torch.testing.assert_close(with_bias, without + b, rtol=0, atol=1e-6)
    assert torch.equal(seen, seen_without)


def test_strides_and_leading_dimensions():
    x, w, b = tensors(24, 10, 5)
    y, observed = run(x, w, b)
    y_nd, observed_nd = run(x.view(2, 3, 4, 10), w, b)
    assert torch.equal(y_nd, y.view(2, 3, 4, 5))
    assert torch.equal(observed_nd, observed)
    y_t, _ = run(x.T.contiguous().T, w.T.contiguous().T, b)
    assert torch.equal(y_t, y)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_empty_batch(shape):
    x = torch.empty(shape, requires_grad=True)
    w = torch.randn(4, 8, requires_grad=True)
    y, observed = run(x, w)
    assert y.shape == (*shape[:-1], 4)
    assert [observed[0].tolist(), observed[2].tolist()] == [NONE_SEEN, NONE_SEEN]
    y.sum().backward()
    assert x.grad.shape == shape
    assert not w.grad.any()


def test_large_batch_is_worked_in_blocks_with_one_noise():
    x, w, b = tensors(2 * BLOCK // 64 + 5, 3, 64)
    y, _ = run(x, w, b)
    again, _ = run(x[: BLOCK // 64], w, b)
    assert torch.equal(y[: BLOCK // 64], again)


def test_observed_is_raw():
    x, w, b = tensors(50, 30, 20)
    tight = RANGES / torch.tensor([[1.0], [1.0], [10.0]])
    _, observed = run(x, w, b, tight)
    assert observed[0].tolist() == [x.min().item(), x.max().item()]
    assert observed[1].tolist() == [w.min().item(), w.max().item()]
    # the accumulator of what the modulators show, but not clamped by the detector
    _, fine = run(x, w, None, torch.cat([tight[:2], torch.tensor([[-99.0, 99.0]])]))
    assert torch.equal(observed[2], fine[2])
    assert observed[2, 0] < 2 * tight[2, 0]
    assert observed[2, 1] > 2 * tight[2, 1]


def test_a_range_never_set_is_calibrated_on_the_batch():
    x, w, b = tensors(50, 30, 20)
    y, observed = run(x, w, b, empty_ranges(3))
    again, _ = run(x, w, b, observed)
    assert torch.equal(y, again)
    mixed = torch.stack([RANGES[0], empty_ranges(1)[0], RANGES[2]])
    y, observed = run(x, w, b, mixed)
    again, _ = run(x, w, b, torch.stack([RANGES[0], observed[1], RANGES[2]]))
    assert torch.equal(y, again)


def test_quantiles_replace_min_and_max():
    x, w, _ = tensors(50, 30, 20)
    _, observed = run(x, w, quantiles=(0.1, 0.9))
    expected = torch.quantile(x, torch.tensor([0.1, 0.9]))
    torch.testing.assert_close(observed[0], expected)
    assert (observed[2].abs() < run(x, w)[1][2].abs()).all()


def test_nan_in_nan_out_and_no_poisoned_range():
    x, w, b = tensors(6, 5, 4)
    x[2, 1] = math.nan
    y, observed = run(x, w, b)
    assert y[2].isnan().all()
    assert y[[0, 1, 3, 4, 5]].isfinite().all()
    assert [observed[0].tolist(), observed[2].tolist()] == [NONE_SEEN, NONE_SEEN]
    assert observed[1].tolist() == [w.min().item(), w.max().item()]


def test_infinite_input_is_clipped():
    x, w, b = tensors(6, 5, 4)
    clipped = x.clone()
    x[2, 1], clipped[2, 1] = math.inf, RANGES[0, 1]
    y, observed = run(x, w, b)
    assert torch.equal(y, run(clipped, w, b)[0])
    assert observed[0].tolist() == NONE_SEEN


@pytest.mark.parametrize("row", [0, 1, 2])
def test_range_without_width(row):
    x, w, _ = tensors(6, 5, 4)
    ranges = RANGES.clone()
    ranges[row] = 0.5
    y, observed = run(x, w, ranges=ranges)
    assert y.isfinite().all()
    assert observed.isfinite().all()
    if row == 2:
        assert (y == 0.5).all()


@pytest.mark.parametrize("levels", [2, 16, 256, 1024])
@pytest.mark.parametrize("ranges", [RANGES, RANGES / 3], ids=["wide", "clipping"])
def test_gradients_are_the_definitions(levels, ranges):
    x, w, b = (t.requires_grad_() for t in tensors(20, 30, 10))
    g = torch.randn(20, 10, generator=torch.Generator().manual_seed(5))
    ours = torch.autograd.grad(run(x, w, b, ranges, levels=levels)[0], (x, w, b), g)
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    y, *_ = defined(*wide, ranges, levels)
    for name, a, e in zip("xwb", ours, torch.autograd.grad(y, wide, g.double()), strict=True):
        torch.testing.assert_close(a, e.float(), rtol=1e-4, atol=1e-4, msg=f"gradient of {name}")


def test_gradients_against_finite_differences():
    x, w, b = (t.requires_grad_() for t in tensors(9, 14, 6))
    g = torch.randn(9, 6, generator=torch.Generator().manual_seed(5))
    y, _ = run(x, w, b, empty_ranges(3), levels=65536, lut_min=0.0, noise=False)
    grads = torch.autograd.grad(y, (x, w, b), g)
    args = [t.detach().double() for t in (x, w, b)]
    for i, grad in enumerate(grads):
        direction = torch.randn(grad.shape, generator=torch.Generator().manual_seed(i)).double()
        ends = [
            (F.linear(*[t + e * direction if j == i else t for j, t in enumerate(args)]) * g).sum()
            for e in (1e-4, -1e-4)
        ]
        slope = (ends[0] - ends[1]) / 2e-4
        torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-3, atol=1e-3)


def share_beyond(t, bounds):
    t = t.double()
    return 1 - ((t >= bounds[0]) & (t <= bounds[1])).double().mean().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("m,k,n", [(1, 1, 1), (33, 65, 17), (600, 90, 40)])
def test_clipped_are_the_shares_beyond_the_ranges(m, k, n, scale, dtype):
    x, w, _ = tensors(m, k, n, dtype, bias=False)
    ranges = RANGES * scale
    found = clipped(x, w, ranges)
    assert found[:2] == pytest.approx([share_beyond(x, ranges[0]), share_beyond(w, ranges[1])])
    _, acc, _ = defined(x, w, None, ranges)
    assert found[2] == pytest.approx(share_beyond(acc, ranges[2].double()), abs=1.01 / acc.numel())


def test_clipped_where_ranges_are_unset_flat_or_quantiles():
    x, w, _ = tensors(40, 30, 20)
    assert clipped(x, w, empty_ranges(3)) == [0, 0, 0]
    x[0, 0] = math.nan
    assert clipped(x, w, empty_ranges(3)) == [0, 0, 0]
    # hides nothing: the others are still looked at
    assert clipped(x, w)[0] == pytest.approx(share_beyond(x, RANGES[0]))
    x[0, 0] = math.inf
    assert clipped(x, w)[0] == pytest.approx(share_beyond(x, RANGES[0]))
    x, w, _ = tensors(40, 30, 20)
    found = clipped(x, w, empty_ranges(3), quantiles=(0.1, 0.8))
    assert found == pytest.approx([0.3] * 3, abs=0.01)
    flat = torch.zeros(3, 2)
    assert clipped(torch.zeros_like(x), w, flat)[::2] == [0, 0]
    assert clipped(x, w, flat)[0] == 1
    assert clipped(x[:0], w) == [0, pytest.approx(share_beyond(w, RANGES[1])), 0]


def test_gradient_types_follow_the_tensors():
    x, w, b = tensors(4, 5, 6)
    x, w, b = (
        t.to(d).requires_grad_()
        for t, d in zip((x, w, b), (torch.bfloat16, torch.float32, torch.float16), strict=True)
    )
    y, observed = run(x, w, b)
    assert not observed.requires_grad
    y.sum().backward()
    assert [t.grad.dtype for t in (x, w, b)] == [t.dtype for t in (x, w, b)]


def test_saved_for_backward_is_a_byte_and_a_bit_an_element():
    x, w, b = (t.requires_grad_() for t in tensors(512, 64, 32))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        run(x, w, b)
    kept = [t for t in saved if t.data_ptr() != w.data_ptr()]
    assert sum(t.numel() * t.element_size() for t in kept) <= x.numel() * 9 / 8 + 64


def test_pure_function_of_its_arguments():
    x, w, b = tensors(30, 20, 10)
    before, ranges = torch.get_rng_state(), RANGES.clone()
    y, observed = run(x, w, b, ranges)
    y_again, observed_again = run(x, w, b, ranges)
    assert torch.equal(y, y_again)
    assert torch.equal(observed, observed_again)
    assert torch.equal(ranges, RANGES)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(y, run(x, w, b, key=KEY + 1)[0])
    assert not torch.equal(y, run(x, w, b, stream=4)[0])


def test_recompute_under_checkpointing_is_exact():
    x, w, b = (t.requires_grad_() for t in tensors(30, 20, 10))
    direct = torch.autograd.grad(run(x, w, b)[0].square().sum(), (x, w, b))
    y = checkpoint(lambda *a: run(*a)[0], x, w, b, use_reentrant=False)
    for a, e in zip(torch.autograd.grad(y.square().sum(), (x, w, b)), direct, strict=True):
        assert torch.equal(a, e)


def test_compiles_in_one_graph():
    x, w, b = (t.requires_grad_() for t in tensors(30, 20, 10))

    def block(x, w, b):
        y, observed = run(F.silu(x), w, b)
        return y * 2, observed

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    (y, observed), (expected, expected_observed) = compiled(x, w, b), block(x, w, b)
    assert torch.equal(y, expected)
    assert torch.equal(observed, expected_observed)
    ours = torch.autograd.grad(y.sum(), (x, w, b))
    for a, e in zip(ours, torch.autograd.grad(expected.sum(), (x, w, b)), strict=True):
        torch.testing.assert_close(a, e)


def test_autocast_decides_the_type_of_the_result():
    x, w, b = tensors(4, 5, 6)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = run(x, w, b)
        (grad,) = torch.autograd.grad(y.sum(), x)
    full, _ = run(x, w, b)
    assert torch.equal(y, full.bfloat16())
    assert torch.equal(grad, torch.autograd.grad(full.sum(), x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("levels", [256, 1000])
def test_opcheck(dtype, bias, levels):
    x, w, b = tensors(7, 9, 5, dtype, bias=bias)
    x.requires_grad_(), w.requires_grad_()
    how = Settings(3, levels, 0.02, True)
    args = (x, w, b, RANGES, KEY, *how, dtype)
    torch.library.opcheck(torch.ops.aixsim.optical_linear, args)
    _, _, used, codes, inside = torch.ops.aixsim.optical_linear(*args)
    w = w.detach().T.contiguous().T
    args = (torch.randn(7, 5), codes, inside, w, used, KEY, *how, dtype, bias)
    torch.library.opcheck(torch.ops.aixsim.optical_linear_backward, args)


@pytest.mark.parametrize("depth", [1001, 588, 1026])
def test_rows_of_any_length_in_many_blocks(depth, monkeypatch):
    """A gradient is masked where its own element was clipped: bits of a block begin with a byte."""
    monkeypatch.setattr(cpu, "block_size", lambda: 33 * depth)
    x = torch.randn(600, depth, requires_grad=True)
    ranges = torch.tensor([[-1.0, 1.0], [-5.0, 5.0], [-2000.0, 2000.0]])
    how = {"stream": 1, "levels": 256, "lut_min": 0.0, "noise": False}
    y, *_ = optical_linear(x, torch.rand(4, depth) + 0.5, None, ranges, KEY, **how)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad != 0, (x >= -1) & (x <= 1))


@pytest.mark.parametrize("transposed", [False, True])
def test_ranges_of_any_strides_are_the_fakes(transposed):
    x, w, _ = tensors(7, 9, 5, torch.float32)
    ranges = RANGES.mT.contiguous().mT if transposed else RANGES
    args = (x, w, None, ranges, KEY, *Settings(3, 256, 0.02, True), torch.float32)
    torch.library.opcheck(torch.ops.aixsim.optical_linear, args)
    real = torch.ops.aixsim.optical_linear(*args)
    with FakeTensorMode() as mode:
        fake = torch.ops.aixsim.optical_linear(
            *(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args)
        )
    assert [t.stride() for t in fake] == [t.stride() for t in real]
