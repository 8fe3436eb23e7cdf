"""The numbers of docs/energy.md are those that come out today."""

import re
from pathlib import Path

import pytest

from aixsim_cli.config.flavors import Flavor, find_flavor
from aixsim_cli.energy.account import token_energy
from aixsim_cli.energy.hardware import read_hardware
from aixsim_cli.energy.layout import Work
from aixsim_cli.energy.report import report
from aixsim_cli.energy.shape import shape_of_flavor, shape_of_llama
from aixsim_cli.transforms.read import parse_transform, read_transform

REPOSITORY = Path(__file__).parents[3]
PAGE = (REPOSITORY / "docs" / "energy.md").read_text(encoding="utf-8")
FLAVORS = ["60M", "200M", "400M", "600M", "1.1B"]
TRANSFORMS = REPOSITORY / "configs" / "transforms"


def row(title):
    """The cells of a table's row, one a size."""
    rows = re.findall(rf"^\| {re.escape(title)} \|(.*)\|$", PAGE, re.MULTILINE)
    (found,) = (cells for r in rows if len(cells := r.split("|")) == len(FLAVORS))
    return [cell.strip() for cell in found]


def told(flavor, hardware="engineered", transform="optical-head", **work):
    shape = shape_of_flavor("aixsim", flavor, 49152)
    config = read_transform(TRANSFORMS / f"{transform}.yaml")
    return report(shape, config, read_hardware(hardware), Work(**work))


def first(cells):
    """The number that each begins with, and the advantage in brackets."""
    pairs = [re.fullmatch(r"([\d.]+)(?: \(([\d.]+)×\))?", cell).groups() for cell in cells]
    return [(float(a), b and float(b)) for a, b in pairs]


@pytest.mark.parametrize(
    ("title", "options"),
    [
        ("`engineered`, output projection digital (`optical.yaml`)", {"transform": "optical"}),
        ("`engineered`, attention and projection digital (`optical-fc.yaml`)",
         {"transform": "optical-fc"}),
        ("`engineered`", {}),
        ("… decoding, 2,048 tokens seen (`--decode`)", {"decode": True}),
        ("`tiles-512`", {"hardware": "tiles-512"}),
        ("`four-pass`", {"hardware": "four-pass"}),
    ],
)  # fmt: skip
def test_the_worked_table(title, options):
    for flavor, (joules, advantage) in zip(FLAVORS, first(row(title)), strict=True):
        found = told(flavor, **options)
        assert joules == pytest.approx(found["joules_per_token"][1] * 1e6, rel=0.006)
        assert advantage == pytest.approx(found["references"][0]["ratio"][1], rel=0.05)


def test_the_ends_of_the_band():
    for flavor, cell in zip(FLAVORS, row("… low to high"), strict=True):
        low, _, high = told(flavor)["joules_per_token"]
        said = [float(end) * 1e-6 for end in cell.split("–")]
        assert said == pytest.approx([low, high], rel=0.05, abs=0)


def test_the_ladder():
    titles = ("0.3 pJ", "0.71 pJ", "2.7 pJ", "0.021 pJ")
    for i, title in enumerate(titles):
        for flavor, (joules, _) in zip(FLAVORS, first(row(f"digital, {title}")), strict=True):
            found = told(flavor)["references"][i]["joules_per_token"]
            assert joules == pytest.approx(found * 1e6, rel=0.006)


def test_the_example_of_the_interface(capsys):
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(program.replace("configs/", f"{REPOSITORY}/configs/"), {})
    (said,) = re.findall(r"# (\d+)\n", program)
    assert round(float(capsys.readouterr().out)) == int(said)


@pytest.mark.parametrize(
    ("title", "hardware", "params"),
    [("`paper-like`", "paper-like", {}), ("`future`, `q_levels: 16`", "future", {"q_levels": 16})],
)
def test_the_abstracts_table(title, hardware, params):
    sizes = [
        find_flavor("aixsim", "1.1B"),
        Flavor(12288, 96, 96, 96, None, 128),
        Flavor(20480, 105, 128, 128, None, 128),
        Flavor(409600, 500, 1024, 1024, None, 128),
        Flavor(819200, 500, 2048, 2048, None, 128),
    ]
    layers = {"output": params, "default": params}
    optical = parse_transform({"layer_name_to_config": layers}, source="test")
    for size, cell in zip(sizes, row(title), strict=True):
        shape = shape_of_llama("large", size, 50257)
        found = token_energy(shape, optical, read_hardware(hardware))
        ratio = 300e-15 * found.macs / found.joules_per_token[1]
        assert float(cell.strip("×").replace(",", "")) == pytest.approx(ratio, rel=0.02)
