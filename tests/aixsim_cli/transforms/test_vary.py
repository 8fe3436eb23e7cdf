"""What `--vary` takes, and the transform at each point of a sweep."""

import itertools

import pytest

from aixsim_cli.errors import UserError
from aixsim_cli.transforms.protocol import Site
from aixsim_cli.transforms.read import parse_transform
from aixsim_cli.transforms.vary import as_word, parse_axis, points_of

SITES = [
    Site("layers.0.attention", "model.layers.0.self_attn", "attention"),
    Site("layers.0.attention.wq", "model.layers.0.self_attn.q_proj", "linear"),
    Site("layers.0.feed_forward.w1", "model.layers.0.mlp.gate_proj", "linear"),
    Site("output", "lm_head", "linear", is_head=True),
]
OPTICAL = {"layer_name_to_config": {"default": {"q_levels": 64, "q_lut_min": 0.1}}}
BOTH = {
    "transforms": [
        {"transform": "bitflip", "fc": {"w_p_frac": 0.5, "seed": 3}},
        {"transform": "optical", "attention": {"q_levels": 64}},
    ]
}


def points(*texts, of=OPTICAL):
    return points_of(parse_transform(of, source="t.yaml"), list(map(parse_axis, texts)), SITES)


def params(point):
    """Name of a module -> its parameters at a point."""
    (transform,) = point.transform.transforms
    rules = {site.name: transform.simulates(site) for site in SITES}
    return {name: rule.params for name, rule in rules.items() if rule is not None}


@pytest.mark.parametrize(
    "text, values, scale",
    [
        ("q_lut_min=0.001:0.1:3", (0.001, 0.01, 0.1), "log"),
        ("q_lut_min=0.1:0.001:3", (0.1, 0.01, 0.001), "log"),
        ("q_lut_min=0:0.3:4:lin", (0.0, 0.1, 0.2, 0.3), "linear"),
        ("photons_per_mac=null,1,1e1,0.5", (None, 1, 10.0, 0.5), "list"),
        ("encoding=differential,offset", ("differential", "offset"), "list"),
        ("q_quantiles=null,[0.1, 0.9]", (None, [0.1, 0.9]), "list"),
        ("q_noise=true,false", (True, False), "list"),
        ("q-levels=16", (16,), "list"),
    ],
)
def test_values(text, values, scale):
    axis = parse_axis(text)
    assert axis.values == values and axis.scale == scale
    assert axis.name == text.partition("=")[0].replace("-", "_")


def test_ends_are_as_given_and_steps_are_equal_factors():
    values = parse_axis("photons_per_mac=0.03:30:10").values
    assert (values[0], values[-1], len(values)) == (0.03, 30, 10)
    factors = [after / before for before, after in itertools.pairwise(values)]
    assert factors == pytest.approx([1000 ** (1 / 9)] * 9, rel=1e-3)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("q_levels", "expected NAME=LO:HI:N"),
        ("=1,2", "expected NAME=LO:HI:N"),
        ("q_levels=", "expected NAME=LO:HI:N"),
        ("q_levels@=1,2", "expected NAME=LO:HI:N"),
        ("q_levels=1:2", "got '1:2'; expected NAME=LO:HI:N"),
        ("q_levels=1:b:3", "got '1:b:3'; expected NAME=LO:HI:N"),
        ("q_levels=1:2:3.5", "expected NAME=LO:HI:N"),
        ("q_levels=1:2:3:log", "expected LO:HI:N, or LO:HI:N:lin"),
        ("q_levels=1:2:3:lin:4", "expected LO:HI:N, or LO:HI:N:lin"),
        ("q_levels=1:2:1", "got 1 points; expected 2 to"),
        ("q_levels=1:2:100000000", "points; expected 2 to 10,000"),
        ("q_levels=0:2:3", "got 0 and 2; expected both above 0, or LO:HI:N:lin"),
        ("q_levels=-2:2:3", "expected both above 0"),
        ("q_levels=2:2:3", "expected two numbers, not the same"),
        ("q_levels=1:inf:3", "expected two numbers"),
        ("q_levels=nan:1:3:lin", "expected two numbers"),
        ("q_levels=[1", "not valid YAML"),
        ("q_levels@(=1", "not a regular expression"),
    ],
)
def test_what_is_no_axis_is_refused(text, expected):
    with pytest.raises(UserError, match="--vary") as raised:
        parse_axis(text)
    assert expected in str(raised.value)


def test_a_pattern_may_hold_an_equals_sign():
    axis = parse_axis("q_levels@(?=layers).*wq=16,32")
    assert (axis.name, axis.layers, axis.values) == ("q_levels", "(?=layers).*wq", (16, 32))


def test_whole_numbers_are_rounded_each_once():
    axes, found = points("q_levels=2:4:9")
    assert axes[0].values == (2, 3, 4)
    assert [point.values for point in found] == [{"q_levels": n} for n in (2, 3, 4)]
    assert axes[0].unit == "levels"
    # one that a parameter of fractions keeps
    assert points("q_lut_min=0.1:0.4:3")[0][0].values == (0.1, 0.2, 0.4)


def test_every_other_parameter_stays():
    _, found = points("q_levels=16,32")
    for point, levels in zip(found, (16, 32), strict=True):
        assert {(p.q_levels, p.q_lut_min) for p in params(point).values()} == {(levels, 0.1)}
        # what the transform leaves digital
        assert set(params(point)) == {site.name for site in SITES[:3]}


@pytest.mark.parametrize("pattern", [r".*wq", r".*self_attn\.q_proj"])
def test_a_pattern_chooses_modules_by_any_of_their_names(pattern):
    _, found = points(f"q_levels@{pattern}=16")
    levels = {name: p.q_levels for name, p in params(found[0]).items()}
    assert levels == {
        "layers.0.attention": 64,
        "layers.0.attention.wq": 16,
        "layers.0.feed_forward.w1": 64,
    }
    assert found[0].values == {f"q_levels@{pattern}": 16}


def test_several_axes_are_a_grid():
    axes, found = points("q_levels@.*wq=16,32", "q_lut_min=null,0.2", "q_levels@.*w1=8,4")
    assert len(found) == 8 and [len(axis.values) for axis in axes] == [2, 2, 2]
    assert [str(point) for point in found[:3]] == [
        "q_levels@.*wq=16, q_lut_min=null, q_levels@.*w1=8",
        "q_levels@.*wq=16, q_lut_min=null, q_levels@.*w1=4",
        "q_levels@.*wq=16, q_lut_min=0.2, q_levels@.*w1=8",
    ]
    last = params(found[-1])
    assert last["layers.0.attention.wq"].q_levels == 32
    assert last["layers.0.feed_forward.w1"].q_levels == 4
    assert {p.q_lut_min for p in last.values()} == {0.2}


def test_parameters_that_need_each_other_are_set_together():
    _, found = points("read_noise=1,2", "photons_per_mac=1,10")
    assert [point.values["read_noise"] for point in found] == [1.0, 1.0, 2.0, 2.0]
    with pytest.raises(
        UserError, match=r"--vary read_noise=1: read_noise: got 1.0 without photons"
    ):
        points("read_noise=1")


def test_of_several_paradigms_those_that_have_the_parameter():
    _, found = points("q_levels=16,32", of=BOTH)
    flips, optical = found[0].transform.transforms
    assert optical.simulates(SITES[0]).params.q_levels == 16
    assert flips.simulates(SITES[1]).params.w_p_frac == 0.5
    assert flips.simulates(SITES[1]).params.seed == 3


def test_equal_values_are_one_point():
    axes, found = points("q_lut_min=0.1,1e-1,0.10")
    assert len(found) == 1 and axes[0].values == (0.1,)


@pytest.mark.parametrize(
    "texts, expected",
    [
        (["q_level=1"], "--vary q_level: optical has no such parameter; did you mean 'q_levels'?"),
        (["w_p_frac=1"], "optical has no such parameter"),
        (["q_levels=1"], "--vary q_levels=1: q_levels: got 1; expected 2 to 65536"),
        (["q_levels=1.5"], "--vary q_levels=1.5: q_levels: got 1.5; expected a whole number"),
        (["q_levels=true"], "q_levels: got true; expected a whole number"),
        (["photons_per_mac=1,-1"], "--vary photons_per_mac=-1: photons_per_mac: got -1"),
        (["encoding=ofset"], "encoding: got 'ofset'; expected one of differential, offset"),
        (["q_levels@.*w9=4"], "--vary q_levels@.*w9: matches no module that has it; they are like"),
        (["q_levels@output=4"], "matches no module that has it"),
        (["q_levels=4", "q_levels=5"], "--vary q_levels and q_levels: both change q_levels of"),
        (["q_levels=4", "q_levels@.*wq=5"], "both change q_levels of layers.0.attention.wq"),
        (["q_lut_min=0:0.5:200:lin", "q_levels=2:400:200:lin"], "got 40,000 points"),
    ],
)
def test_what_does_not_fit_is_named(texts, expected):
    with pytest.raises(UserError) as raised:
        points(*texts)
    assert expected in str(raised.value)


def test_a_transform_of_bypassed_modules_has_nothing_to_vary():
    with pytest.raises(UserError, match=r"t\.yaml simulates no module that has it"):
        points("q_levels=4", of={"layer_name_to_config": {"default": {"q_bypass": True}}})


def test_numbers_are_shown_in_full_and_short():
    assert [as_word(v) for v in (0.1, 1.0, 1e-7, 0.123456789, None, "unit", True, [0.1, 1])] == [
        *("0.1", "1", "1e-07", "0.123456789", "null", "unit", "true", "[0.1, 1]")
    ]
