"""The optical attention's Triton kernels compute what the CPU computes."""

import pytest
import torch
from aixsim_kernels import are_known_set, clipped_in, empty_ranges, empty_seen, observed_in
from aixsim_kernels.common.noise import Place, placed
from aixsim_kernels.optical.attention import cpu
from aixsim_kernels.optical.attention import triton as gpu
from aixsim_kernels.optical.settings import Settings

KEY = torch.tensor(-987654321987654)
SET = torch.tensor([[-3.0, 2.5], [-2.7, 3.1], [-9.0, 11.0], [-2.6, 2.9], [-1.1, 1.2]])
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def operands(batches, heads, groups, queries, keys, head_dim, value_dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = (
        (batches, heads, queries, head_dim),
        (batches, groups, keys, head_dim),
        (batches, groups, keys, value_dim),
    )
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def settings(head_dim, **changes):
    how = {"stream": 0x123456789ABC, "levels": 256, "lut_min": 0.02, "noise": True}
    how |= {"scale": head_dim**-0.5, "is_causal": True, "rowmax": False}
    return Settings(**(how | changes))


def a_mask(kind, batches, heads, queries, keys):
    """None, padding (B, 1, 1, L), or an arbitrary (1, H, M, L), bool or additive."""
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(1)
    if kind == "padding":
        mask = torch.arange(keys) < keys - torch.arange(batches)[:, None] - 1
        return mask[:, None, None]
    mask = torch.rand(1, heads, queries, keys, generator=generator) < 0.7
    # a row that attends to nothing
    mask[..., 2, :] = False
    if kind == "bool":
        return mask
    added = torch.randn(1, heads, queries, keys, generator=generator)
    return added.masked_fill(~mask, -float("inf"))


CASES = [
    ((1, 4, 2, 37, 37, 24, 24), None, {}),
    ((2, 2, 1, 37, 37, 24, 24), None, {"rowmax": True}),
    ((1, 3, 1, 1, 40, 16, 16), None, {}),
    ((1, 2, 2, 40, 19, 16, 16), None, {"rowmax": True}),
    ((2, 2, 1, 33, 50, 20, 12), "padding", {"is_causal": False}),
    ((2, 2, 1, 33, 33, 20, 12), "padding", {"rowmax": True}),
    ((1, 4, 2, 20, 35, 16, 40), "bool", {"is_causal": False}),
    ((2, 4, 2, 21, 35, 16, 16), "additive", {"rowmax": True}),
    ((1, 2, 1, 18, 18, 16, 16), None, {"noise": False, "levels": 16, "lut_min": 0.0}),
    ((1, 2, 1, 18, 18, 16, 16), None, {"levels": 65536}),
    # tiles that are seen whole, on which no mask is laid
    ((1, 2, 1, 150, 150, 16, 16), None, {}),
    ((1, 2, 2, 100, 170, 16, 16), None, {"rowmax": True}),
    ((1, 2, 1, 70, 130, 16, 16), None, {"is_causal": False}),
]


def compare(run, inputs, mask, ranges, how, out_dtype=torch.float32, key=KEY):
    """Differences of the outputs in levels of the detector; everything else is checked here."""
    found = run(gpu.forward, *inputs, mask, ranges, key, how, out_dtype)
    expected = cpu.forward(*inputs, mask, ranges, key, how, out_dtype)
    out, seen, kept, used = expected
    # a last bit decides whether a sum lies beyond the end of a range, which may be its own
    difference = clipped_in(found[1]) - clipped_in(seen)
    assert (difference.abs() <= 0.02 * clipped_in(seen) + 2.1 / out.numel()).all()
    for mine, theirs in ((observed_in(found[1]), observed_in(seen)), (found[3], used)):
        for i in (0, 1, 3):
            assert torch.equal(mine[i], theirs[i])
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    step = (used[4, 1] - used[4, 0]) / (how.detector_levels - 1)
    return (found[0] - out).abs() / step, (found[2] - kept).abs()


@pytest.mark.parametrize("unset", [False, True])
@pytest.mark.parametrize(("shape", "mask", "changes"), CASES)
def test_float32_codes_are_equal(run, shape, mask, changes, unset):
    how = settings(shape[5], **changes)
    inputs = operands(*shape)
    batches, heads, _, queries, keys, *_ = shape
    mask = a_mask(mask, batches, heads, queries, keys)
    ranges = empty_ranges(5) if unset else SET
    difference, kept = compare(run, inputs, mask, ranges, how)
    # the last bit of a float32 decides ties between codes: with 65536 levels now and then, and in
    # a range that the batch itself set, whose ends are codes of an operand
    ties = 0.05 if how.levels > 256 else 0.005 if unset else 0
    assert (difference > 0.01).float().mean() <= ties
    assert difference.max() < 1.5
    assert kept <= 1e-6


@pytest.mark.parametrize("place", [Place(20, 50, 13), Place(20, 50, 30, 9, 4), Place(20, 20)])
def test_a_part_of_a_whole(run, place):
    inputs, how, key = operands(2, 2, 1, 20, 55, 16, 24), settings(16), placed(KEY, place)
    difference, kept = compare(run, inputs, None, SET, how, key=key)
    assert difference.max() <= 0.01 and kept <= 1e-6
    for mine, theirs in zip(*gradients(run, inputs, None, how, torch.float32, key), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_16_bit_codes_are_at_most_one_apart_and_rarely(run, dtype):
    """The operands are 16 bits where the result is, whatever the inputs (autocast)."""
    inputs = operands(1, 4, 2, 64, 64, 32, 32, DTYPES[dtype])
    difference, kept = compare(run, inputs, None, SET, settings(32), torch.float16)
    assert difference.max() < 1.5
    # of 8,192 elements
    assert (difference > 0.5).float().mean() <= 1e-3
    assert kept <= 1e-4


OF_16_BITS = [(False, *case) for case in CASES if case[2].get("levels", 0) <= 256]


@pytest.mark.parametrize(
    ("unset", "shape", "mask", "changes"),
    [*OF_16_BITS, (True, *CASES[1]), (True, *CASES[-1])],
)
def test_16_bit_codes_of_every_case(run, unset, shape, mask, changes):
    how, inputs = settings(shape[5], **changes), operands(*shape)
    batches, heads, _, queries, keys, *_ = shape
    mask = a_mask(mask, batches, heads, queries, keys)
    ranges = empty_ranges(5) if unset else SET
    difference, kept = compare(run, inputs, mask, ranges, how, torch.float16)
    assert difference.max() < 1.5
    # of 300 to 4,800 elements; an additive mask is added after another rounding
    assert (difference > 0.5).float().mean() <= 5e-3
    assert kept <= 1e-3


def gradients(run, inputs, mask, how, dtype, key=KEY, ranges=SET):
    """The kernel's gradients of q, k, v and an additive mask, and the CPU's."""
    wants_mask = mask is not None and mask.dtype != torch.bool
    out, *_, used, rows, smooth = run(gpu.forward, *inputs, mask, ranges, key, how, dtype)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    saved = (*inputs, mask, used, key)
    return (
        run(gpu.backward, grad, *saved, rows, smooth, how, wants_mask),
        cpu.backward(grad, *saved, how, wants_mask),
    )


LIGHTS = [
    {"photons": 2.0},
    {"photons": 4.0, "offset": True, "levels_out": 64},
    {"photons": 1.0, "read_noise": 2.0, "levels_out": 1000},
    {"photons": 3.0, "offset": True, "read_noise": 5.0, "noise": False},
]
LIT = [
    ((1, 2, 1, 20, 20, 16, 16), None, {}),
    ((1, 2, 1, 18, 18, 20, 16), None, {"rowmax": True}),
    ((2, 2, 1, 17, 17, 16, 12), "padding", {"rowmax": True}),
    ((1, 2, 2, 19, 21, 16, 16), "additive", {}),
]
LAMPS = torch.tensor([[0.4, 0.6], [0.02, 0.04]])


@pytest.mark.parametrize("unset", [(), (5, 6), (2, 4, 5)])
@pytest.mark.parametrize("light", LIGHTS, ids=str)
@pytest.mark.parametrize("case", range(len(LIT)))
def test_light(run, case, light, unset):
    shape, mask, changes = LIT[case]
    batches, heads, _, queries, keys, *_ = shape
    # all lights on the first, and each of the others once
    if case and (case != LIGHTS.index(light) or unset == (2, 4, 5)):
        return
    mask = a_mask(mask, batches, heads, queries, keys)
    ranges = torch.cat([SET, LAMPS])
    ranges[list(unset)] = empty_ranges(1)
    how = settings(shape[5], **changes | light)
    difference, kept = compare(run, operands(*shape), mask, ranges, how)
    # the noise is made of a logarithm: a last bit moves some scores across a tie
    assert (difference > 0.5).float().mean() <= 0.02
    assert difference.max() < 3 and kept <= 1e-4


@pytest.mark.parametrize("case", [1, 2, 3])
def test_gradients_with_light(run, case):
    (shape, mask, changes), light = LIT[case], LIGHTS[case - 1]
    batches, heads, _, queries, keys, *_ = shape
    mask, inputs = a_mask(mask, batches, heads, queries, keys), operands(*shape)
    how, ranges = settings(shape[5], **changes | light), torch.cat([SET, LAMPS])
    for mine, theirs in zip(
        *gradients(run, inputs, mask, how, torch.float32, ranges=ranges), strict=True
    ):
        assert (mine - theirs).norm() <= 5e-3 * theirs.norm()
        if not mine.numel():
            continue
        off = ~torch.isclose(mine, theirs, rtol=1e-3, atol=1e-4)
        assert off.float().mean() <= 0.03


def test_light_in_16_bits(run):
    inputs = operands(1, 4, 2, 60, 60, 24, 24, torch.bfloat16)
    how, ranges = settings(24, photons=2.0, levels_out=64), torch.cat([SET, LAMPS])
    difference, kept = compare(run, inputs, None, ranges, how, torch.float16)
    assert (difference > 0.5).float().mean() <= 0.02 and kept <= 1e-3


@pytest.mark.parametrize(("shape", "mask", "changes"), CASES)
def test_gradients(run, shape, mask, changes):
    batches, heads, _, queries, keys, *_ = shape
    mask = a_mask(mask, batches, heads, queries, keys)
    inputs = operands(*shape)
    how = settings(shape[5], **changes)
    for mine, theirs in zip(*gradients(run, inputs, mask, how, torch.float32), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-3)
        # of ten thousands of scores one may lie between two levels, and move its row a little
        off = ~torch.isclose(mine, theirs, rtol=1e-4, atol=1e-5)
        assert off.sum() <= (0.02 * off.numel() if queries * keys > 5000 else 0)


@pytest.mark.parametrize(
    ("own", "queries", "keys"), [((1, 2, 33, 18), 33, 18), ((2, 1, 1, 18), 33, 18), ((9, 1), 9, 34)]
)
def test_gradient_of_a_mask_in_its_own_shape(run, own, queries, keys):
    generator = torch.Generator().manual_seed(4)
    mask = torch.randn(own, generator=generator)
    mask.masked_fill_(torch.rand(own, generator=generator) < 0.1, -float("inf"))
    inputs = operands(2, 2, 1, queries, keys, 16, 12)
    mine, theirs = gradients(run, inputs, mask, settings(16), torch.float32)
    assert mine[3].shape == theirs[3].shape == mask.shape
    assert torch.allclose(mine[3], theirs[3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "of_inputs", "rowmax", "mask"),
    [
        ("bfloat16", "bfloat16", False, None),
        ("bfloat16", "bfloat16", False, "additive"),
        ("float16", "float16", True, None),
        ("bfloat16", "float32", True, "bool"),
        ("float16", "float32", False, None),
    ],
)
def test_gradients_of_16_bits(run, dtype, of_inputs, rowmax, mask):
    inputs = operands(1, 4, 2, 40, 40, 32, 32, DTYPES[of_inputs])
    how = settings(32, rowmax=rowmax)
    of = gradients(run, inputs, a_mask(mask, 1, 4, 40, 40), how, DTYPES[dtype])
    for mine, theirs in zip(*(each[:3] for each in of), strict=True):
        assert mine.dtype == theirs.dtype == DTYPES[of_inputs]
        difference = (mine.float() - theirs.float()).norm() / theirs.float().norm()
        assert difference < (1e-2 if dtype == "bfloat16" else 2e-3)


def test_head_dim_of_256(run):
    inputs = operands(1, 1, 1, 17, 17, 256, 256)
    how = settings(256)
    difference, _ = compare(run, inputs, None, SET, how)
    assert difference.max() < 0.01
    for mine, theirs in zip(*gradients(run, inputs, None, how, torch.float32), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_non_contiguous_operands(run):
    inputs = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in operands(2, 2, 2, 9, 9, 8, 8)]
    assert not inputs[0].is_contiguous()
    difference, _ = compare(run, inputs, None, SET, settings(8))
    assert difference.max() < 0.01


@pytest.mark.parametrize("which", ["batches", "queries", "keys"])
def test_nothing_at_all(run, which):
    sizes = {"batches": 1, "queries": 4, "keys": 5} | {which: 0}
    inputs = operands(sizes["batches"], 2, 1, sizes["queries"], sizes["keys"], 16, 16)
    how = settings(16, is_causal=False)
    out, seen, kept, used, rows, smooth = run(
        gpu.forward, *inputs, None, SET, KEY, how, torch.float32
    )
    assert out.shape == inputs[0].shape and not out.any()
    assert kept == 0
    assert torch.equal(seen[2], empty_seen(1)[0])
    grads = run(gpu.backward, out, *inputs, None, used, KEY, rows, smooth, how, False)
    assert all(not g.any() for g in grads)


@pytest.mark.parametrize("unset", [[], [2, 4], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_shares_that_are_clipped_where_something_is_not_finite(run, bad, which, unset):
    inputs = operands(1, 2, 1, 8, 8, 16, 16)
    inputs[which][0, 0, 0, 5] = bad
    ranges = SET.clone()
    ranges[unset] = empty_ranges(1)
    found = run(gpu.forward, *inputs, None, ranges, KEY, settings(16), torch.float32)[1]
    how = (None, ranges, KEY, settings(16), torch.float32)
    found, expected = clipped_in(found), clipped_in(cpu.forward(*inputs, *how)[1])
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)
    assert not expected[unset].any() and ((expected >= 0) & (expected <= 1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite(run, bad, dtype):
    q, k, v = operands(1, 1, 1, 8, 8, 16, 16)
    q[0, 0, 3, 5] = bad
    out, seen, *_ = run(gpu.forward, q, k, v, None, SET, KEY, settings(16), DTYPES[dtype])
    # NaN in, NaN out in its own row; an infinity is clipped; neither gets into a range
    assert torch.equal(out.isnan().any(-1)[0, 0], torch.arange(8) == 3) == (bad != bad)
    assert torch.equal(seen[0, :2], empty_seen(1)[0, :2])
    assert seen[2].isfinite().all() == (bad == float("inf"))


@pytest.mark.parametrize("rowmax", [False, True])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradients_of_what_is_no_number(run, which, rowmax):
    inputs = operands(1, 2, 1, 8, 8, 16, 16)
    inputs[which][0, 0, 3, 5] = float("nan")
    how = settings(16, rowmax=rowmax)
    for mine, theirs in zip(*gradients(run, inputs, None, how, torch.float32), strict=True):
        # of a clipped element the CPU's is 0
        assert torch.equal(mine.isnan().any(-1), theirs.isnan().any(-1))


@pytest.mark.parametrize("rowmax", [False, True])
@pytest.mark.parametrize("added", [-1e4, -1e9])
def test_a_large_mask_that_shuts_nothing(run, added, rowmax):
    """All that a row sees carries the same number, as padding by a finite one leaves it."""
    inputs = operands(1, 2, 1, 20, 20, 16, 16)
    mask = torch.zeros(1, 1, 20, 20)
    mask[..., 5, :] = added
    how = settings(16, rowmax=rowmax)
    difference, kept = compare(run, inputs, mask, SET, how, torch.float16)
    assert difference.max() < 1.5
    assert kept <= 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_key_that_is_not_a_number(run, dtype):
    q, k, v = operands(1, 1, 1, 8, 8, 16, 16)
    k[0, 0, 3, 5] = float("nan")
    out, *_ = run(gpu.forward, q, k, v, None, SET, KEY, settings(16), DTYPES[dtype])
    # of those that see it
    assert torch.equal(out.isnan().any(-1)[0, 0], torch.arange(8) >= 3)


@pytest.mark.parametrize("unset", [[], [1], [4]])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16])
def test_what_the_host_knows_of_ranges_changes_no_bit(run, unset, out_dtype):
    ranges, inputs = SET.clone(), operands(1, 2, 1, 70, 70, 16, 24)
    ranges[unset] = empty_ranges(1)
    known = []

    def forward(ranges, *inputs):
        known.append(are_known_set(ranges))
        return gpu.forward(*inputs, None, ranges, KEY, settings(16), out_dtype)

    found = run(forward, ranges, *inputs)
    expected = run(lambda ranges, *rest: forward(ranges.clone(), *rest), ranges, *inputs)
    assert known == [not unset, False]
    assert all(map(torch.equal, found, expected))
