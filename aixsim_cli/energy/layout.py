"""Matrix products laid out on arrays: what is shown, read and loaded, a token of the forward.

A product of a token's vector with a (K, N) matrix on arrays of (Ka, Na) shows each of its K values
⌈N / Na⌉ times and reads each of its N outputs ⌈K / Ka⌉ times. A causal attention lights the tiles
that a token sees, no more.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, inf

from aixsim_cli.energy.shape import Attention, Linear, Place
from aixsim_cli.transforms.counts import Arrays, Product

SCORES, VALUES = "q kᵀ", "p v"


@dataclass(frozen=True)
class Work:
    """What a model is asked to do.

    Args:
        seq_len: tokens of a sequence; in decoding, those that a new one sees.
        batch: sequences at once.
        decode: a token after the other; else all of a sequence at once, causally.
    """

    seq_len: int = 2048
    batch: int = 1
    decode: bool = False

    @property
    def tokens(self) -> int:
        """That go through a layer at once."""
        return self.batch * (1 if self.decode else self.seq_len)

    @property
    def seen(self) -> float:
        """Tokens that one sees, itself among them, on average."""
        return self.seq_len if self.decode else (self.seq_len + 1) / 2

    def tiles(self, size: int | None) -> float:
        """Arrays of `size` that hold the tokens that one sees, on average."""
        if size is None:
            return 1
        if self.decode:
            return ceil(self.seq_len / size)
        full, rest = divmod(self.seq_len, size)
        return (size * full * (full + 1) / 2 + rest * (full + 1)) / self.seq_len


def products(place: Place, arrays: Arrays, work: Work) -> Iterator[Product]:
    """The products of a place: one of a linear, two of an attention."""
    if isinstance(place, Linear):
        yield _linear(place, arrays, work)
    else:
        yield _scores(place, arrays, work)
        yield _values(place, arrays, work)


def _linear(linear: Linear, arrays: Arrays, work: Work) -> Product:
    k, n = linear.k, linear.n
    k_tiles, n_tiles = _tiles(k, arrays.k), _tiles(n, arrays.n)
    stays = arrays.in_place
    return Product(
        linear.kind,
        k=k,
        n=n,
        vectors=1,
        macs=k * n,
        outputs=n,
        shown=k * n_tiles,
        read=n * k_tiles,
        loads=0 if stays else k * n / min(work.tokens, arrays.vectors or inf),
        fetched=0 if stays else k * n / work.tokens,
        shots=_turns(k_tiles * n_tiles, arrays),
        arrays=arrays,
    )


def _scores(attention: Attention, arrays: Arrays, work: Work) -> Product:
    """q kᵀ: a query of `head_dim` values against the keys that it sees."""
    heads, width = attention.heads, attention.head_dim
    k_tiles, n_tiles = _tiles(width, arrays.k), work.tiles(arrays.n)
    return Product(
        SCORES,
        k=width,
        n=work.seen,
        vectors=heads,
        macs=heads * width * work.seen,
        outputs=heads * work.seen,
        shown=heads * width * n_tiles,
        read=heads * work.seen * k_tiles,
        loads=_cached(attention, arrays, work),
        fetched=0,
        shots=_turns(attention.kv_heads * k_tiles * n_tiles, arrays) * _group(attention),
        arrays=arrays,
    )


def _values(attention: Attention, arrays: Arrays, work: Work) -> Product:
    """p v: a row of probabilities against the values that it weighs."""
    heads, width = attention.heads, attention.head_dim
    k_tiles, n_tiles = work.tiles(arrays.k), _tiles(width, arrays.n)
    return Product(
        VALUES,
        k=work.seen,
        n=width,
        vectors=heads,
        macs=heads * width * work.seen,
        outputs=heads * width,
        shown=heads * work.seen * n_tiles,
        read=heads * width * k_tiles,
        loads=_cached(attention, arrays, work),
        fetched=0,
        shots=_turns(attention.kv_heads * k_tiles * n_tiles, arrays) * _group(attention),
        arrays=arrays,
    )


def _cached(attention: Attention, arrays: Arrays, work: Work) -> float:
    """Keys, or values, that are written a token.

    A token's own, once; all that it sees, where decoding finds nothing in place; and all again for
    every so many vectors, where an array serves no more.
    """
    own = attention.kv_heads * attention.head_dim
    written = own * work.seen if work.decode and not arrays.cache_in_place else own
    if arrays.vectors is None:
        return written
    return max(written, attention.heads * attention.head_dim * work.seen / arrays.vectors)


def _group(attention: Attention) -> float:
    return attention.heads / attention.kv_heads


def _tiles(size: int, array: int | None) -> int:
    return 1 if array is None else ceil(size / array)


def _turns(tiles: float, arrays: Arrays) -> float:
    """Times that the arrays are used for one vector, all of them at once."""
    return 1 if arrays.number is None else max(1, tiles / arrays.number)
