"""The optical equations once more, in numpy's float64 and integers, to hold kernels to."""

from types import SimpleNamespace

import numpy as np
import pytest

WORD = np.uint64(0xFFFFFFFF)


def mix(x):
    x = np.asarray(x, np.uint64) & WORD
    x ^= x >> np.uint64(16)
    x = (x * np.uint64(0x7FEB352D)) & WORD
    x ^= x >> np.uint64(15)
    x = (x * np.uint64(0x846CA68B)) & WORD
    return x ^ (x >> np.uint64(16))


def noise(rows, columns, key, stream, op):
    """u of the first `rows` x `columns` outputs, from the words of every counter."""
    h = np.uint64(0x9E3779B9)
    for word in (stream, stream >> 32, op, key, key >> 32):
        h = mix(h ^ np.uint64(word & 0xFFFFFFFF))
    row = np.arange(rows, dtype=np.uint64)
    row_key = mix(mix(h ^ row) ^ (row >> np.uint64(32)))
    column = np.arange(columns, dtype=np.uint64)
    x = row_key[:, None] ^ (column >> np.uint64(1))
    x = (x * np.uint64(0x7FEB352D)) & WORD
    x ^= x >> np.uint64(15)
    x = (x * np.uint64(0x846CA68B)) & WORD
    x ^= x >> np.uint64(16)
    half = np.where(column % 2 == 0, x & np.uint64(0xFFFF), x >> np.uint64(16))
    return (half.astype(np.uint16).view(np.int16).reshape(rows, columns) + 0.5) / 65536


def position(x, lo, hi, levels):
    """Where x lies on the grid, in levels, before it is rounded."""
    if hi - lo == 0:
        return np.where(np.isnan(x), np.nan, 0.0)
    return (np.asarray(x, np.float64) - lo) / (hi - lo) * (levels - 1)


def value(code, lo, hi, levels):
    return lo + code * (hi - lo) / (levels - 1)


def modulate(x, lo, hi, levels, lut_min=0.0):
    code = np.rint(np.clip(position(x, lo, hi, levels), 0, levels - 1))
    shown = value(code, lo, hi, levels)
    zero = np.abs(shown) <= 2.0**-22 * max(abs(lo), abs(hi))
    floored = np.where(
        shown > 0, np.maximum(shown, lut_min * hi), np.minimum(shown, -lut_min * abs(lo))
    )
    return np.where(zero, shown, floored)


def detect(acc, lo, hi, levels, u):
    return np.clip(np.rint(position(acc, lo, hi, levels) + u), 0, levels - 1)


@pytest.fixture(scope="session")
def oracle():
    return SimpleNamespace(
        mix=mix, noise=noise, position=position, value=value, modulate=modulate, detect=detect
    )
