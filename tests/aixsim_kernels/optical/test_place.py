"""An operation on a part of a whole is that part of the operation on the whole."""

import pytest
import torch
from aixsim_kernels import optical_attention, optical_linear
from aixsim_kernels.common.noise import Place, placed
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("passes")
OPTICAL = {"stream": 7, "levels": 256, "lut_min": 0.02, "noise": True}
LINEAR = torch.tensor([[-4.0, 4.0], [-0.2, 0.2], [-6.0, 6.0]])
ATTENTION = torch.tensor([[-4.0, 4.0], [-4.0, 4.0], [-30.0, 30.0], [-4.0, 4.0], [-2.0, 2.0]])
KEY = torch.tensor(2**40 + 3)


def eighths(*shape):
    """Numbers whose products float32 sums exactly, in whatever order."""
    return torch.randint(-16, 17, shape) / 8


def parts(draw, n, even=False):
    """Where some of n begin, and how many."""
    first = draw(st.integers(0, n - 1))
    first -= first % 2 if even else 0
    return first, draw(st.integers(1, n - first))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_linear(data):
    torch.manual_seed(data.draw(st.integers(0, 9)))
    length, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40))
    x, weight = eighths(3, length, 16), eighths(columns, 16) / 16
    row, rows = parts(data.draw, length)
    column, n = parts(data.draw, columns, even=True)
    # levels that are sums of powers of two: the products are exact
    ranges = torch.tensor([[-4.0, 3.96875], [-0.25, 0.248046875], [-6.0, 6.0]])
    how = OPTICAL | {"lut_min": 0.0}
    whole, *_ = optical_linear(x, weight, None, ranges, KEY, **how)
    key = placed(KEY, Place(rows, length, row, first_column=column))
    part = (slice(None), slice(row, row + rows), slice(column, column + n))
    mine, *_ = optical_linear(x[part[:2]], weight[part[2]], None, ranges, key, **how)
    assert torch.equal(mine, whole[part])


def attend(q, k, v, key, **more):
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    how = OPTICAL | {"scale": 0.25, "is_causal": True, "attention_range": "unit"} | more
    out, *_ = optical_attention(q, k, v, None, ATTENTION, key, **how)
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    return out.detach(), *grads


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("more_keys", [0, 5])
@pytest.mark.parametrize("quantiles", [None, (0.01, 0.99)])
def test_attention_by_queries(is_causal, more_keys, quantiles):
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 4, 30, 16), *torch.randn(2, 2, 2, 30 + more_keys, 16)
    more = {"is_causal": is_causal, "quantiles": quantiles}
    out, grad_q, grad_k, grad_v = attend(q, k, v, KEY, **more)
    of_k, of_v = torch.zeros_like(k), torch.zeros_like(v)
    for first, last in ((0, 9), (9, 10), (10, 30)):
        key = placed(KEY, Place(last - first, 30, first, 4))
        mine, mine_q, mine_k, mine_v = attend(q[:, :, first:last], k, v, key, **more)
        # one level of the detector is 0.016; a sum in another order seldom moves one
        assert ((mine - out[:, :, first:last]).abs() > 1e-4).float().mean() <= 1e-3
        assert (mine_q - grad_q[:, :, first:last]).norm() <= 1e-4 * grad_q.norm()
        of_k += mine_k
        of_v += mine_v
    assert (of_k - grad_k).norm() <= 1e-4 * grad_k.norm()
    assert (of_v - grad_v).norm() <= 2e-3 * grad_v.norm()


def test_attention_by_heads():
    torch.manual_seed(2)
    q, k, v = torch.randn(2, 6, 20, 16), torch.randn(2, 3, 20, 16), torch.randn(2, 3, 20, 16)
    out, *grads = attend(q, k, v, KEY)
    for head in range(3):
        of_q, of_k = slice(2 * head, 2 * head + 2), slice(head, head + 1)
        key = placed(KEY, Place(20, 20, 0, 6, 2 * head))
        mine, *own = attend(q[:, of_q], k[:, of_k], v[:, of_k], key)
        assert ((mine - out[:, of_q]).abs() > 1e-4).float().mean() <= 1e-3
        for a, b, place in zip(own, grads, (of_q, of_k, of_k), strict=True):
            assert (a - b[:, place]).norm() <= 2e-3 * b[:, place].norm()


def test_another_place_draws_other_noise():
    torch.manual_seed(3)
    x, weight = torch.randn(8, 16), torch.randn(8, 16) / 16
    found = [
        optical_linear(x, weight, None, LINEAR, placed(KEY, place), **OPTICAL)[0]
        for place in (Place(8, 99), Place(8, 99, 8), Place(8, 99, 0, first_column=2))
    ]
    for i in range(3):
        assert not torch.equal(found[i], found[i - 1])


@pytest.mark.parametrize(
    "place",
    [Place(5, 4), Place(2, 4, 3), Place(0, 4), Place(2, 4, -1), Place(2, 4, 0, 2, 2),
     Place(2, 4, first_column=3), Place(2, 4, of_columns=5), Place(2, 4, 0, 1, 0, 6, 6)],
)  # fmt: skip
def test_no_part_of_a_whole(place):
    with pytest.raises(ValueError, match=r"no part of its whole|expected even numbers"):
        placed(KEY, place)
