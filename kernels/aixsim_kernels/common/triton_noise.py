"""The noise of `noise.py` inside Triton kernels: the same integers for the same counters."""

import triton
import triton.language as tl
from triton.language import target_info

from aixsim_kernels.common.noise import NORMAL

# coefficients of `normal`, that of w^0 first
_Z0, _Z1, _Z2, _Z3, _Z4, _Z5 = map(tl.constexpr, NORMAL)
# what `add_uniform` adds beside the noise: (2^23 + 2^15) / 2^16
ORIGIN = tl.constexpr(128.5)


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
def words(keys, pairs):
    """32 random bits for keys (uint32) and column numbers over 2, of one shape when broadcast."""
    word = keys ^ pairs.to(tl.uint32)
    word *= 0x7FEB352D
    word ^= word >> 15
    word *= 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def as_digits(half):
    """16 bits, uint32 (...), as the lowest digits of a large number, float32 (...).

    A GPU converts integers at a quarter of the rate, in the unit that makes exponentials.
    """
    # the sign bit turned over is 2^15 too many
    return (half ^ 0x4B008000).to(tl.float32, bitcast=True)


@triton.jit
def digits(keys, columns):
    """The noise of rows and columns, for `uniform` and `add_uniform`.

    Args:
        keys: uint32, from `row_keys`.
        columns: int32, of a shape that broadcasts with that of the keys.

    Returns:
        float32 of the common shape.
    """
    word = words(keys, columns >> 1)
    return as_digits((word >> ((columns & 1) * 16).to(tl.uint32)) & 0xFFFF)


@triton.jit
def digits_of_pairs(keys, pairs):
    """`digits` of neighbouring columns, whose word is made once.

    Args:
        keys: uint32 (rows,), from `row_keys`.
        pairs: int32 (columns / 2,), consecutive column numbers over 2.

    Returns:
        float32 (rows, columns).
    """
    word = words(keys[:, None], pairs[None, :])
    return tl.interleave(as_digits(word & 0xFFFF), as_digits(word >> 16))


@triton.jit
def uniform(digits):
    """`noise.uniform_noise` of what `digits` returned: float32 (...)."""
    return (digits - 8421376.0 + 0.5) * 1.52587890625e-05


@triton.jit
def log2(x):
    """Logarithm to the base 2 of normal numbers, to 2^-22: CUDA's own is many instructions long."""
    if target_info.is_cuda():
        x = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        x = tl.log2(x)
    return x


@triton.jit
def normal(digits):
    """`noise.normal` of what `digits` returned: float32 (...)."""
    x = (digits - 8421376.0 + 0.5) * 3.0517578125e-05
    # in one rounding: of a square next to 1 it would be most of what is left
    w = log2(tl.fma(-x, x, 1.0)) * -0.6931471805599453
    z = tl.fma(w, _Z5, _Z4)
    z = tl.fma(z, w, _Z3)
    z = tl.fma(z, w, _Z2)
    z = tl.fma(z, w, _Z1)
    return x * tl.fma(z, w, _Z0)


@triton.jit
def add_uniform(x, digits):
    """x + ORIGIN + `uniform(digits)`, to 2^-17, in one multiplication and addition."""
    return tl.fma(digits, 1.52587890625e-05, x)
