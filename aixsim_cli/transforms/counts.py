"""What a matrix product takes of hardware, as numbers of things; prices are `aixsim_cli.energy`'s.

All numbers are a token of the model's forward. Plain Python: whoever counts needs no torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Arrays:
    """The arrays on which vectors are multiplied with matrices.

    Args:
        k: inputs of an array; null = as many as the product has.
        n: outputs of an array; null = as many as the product has.
        in_place: whether every weight has a pixel of its own, written once for good; else arrays
            are reloaded.
        cache_in_place: whether keys and values stay where they were written; else a step of
            decoding writes all of them again.
        vectors: that one load of an array serves; null = a batch's.
        number: arrays that work at once; null = all that a product fills.
        pixels: a value of the second operand; two of them carry a sign.
        shows: times that the first operand is shown; four passes carry the signs of both.
        reads: times that an output is read.

    Raises:
        ValueError: a number is below 1.
    """

    k: int | None = None
    n: int | None = None
    in_place: bool = True
    cache_in_place: bool = True
    vectors: int | None = None
    number: int | None = None
    pixels: int = 2
    shows: int = 1
    reads: int = 1

    def __post_init__(self) -> None:
        for name in ("k", "n", "vectors", "number", "pixels", "shows", "reads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}; expected 1 or more")


@dataclass(frozen=True)
class Product:
    """Vectors of k values times a (k, n) matrix, laid out on arrays.

    Args:
        kind: of its place in a model: "wq", "q kᵀ".
        k: length of the sums; of an attention's second product the mean, since it grows.
        n: outputs of a vector, mean likewise.
        vectors: a token.
        macs: multiplications that are wanted; a causal attention wants those it sees.
        outputs: that are wanted.
        shown: values of the first operand, once for every array along n.
        read: outputs, once for every array along k.
        loads: values of the second operand that are written to arrays.
        fetched: those of them that come from memory outside the chip.
        shots: times that the arrays, all that work at once, are used.
        arrays: what it is computed on.
    """

    kind: str
    k: float
    n: float
    vectors: float
    macs: float
    outputs: float
    shown: float
    read: float
    loads: float
    fetched: float
    shots: float
    arrays: Arrays


@dataclass(frozen=True)
class Counts:
    """What a product takes of the hardware.

    Args:
        photons: detected ones; None = there is no light, or its amount is not said.
        dot_products: sums that are made with light.
        read_variance: of the read-outs of a sum, electrons².
        inputs: samples of the first operand's converters.
        weights: samples of the second operand's converters.
        outputs: samples of the detectors' converters.
        bits: of the operands' samples.
        bits_out: of the detectors' samples.
        sram_bytes: to and from the buffer.
        dram_bytes: from memory outside the chip.
        digital_ops: additions and the like around the product.
        digital_macs: multiplications that are digital.
        shots: times that the arrays are used one after the other.
        samples: that a detector's converter takes one after the other.
    """

    photons: float | None = None
    dot_products: float = 0.0
    read_variance: float = 0.0
    inputs: float = 0.0
    weights: float = 0.0
    outputs: float = 0.0
    bits: float = 8.0
    bits_out: float = 8.0
    sram_bytes: float = 0.0
    dram_bytes: float = 0.0
    digital_ops: float = 0.0
    digital_macs: float = 0.0
    shots: float = 0.0
    samples: float = 0.0
