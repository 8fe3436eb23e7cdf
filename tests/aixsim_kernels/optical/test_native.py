"""The passes in C compute what those in torch do: the same codes, bits and levels."""

import ctypes
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from aixsim_kernels import optical_linear
from aixsim_kernels.common.library import opened
from aixsim_kernels.common.noise import row_keys
from aixsim_kernels.optical import native
from aixsim_kernels.optical.attention.scores import Scores
from aixsim_kernels.optical.passes import Passes
from hypothesis import given, settings
from hypothesis import strategies as st

FOLDER = Path(native.__file__).parent
TORCH = Passes()
C_TYPES = {
    "long": ctypes.c_long,
    "int": ctypes.c_int,
    "float": ctypes.c_float,
    "Grid": native._Grid,
}

needs_library = pytest.mark.skipif(
    not isinstance(native.library(), ctypes.CDLL), reason=str(native.library())
)


def same(a, b):
    """Bit by bit, but that one NaN is like another."""
    return torch.equal(a.nan_to_num(7.25), b.nan_to_num(7.25)) and torch.equal(a.isnan(), b.isnan())


def ranges_of(ends, levels):
    """One range for C, one for torch."""
    running = torch.tensor([ends])
    both = native.passes_of(running), TORCH
    return tuple(passes.ranges(running, [levels])[0] for passes in both)


def same_seen(here, there, n):
    """Both ranges saw the same."""
    c, t = native.passes_of(torch.zeros(1)).results([here], [n]), TORCH.results([there], [n])
    return all(torch.equal(a, b) for a, b in zip(c, t, strict=True))


@st.composite
def operands(draw):
    """A matrix with what may lie in it, and the ends and levels that it is worked with."""
    shape = draw(st.tuples(st.integers(0, 5), st.sampled_from([1, 7, 16, 33, 1024, 1500])))
    seed = draw(st.integers(0, 2**31))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    if x.numel() and draw(st.booleans()):
        x.view(-1)[seed % x.numel()] = draw(st.sampled_from([float("nan"), float("inf"), -1e30, 0]))
    ends = draw(st.sampled_from([(-1.0, 1.5), (-9.0, 9.0), (0.0, 2.0), (0.5, 0.5), (-3.0, -1.0)]))
    return x.to(dtype), ends, draw(st.sampled_from([2, 7, 256, 65536]))


def keys_of(rows):
    return row_keys(torch.arange(rows), torch.tensor(5), 1234)


@needs_library
@pytest.mark.parametrize("key", [0, 5, -1, 2**40 + 7])
def test_row_keys(key):
    key = torch.tensor(key)
    for passes in (native.passes_of(key), TORCH):
        found = passes.row_keys([2, 1500], key, 3**20)
        assert torch.equal(found.view(-1), row_keys(torch.arange(3000), key, 3**20))


@needs_library
@given(
    st.floats(-(2.0**99), 2.0**99, width=32),
    st.floats(0, 2.0**99, width=32) | st.sampled_from([0.0, 2.0**-149]),
    st.integers(2, 65536),
)
def test_the_levels_of_a_range(lo, width, levels):
    here, there = ranges_of((lo, lo + width), levels)
    expected = [*map(float, there.grid[:4]), levels - 1]
    at = here.levels_at
    assert [at.lo, at.hi, at.step, at.per_level, at.top] == expected


@needs_library
@settings(max_examples=60, deadline=None)
@given(operands(), st.sampled_from([0.0, 0.02]))
def test_modulate(operand, lut_min):
    x, ends, levels = operand
    found = []
    for passes, at in zip((native.passes_of(x), TORCH), ranges_of(ends, levels), strict=True):
        codes = torch.zeros(x.shape, dtype=torch.uint8 if levels <= 256 else torch.int32)
        inside = torch.zeros((x.numel() + 7) // 8, dtype=torch.uint8)
        value = passes.modulate(x, at, lut_min, codes, inside)
        found.append((value, at, codes, inside, passes.decode(codes, at)))
    (value, at, *rest), (expected, expected_at, *expected_rest) = found
    assert value.dtype == torch.float32 and same(value, expected)
    assert same_seen(at, expected_at, x.numel())
    # what a NaN is coded as means nothing: its value is NaN whatever it is
    known = ~x.isnan()
    assert torch.equal(rest[0][known], expected_rest[0][known])
    assert torch.equal(rest[1], expected_rest[1])
    assert torch.equal(rest[2][known], expected_rest[2][known])
    # without codes and bits too; a range goes on seeing
    for passes, one in ((native.passes_of(x), at), (TORCH, expected_at)):
        assert same(passes.modulate(x.clone(), one, lut_min), value)
    assert same_seen(at, expected_at, 2 * x.numel())


@needs_library
@settings(max_examples=40, deadline=None)
@given(operands(), st.booleans(), st.booleans())
def test_detect(operand, noise, by_row):
    acc, (here, there) = operand[0].float(), ranges_of(*operand[1:])
    keys = keys_of(len(acc)) if noise else None
    found, expected = acc.clone(), acc.clone()
    native.passes_of(acc).detect_(found, here, keys, by_row=by_row)
    TORCH.detect_(expected, there, keys, by_row=by_row)
    assert same(found, expected)
    assert same_seen(here, there, len(acc) if by_row else acc.numel())


@needs_library
@settings(max_examples=30, deadline=None)
@given(operands())
def test_masks_of_gradients(operand):
    x, (here, there) = operand[0], ranges_of(*operand[1:])
    inside = torch.zeros((x.numel() + 7) // 8, dtype=torch.uint8)
    TORCH.modulate(x, there, 0.0, None, inside)
    grad, c = torch.randn(x.shape), native.passes_of(x)
    expected = TORCH.mask_clipped_(grad.clone(), x, there)
    assert torch.equal(c.mask_clipped_(grad.clone(), x, here), expected)
    assert torch.equal(c.mask_packed_(grad.clone(), inside), expected)


@needs_library
@pytest.mark.parametrize("ends", [(float("inf"), -float("inf")), (-1.0, 2.0)], ids=["new", "set"])
@pytest.mark.parametrize("quantiles", [None, (0.1, 0.9)])
@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_a_look_takes_the_same_range(ends, quantiles, value):
    x = torch.randn(50, 3)
    x[7, 1] = value
    here, there = ranges_of(ends, 256)
    for passes, at in ((native.passes_of(x), here), (TORCH, there)):
        at.look(x, quantiles)
        passes.modulate(x, at)
    assert torch.equal(here.bounds, there.bounds)
    assert same_seen(here, there, x.numel())


def some_mask(kind, queries, keys):
    if kind in (None, "causal"):
        return None
    shut = torch.rand(2, 1, 1, queries, keys) < 0.3
    shut[0, :, :, :1] = True
    if kind == "bool":
        return ~shut
    if kind == "by key":
        return ~shut[:, :, :, 1:2]
    dtype = torch.float32 if kind == "added" else torch.bfloat16
    added = torch.randn(shut.shape, dtype=dtype)
    return added.masked_fill(shut, torch.finfo(dtype).min)


MASKS = [None, "causal", "bool", "by key", "added", "added, 16 bits"]


def quarters(*shape):
    """Numbers whose products and sums float32 holds, in whatever order they are taken."""
    return torch.randint(-8, 9, shape) / 4


@needs_library
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("rowmax", [False, True], ids=["unit", "rowmax"])
@pytest.mark.parametrize("keys", [5, 48, 1100])
def test_attend(kind, rowmax, keys):
    torch.manual_seed(1)
    q, k = quarters(2, 2, 3, 9, 16), quarters(2, 2, keys, 16)
    # what is multiplied with it is what the modulator shows
    v = torch.eye(keys).expand(2, 2, keys, keys)
    k[1, 1, 2, 3] = float("nan") if kind == "bool" else 0.5
    mask = some_mask(kind, 9, keys)
    if mask is not None:
        mask = mask.expand(2, 2, 3, 9, keys)
    scores = Scores(q, k, mask, 0.25, kind in ("causal", "added"), 256)
    at, at_torch = ranges_of((-17.0, 18.0), 256)
    noise = keys_of(108).view(2, 2, 3, 9)
    c, close = native.passes_of(q), partial(torch.testing.assert_close, equal_nan=True)
    here = c.attend(scores, v, at, noise, rowmax=rowmax)
    expected = TORCH.attend(scores, v, at_torch, noise, rowmax=rowmax)
    assert same_seen(at, at_torch, 108)
    for mine, theirs in zip(here[:3], expected[:3], strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
    # exponentials to 2 ulp
    close(here.total, expected.total, rtol=1e-6, atol=0)
    close(here.kept, expected.kept, rtol=1e-5, atol=3 / 255)
    levels = (here.light - expected.light).nan_to_num().abs() * 255
    assert levels.max() <= 1.01 and (levels > 0.5).float().mean() <= 1e-3

    grad = quarters(2, 2, 3, 9, keys)
    mine = c.attend_grad(scores, v, at, noise, grad, rowmax=rowmax)
    theirs = TORCH.attend_grad(scores, v, at_torch, noise, grad, rowmax=rowmax)
    # a level here and there in that of v alone
    for a, b, tolerance in zip(mine, theirs, (1e-5, 1e-5, 2e-3), strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert (a - b).nan_to_num().norm() <= tolerance * b.nan_to_num().norm()


@needs_library
def test_attend_with_more_queries_than_keys_and_in_many_blocks():
    torch.manual_seed(3)
    q, k, v = quarters(1, 2, 2, 900, 8), quarters(1, 2, 700, 8), quarters(1, 2, 700, 5)
    scores = Scores(q, k, None, 0.25, True, 256)
    at, at_torch = ranges_of((-17.0, 18.0), 256)
    noise, grad = keys_of(3600).view(1, 2, 2, 900), quarters(1, 2, 2, 900, 5)
    c = native.passes_of(q)
    here = c.attend(scores, v, at, noise, rowmax=False)
    expected = TORCH.attend(scores, v, at_torch, noise, rowmax=False)
    assert same_seen(at, at_torch, 3600)
    # the first 200 queries see nothing
    assert not here.light[..., :200, :].any() and not here.total[..., :200, :].any()
    assert (here.light - expected.light).abs().max() <= 2 * 5 / 255
    mine = c.attend_grad(scores, v, at, noise, grad, rowmax=False)
    theirs = TORCH.attend_grad(scores, v, at_torch, noise, grad, rowmax=False)
    for a, b, tolerance in zip(mine, theirs, (1e-5, 1e-5, 2e-3), strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@needs_library
@pytest.mark.parametrize(("dim", "out"), [(0, 4), (4, 0), (1, 1)])
def test_heads_without_width(dim, out):
    torch.manual_seed(6)
    scores = Scores(quarters(1, 1, 2, 9, dim), quarters(1, 1, 9, dim), None, 0.25, True, 256)
    v, at = quarters(1, 1, 9, out), ranges_of((-17.0, 18.0), 256)
    grad = quarters(1, 1, 2, 9, out)
    found = []
    for passes, one in zip((native.passes_of(v), TORCH), at, strict=True):
        light, total, *_ = passes.attend(scores, v, one, None, rowmax=False)
        grads = passes.attend_grad(scores, v, one, None, grad, rowmax=False)
        found.append([light, total, *grads])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-2)


@needs_library
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["rows", "columns", "one", "turned"])
def test_a_mask_that_is_broadcast_stays_small(dtype, shape):
    own = {
        "rows": torch.ones(2, 1, 1, 40, 1),
        "columns": torch.ones(2, 1, 1, 1, 50),
        "one": torch.ones(()),
        "turned": torch.ones(50, 40).mT,
    }[shape].to(dtype)
    mask = own.expand(2, 2, 3, 40, 50)
    scores = Scores(torch.randn(2, 2, 3, 40, 4), torch.randn(2, 2, 50, 4), mask, 0.25, False, 256)
    passes, (at, _) = native.passes_of(own.float()), ranges_of((-9.0, 9.0), 256)
    held = passes._about(scores, torch.randn(2, 2, 50, 4), at, None, False)[1][-1]
    assert held.shape == mask.shape and held.stride(-1) == 1
    assert held.untyped_storage().size() <= 2 * 40 * 50 * 4


@needs_library
@pytest.mark.parametrize("repeats", [1, 3])
def test_a_gradient_of_any_strides(repeats):
    torch.manual_seed(5)
    scores = Scores(quarters(2, 2, repeats, 9, 8), quarters(2, 2, 9, 8), None, 0.25, True, 256)
    v, noise = quarters(2, 2, 9, 6), keys_of(36 * repeats).view(2, 2, repeats, 9)
    at, _ = ranges_of((-17.0, 18.0), 256)
    c, heads = native.passes_of(v), 2 * repeats
    for grad in (
        torch.randn(2, 9, heads, 6).transpose(1, 2),
        torch.randn(2, heads, 6, 9).transpose(2, 3),
        torch.ones(()).expand(2, heads, 9, 6),
        torch.randn(2, heads, 1, 6).expand(2, heads, 9, 6),
        torch.randn(2, 1, 9, 6).expand(2, heads, 9, 6),
    ):
        one, other = (
            c.attend_grad(scores, v, at, noise, g.unflatten(1, (2, repeats)), rowmax=False)
            for g in (grad, grad.contiguous())
        )
        for a, b in zip(one, other, strict=True):
            assert (a - b).norm() <= 1e-6 * b.norm()


@needs_library
@pytest.mark.parametrize("queries", [1, 7, 300])
def test_nothing_lies_beyond_the_range_that_the_scores_themselves_set(queries):
    torch.manual_seed(4)
    scores = Scores(
        torch.randn(1, 1, 3, queries, 16), torch.randn(1, 1, 300, 16), None, 0.25, False, 256
    )
    v = torch.randn(1, 1, 300, 16)
    at, _ = ranges_of((float("inf"), -float("inf")), 256)
    c = native.passes_of(v)
    c.look_at_scores(scores, v, at, None)
    torch.testing.assert_close(at.bounds, scores.range(None), rtol=1e-5, atol=1e-5)
    c.attend(scores, v, at, None, rowmax=False)
    assert at.seen.clipped == 0


def everything(passes):
    """A result of every pass, in one list."""
    torch.manual_seed(2)
    x = torch.randn(37, 1501)
    ranges = x_at, acc_at, score_at = passes.ranges(torch.tensor([[-2.0, 2.5]] * 3), [256] * 3)
    codes, inside = torch.zeros(x.shape, dtype=torch.uint8), torch.zeros(6943, dtype=torch.uint8)
    value = passes.modulate(x, x_at, 0.02, codes, inside)
    acc, keys = x.clone(), passes.row_keys([37], torch.tensor(5), 1234)
    passes.detect_(acc, acc_at, keys)
    scores = Scores(quarters(1, 2, 3, 300, 8), quarters(1, 2, 300, 8), None, 0.25, True, 256)
    v, noise = torch.eye(300).expand(1, 2, 300, 300), keys_of(1800).view(1, 2, 3, 300)
    attended = passes.attend(scores, v, score_at, noise, rowmax=False)[:3]
    grad = torch.randn(1, 2, 3, 300, 300)
    grads = passes.attend_grad(scores, v, score_at, noise, grad, rowmax=True)
    masked = passes.mask_clipped_(x.clone(), x, x_at)
    packed = passes.mask_packed_(x.clone(), inside)
    results = passes.results(ranges, [x.numel(), acc.numel(), 300])
    decoded = passes.decode(codes, x_at)
    return [value, codes, inside, acc, keys, *attended, *grads, masked, packed, *results, decoded]


@needs_library
def test_another_default_type_is_none_of_c():
    x, weight = torch.randn(256, 40), torch.randn(64, 40)
    ranges = torch.tensor([[-2.0, 2.0], [-2.0, 2.0], [-30.0, 30.0]])
    how = {"stream": 1, "levels": 256, "lut_min": 0.02, "noise": True}
    expected = optical_linear(x, weight, None, ranges, torch.tensor(5), **how)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = optical_linear(x, weight, None, ranges, torch.tensor(5), **how)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected))


@needs_library
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_any_number_of_threads_makes_the_same_bits(threads):
    expected = everything(native.NativePasses(native.library(), 1))
    found = everything(native.NativePasses(native.library(), threads))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_library
def test_any_vector_width_makes_the_same_bits(compile_library):
    has = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    widths = {"x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512vl"}
    machines = [machine for machine, flag in widths.items() if f" {flag} " in has] or ["native"]
    options = [("-DCLONES=", f"-march={name}") for name in machines] + [("-O0",)]
    libraries = [opened(compile_library(*some)) for some in options]
    found = [everything(native.NativePasses(one)) for one in libraries]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_the_structure_of_an_attention_is_that_of_c():
    source = (FOLDER / "attention.c").read_text(encoding="utf-8")
    (fields,) = re.findall(r"^typedef struct \{([^}]*)\} Attention;", source, re.MULTILINE)
    listed = []
    for line in re.findall(r"(?:const )?(\w+) ([^;]*);", re.sub(r"/\*.*?\*/", "", fields)):
        for name in line[1].split(", "):
            kind = native.c_void_p if name[0] == "*" else C_TYPES[line[0]]
            base, _, length = name.strip("*]").partition("[")
            listed.append((base, kind * int(length) if length else kind))
    assert listed == native._Attention._fields_


def test_without_a_library_torch_makes_the_passes(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: "no compiler")
    assert type(native.passes_of(torch.zeros(1))) is Passes
