"""Price lists: those that come with aixsim are whole; mistakes are named by file, line and key."""

import tomllib
from pathlib import Path

import pytest

from aixsim_cli.energy.hardware import PRICES, Light, Number, Price, read_hardware, shipped_hardware
from aixsim_cli.errors import ConfigError, UserError

REPOSITORY = Path(__file__).parents[3]


def exactly(joules):
    """To four digits, however small: by itself approx takes what is below 1e-12 for nothing."""
    return pytest.approx(joules, rel=1e-4, abs=0)


@pytest.mark.parametrize("name", shipped_hardware())
def test_a_shipped_list_is_read_by_name_and_as_a_file(name):
    found = read_hardware(name)
    assert found == read_hardware(REPOSITORY / "configs" / "hardware" / f"{name}.yaml")
    assert found.name == name and len(found.references) >= 4


def test_these_lists_come_with_aixsim():
    assert set(shipped_hardware()) == {
        "engineered", "four-pass", "future", "lightening-transformer", "paper-like", "tiles-512",
    }  # fmt: skip


def test_a_wheel_has_them():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    package = REPOSITORY / "aixsim_cli"
    patterns = project["tool"]["setuptools"]["package-data"]["aixsim_cli"]
    found = {path for pattern in patterns for path in package.glob(pattern)}
    assert found >= {PRICES / f"{name}.yaml" for name in shipped_hardware()}


def test_a_list_says_what_differs_from_its_base(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "base: tiles-512\nhardware: mine\narrays: {n: 64}\n"
        'adc: {value: [1, 2, 3], unit: fJ, source: "a paper"}\n'
        'references: {mine: {value: 1, unit: pJ, source: "me"}}\n'
    )
    (tmp_path / "other.yaml").write_text("base: mine.yaml\nhardware: other\n")
    found, base = read_hardware(tmp_path / "other.yaml"), read_hardware("tiles-512")
    assert (found.arrays.k, found.arrays.n) == (512, 64)
    assert found.adc.joules() == exactly((1e-15, 2e-15, 3e-15))
    assert found.dac == base.dac
    assert set(found.references) == {*base.references, "mine"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("dac: {value: -1, unit: pJ, source: x}", ":3: dac: value: got -1.0; expected 0 <= low"),
        ("dac: {value: [3, 2, 1], unit: pJ, source: x}", r":3: dac: value: got \[3.0, 2.0, 1.0\]"),
        ("dac: {value: 1, unit: kg, source: x}", ":3: dac.unit: got 'kg'; expected one of aJ, fJ"),
        ("dac: {value: 1, unit: pJ}", ":3: dac.source: missing"),
        ("dac: {value: 1, unit: pJ, source: ' '}", ":3: dac: source: got an empty text"),
        ("dac: {value: many, unit: pJ, source: x}", ":3: dac.value: got 'many'; expected a number"),
        ("dac: {value: .nan, unit: pJ, source: x}", ":3: dac.value: got .nan"),
        ("dacs: {value: 1, unit: pJ, source: x}", ":3: dacs: unknown key; did you mean 'dac'"),
        ("arrays: {k: 0}", ":3: arrays: k: got 0; expected 1 or more"),
        ("light: {wall_plug: {value: 2, source: x}}", ":3: light: wall_plug: value: got 2.0 to"),
        ("references: {mine: {value: 1, source: x}}", ":3: references.mine.unit: missing"),
        ("references: {mine: {value: 1, unit: kg, source: x}}", ":3: references.mine.*got 'kg'"),
        ("references: 3", ":3: references: got 3"),
    ],
)
def test_what_is_wrong_is_named_by_file_line_and_key(tmp_path, line, said):
    (tmp_path / "bad.yaml").write_text(f"base: engineered\nhardware: bad\n{line}\n")
    with pytest.raises(ConfigError, match=f"bad.yaml{said}"):
        read_hardware(tmp_path / "bad.yaml")


def test_without_a_base_everything_is_needed(tmp_path):
    text = (REPOSITORY / "configs" / "hardware" / "engineered.yaml").read_text()
    (tmp_path / "bad.yaml").write_text(text.replace("dac:\n", "dacs:\n"))
    with pytest.raises(ConfigError, match=r"bad.yaml: dac: missing; expected \{value: \[low"):
        read_hardware(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("engineerd", "did you mean 'engineered'"),
        ("./no.yaml", "no.yaml: no such price list"),
        ("configs/transforms/optical.yaml", "is a transform file .*; expected a price list"),
    ],
)
def test_a_list_that_is_not_there_is_told(name, said):
    with pytest.raises(UserError, match=said):
        read_hardware(name)


def test_a_base_of_itself_is_refused(tmp_path):
    (tmp_path / "bad.yaml").write_text("base: bad.yaml\nhardware: bad\n")
    with pytest.raises(ConfigError, match=r"bad.yaml:1: base: got 'bad.yaml'"):
        read_hardware(tmp_path / "bad.yaml")


def test_a_photon_costs_its_energy_over_all_efficiencies():
    one, half = (Number(value, "x") for value in (1, 0.5))
    number = Number((1000, 1550, 2000), "x")
    light = Light(number, half, one, Number((0.1, 0.2, 0.3), "x"), one)
    # h c / 1550 nm = 0.12816 aJ
    assert light.joules()[1] == exactly(0.12816e-18 / 0.5 / 0.2)
    assert light.joules()[0] == exactly(0.12816e-18 * 1550 / 2000 / 0.5 / 0.3)


def test_a_bit_more_costs_its_factor():
    price = Price((1, 2, 3), "x", "pJ", per_bit=2)
    assert price.joules(4) == exactly((1e-12 / 16, 2e-12 / 16, 3e-12 / 16))
    assert Price(2, "x", "pJ").joules(4) == exactly((2e-12,) * 3)
