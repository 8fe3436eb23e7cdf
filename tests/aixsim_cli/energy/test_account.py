"""The account: published numbers come out, and counts follow what the hardware is."""

from dataclasses import replace

import pytest

from aixsim_cli.config.flavors import Flavor
from aixsim_cli.energy.account import light_per_token, price_of, token_energy
from aixsim_cli.energy.hardware import read_hardware
from aixsim_cli.energy.layout import Work, products
from aixsim_cli.energy.report import report
from aixsim_cli.energy.shape import Linear, shape_of_flavor, shape_of_llama
from aixsim_cli.errors import ConfigError
from aixsim_cli.transforms.counts import Arrays, Counts
from aixsim_cli.transforms.optical_params import Optical, OpticalParams
from aixsim_cli.transforms.read import parse_transform

SHAPE = shape_of_flavor("aixsim", "60M", 49152)
ENGINEERED = read_hardware("engineered")


def optical(default=None, **patterns):
    """Optical everything, the output projection too, but for some patterns."""
    layers = {**patterns, "output": default or {}, "default": default or {}}
    data = {"transform": "optical", "use_regex": True, "layer_name_to_config": layers}
    return parse_transform(data, source="test")


def nominal(shape, transform, hardware, **work):
    found = token_energy(shape, transform, hardware, **work)
    return {row.kind: {part: j[1] for part, j in row.joules.items()} for row in found.rows}


def test_lightening_transformers_core_costs_what_its_repository_says():
    hardware = read_hardware("lightening-transformer")
    (core,) = products(Linear("core", 12, 12, None), hardware.arrays, Work(seq_len=12))
    # without memory and laser, as its 0.88 pJ is
    counts = replace(Optical.count(OpticalParams(), core), dram_bytes=0)
    joules = price_of(counts, hardware)
    converters = sum(joules[part][1] for part in ("DAC", "weights", "ADC"))
    assert converters / core.macs == pytest.approx(0.88e-12, rel=0.005, abs=0)


@pytest.mark.parametrize(
    ("counts", "part", "picojoules"),
    [
        (Counts(inputs=2), "DAC", 2 * (3.57 + 0.45)),
        (Counts(inputs=2, bits=4), "DAC", 2 * (3.57 / 16 + 0.45)),
        (Counts(weights=2), "weights", 2 * (3.57 + 0.45)),
        (Counts(dram_bytes=2), "weights", 2 * 31.2),
        (Counts(outputs=2), "ADC", 2 * (0.3 + 1.48)),
        (Counts(outputs=2, bits_out=9), "ADC", 2 * (0.3 + 2 * 1.48)),
        (Counts(sram_bytes=2), "buffer", 2 * 0.83),
        (Counts(digital_ops=2), "digital", 2 * 1.0),
        (Counts(digital_macs=2), "digital", 2 * 0.3),
        (Counts(photons=2, dot_products=5), "light", 2 * 1.602e-6),
        (Counts(dot_products=2), "light", 2000 * 1.602e-6),
    ],
)
def test_everything_has_its_price_and_nothing_else(counts, part, picojoules):
    priced = {name: joules[1] for name, joules in price_of(counts, ENGINEERED).items()}
    assert priced.pop(part) == pytest.approx(picojoules * 1e-12, rel=1e-4, abs=0)
    assert set(priced.values()) == {0}


@pytest.mark.parametrize(
    ("size", "hardware", "params", "published"),
    [
        # Megatron-Turing NLG, the largest model of 2022, and a thousand times a thousand million
        # weights fourfold; arXiv 2302.10360's abstract: 100x, > 8,000x, > 100,000x
        (Flavor(20480, 105, 128, 128, None, 128), "paper-like", {}, 100),
        (Flavor(819200, 500, 2048, 2048, None, 128), "paper-like", {}, 8000),
        (Flavor(819200, 500, 2048, 2048, None, 128), "future", {"q_levels": 16}, 100_000),
    ],
)
def test_the_abstracts_advantages_come_out_within_a_factor_of_two(
    size, hardware, params, published
):
    shape = shape_of_llama("large", size, 50257)
    found = token_energy(shape, optical(params), read_hardware(hardware))
    ratio = 300e-15 * found.macs / found.joules_per_token[1]
    assert published / 2 < ratio < published * 2


def test_light_code_and_the_reloaded_array_save_about_half_of_a_prefill():
    # LightCode (arXiv 2509.16443): up to 50 % of the energy of Llama-7B's prefill, at the longest
    # sequence; here too it rises with the tokens that share a load of the weights
    shape = shape_of_llama("7B", Flavor(4096, 32, 32, 32, None, 256), 32000)
    hardware, saved = read_hardware("four-pass"), []
    for length in (128, 512, 2048):
        (first, *_) = report(shape, optical(), hardware, Work(length))["references"]
        saved.append(1 - 1 / first["ratio"][1])
    assert saved == sorted(saved) and saved[0] < 0 < saved[1] < 0.6 < saved[2] < 0.8


def test_sums_twice_as_long_are_read_half_as_often():
    reads = []
    for k in (512, 1024):
        (product,) = products(Linear("w", k, 512, None), Arrays(), Work())
        reads.append(Optical.count(OpticalParams(), product).outputs / product.macs)
    assert reads[0] == 2 * reads[1]


def test_arrays_show_and_read_again_for_every_tile():
    whole, tiled = Linear("w", 1024, 768, None), Arrays(k=512, n=256)
    (product,) = products(whole, tiled, Work())
    assert (product.shown, product.read, product.shots) == (1024 * 3, 768 * 2, 1)
    (product,) = products(whole, replace(tiled, number=4), Work())
    assert product.shots == 6 / 4


def test_a_causal_attention_lights_the_tiles_that_tokens_see():
    for length in (1, 5, 8, 2048, 2049):
        tiles = sum(-(-seen // 8) for seen in range(1, length + 1)) / length
        assert Work(length).tiles(8) == pytest.approx(tiles)
    assert Work(17, decode=True).tiles(8) == 3


def test_weights_that_do_not_stay_are_written_once_for_a_batch():
    arrays = Arrays(in_place=False, cache_in_place=False)
    linear = Linear("w", 64, 32, None)
    for work, shared in ((Work(128, 4), 512), (Work(128, 4, decode=True), 4)):
        (product,) = products(linear, arrays, work)
        assert product.loads == product.fetched == 64 * 32 / shared
    (product,) = products(linear, replace(arrays, vectors=16), Work(128))
    assert (product.loads, product.fetched) == (64 * 32 / 16, 64 * 32 / 128)


def test_keys_and_values_are_written_once_a_token_or_all_of_them_a_step():
    attention = SHAPE.places[0]
    own = attention.kv_heads * attention.head_dim
    for arrays, written in ((Arrays(), own), (Arrays(cache_in_place=False), own * 100)):
        for product in products(attention, arrays, Work(100, decode=True)):
            assert product.loads == written
        for product in products(attention, arrays, Work(100)):
            assert product.loads == own


def test_signs_take_passes_or_an_offset_and_digital_sums():
    (product,) = products(
        Linear("w", 64, 32, None), Arrays(pixels=2, shows=4, reads=4, in_place=False), Work(8)
    )
    passes = Optical.count(OpticalParams(), product)
    offset = Optical.count(OpticalParams(encoding="offset"), product)
    assert (passes.inputs, passes.outputs, passes.weights) == (4 * 64, 4 * 32, 2 * 64 * 32 / 8)
    assert (offset.inputs, offset.outputs, offset.weights) == (64, 32, 64 * 32 / 8)
    assert passes.digital_ops == 32 + 4 * 32 and offset.digital_ops == 32 + 32 + 64 + 2 * 32


def test_a_bit_less_halves_the_converters_and_an_eighth_of_the_bytes():
    full, less = (nominal(SHAPE, optical(p), ENGINEERED) for p in ({}, {"q_levels_out": 128}))
    adc, tia = ENGINEERED.adc.nominal, ENGINEERED.tia.nominal
    ratio = less["wq"]["ADC"] / full["wq"]["ADC"]
    assert ratio == pytest.approx((adc / 2 + tia) / (adc + tia))
    assert less["wq"]["DAC"] == full["wq"]["DAC"]
    assert less["wq"]["buffer"] == pytest.approx(
        full["wq"]["buffer"] * (8 + 7) / 16, rel=1e-9, abs=0
    )


def test_light_is_counted_by_layer_and_pattern():
    transform = optical({"photons_per_mac": 2}, **{r"layers\.0\..*w1": {"photons_per_mac": 100}})
    light = light_per_token(SHAPE, transform)
    layer = 384 * 1408
    assert light["w1"] == 100 * layer + 21 * 2 * layer
    assert light["output"] == 2 * 384 * 49152
    assert light["q kᵀ"] == 2 * 22 * 384 * 1024.5
    found = token_energy(SHAPE, transform, ENGINEERED)
    assert found.photons_per_token == pytest.approx(sum(light.values()))
    lit = sum(row.joules["light"][1] for row in found.rows)
    assert lit == pytest.approx(
        found.photons_per_token * ENGINEERED.light.joules()[1], rel=1e-9, abs=0
    )


def test_no_light_is_none_and_bypassed_places_are_digital():
    digital = token_energy(SHAPE, None, ENGINEERED)
    bypassed = token_energy(SHAPE, optical({"q_bypass": True}), ENGINEERED)
    assert digital.photons_per_token is None and light_per_token(SHAPE, None) == {}
    assert bypassed.joules_per_token == digital.joules_per_token
    around = SHAPE.digital_ops(1024.5) * 1e-12
    assert digital.joules_per_token[1] == pytest.approx(
        0.3e-12 * digital.macs + around, rel=1e-9, abs=0
    )


def test_linears_alone_leave_attention_and_head_digital():
    transform = parse_transform({"transform": "optical", "fc": {}}, source="test")
    rows = {r.kind: r.paradigm for r in token_energy(SHAPE, transform, ENGINEERED).rows}
    assert rows.pop("w2") == "optical"
    assert rows["q kᵀ"] == rows["p v"] == rows["output"] == "digital"


def test_a_paradigm_that_counts_nothing_is_digital():
    transform = parse_transform({"transform": "bitflip", "fc": {"w_p_frac": 0.1}}, source="test")
    found = token_energy(SHAPE, transform, ENGINEERED)
    same = token_energy(SHAPE, None, ENGINEERED)
    assert found.joules_per_token == pytest.approx(same.joules_per_token, rel=1e-9, abs=0)
    assert {row.paradigm for row in found.rows} == {"bitflip", "digital"}


def test_a_third_partys_count_is_used(monkeypatch):
    class Half(Optical):
        @staticmethod
        def count(params, product):
            return replace(Optical.count(params, product), digital_macs=product.macs / 2)

    monkeypatch.setattr("aixsim_cli.transforms.read.get_paradigm", lambda name: Half)
    more = nominal(SHAPE, optical(), ENGINEERED)["w1"]["digital"]
    monkeypatch.undo()
    less = nominal(SHAPE, optical(), ENGINEERED)["w1"]["digital"]
    assert more - less == pytest.approx(0.15e-12 * 22 * 384 * 1408, rel=1e-9, abs=0)


def test_a_pattern_without_a_place_is_refused():
    with pytest.raises(ConfigError, match="matches no linear or attention of this model"):
        token_energy(SHAPE, optical(**{"nowhere": {}}), ENGINEERED)
