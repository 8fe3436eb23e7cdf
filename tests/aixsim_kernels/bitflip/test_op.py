"""Bit-flips: exact against integers, rates bit by bit, gradients."""

import numpy as np
import pytest
import torch
from aixsim_kernels import bitflip
from aixsim_kernels.bitflip import cpu
from aixsim_kernels.common.library import opened
from aixsim_kernels.common.noise import Place, placed
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# dtype -> (integer type, sign and exponent bits, all bits)
BITS = {
    torch.float32: (torch.int32, range(23, 32), 32),
    torch.bfloat16: (torch.int16, range(7, 16), 16),
    torch.float16: (torch.int16, range(10, 16), 16),
}
KEY = torch.tensor(-8765432109876543)


def bits_of(x):
    """(...) -> bool (bits, ...), the lowest bit first."""
    integer, _, n = BITS[x.dtype]
    words = x.contiguous().view(integer).long()
    return torch.stack([words >> i & 1 == 1 for i in range(n)])


def flipped(x, **how):
    """Which bits of x flip: bool (bits, ...)."""
    return bits_of(bitflip(x, KEY, **{"stream": 0} | how)) ^ bits_of(x)


def triple32(x):
    x = np.asarray(x, np.uint64)
    for shift, factor in ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor) & np.uint64(0xFFFFFFFF)
    return x ^ (x >> np.uint64(14))


def expected_flips(dtype, count, key, stream, p_exp, p_frac, mix):
    """The same flips from integers: bit b flips where its number u < p, with u of 32 digits."""
    _, exponent, n_bits = BITS[dtype]
    n_words = -(-count * n_bits // 32)
    h = np.uint64(0x9E3779B9)
    for word in (stream, stream >> 32, 0, key, key >> 32):
        h = mix(h ^ np.uint64(word & 0xFFFFFFFF))
    place = np.arange(n_words, dtype=np.uint64)
    block = place // cpu.BLOCK
    block_key = mix(mix(h ^ block) ^ (block >> np.uint64(32)))
    u = np.zeros((32, n_words), np.uint64)
    for i in range(32):
        word = triple32(block_key ^ (np.uint64(i * cpu.BLOCK) + place % cpu.BLOCK))
        for bit in range(32):
            digit = 1 - (word >> np.uint64(bit) & np.uint64(1))
            u[bit] |= digit << np.uint64(31 - i)
    p = np.array([p_exp if bit % n_bits in exponent else p_frac for bit in range(32)])
    flips = u < np.rint(p * 2.0**32).astype(np.uint64)[:, None]
    # a word of 16-bit values holds the even one in its low half
    return (
        flips.reshape(32 // n_bits, n_bits, n_words)
        .transpose(1, 2, 0)
        .reshape(n_bits, -1)[:, :count]
    )


@given(
    st.sampled_from(DTYPES),
    st.integers(1, 40),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-(2**63), 2**63 - 1),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_every_bit_is_that_of_the_equations(integers, dtype, count, p_exp, p_frac, key, stream):
    x = torch.linspace(-3, 3, count).to(dtype)
    y = bitflip(x, torch.tensor(key), stream=stream, p_exp=p_exp, p_frac=p_frac)
    expected = expected_flips(dtype, count, key, stream, p_exp, p_frac, integers.mix)
    assert np.array_equal((bits_of(y) ^ bits_of(x)).numpy(), expected)


def test_blocks_have_keys_of_their_own(integers):
    x = torch.zeros(cpu.BLOCK + 5)
    expected = expected_flips(x.dtype, len(x), int(KEY), 0, 0.5, 0.5, integers.mix)
    assert np.array_equal(flipped(x, p_exp=0.5, p_frac=0.5).numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p_exp", "p_frac"), [(0.5, 0.3), (1e-3, 0.9), (2**-7, 2**-12)])
def test_rate_of_every_bit(dtype, p_exp, p_frac):
    n = 1 << 19
    rates = flipped(torch.zeros(n, dtype=dtype), p_exp=p_exp, p_frac=p_frac).double().mean(1)
    for bit, rate in enumerate(rates.tolist()):
        p = p_exp if bit in BITS[dtype][1] else p_frac
        assert abs(rate - p) < 4 * (p * (1 - p) / n) ** 0.5, f"bit {bit}: {rate}, expected {p}"


def test_rate_of_a_rare_flip():
    n, p = 1 << 21, 2.0**-16
    count = flipped(torch.zeros(n), p_exp=p, p_frac=p).sum().item()
    assert abs(count - 32 * n * p) < 4 * (32 * n * p) ** 0.5


@pytest.mark.parametrize("p", [0.25, 0.0625, 0.7])
def test_bits_and_neighbours_are_independent(p):
    n = 1 << 18
    f = flipped(torch.zeros(n), p_exp=p, p_frac=p).double().sub_(p)
    sigma = p * (1 - p) / n**0.5
    between_bits = (f @ f.T / n).fill_diagonal_(0)
    assert between_bits.abs().max() < 5 * sigma
    for distance in (1, 2, 16, 256, 4096):
        together = (f[:, :-distance] * f[:, distance:]).mean(1)
        assert together.abs().max() < 5 * sigma, f"{distance} apart"


@pytest.mark.parametrize("dtype", DTYPES)
def test_probabilities_0_and_1_are_exact(dtype):
    integer, exponent, n = BITS[dtype]
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(integer).view(dtype)
    assert not flipped(x, p_exp=0, p_frac=0).any(), "NaN payloads and all"
    assert flipped(x, p_exp=1, p_frac=1).all()
    rows = flipped(x, p_exp=1, p_frac=0).float().mean(1)
    assert rows.tolist() == [float(bit in exponent) for bit in range(n)]
    rows = flipped(x, p_exp=0, p_frac=1).float().mean(1)
    assert rows.tolist() == [float(bit not in exponent) for bit in range(n)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_out(dtype):
    x = torch.linspace(-3, 3, 4001).to(dtype)
    x[:2] = torch.tensor([torch.nan, -torch.inf])
    how = {"stream": 0, "p_exp": 0.1, "p_frac": 0.1}
    raw = bitflip(x, KEY, **how)
    y = bitflip(x, KEY, **how, zero_out=1.25)
    assert torch.equal(y, torch.where(raw.float().abs() < 1.25, raw, 0))


def test_zero_out_alone():
    x = torch.tensor([1.0, -1.25, 2.0, float("nan"), -float("inf"), 0.0])
    assert bitflip(x, KEY, stream=0, zero_out=1.25).tolist() == [1, 0, 0, 0, 0, 0]


def test_gradient_is_straight_through_and_zero_where_zeroed():
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    g = torch.arange(3000.0)
    (grad,) = torch.autograd.grad(bitflip(x, KEY, stream=0, p_exp=0.2, p_frac=0.2), x, g)
    assert torch.equal(grad, g)
    raw = bitflip(x, KEY, stream=0, p_exp=0.2, p_frac=0.2)
    y = bitflip(x, KEY, stream=0, p_exp=0.2, p_frac=0.2, zero_out=2.0)
    (grad,) = torch.autograd.grad(y, x, g)
    assert torch.equal(grad, g * (raw.abs() < 2.0))


def test_a_value_that_becomes_zero_by_itself_keeps_its_gradient():
    x = torch.zeros(8, requires_grad=True)
    bitflip(x, KEY, stream=0, zero_out=1.0).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1.0] * 8


def test_keys_streams_and_places_draw_other_flips():
    x = torch.zeros(2, 4096)
    how = {"p_exp": 0.5, "p_frac": 0.5}
    first = bitflip(x, KEY, stream=0, **how)
    assert torch.equal(bits_of(first), bits_of(bitflip(x, KEY.clone(), stream=0, **how)))
    others = [bitflip(x, KEY + 1, stream=0, **how), bitflip(x, KEY, stream=1, **how)]
    for other in (*others, first.flip(0)):
        same = (bits_of(other) == bits_of(first)).double().mean().item()
        assert abs(same - 0.5) < 4 * 0.5 / (32 * x.numel()) ** 0.5


def test_strides_and_odd_sizes():
    x = torch.randn(33, 7).to(torch.bfloat16)
    how = {"stream": 0, "p_exp": 0.1, "p_frac": 0.3}
    by_strides = bitflip(x.T, KEY, **how)
    assert by_strides.is_contiguous() and by_strides.shape == (7, 33)
    assert torch.equal(bits_of(by_strides), bits_of(bitflip(x.T.contiguous(), KEY, **how)))
    assert bitflip(torch.empty(0, 3), KEY, **how).shape == (0, 3)


@pytest.mark.parametrize("zero_out", [None, 1.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_operator_is_registered_in_full(dtype, zero_out):
    x = torch.randn(3, 5, dtype=dtype, requires_grad=True)
    # sign and exponent bits alone make NaN, which the check takes for a difference
    arguments = (x, KEY, 1, 0.1 if zero_out else 0.0, 0.2, zero_out)
    torch.library.opcheck(torch.ops.aixsim.bitflip.default, arguments)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"float64; expected float32"):
        bitflip(torch.zeros(2, dtype=torch.float64), KEY, stream=0)
    with pytest.raises(ValueError, match=r"1\.5"):
        bitflip(torch.zeros(2), KEY, stream=0, p_exp=1.5)


needs_library = pytest.mark.skipif(isinstance(cpu.library(), str), reason=str(cpu.library()))
ODDS = [0.0, 1.0, 0.25, 2.0**-17, 0.3, 1 - 2.0**-32, 2.0**-32]


@needs_library
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from([0, 1, 15, 33, 4097]) | st.integers(2**18 - 9, 2**18 + 40),
    st.sampled_from(ODDS),
    st.sampled_from(ODDS),
    st.sampled_from([None, 0.0, -0.0, -1.0, float("nan"), 1.25, 30.0, float("inf")]),
    st.integers(-(2**63), 2**63 - 1),
)
def test_c_flips_what_torch_flips(dtype, n, p_exp, p_frac, zero_out, key):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    how = (x, torch.tensor(key), 12345678912345, p_exp, p_frac, zero_out)
    found = cpu.forward(*how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "library", lambda: "a test does without")
        expected = cpu.forward(*how)
    integer = BITS[dtype][0]
    assert torch.equal(found[0].view(integer), expected[0].view(integer))
    assert torch.equal(found[1], expected[1])


@needs_library
@pytest.mark.parametrize("options", [("-DCLONES=", "-march=x86-64"), ("-O0",)])
def test_any_compiler_and_number_of_threads_flips_the_same(options, compile_library, monkeypatch):
    x, how = torch.randn(300, 1001), (KEY, 5, 2.0**-9, 0.3, 2.0)
    expected = cpu.forward(x, *how)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    other = opened(compile_library(*options))
    monkeypatch.setattr(cpu, "library", lambda: other)
    found = cpu.forward(x, *how)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(DTYPES), st.sampled_from([1, 3]))
def test_a_part_flips_what_the_whole_flips(data, dtype, sequences):
    length, columns = data.draw(st.integers(1, 9)), 2 * data.draw(st.integers(1, 20))
    first, column = data.draw(st.integers(0, length - 1)), data.draw(st.integers(0, columns - 1))
    rows, column = data.draw(st.integers(1, length - first)), column - column % 2
    n = data.draw(st.integers(1, (columns - column) // 2)) * 2
    x = torch.randn(sequences, length, columns).to(dtype)
    how = {"stream": 5, "p_exp": 0.25, "p_frac": 0.3, "zero_out": 1.5}
    part = (slice(None), slice(first, first + rows), slice(column, column + n))
    key = placed(KEY, Place(rows, length, first, first_column=column, of_columns=columns))
    mine, whole = bitflip(x[part], key, **how), bitflip(x, KEY, **how)[part]
    assert torch.equal(mine.view(BITS[dtype][0]), whole.contiguous().view(BITS[dtype][0]))


def test_a_part_in_another_block_of_words(monkeypatch):
    monkeypatch.setattr(cpu, "BLOCK", 1 << 10)
    monkeypatch.setattr(cpu, "library", lambda: "a test does without")
    x, how = torch.randn(100, 64), {"stream": 5, "p_exp": 0.25, "p_frac": 0.3}
    key = placed(KEY, Place(60, 100, 40))
    assert torch.equal(
        bitflip(x[40:], key, **how).view(torch.int32), bitflip(x, KEY, **how)[40:].view(torch.int32)
    )


def test_a_part_that_ends_within_a_word():
    key = placed(KEY, Place(2, 4))
    assert bitflip(torch.ones(2, 3), key, stream=1, p_exp=0.5).shape == (2, 3)
    with pytest.raises(ValueError, match="even number"):
        bitflip(torch.ones(2, 3, dtype=torch.bfloat16), key, stream=1, p_exp=0.5)
