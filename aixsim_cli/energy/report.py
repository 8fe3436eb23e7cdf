"""What `aixsim energy` tells: the account by kind of layer, comparisons, and its limits.

Plain values throughout, as its JSON has them; joules and seconds, a band is [low, nominal, high].
"""

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from aixsim_cli.energy.account import DIGITAL, TokenEnergy, token_energy
from aixsim_cli.energy.hardware import PRICED_BITS, Band, Hardware, Number, Price
from aixsim_cli.energy.layout import SCORES, VALUES, Work
from aixsim_cli.energy.shape import Shape
from aixsim_cli.transforms.config import TransformConfig
from aixsim_cli.transforms.optical_params import FEW_PHOTONS

# of a training run, as generate-cfg and the configs of this repository have them
TOKENS_A_PARAMETER = 22
STEP_SEQUENCES = 96
# a backward multiplies twice what the forward does
_BACKWARD = 2
# above so many electrons a well is full
_FULL = 1e5


def report(
    shape: Shape, transform: TransformConfig | None, hardware: Hardware, work: Work
) -> dict[str, Any]:
    """Everything about a model's energy a token.

    Args:
        shape: of the model.
        transform: what is simulated; None = all digital.
        hardware: its prices.
        work: what the model is asked to do.

    Raises:
        ConfigError: a pattern matches nothing, or two transforms simulate one place.
    """
    energy = _energy(shape, transform, hardware, work)
    total = energy.joules_per_token
    return {
        "model": shape.name,
        "transform": transform and transform.name,
        "hardware": {"name": hardware.name, "what": hardware.hardware},
        "seq_len": work.seq_len,
        "batch": work.batch,
        "decode": work.decode,
        "macs_per_token": energy.macs,
        "photons_per_token": energy.photons_per_token,
        "joules_per_token": total,
        "joules_per_mac": _over(total, energy.macs),
        "seconds_per_token": energy.seconds_per_token,
        "layers": _layers(energy),
        "alternatives": dict(_alternatives(energy, shape, transform, hardware, work)),
        "references": _references(energy, shape, hardware, work),
        "training": _training(shape, transform, hardware, work.seq_len),
        "assumptions": [*_assumptions(energy, hardware, work), *shape.notes],
        "warnings": list(dict.fromkeys(_warnings(energy))),
        "prices": list(_prices(hardware)),
    }


def _energy(
    shape: Shape, transform: TransformConfig | None, hardware: Hardware, work: Work
) -> TokenEnergy:
    return token_energy(
        shape,
        transform,
        hardware,
        seq_len=work.seq_len,
        batch=work.batch,
        decode=work.decode,
    )


def _layers(energy: TokenEnergy) -> list[dict[str, Any]]:
    nominal = energy.joules_per_token[1]
    return [
        {
            "kind": row.kind,
            "computed": row.paradigm,
            "macs": row.macs,
            "photons_per_mac": row.photons / row.macs if row.photons is not None else None,
            "photons": row.photons,
            "joules": row.joules,
            "total": row.total,
            "joules_per_mac": row.total[1] / row.macs if row.macs else None,
            "share": row.total[1] / nominal if nominal else 0.0,
        }
        for row in energy.rows
    ]


def _alternatives(
    energy: TokenEnergy,
    shape: Shape,
    transform: TransformConfig | None,
    hardware: Hardware,
    work: Work,
) -> Iterator[tuple[str, Band]]:
    """The same with one thing otherwise."""
    attention = [r for r in energy.rows if r.kind in (SCORES, VALUES) and r.paradigm != DIGITAL]
    if not attention:
        return
    macs, price = sum(row.macs for row in attention), hardware.digital_mac.joules()
    kept = energy.joules_per_token
    low, nominal, high = (
        kept[i] - sum(row.total[i] for row in attention) + macs * price[i] for i in range(3)
    )
    yield "the products of attention digital", (low, nominal, high)
    if work.decode:
        stays = hardware.arrays.cache_in_place
        other = replace(hardware, arrays=replace(hardware.arrays, cache_in_place=not stays))
        name = "keys and values written anew each step" if stays else "keys and values kept"
        yield name, _energy(shape, transform, other, work).joules_per_token


def _references(
    energy: TokenEnergy, shape: Shape, hardware: Hardware, work: Work
) -> list[dict[str, Any]]:
    """Digital machines with the same operations around the same products.

    What stays digital here costs what it costs there: a ratio is that of what differs, and its band
    that of the prices of what differs.
    """
    macs = sum(counts.digital_macs for _, _, counts in energy.laid)
    own = macs * hardware.digital_mac.joules()[1]
    operations = sum(row.joules[DIGITAL][1] for row in energy.rows) - own
    others = [at for row in energy.rows for part, at in row.joules.items() if part != DIGITAL]
    found = []
    for name, price in hardware.references.items():
        joules = _digital(energy.macs, shape, hardware, price, work)
        digital = operations + macs * price.joules()[1]
        low, nominal, high = (digital + sum(at[i] for at in others) for i in range(3))
        found.append(
            {
                "name": name,
                "joules_per_mac": price.joules(),
                "joules_per_token": joules,
                # of the band of what is not digital here
                "ratio": (_ratio(joules, high), _ratio(joules, nominal), _ratio(joules, low)),
                "source": price.source,
            }
        )
    return found


def _digital(macs: float, shape: Shape, hardware: Hardware, mac: Price, work: Work) -> float:
    """Joules of a digital forward, a token."""
    around = shape.digital_ops(work.seen) * hardware.digital_op.joules()[1]
    return macs * mac.joules()[1] + around


def _training(
    shape: Shape, transform: TransformConfig | None, hardware: Hardware, seq_len: int
) -> dict[str, Any]:
    """A run whose forward is on the hardware, its weights written each step; the rest digital."""
    work = Work(seq_len, STEP_SEQUENCES)
    rewritten = replace(
        hardware,
        arrays=replace(hardware.arrays, in_place=False),
        # one digital processor for all that is digital
        digital_mac=hardware.backward_mac,
    )
    energy = _energy(shape, transform, rewritten, work)
    forward = _digital(energy.macs, shape, hardware, hardware.backward_mac, work)
    backward, tokens = _BACKWARD * forward, TOKENS_A_PARAMETER * shape.parameters
    digital, simulated = forward + backward, energy.joules_per_token[1] + backward
    return {
        "tokens": tokens,
        "digital_joules": digital * tokens,
        "joules": simulated * tokens,
        "saved": 1 - _ratio(simulated, digital),
        "most": 1 / (1 + _BACKWARD),
    }


def _assumptions(energy: TokenEnergy, hardware: Hardware, work: Work) -> Iterator[str]:
    arrays, lit = hardware.arrays, [counts for _, by, counts in energy.laid if by]
    each = f"{work.batch} x {work.seq_len}"
    if work.decode:
        yield f"a step of decoding, each of {work.batch} sequences at a context of {work.seq_len}"
    else:
        yield f"a causal forward of {each} tokens; a token sees {work.seen:g} on average"
    if any(c.dot_products and c.photons is None for c in lit):
        light = hardware.light.photons_per_dot
        yield (
            f"no photons_per_mac is set: {light.nominal:g} detected photons a sum ({light.source})"
        )
    if any(c.dot_products for c in lit):
        sizes = f"{arrays.k or 'any number of'} inputs and {arrays.n or 'any number of'} outputs"
        placed = "in place" if arrays.in_place else f"loaded once for {work.tokens} tokens"
        if not arrays.in_place and arrays.vectors:
            placed = f"loaded for every {min(arrays.vectors, work.tokens)} vectors"
        cached = "kept" if arrays.cache_in_place else "loaded again by each step of decoding"
        yield f"arrays of {sizes}, weights {placed}; keys and values written once and {cached}"
        yield (
            f"signs by differences: {arrays.shows} shows, {arrays.pixels} pixels a weight, "
            f"{arrays.reads} reads; by an offset: one of each, and digital sums"
        )
        bits = sorted({c.bits for c in lit} | {c.bits_out for c in lit})
        factors = {hardware.dac.per_bit, hardware.adc.per_bit}
        yield (
            f"samples of {', '.join(f'{b:g}' for b in bits)} bit; converters are priced at "
            f"{PRICED_BITS}, and cost x{', x'.join(f'{f:g}' for f in sorted(factors))} a bit more"
        )
    uncounted = sorted({b.transform.name for _, b, c in energy.laid if b and c.digital_macs})
    if uncounted:
        names = ", ".join(uncounted)
        yield f"{names}: says no counts of its own, so that it has the price of digital products"
    mac, op = hardware.digital_mac, hardware.digital_op
    yield f"digital products: {mac.nominal:g} {mac.unit} each; operations: {op.nominal:g} {op.unit}"
    yield "operations: norms 4 a value, rotary 3, activation 5, gate 1, residual 1, softmax 6"
    yield "looking up an embedding costs nothing"
    yield "time: products one after the other, no pipeline, nothing of what is digital"


def _warnings(energy: TokenEnergy) -> Iterator[str]:
    for product, _, counts in energy.laid:
        if counts.photons is None or not counts.dot_products:
            continue
        light = counts.photons / counts.dot_products
        if light < FEW_PHOTONS:
            said = f"{light:.3g} photons a sum; below {FEW_PHOTONS} noise is no Gaussian"
            yield f"{product.kind}: {said}"
        if light < counts.read_variance:
            yield (
                f"{product.kind}: {light:.3g} photons a sum; the read-outs' noise is as strong as "
                f"that of {counts.read_variance:.3g}"
            )
        if light > _FULL:
            yield f"{product.kind}: {light:.3g} photons a sum; a camera's well holds some {_FULL:g}"


def _prices(hardware: Hardware) -> Iterator[dict[str, Any]]:
    """Every number of the list, with its source."""
    sections: list[tuple[str, Any]] = [("light.", hardware.light), ("", hardware)]
    for prefix, section in sections:
        for each in fields(section):
            number = getattr(section, each.name)
            if isinstance(number, Number):
                unit = number.unit if isinstance(number, Price) else ""
                yield {
                    "name": prefix + each.name,
                    "value": number.band,
                    "unit": unit,
                    "source": number.source,
                }


def _over(band: Band, count: float) -> Band:
    return band[0] / count, band[1] / count, band[2] / count


def _ratio(joules: float, over: float) -> float:
    # prices may be nothing
    return joules / over if over else math.inf
