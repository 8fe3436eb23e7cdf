"""The report: sums are sums, comparisons are with the same work, doubts are told."""

from dataclasses import replace

import pytest

from aixsim_cli.energy.hardware import read_hardware
from aixsim_cli.energy.layout import Work
from aixsim_cli.energy.report import report
from aixsim_cli.energy.shape import shape_of_flavor
from aixsim_cli.transforms.read import parse_transform, read_transform

SHAPE = shape_of_flavor("aixsim", "60M", 49152)
ENGINEERED = read_hardware("engineered")
OPTICAL = read_transform("configs/transforms/optical.yaml")


def told(params=None, *, hardware=ENGINEERED, work=None):
    data = {"transform": "optical", "layer_name_to_config": {"default": params or {}}}
    return report(SHAPE, parse_transform(data, source="test"), hardware, work or Work())


def test_layers_add_up():
    found = report(SHAPE, OPTICAL, ENGINEERED, Work())
    for end in range(3):
        parts = sum(j[end] for row in found["layers"] for j in row["joules"].values())
        assert parts == pytest.approx(found["joules_per_token"][end], rel=1e-9, abs=0)
    assert sum(row["share"] for row in found["layers"]) == pytest.approx(1)
    assert sum(row["macs"] for row in found["layers"]) == found["macs_per_token"]


def test_low_is_below_nominal_below_high():
    found = report(SHAPE, OPTICAL, ENGINEERED, Work())
    low, nominal, high = found["joules_per_token"]
    assert low < nominal < high
    for row in found["references"]:
        assert row["ratio"][0] < row["ratio"][1] < row["ratio"][2]
    # where a rung's price is what digital products cost here
    same = found["references"][0]
    assert same["ratio"][1] == pytest.approx(same["joules_per_token"] / nominal)


def test_what_is_digital_is_no_advantage_over_anything():
    found = report(SHAPE, None, ENGINEERED, Work())
    for row in found["references"]:
        assert row["ratio"] == pytest.approx((1, 1, 1)), row["name"]
    # most products digital, by whatever price: at most what the others saved
    some = parse_transform(
        {"transform": "optical", "use_regex": True, "layer_name_to_config": {".*q_proj": {}}},
        source="test",
    )  # fmt: skip
    part = report(SHAPE, some, ENGINEERED, Work())
    lit = sum(row["macs"] for row in part["layers"] if row["computed"] != "digital")
    most = 1 / (1 - lit / part["macs_per_token"])
    assert 0 < lit < part["macs_per_token"]
    assert all(row["ratio"][2] < most for row in part["references"])


def test_attention_digital_instead_is_the_transform_without_it():
    fc = read_transform("configs/transforms/optical-fc.yaml")
    expected = report(SHAPE, fc, ENGINEERED, Work())
    found = report(SHAPE, OPTICAL, ENGINEERED, Work())
    instead = found["alternatives"]["the products of attention digital"]
    assert instead == pytest.approx(expected["joules_per_token"], rel=1e-9, abs=0)
    assert not expected["alternatives"]


def test_decoding_tells_both_ways_to_keep_keys_and_values():
    kept = told(work=Work(decode=True))
    arrays = replace(ENGINEERED.arrays, cache_in_place=False)
    anew = told(hardware=replace(ENGINEERED, arrays=arrays), work=Work(decode=True))
    other = kept["alternatives"]["keys and values written anew each step"]
    assert other == anew["joules_per_token"] and other[1] > 2 * kept["joules_per_token"][1]
    back = anew["alternatives"]["keys and values kept"]
    assert back == kept["joules_per_token"]


def test_a_training_saves_less_than_its_forwards_share():
    found = told()["training"]
    assert found["tokens"] == 22 * 63_226_752
    assert found["saved"] == pytest.approx(1 - found["joules"] / found["digital_joules"])
    assert 0.2 < found["saved"] < found["most"] == pytest.approx(1 / 3)
    # 3 x (80.5 M x 0.71 pJ and what is around) a token
    assert found["digital_joules"] / 3.6e6 == pytest.approx(0.0675, rel=0.01)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"photons_per_mac": 0.1}, "q kᵀ: 6.4 photons a sum; below 20 noise is no Gaussian"),
        ({"photons_per_mac": 1, "read_noise": 30.0}, "w1: 384 photons a sum; the read-outs' noise"),
        ({"photons_per_mac": 1000}, "w1: 3.84e+05 photons a sum; a camera's well"),
    ],
)
def test_doubtful_light_is_told(params, said):
    assert any(line.startswith(said) for line in told(params)["warnings"])
    assert told({"photons_per_mac": 1})["warnings"] == []


def test_light_that_a_transform_does_not_set_is_told():
    said = "no photons_per_mac is set: 1000 detected photons a sum"
    assert any(line.startswith(said) for line in told()["assumptions"])
    assert not any(said in line for line in told({"photons_per_mac": 1})["assumptions"])
    assert told()["photons_per_token"] is None


def test_a_paradigm_without_counts_is_told():
    transform = read_transform("configs/transforms/bitflip-optical.yaml")
    said = report(SHAPE, transform, ENGINEERED, Work())["assumptions"]
    assert (
        "bitflip: says no counts of its own, so that it has the price of digital products" in said
    )


def test_every_price_has_its_source():
    assert all(row["source"] for row in told()["prices"])
    assert {"light.wall_plug", "adc", "clock_ghz"} <= {row["name"] for row in told()["prices"]}
