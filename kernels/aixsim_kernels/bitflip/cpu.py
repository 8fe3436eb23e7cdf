"""Random bit-flips on a CPU, in C (`flips.c`) or torch; what `triton.py` is compared with.

A tensor is worked on as 32-bit words: one float32, or two 16-bit floats. All 32 bits of a word are
decided at once. With the binary digits of a bit's probability p = 0.d1 d2 d3 … and random words
w1, w2, w3, …, one bit of each, the bit flips where the fraction 0.~w1 ~w2 ~w3 … is below p:

    alive = bits with 0 < p < 1;  flips = bits with p = 1
    for each digit d (a word: one digit of every bit's p):
        flips |= alive & w & d
        alive &= w ^ d

Every digit leaves half of the bits undecided whatever p is, so after a few digits almost all words
are done, and the rest of the digits is drawn for the few that are not.

The random word i of word j is the mixer "triple32" of Chris Wellons' hash-prospector
(https://github.com/skeeto/hash-prospector, public domain) of `key ^ counter`, where the key belongs
to the block j // BLOCK and the counter is i * BLOCK + j % BLOCK: a flip depends on the place in the
tensor alone, or in the whole that it is a part of. The two-multiply mixer of `common/noise.py` does
not do here: the words of one place differ in few bits of the counter, and the flips of two bits
came out correlated (0.22 at p = 1/4).
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aixsim_kernels.common.library import library
from aixsim_kernels.common.noise import global_rows, place_in, row_keys, seed_word

# words that share a key
BLOCK = 1 << 18
# digits drawn for all words before those that are decided are left out
DIGITS_AT_ONCE = 8
# probabilities are multiples of 2**-DIGITS
DIGITS = 32

# sign and exponent bits, fraction bits; a word of 16-bit floats holds two
FIELDS = {
    torch.float32: (0xFF800000, 0x007FFFFF),
    torch.bfloat16: (0xFF80FF80, 0x007F007F),
    torch.float16: (0xFC00FC00, 0x03FF03FF),
}


@dataclass(frozen=True)
class Plan:
    """The bits of a word and their probabilities, as signed 32-bit words.

    Args:
        certain: bits that flip for sure.
        uncertain: bits that may flip.
        digits: for each binary digit, first to last, the bits whose probability has it set.
    """

    certain: int
    uncertain: int
    digits: tuple[int, ...]


def numerator(p: float) -> int:
    """A probability in units of 2**-32, rounded."""
    return round(p * 2**DIGITS)


def make_plan(dtype: torch.dtype, p_exp: float, p_frac: float) -> Plan:
    """What to draw for a type and two probabilities.

    Args:
        dtype: float32, bfloat16 or float16.
        p_exp: of every sign and exponent bit, in [0, 1].
        p_frac: of every fraction bit, in [0, 1].
    """
    fields = [
        (field, numerator(p)) for field, p in zip(FIELDS[dtype], (p_exp, p_frac), strict=True)
    ]
    certain = sum(field for field, n in fields if n == 1 << DIGITS)
    fields = [(field, n) for field, n in fields if 0 < n < 1 << DIGITS]
    digits = [sum(field for field, n in fields if n >> (DIGITS - 1 - i) & 1) for i in range(DIGITS)]
    while digits and not digits[-1]:
        digits.pop()
    uncertain = sum(field for field, _ in fields)
    return Plan(_signed(certain), _signed(uncertain), tuple(map(_signed, digits)))


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def forward(
    x: Tensor, key: Tensor, stream: int, p_exp: float, p_frac: float, zero_out: float | None
) -> tuple[Tensor, Tensor]:
    """Forward pass; arguments as in `bitflip`.

    Returns:
        y, shape and type of x, contiguous; bool, where y was not zeroed: shape of x, or (0,) where
        `zero_out` is None.
    """
    plan, found = make_plan(x.dtype, p_exp, p_frac), library()
    if x.device.type == "cpu" and isinstance(found, ctypes.CDLL) and place_in(key) is None:
        return _in_c(found, x, key, stream, plan, zero_out)
    y = flip(x, key, stream, plan)
    if zero_out is None:
        return y, torch.empty(0, dtype=torch.bool, device=x.device)
    # in float32: a 16-bit comparison would round the threshold; NaN is not below it
    kept = y.float().abs() < zero_out
    return y.masked_fill_(~kept, 0.0), kept


def magnitude_limit(zero_out: float, dtype: torch.dtype) -> int:
    """The bits of the smallest value of a type that is not below a threshold.

    For non-negative floats the order of the bits is that of the values, infinity above all numbers
    and NaN above infinity.
    """
    if not zero_out > 0:
        # no magnitude is below it
        return 0
    threshold = torch.tensor(zero_out, dtype=torch.float32)
    rounded = threshold.to(dtype)
    if rounded < threshold:
        rounded = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    bits = rounded.view(torch.int32 if dtype == torch.float32 else torch.int16)
    return int(bits)


def _in_c(
    found: ctypes.CDLL, x: Tensor, key: Tensor, stream: int, plan: Plan, zero_out: float | None
) -> tuple[Tensor, Tensor]:
    """`forward` by `flips.c`."""
    flat = whole_words(x)
    y = torch.empty_like(flat)
    kept = torch.empty(0 if zero_out is None else y.numel(), dtype=torch.bool)
    n_words = y.numel() * y.element_size() // 4
    keys = _block_keys(n_words, key, stream)
    digits = torch.tensor(plan.digits, dtype=torch.int32)
    limit = 0 if zero_out is None else magnitude_limit(zero_out, x.dtype)
    found.aixsim_flip(
        flat.data_ptr(), y.data_ptr(), None if zero_out is None else kept.data_ptr(), n_words,
        keys.data_ptr(), plan.certain % 2**32, plan.uncertain % 2**32, digits.data_ptr(),
        len(digits), x.element_size() == 2, limit, torch.get_num_threads(),
    )  # fmt: skip
    kept = kept if zero_out is None else kept[: x.numel()].view(x.shape)
    return y[: x.numel()].view(x.shape), kept


def whole_words(x: Tensor) -> Tensor:
    """x in one row, contiguous; behind an odd number of 16-bit values one more."""
    flat = x.contiguous().view(-1)
    odd = flat.numel() * flat.element_size() % 4 // 2
    return torch.nn.functional.pad(flat, (0, odd)) if odd else flat


def _block_keys(n_words: int, key: Tensor, stream: int) -> Tensor:
    """Key of each block of words: int32 (blocks,)."""
    blocks = torch.arange((n_words + BLOCK - 1) // BLOCK, device=key.device)
    return row_keys(blocks, key, seed_word(stream, 0))


def _blocks(words: Tensor) -> Sequence[Tensor]:
    """Words (n,) by blocks; torch makes of no words one block, of none."""
    return words.split(BLOCK) if len(words) else ()


def _in_whole(x: Tensor, key: Tensor) -> Tensor:
    """Where in the whole the words of a part are: int64 (words,)."""
    place = place_in(key)
    assert place is not None
    columns = x.shape[-1] if x.dim() else 1
    of_columns = torch.where(torch.as_tensor(place.of_columns > 0), place.of_columns, columns)
    per_word = 4 // x.element_size()
    words = torch.arange(columns // per_word, device=key.device)
    rows = global_rows([x.numel() // max(columns, 1)], key)
    first = rows * of_columns + place.first_column
    return ((first // per_word).unsqueeze(1) + words).flatten()


def flip(x: Tensor, key: Tensor, stream: int, plan: Plan) -> Tensor:
    """A contiguous copy of x (any shape) with its bits flipped."""
    values = whole_words(x).clone()
    words = values.view(torch.int32)
    blocks = _blocks(words)
    if place_in(key) is None:
        keys = _block_keys(len(words), key, stream)
        places = [torch.arange(len(b), dtype=torch.int32, device=x.device) for b in blocks]
    else:
        in_whole = _in_whole(x, key)
        keys = _blocks(row_keys(in_whole // BLOCK, key, seed_word(stream, 0)))
        places = _blocks((in_whole % BLOCK).int())
    for block, place, block_key in zip(blocks, places, keys, strict=True):
        if plan.certain:
            block.bitwise_xor_(plan.certain)
        if plan.uncertain:
            alive = torch.full_like(block, plan.uncertain)
            block.bitwise_xor_(_draw(place, alive, block_key, plan.digits))
    return values[: x.numel()].view(x.shape)


def _draw(
    place: Tensor, alive: Tensor, key: Tensor, digits: tuple[int, ...], done: int = 0
) -> Tensor:
    """Which bits flip, by the digits from number `done` on.

    Args:
        place: int32 (n,), each word's place in its block.
        alive: int32 (n,), its undecided bits; overwritten.
        key: int32, 0-d, of the block, or (n,), of each word.
        digits: of the plan.
        done: how many digits have been drawn.

    Returns:
        int32 (n,).
    """
    flips = torch.zeros_like(alive)
    last = min(done + DIGITS_AT_ONCE, len(digits))
    for i in range(done, last):
        word = random_words(place, key, i)
        if digits[i]:
            flips |= (alive & word).bitwise_and_(digits[i])
            word ^= digits[i]
        alive &= word
    if last < len(digits):
        rest = alive.nonzero().squeeze(1)
        if len(rest):
            of_rest = key[rest] if key.dim() else key
            flips[rest] |= _draw(place[rest], alive[rest], of_rest, digits, last)
    return flips


def random_words(place: Tensor, key: Tensor, i: int) -> Tensor:
    """Random word number `i` of the words at these places of a block: int32 (n,) -> int32 (n,)."""
    x = place ^ (key ^ i * BLOCK)
    # torch shifts int32 arithmetically: the masks make the shifts logical ones
    x ^= (x >> 17).bitwise_and_(0x7FFF)
    x *= 0xED5AD4BB - (1 << 32)
    x ^= (x >> 11).bitwise_and_(0x1FFFFF)
    x *= 0xAC4C1B51 - (1 << 32)
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= 0x31848BAB
    x ^= (x >> 14).bitwise_and_(0x3FFFF)
    return x
