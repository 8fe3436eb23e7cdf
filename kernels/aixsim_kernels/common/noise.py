"""Counter-based noise: a pure function of (key, stream, op, row, column).

Every output element owns one 16-bit random integer. It depends on the element's global index alone,
never on how the work was cut into blocks or on which device it ran, so that a recomputed forward
sees the same noise. The mixer is the two-multiply 32-bit finaliser "lowbias32" of Chris Wellons'
hash-prospector (https://github.com/skeeto/hash-prospector, public domain):

    x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16

A row's key is that mixer chained over stream, op, key and row index. A pair of neighbouring columns
gets the same mixer, less its first line (the row key is mixed already), of
`row_key ^ (column >> 1)`: the low half of the word is the even column's, the high half the odd's.

An operation may work on a part of a whole: some rows of a sequence, some heads, some columns, as a
rank has them that shares them with others. Then its key is `placed`, and the part draws what the
whole would draw there, and knows which of the whole's queries its own are. All of it are integers
on the device: another part compiles nothing anew.
"""

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

_Word = TypeVar("_Word", int, Tensor)
_WORD = 0xFFFFFFFF
_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B
# the same 32 bits as a signed integer, which is what in-place int32 arithmetic takes
_SIGNED_MULTIPLIER_2 = _MULTIPLIER_2 - (1 << 32)


def _mix(x: _Word) -> _Word:
    """lowbias32 of a Python int or of an int64 tensor that holds unsigned 32-bit words."""
    x = x ^ (x >> 16)
    x = (x * _MULTIPLIER_1) & _WORD
    x = x ^ (x >> 15)
    x = (x * _MULTIPLIER_2) & _WORD
    return x ^ (x >> 16)


def seed_word(stream: int, op: int) -> int:
    """Unsigned 32-bit word that tells layers and the operations within a layer apart.

    Args:
        stream: any integer, 64 bits of it count; the caller's hash of layer and seed.
        op: number of the operation within the layer.
    """
    low = _mix((stream & _WORD) ^ 0x9E3779B9)
    return _mix(_mix(low ^ ((stream >> 32) & _WORD)) ^ (op & _WORD))


def row_keys(rows: Tensor, key: Tensor, seed: int) -> Tensor:
    """Random 32-bit word of each output row.

    Args:
        rows: int64, any shape; global row indices.
        key: int64, 0-d or `placed`, on the device of `rows`; changes from step to step.
        seed: `seed_word` of the layer and operation.

    Returns:
        int32, shape of `rows`.
    """
    key = key if key.dim() == 0 else key[0]
    word = _mix((key & _WORD) ^ seed)
    word = _mix(((key >> 32) & _WORD) ^ word)
    word = _mix((rows & _WORD) ^ word)
    word = _mix(((rows >> 32) & _WORD) ^ word)
    return word.to(torch.int32)


class Place(NamedTuple):
    """Which part of a whole an operation works on.

    Args:
        rows: rows of a sequence that are here: of a linear's input, or an attention's queries. No
            operation checks that it has so many.
        of_rows: rows of a whole sequence.
        first_row: the first one of them here.
        of_heads: query heads of the whole.
        first_head: the first one of them here.
        first_column: of a linear's outputs, or of what bits are flipped in; even, as two columns
            share a word. An attention has all of its keys and channels.
        of_columns: of the whole, even; 0 = all of them are here. A linear need not know.
    """

    rows: int
    of_rows: int
    first_row: int = 0
    of_heads: int = 1
    first_head: int = 0
    first_column: int = 0
    of_columns: int = 0


def placed(key: Tensor, place: Place) -> Tensor:
    """A key that an operation on a part of a whole takes, int64 (8,), from one of 0 dimensions.

    Raises:
        ValueError: the part lies outside of the whole, or its first column or the number of all
            columns is odd.
    """
    rows, of_rows, row, of_heads, head, column, of_columns = place
    if not (row >= 0 and 0 < rows <= of_rows - row and 0 <= head < of_heads and column >= 0):
        raise ValueError(f"{place}: no part of its whole")
    if of_columns < 0 or (of_columns and column >= of_columns):
        raise ValueError(f"{place}: no part of its whole")
    if column % 2 or of_columns % 2:
        raise ValueError(f"column {column} of {of_columns}: expected even numbers")
    return torch.cat([key.view(1), torch.tensor(place, device=key.device)])


def place_in(key: Tensor) -> Place | None:
    """The place that a key has, of int64 tensors, 0-d; None for a key of the whole."""
    return Place(*key[1:]) if key.dim() else None  # pyright: ignore[reportArgumentType]


def global_rows(shape: Sequence[int], key: Tensor) -> Tensor:
    """Index in the whole of each row of an output, int64 `shape`: (rows,), (B, heads …, rows)."""
    index = torch.arange(torch.Size(shape).numel(), device=key.device).view(*shape)
    place = place_in(key)
    if place is None:
        return index
    outer, row = index // place.rows, index % place.rows
    heads = prod(shape[1:-1])
    outer = outer // heads * place.of_heads + outer % heads + place.first_head
    return outer * place.of_rows + place.first_row + row


def random_int16(keys: Tensor, columns: int, first: Tensor | int = 0) -> Tensor:
    """Random 16-bit integers of `columns` columns of each row.

    Args:
        keys: int32 (...), from `row_keys`.
        columns: number of columns.
        first: the first one, even.

    Returns:
        int16 (..., columns), uniform over all 65536 values.
    """
    pairs = torch.arange((columns + 1) // 2, dtype=torch.int32, device=keys.device)
    pairs += first // 2
    bits = torch.bitwise_xor(keys.unsqueeze(-1), pairs)
    bits.mul_(_MULTIPLIER_1)
    # torch shifts int32 arithmetically: the mask makes the shift a logical one
    bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF))
    bits.mul_(_SIGNED_MULTIPLIER_2)
    bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))
    return bits.view(torch.int16)[..., :columns]


# of `normal`: z = x * P(w), which is fitted to the inverse of the normal distribution
NORMAL = (1.25235357, 0.329398084, 0.0171813540, -0.00472253524, 3.79952040e-4, -1.10452e-5)


@cache
def normal_table(device: torch.device) -> Tensor:
    """`normal` of all integers in order, the lowest first: float32 (65536,) on this device."""
    x = (torch.arange(-32768, 32768, dtype=torch.float64) + 0.5) / 32768
    w, z = -torch.log1p(-(x**2)), torch.zeros_like(x)
    for coefficient in reversed(NORMAL):
        z = z * w + coefficient
    # made on a CPU, so that it is the same everywhere
    return (x * z).float().to(device)


def normal(bits: Tensor) -> Tensor:
    """Standard normal numbers, one for each 16-bit integer.

    The inverse of the normal distribution at (i + 1/2) / 65536, to 3e-4: with x = 2 (i + 1/2) /
    65536 and w = -ln(1 - x^2) it is x times a polynomial in w (as in M. Giles, "Approximating the
    erfinv function", 2011, with one polynomial instead of two). |z| <= 4.32, variance 0.9999.

    Args:
        bits: int16 (...), from `random_int16`.

    Returns:
        float32 (...).
    """
    index = bits.to(torch.int32).add_(32768)
    found = normal_table(bits.device).index_select(0, index.reshape(-1))
    return found.view(bits.shape)


def normal_noise(rows: int, columns: int, key: Tensor, stream: int, *, op: int = 0) -> Tensor:
    """`normal` of the integers of an output, float32 (rows, columns); as `uniform_noise`."""
    return normal(_noise_bits(rows, columns, key, stream, op))


def uniform_noise(rows: int, columns: int, key: Tensor, stream: int, *, op: int = 0) -> Tensor:
    """Noise of an output (rows, columns).

    Args:
        rows: number of rows.
        columns: number of columns.
        key: int64, 0-d, or `placed`: the noise of a part of a whole; it lives on the key's device.
        stream: hash of layer and seed.
        op: number of the operation within the layer.

    Returns:
        float32 (rows, columns), `(int16 + 1/2) / 65536`: uniform over 65536 values strictly
        inside (-1/2, 1/2), mean exactly 0.
    """
    return _noise_bits(rows, columns, key, stream, op).float().add_(0.5).mul_(2.0**-16)


def _noise_bits(rows: int, columns: int, key: Tensor, stream: int, op: int) -> Tensor:
    place = place_in(key)
    keys = row_keys(global_rows([rows], key), key, seed_word(stream, op))
    return random_int16(keys, columns, 0 if place is None else place.first_column)
