"""The noise of `noise.py` inside Triton kernels: the same integers for the same counters."""

import triton
import triton.language as tl


@triton.jit
def mix(x):
    """lowbias32 of uint32 words, any shape."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_keys(rows, key, seed):
    """`noise.row_keys`: rows int64 (...), key int64 and seed scalars -> uint32 (...)."""
    word = mix((key & 0xFFFFFFFF).to(tl.uint32) ^ seed.to(tl.uint32))
    word = mix(((key >> 32) & 0xFFFFFFFF).to(tl.uint32) ^ word)
    word = mix((rows & 0xFFFFFFFF).to(tl.uint32) ^ word)
    return mix(((rows >> 32) & 0xFFFFFFFF).to(tl.uint32) ^ word)


@triton.jit
def global_rows(key_ptr, outer, rows, heads, n_rows, PLACED: tl.constexpr):
    """`noise.global_rows` of rows (...) of head `outer` in (B, heads): int64 (...)."""
    if PLACED:
        of_rows, first_row = tl.load(key_ptr + 2), tl.load(key_ptr + 3)  # [], []
        of_heads, first_head = tl.load(key_ptr + 4), tl.load(key_ptr + 5)  # [], []
        outer = outer // heads * of_heads + outer % heads + first_head
        return outer * of_rows + first_row + rows
    return outer * n_rows + rows


@triton.jit
def uniform_pairs(keys, pairs):
    """Noise of neighbouring columns, which share a word.

    Args:
        keys: uint32 (rows,), from `row_keys`.
        pairs: int32 (columns / 2,), consecutive column numbers over 2.

    Returns:
        float32 (rows, columns): `noise.uniform_noise` of these rows and columns.
    """
    word = keys[:, None] ^ pairs[None, :].to(tl.uint32)
    word *= 0x7FEB352D
    word ^= word >> 15
    word *= 0x846CA68B
    word ^= word >> 16
    return (tl.interleave(signed(word & 0xFFFF), signed(word >> 16)) + 0.5) * 1.52587890625e-05


@triton.jit
def signed(half):
    """16 bits in uint32 (...) as a signed number, float32 (...).

    They become the lowest digits of 2^23, which is exact; a GPU converts integers at a quarter of
    the rate, in the unit that makes exponentials.
    """
    # the sign bit turned over is 2^15 too many
    return (half ^ 0x4B008000).to(tl.float32, bitcast=True) - 8421376.0
