import math

import pytest
import torch
from aixsim_kernels import (
    are_known_set,
    clipped_in,
    empty_ranges,
    empty_seen,
    is_empty,
    note_set,
    observed_in,
    seen_of,
    update_ranges,
)
from aixsim_kernels.optical.ranges import merge_observed, observe, quantile_range
from hypothesis import given, settings
from hypothesis import strategies as st

EMPTY = [math.inf, -math.inf]


def test_empty_ranges():
    assert empty_ranges(2).tolist() == [EMPTY, EMPTY]
    assert empty_ranges(2).dtype == torch.float32
    assert is_empty(empty_ranges(2)).all()


def test_merge_observed():
    a = torch.tensor([[-1.0, 2.0], EMPTY, EMPTY])
    b = torch.tensor([[-3.0, 1.0], [0.0, 1.0], EMPTY])
    assert merge_observed(a, b).tolist() == [[-3, 2], [0, 1], EMPTY]


def test_what_was_seen():
    observed = torch.tensor([[-1.0, 2.0], [3.0, 4.0], EMPTY])
    shares = torch.tensor([0.25, 0.0, 1.0])
    seen = seen_of(observed, shares)
    assert torch.equal(observed_in(seen), observed) and torch.equal(clipped_in(seen), shares)
    assert not clipped_in(seen_of(observed)).any()
    assert observed_in(empty_seen(2)).tolist() == [EMPTY, EMPTY]
    assert clipped_in(empty_seen(2)).tolist() == [0, 0]
    other = seen_of(torch.tensor([[-3.0, 1.0], EMPTY, EMPTY]), torch.tensor([0.5, 0.125, 0.0]))
    both = torch.maximum(seen, other)
    assert observed_in(both).tolist() == [[-3, 2], [3, 4], EMPTY]
    assert clipped_in(both).tolist() == [0.5, 0.125, 1]


@pytest.mark.parametrize(
    "write",
    [
        lambda ranges: ranges.copy_(ranges),
        lambda ranges: ranges[0].fill_(1),
        lambda ranges: ranges.detach().zero_(),
        lambda ranges: torch._foreach_copy_([ranges], [ranges.clone()]),
    ],
)
def test_what_is_known_of_ranges_is_forgotten_when_they_are_written_into(write):
    ranges, other = torch.ones(3, 2), torch.ones(3, 2)
    assert not are_known_set(ranges)
    note_set(ranges)
    assert are_known_set(ranges) and not are_known_set(other) and not are_known_set(ranges.clone())
    write(ranges)
    assert not are_known_set(ranges)


def test_what_was_made_for_inference_has_no_version():
    with torch.inference_mode():
        ranges = torch.ones(3, 2)
        note_set(ranges)
        assert not are_known_set(ranges)


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
            ranges = update_ranges(ranges, observe(x).unsqueeze(0), attack, 0.9)
        torch.testing.assert_close(
            ranges, scale * torch.tensor([[-1.0, 2.0]]), rtol=1e-2, atol=5e-3
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_observe_is_min_and_max(dtype):
    x = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert observe(x.T).tolist() == [x.min().item(), x.max().item()]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_observe_is_empty_where_not_finite(bad):
    x = torch.ones(5)
    x[2] = bad
    assert observe(x).tolist() == EMPTY


def test_observe_nothing():
    assert observe(torch.empty(0, 3)).tolist() == EMPTY


def test_observe_quantiles_exact_when_small():
    x = torch.arange(1001.0)
    assert observe(x, (0.1, 0.9)).tolist() == [100, 900]


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
    assert torch.equal(quantile_range(x, (low, high)), expected)


@pytest.mark.parametrize("p", [0.001, 0.01, 0.25])
@pytest.mark.parametrize("columns", [1408, 2048])
def test_observe_quantiles_of_a_large_tensor(p, columns):
    # columns of very different size: a sample in step with the rows would miss most of them
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, columns, generator=generator) * torch.linspace(0.1, 5, columns)
    for bound, end in zip(observe(x, (p, 1 - p)), (p, 1 - p), strict=True):
        share = (x <= bound).double().mean().item()
        assert abs(share - end) < 4 * math.sqrt(p * (1 - p)) / 256
