"""The energy of a model a token: counts of every product times prices, by kind of layer.

The interface for others: `token_energy`, and `light_per_token`, which needs no prices.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from aixsim_cli.energy.hardware import Band, Hardware
from aixsim_cli.energy.layout import Work, products
from aixsim_cli.energy.shape import Shape
from aixsim_cli.transforms.config import TransformConfig
from aixsim_cli.transforms.counts import Arrays, Counts, Product
from aixsim_cli.transforms.plan import Simulation, plan_transform

PARTS = ("light", "DAC", "weights", "ADC", "buffer", "digital")
DIGITAL = "digital"
# the row of what is no product
AROUND = "others"


@dataclass
class Row:
    """All layers of one kind that are computed in one way; sums of a token.

    Args:
        kind: of layer.
        paradigm: that computes them.
        macs: multiplications.
        photons: detected; None = there is no light, or its amount is not said.
        seconds: that the arrays take, one product after the other.
        joules: part -> low, nominal, high.
    """

    kind: str
    paradigm: str
    macs: float = 0.0
    photons: float | None = None
    seconds: float = 0.0
    joules: dict[str, Band] = field(default_factory=lambda: dict.fromkeys(PARTS, (0.0, 0.0, 0.0)))

    @property
    def total(self) -> Band:
        """Of all parts."""
        return _sum(*self.joules.values())


@dataclass(frozen=True)
class TokenEnergy:
    """What a token's forward takes.

    Args:
        rows: by kind of layer, in the order of the model; what is no product at the end.
        laid: every product with what simulates it (None = digital), and its counts.
    """

    rows: list[Row]
    laid: list[tuple[Product, Simulation | None, Counts]]

    @property
    def macs(self) -> float:
        """Multiplications."""
        return sum(row.macs for row in self.rows)

    @property
    def photons_per_token(self) -> float | None:
        """Detected ones; None = there is no light, or its amount is not said."""
        return _light(row.photons for row in self.rows)

    @property
    def joules_per_token(self) -> Band:
        """Low, nominal, high."""
        return _sum(*(row.total for row in self.rows))

    @property
    def seconds_per_token(self) -> float:
        """That the arrays take, one product after the other; what is digital aside."""
        return sum(row.seconds for row in self.rows)


def token_energy(
    shape: Shape,
    transform: TransformConfig | None,
    hardware: Hardware,
    *,
    seq_len: int = 2048,
    batch: int = 1,
    decode: bool = False,
) -> TokenEnergy:
    """Energy and light of a token's forward.

    Args:
        shape: of the model.
        transform: what is simulated, by its patterns; None = all digital.
        hardware: its prices, and the arrays.
        seq_len: tokens of a sequence; in decoding, those that a new one sees.
        batch: sequences at once.
        decode: a token after the other; else the mean over a causal sequence.

    Raises:
        ConfigError: a pattern matches nothing, or two transforms simulate one place.
    """
    work = Work(seq_len, batch, decode)
    laid = list(_laid(shape, transform, hardware.arrays, work))
    rows: dict[tuple[str, str], Row] = {}
    for product, by, counts in laid:
        key = (product.kind, by.transform.name if by else DIGITAL)
        row = rows.setdefault(key, Row(*key))
        row.macs += product.macs
        row.photons = _light((row.photons, counts.photons))
        row.seconds += _seconds(counts, hardware)
        for part, joules in price_of(counts, hardware).items():
            row.joules[part] = _sum(row.joules[part], joules)
    around = Row(AROUND, DIGITAL)
    ops = Counts(digital_ops=shape.digital_ops(work.seen))
    around.joules |= price_of(ops, hardware)
    return TokenEnergy([*rows.values(), around], laid)


def light_per_token(
    shape: Shape, transform: TransformConfig | None, *, seq_len: int = 2048, decode: bool = False
) -> dict[str, float]:
    """Photons that a token's forward detects, Σ photons_per_mac · macs, by kind of layer.

    Args:
        shape: of the model.
        transform: what is simulated; None = all digital.
        seq_len: tokens of a sequence; in decoding, those that a new one sees.
        decode: a token after the other; else the mean over a causal sequence.

    Returns:
        kind -> photons, of the kinds whose light is said; none of a model without light.

    Raises:
        ConfigError: a pattern matches nothing, or two transforms simulate one place.
    """
    light: dict[str, float] = {}
    for product, _, counts in _laid(shape, transform, Arrays(), Work(seq_len, 1, decode)):
        if counts.photons is not None:
            light[product.kind] = light.get(product.kind, 0.0) + counts.photons
    return light


def _laid(
    shape: Shape, transform: TransformConfig | None, arrays: Arrays, work: Work
) -> Iterator[tuple[Product, Simulation | None, Counts]]:
    """Every product, what simulates it, and what it takes; one that nothing does is digital."""
    simulated: dict[Any, Simulation] = {}
    if transform is not None:
        simulated = {s.site: s for s in plan_transform(transform, shape.sites).simulated}
    for place in shape.places:
        by = simulated.get(place.site)
        for product in products(place, arrays, work):
            if by is None:
                yield product, None, Counts(digital_macs=product.macs)
            else:
                yield product, by, by.transform.paradigm.count(by.rule.params, product)


def price_of(counts: Counts, hardware: Hardware) -> dict[str, Band]:
    """Joules of each part of what a product takes: low, nominal, high.

    Args:
        counts: a token.
        hardware: its prices.
    """
    of = hardware
    show = _sum(of.dac.joules(counts.bits), of.modulator.joules())
    read = _sum(of.tia.joules(counts.bits_out), of.adc.joules(counts.bits_out))
    said, light = counts.photons, of.light.joules()
    assumed = _times(of.light.photons_per_dot.band, counts.dot_products)
    photons = assumed if said is None else (said, said, said)
    return {
        "light": (photons[0] * light[0], photons[1] * light[1], photons[2] * light[2]),
        "DAC": _times(show, counts.inputs),
        "weights": _sum(_times(show, counts.weights), _times(of.dram.joules(), counts.dram_bytes)),
        "ADC": _times(read, counts.outputs),
        "buffer": _times(of.sram.joules(), counts.sram_bytes),
        "digital": _sum(
            _times(of.digital_op.joules(), counts.digital_ops),
            _times(of.digital_mac.joules(), counts.digital_macs),
        ),
    }


def _seconds(counts: Counts, hardware: Hardware) -> float:
    """That arrays and converters take, whichever are slower."""
    shown = counts.shots / hardware.clock_ghz.nominal
    return max(shown, counts.samples / hardware.adc_ghz.nominal) * 1e-9


def _light(photons: Any) -> float | None:
    said = [each for each in photons if each is not None]
    return sum(said) if said else None


def _times(band: Band, count: float) -> Band:
    return band[0] * count, band[1] * count, band[2] * count


def _sum(*bands: Band) -> Band:
    low, nominal, high = (sum(ends) for ends in zip(*bands, strict=True))
    return low, nominal, high
