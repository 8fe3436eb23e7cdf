"""Price lists of hardware: YAML files in which every number has a source, and low and high ends.

    hardware: what it is, in a line
    base: engineered                                  # what is not said here is said there
    dac: {value: [0.33, 3.57, 10.9], unit: pJ, source: "…"}        # [low, nominal, high], or one
    arrays: {k: 512, n: 512}

`--hardware` takes the name of one that comes with aixsim (`configs/hardware/`), or a file.
"""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_type_hints

from aixsim_cli.errors import ConfigError, UserError, nearest, shown
from aixsim_cli.settings.build import build
from aixsim_cli.settings.document import HARDWARE, Document, check_purpose, load_yaml
from aixsim_cli.transforms.counts import Arrays

PRICES = Path(__file__).parent / "prices"
# low, nominal, high
Band = tuple[float, float, float]
# of the samples that prices are of
PRICED_BITS = 8
_PLANCK, _SPEED = 6.62607015e-34, 299_792_458.0  # J s, m/s, exact in the SI
_JOULES = {"aJ": 1e-18, "fJ": 1e-15, "pJ": 1e-12, "nJ": 1e-9}
_DEEPEST = 8
_SECTIONS = ("light", "arrays", "references")


@dataclass(frozen=True)
class Number:
    """A number with its source.

    Args:
        value: [low, nominal, high], or one for all.
        source: who says so.

    Raises:
        ValueError: it is negative, or not in this order.
    """

    value: float | Band
    source: str

    def __post_init__(self) -> None:
        low, nominal, high = self.band
        if not 0 <= low <= nominal <= high:
            got = list(self.value) if isinstance(self.value, tuple) else self.value
            raise ValueError(f"value: got {got}; expected 0 <= low <= nominal <= high")
        if not self.source.strip():
            raise ValueError("source: got an empty text; expected who says so")

    @property
    def band(self) -> Band:
        """Low, nominal, high."""
        value = self.value
        return value if isinstance(value, tuple) else (value, value, value)

    @property
    def nominal(self) -> float:
        """The middle one."""
        return self.band[1]


@dataclass(frozen=True)
class Price(Number):
    """What one thing costs.

    Args:
        unit: of the value.
        per_bit: factor for every bit that a sample has more than eight.

    Raises:
        ValueError: as `Number`, or the factor is below 1.
    """

    unit: Literal["aJ", "fJ", "pJ", "nJ"]
    per_bit: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_bit < 1:
            raise ValueError(f"per_bit: got {self.per_bit}; expected 1 or more")

    def joules(self, bits: float = PRICED_BITS) -> Band:
        """Of one; low, nominal, high."""
        factor = _JOULES[self.unit] * self.per_bit ** (bits - PRICED_BITS)
        low, nominal, high = self.band
        return low * factor, nominal * factor, high * factor


@dataclass(frozen=True)
class Light:
    """What a photo-electron on a detector costs.

    Args:
        wavelength_nm: of the light.
        quantum_efficiency: photo-electrons a photon on the detector.
        transmission: of the optics, without what the modulators show.
        wall_plug: light a joule of electricity.
        photons_per_dot: detected for each sum, where a transform says no `photons_per_mac`.

    Raises:
        ValueError: an efficiency is not within [1e-6, 1], or a wavelength below a nanometre.
    """

    wavelength_nm: Number
    quantum_efficiency: Number
    transmission: Number
    wall_plug: Number
    photons_per_dot: Number

    def __post_init__(self) -> None:
        for name in ("quantum_efficiency", "transmission", "wall_plug"):
            low, _, high = getattr(self, name).band
            if not 1e-6 <= low <= high <= 1:
                raise ValueError(f"{name}: value: got {low} to {high}; expected 1e-6 <= x <= 1")
        if self.wavelength_nm.band[0] < 1:
            got = self.wavelength_nm.band[0]
            raise ValueError(f"wavelength_nm: value: got {got}; expected 1 or more")

    def joules(self) -> Band:
        """From the wall for one photo-electron, h c / (wavelength · efficiencies)."""
        parts = (self.wavelength_nm, self.quantum_efficiency, self.transmission, self.wall_plug)
        # the cheap end is that of long waves and high efficiencies
        cheap, nominal, dear = (
            _PLANCK * _SPEED / (length * 1e-9 * efficiency * passed * plug)
            for length, efficiency, passed, plug in zip(*(p.band[::-1] for p in parts), strict=True)
        )
        return cheap, nominal, dear


@dataclass(frozen=True)
class Hardware:
    """A machine's price list.

    Args:
        hardware: what it is, in a line.
        light: of its optics.
        dac: a sample of a modulator's converter.
        modulator: a sample that it shows.
        tia: an output's amplifier, a sample.
        adc: a sample of a detector's converter.
        sram: a byte to or from the buffer.
        dram: a byte from memory outside the chip.
        digital_op: an operation around the products: normalisation, softmax, decoding.
        digital_mac: a multiplication of what stays digital.
        backward_mac: a multiplication of the digital processor that computes gradients.
        clock_ghz: of the arrays.
        adc_ghz: of the detectors' converters, one a column of an array.
        arrays: their sizes, and how they carry signs.
        references: digital machines to compare with: name -> price of a multiplication.
        name: of the list, or its file.
    """

    hardware: str
    light: Light
    dac: Price
    modulator: Price
    tia: Price
    adc: Price
    sram: Price
    dram: Price
    digital_op: Price
    digital_mac: Price
    backward_mac: Price
    clock_ghz: Number
    adc_ghz: Number
    arrays: Arrays
    references: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        for name in ("clock_ghz", "adc_ghz"):
            if not getattr(self, name).band[0] > 0:
                raise ValueError(f"{name}: value: got 0; expected more than 0")


_EXPECTED = {
    Price: "{value: [low, nominal, high], unit: pJ, source: …}",
    Number: "{value: [low, nominal, high], source: …}",
}


def shipped_hardware() -> list[str]:
    """The names of the price lists that come with aixsim."""
    return sorted(path.stem for path in PRICES.glob("*.yaml"))


def read_hardware(name: str | Path) -> Hardware:
    """Read a price list.

    Args:
        name: of one that comes with aixsim, or a file.

    Raises:
        UserError: there is none.
        ConfigError: everything that is wrong with it, each with its line.
    """
    return _read(_find(str(name), Path()), depth=0)[1]


def _find(name: str, folder: Path) -> Path:
    if name in shipped_hardware():
        return PRICES / f"{name}.yaml"
    if (path := folder / name).is_file():
        return path
    if "/" in name or name.endswith((".yaml", ".yml")):
        raise UserError(f"{path}: no such price list; expected a .yaml file")
    raise UserError(f"hardware: got {name!r}{nearest(name, shipped_hardware())}")


def _read(path: Path, *, depth: int) -> tuple[dict[str, Any], Hardware]:
    """What a file says with what its base says, and the price list that this is."""
    document = load_yaml(path)
    check_purpose(document.data, document.source, HARDWARE)
    data = dict(document.data)
    inherited: dict[str, Any] = {}
    base = data.pop("base", None)
    if base is not None:
        if not isinstance(base, str) or depth == _DEEPEST:
            expected = f"a name or a file, and at most {_DEEPEST} of them in a row"
            raise ConfigError([f"{document.where('base')}: got {shown(base)}; expected {expected}"])
        # complete by itself: what is wrong with it has its own lines
        inherited, _ = _read(_find(base, path.parent), depth=depth + 1)
    merged = inherited | {key: _over(inherited, key, value) for key, value in data.items()}
    if problems := list(_missing(Hardware, merged, document)):
        raise ConfigError(problems)
    references = _references(merged, document)
    known = merged | {"references": {}, "name": path.stem}
    made = build(Hardware, Document(known, document.source, document.lines))
    return merged, replace(made, references=references)


def _over(inherited: Mapping[str, Any], key: str, value: Any) -> Any:
    """A section over that of the base; a price is one thing with its source."""
    below = inherited.get(key)
    if key in _SECTIONS and isinstance(value, Mapping) and isinstance(below, Mapping):
        return {**below, **value}
    return value


def _missing(cls: type, data: Any, document: Document, prefix: str = "") -> Iterator[str]:
    """Keys that are needed and not there; they stand at the line of what they are missing in."""
    if not isinstance(data, Mapping):
        return
    hints = get_type_hints(cls)
    for each in fields(cls):
        key, hint = f"{prefix}{each.name}", hints[each.name]
        if each.name in data:
            if is_dataclass(hint):
                yield from _missing(cast(type, hint), data[each.name], document, f"{key}.")
        elif each.default is MISSING and each.default_factory is MISSING:
            line = document.line_of(prefix[:-1]) if prefix else None
            where = f"{document.source}:{line}" if line else document.source
            yield f"{where}: {key}: missing; expected {_EXPECTED.get(hint, 'it')}"


def _references(data: Mapping[str, Any], document: Document) -> dict[str, Price]:
    """The digital machines, each a price under a name of the file's own."""
    listed = data.get("references", {})
    if not isinstance(listed, Mapping):
        said = f"got {shown(listed)}; expected name: price"
        raise ConfigError([f"{document.where('references')}: {said}"])
    made, problems = {}, []
    for name, value in listed.items():
        where = document.where(f"references.{name}")
        part = Document(dict(value) if isinstance(value, Mapping) else {}, where)
        wrong = [p.replace(f"{where}: ", f"{where}.", 1) for p in _missing(Price, part.data, part)]
        try:
            made[str(name)] = made.get(name) if wrong else build(Price, part)
        except ConfigError as error:
            wrong = error.problems
        problems += wrong
    if problems:
        raise ConfigError(problems)
    return made
