"""Patterns of a stranger's file: bounded in time and memory, before anything is compiled."""

import resource
import time

import pytest

from aixsim_cli.errors import ConfigError
from aixsim_cli.transforms.apply import plan_transform
from aixsim_cli.transforms.patterns import MAX_LENGTH, length_written_out
from aixsim_cli.transforms.protocol import Site
from aixsim_cli.transforms.read import parse_transform

SITES = [
    Site("layers.0.attention.wq", "model.layers.0.self_attn.q_proj", "linear"),
    Site("layers.0.attention", "model.layers.0.self_attn", "attention"),
    Site("output", "lm_head", "linear", is_head=True),
]
HOSTILE = [
    "(?R)?layers.*",
    "(?1)(a)",
    "(?P<x>a)(?&x)",
    "(?P<x>a)(?P>x)",
    "(a)?(?(1)b|c)",
    "((((a{1000}){1000}){1000}){1000}){1000}",
    "(?:(?:(?:(?:a{99}){99}){99}){99}){0,99}",
    "[a]{100}{100}{100}",
    r"(?:\p{L}{1000}){1000}",
    "a" * (MAX_LENGTH + 1),
    "(" * 5000 + "a" + ")" * 5000,
    "(?:layers){e<=3}",
    "(?x)(a #(\n)",
    "(?V1)[a--[b]]",
    "(*FAIL)",
    "[" * 9000,
    "(?#",
    "{9}" * 3000,
]


def parse(layers, **more):
    data = {"use_regex": True, "layer_name_to_config": layers} | more
    return parse_transform(data, source="t.yaml")


@pytest.mark.parametrize("params", [None, {}], ids=["null", "params"])
@pytest.mark.parametrize("pattern", HOSTILE, ids=[p[:16] for p in HOSTILE])
def test_a_pattern_without_bounds_is_refused_at_once(pattern, params):
    start = time.process_time()
    with pytest.raises(ConfigError, match="not a regular expression that is taken") as caught:
        parse({pattern: params})
    assert time.process_time() - start < 1
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("pattern", "length"),
    [
        (r"layers\.\d+\.feed_forward\.w[123]", 33),
        (r"layers\.\d{1,3}\..*", 19),
        ("a{2}(bc){30}", 62),
        ("(?i:x)(?P<n>y)(?<!z)(?=.)", 25),
        ("[{(]{2}", 7),
        ("(?i)ABC", 7),
    ],
)
def test_ordinary_expressions_are_taken(pattern, length):
    assert length_written_out(pattern) == length
    parse({pattern: None})


def test_too_many_patterns_are_refused_before_they_are_read():
    many = {f"layers\\.{i}": None for i in range(200_000)}
    start = time.process_time()
    with pytest.raises(ConfigError, match=r"got 200,000 regular expressions; expected at most 500"):
        parse(many)
    with pytest.raises(ConfigError, match=r"got 200,000 names; expected at most 10,000"):
        parse(many, use_regex=False)
    assert time.process_time() - start < 5


def test_expressions_are_bounded_together():
    with pytest.raises(ConfigError, match=r"come to more than 100,000 characters"):
        parse({f"layers\\.{i}" + "a" * 4000: None for i in range(100)})


def test_hostile_patterns_take_no_memory():
    parse({"a": {}})
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for pattern in HOSTILE:
        with pytest.raises(ConfigError):
            parse({pattern: {"q_levels": 4}, "default": {}})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 50_000, "kilobytes"


def assert_stopped(config, *, modules, within):
    """Matching these modules is given up, in so many seconds."""
    sites = [Site(f"{'ab' * 12}{i}", f"{'ab' * 12}{i}", "linear") for i in range(modules)]
    start = time.process_time()
    with pytest.raises(ConfigError, match=r"takes more than 1 s to match"):
        plan_transform(config, sites)
    assert time.process_time() - start < within


def test_the_time_limit_holds_for_all_modules_together():
    slow = r"(?:(.+?)(.*?)\1?)+[A-Z]"
    assert_stopped(parse({slow: None, "default": {}}), modules=400, within=4)


def test_many_matches_of_less_than_a_millisecond_are_counted():
    """None of them is slow: 6,000 took almost five seconds."""
    slow = {rf"(.+?)(.+?)(.+?)\1[A-Z]{{1,{n + 1}}}": None for n in range(60)}
    assert_stopped(parse({**slow, ".*": {}}), modules=100, within=3)


def test_ordinary_patterns_may_be_as_many_as_they_like():
    config = parse({**{rf"layers\.{i}\.attention\..*": None for i in range(499)}, ".*": {}})
    sites = [Site(f"layers.{i}.mlp.up", f"layers.{i}.mlp.up", "linear") for i in range(2000)]
    assert len(plan_transform(config, sites).simulated) == 2000


def test_patterns_that_match_nothing_are_counted():
    layers = {f"layers.{i}.mystery": {} for i in range(3000)}
    with pytest.raises(ConfigError) as caught:
        plan_transform(parse(layers, use_regex=False), SITES)
    assert len(caught.value.problems) == 9
    assert "2,992 more patterns match nothing" in caught.value.problems[-1]
    assert len(str(caught.value)) < 3000


def test_a_null_that_matches_nothing_is_told():
    report = plan_transform(parse({r"layer\.0\..*": None, "default": {}}), SITES)
    (note,) = report.notes
    assert note.startswith(r"t.yaml: layer_name_to_config: layer\.0\..*: matches no linear")
    assert f"note: {note}" in str(report).splitlines()


def test_a_null_behind_a_pattern_that_has_it_all_is_told():
    report = plan_transform(parse({".*": {}, r"layers\.0\..*": None}), SITES)
    (note,) = report.notes
    assert "an earlier pattern has all that it matches, layers.0.attention.wq as .*" in note


@pytest.mark.parametrize(
    ("layers", "name"),
    [
        ({"layers.0.attention.wq": None, "default": {}}, "optical"),
        ({"lm_head": None, "default": {}}, "optical"),
        # what comes first leaves it digital too
        ({"output": None, "lm_head": None, "default": {}}, "optical"),
        # what the paradigm does not simulate anyway
        ({"layers.0.attention": None, "default": {"w_p_frac": 0.1}}, "bitflip"),
    ],
)
def test_a_null_that_holds_is_no_note(layers, name):
    report = plan_transform(parse(layers, transform=name, use_regex=False), SITES)
    assert report.notes == []
