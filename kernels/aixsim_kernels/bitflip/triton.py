"""Random bit-flips as a Triton kernel: bit for bit what `cpu.py` computes, in one pass.

Not tuned on a GPU. A word costs about twelve integer instructions a digit, whatever the tile.

Legend: a program works on TILE_WORDS words, of a block of BLOCK_WORDS that share a key; `alive` are
the bits of a word that are not decided yet, `flips` those that flip. A comment gives the shape of a
value, [] of a number.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from aixsim_kernels.bitflip.cpu import (
    BLOCK,
    DIGITS,
    FIELDS,
    magnitude_limit,
    numerator,
    whole_words,
)
from aixsim_kernels.common.noise import seed_word
from aixsim_kernels.common.triton_launch import launch
from aixsim_kernels.common.triton_noise import global_rows, row_keys

# words a program works on; a divisor of BLOCK
TILE = 1024


def forward(
    x: Tensor, key: Tensor, stream: int, p_exp: float, p_frac: float, zero_out: float | None
) -> tuple[Tensor, Tensor]:
    """As `cpu.forward`."""
    count = x.numel()
    flat = whole_words(x)
    y = torch.empty_like(flat)
    kept = torch.empty(0 if zero_out is None else x.shape, dtype=torch.bool, device=x.device)
    words = flat.view(torch.int32)
    n_exp, n_frac = numerator(p_exp), numerator(p_frac)
    exp_field, frac_field = FIELDS[x.dtype]
    programs: Any = triton.cdiv(len(words), TILE)
    if count:
        launch(
            _flip,
            programs,
            x_ptr=words,
            y_ptr=y.view(torch.int32),
            kept_ptr=kept,
            key_ptr=key,
            count=count,
            columns=x.shape[-1] if x.dim() else 1,
            n_words=len(words),
            n_exp=n_exp,
            n_frac=n_frac,
            limit=0 if zero_out is None else magnitude_limit(zero_out, x.dtype),
            seed=seed_word(stream, 0),
            N_DIGITS=max(_n_digits(n_exp), _n_digits(n_frac)),
            EXP=exp_field,
            FRAC=frac_field,
            HALVES=x.element_size() == 2,
            ZERO_OUT=zero_out is not None,
            PLACED=key.dim() > 0,
            BLOCK_WORDS=BLOCK,
            TILE_WORDS=TILE,
        )
    return y[:count].view(x.shape), kept


def _n_digits(n: int) -> int:
    """Binary digits of n / 2**32 up to its last 1; none for 0 and 1."""
    return 0 if n in (0, 1 << DIGITS) else DIGITS - ((n & -n).bit_length() - 1)


@triton.jit
def _random_word(x):
    x ^= x >> 17
    x *= 0xED5AD4BB
    x ^= x >> 11
    x *= 0xAC4C1B51
    x ^= x >> 15
    x *= 0x31848BAB
    return x ^ (x >> 14)


@triton.jit
def _field(FIELD: tl.constexpr, set_):
    return tl.where(set_, FIELD, 0).to(tl.uint32)


# a 1 would be taken for a constant, and every probability compiled anew
@triton.jit(do_not_specialize=["n_exp", "n_frac", "limit", "seed"])
def _flip(
    x_ptr,
    y_ptr,
    kept_ptr,
    key_ptr,
    count,
    columns,
    n_words,
    n_exp,
    n_frac,
    limit,
    seed,
    N_DIGITS: tl.constexpr,
    EXP: tl.constexpr,
    FRAC: tl.constexpr,
    HALVES: tl.constexpr,
    ZERO_OUT: tl.constexpr,
    PLACED: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    TILE_WORDS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * TILE_WORDS
    offsets = first + tl.arange(0, TILE_WORDS)
    if PLACED:
        WIDTH: tl.constexpr = 2 if HALVES else 1  # pyright: ignore[reportAssignmentType]
        words = columns // WIDTH
        row, here = offsets // words, tl.load(key_ptr + 1)  # [TILE_WORDS], []
        row = global_rows(key_ptr, row // here, row % here, 1, here, PLACED)
        first_column, of_columns = tl.load(key_ptr + 6), tl.load(key_ptr + 7)  # [], []
        of_columns = tl.where(of_columns > 0, of_columns, columns)
        in_whole = (row * of_columns + first_column) // WIDTH + offsets % words
        # [TILE_WORDS], of the key []
        key32 = row_keys(in_whole // BLOCK_WORDS, tl.load(key_ptr), seed)
        place = (in_whole % BLOCK_WORDS).to(tl.uint32)
    else:
        key32 = row_keys(first // BLOCK_WORDS, tl.load(key_ptr), seed)  # [], of the key []
        place = (first % BLOCK_WORDS).to(tl.uint32) + tl.arange(0, TILE_WORDS).to(tl.uint32)
    n_exp = n_exp.to(tl.int64)
    n_frac = n_frac.to(tl.int64)
    whole = tl.full((), 1, tl.int64) << 32
    alive = tl.full((TILE_WORDS,), 0, tl.uint32)
    alive |= _field(EXP, (n_exp > 0) & (n_exp < whole))
    alive |= _field(FRAC, (n_frac > 0) & (n_frac < whole))
    flips = tl.full((TILE_WORDS,), 0, tl.uint32)
    flips |= _field(EXP, n_exp == whole) | _field(FRAC, n_frac == whole)
    for i in range(N_DIGITS):
        word = _random_word(place ^ (i * BLOCK_WORDS) ^ key32)
        digit = _field(EXP, (n_exp >> (31 - i)) & 1 == 1)
        digit |= _field(FRAC, (n_frac >> (31 - i)) & 1 == 1)
        flips |= alive & word & digit
        alive &= word ^ digit

    inside = offsets < n_words
    y = tl.load(x_ptr + offsets, mask=inside).to(tl.uint32, bitcast=True) ^ flips  # [TILE_WORDS]
    if ZERO_OUT and HALVES:
        low = (y & 0x7FFF) < limit
        high = ((y >> 16) & 0x7FFF) < limit
        y &= tl.where(low, 0xFFFF, 0).to(tl.uint32) | tl.where(high, 0xFFFF0000, 0).to(tl.uint32)
        tl.store(kept_ptr + 2 * offsets, low, mask=inside)  # [TILE_WORDS]
        tl.store(kept_ptr + 2 * offsets + 1, high, mask=2 * offsets + 1 < count)  # [TILE_WORDS]
    elif ZERO_OUT:
        low = (y & 0x7FFFFFFF) < limit
        y = tl.where(low, y, 0)
        tl.store(kept_ptr + offsets, low, mask=inside)  # [TILE_WORDS]
    tl.store(y_ptr + offsets, y.to(tl.int32, bitcast=True), mask=inside)  # [TILE_WORDS]
