"""Transform files: precedence, both names, NewComputeBench's forms, and every mistake."""

import pytest

from aixsim_cli.errors import ConfigError, UserError
from aixsim_cli.transforms.optical import OpticalParams
from aixsim_cli.transforms.protocol import Site
from aixsim_cli.transforms.read import parse_transform, read_transform

WQ = Site("layers.0.attention.wq", "model.layers.0.self_attn.q_proj", "linear")
W1 = Site("layers.1.feed_forward.w1", "model.layers.1.mlp.gate_proj", "linear")
ATTENTION = Site("layers.0.attention", "model.layers.0.self_attn", "attention")
HEAD = Site("output", "lm_head", "linear", is_head=True)


def parse(**data):
    return parse_transform(data, source="t.yaml")


def rule_of(config, site):
    """The rule by which a site is simulated; None = it stays digital."""
    return next(filter(None, (t.simulates(site) for t in config.transforms)), None)


def levels(config, site):
    rule = rule_of(config, site)
    return rule.params.q_levels if rule is not None and rule.params is not None else None


def test_first_full_match_wins_and_default_is_last():
    config = parse(
        use_regex=True,
        layer_name_to_config={
            "default": {"q_levels": 8},
            r"layers\.0\..*": {"q_levels": 16},
            r"layers\..*": {"q_levels": 32},
        },
    )
    assert levels(config, WQ) == 16
    assert levels(config, W1) == 32
    assert levels(config, Site("other", "other", "linear")) == 8


def test_pattern_must_match_the_whole_name():
    config = parse(use_regex=True, layer_name_to_config={"attention": {"q_levels": 16}})
    assert rule_of(config, WQ) is None


@pytest.mark.parametrize("pattern", [r"layers\.0\.attention\.wq", r"model\..*\.q_proj"])
def test_either_name_matches(pattern):
    config = parse(use_regex=True, layer_name_to_config={pattern: {"q_levels": 16}})
    assert levels(config, WQ) == 16


def test_without_regex_names_are_literal():
    config = parse(layer_name_to_config={"layers.0.attention.wq": {"q_levels": 16}})
    assert levels(config, WQ) == 16
    assert rule_of(config, Site("layersX0.attention.wq", "x", "linear")) is None


def test_null_keeps_a_module_digital():
    config = parse(
        use_regex=True, layer_name_to_config={r".*\.wq": None, "default": {"q_levels": 8}}
    )
    assert levels(config, WQ) is None
    assert levels(config, W1) == 8


def test_default_spares_the_head_and_a_pattern_does_not():
    assert rule_of(parse(layer_name_to_config={"default": {}}), HEAD) is None
    assert rule_of(parse(layer_name_to_config={"output": {}}), HEAD) is not None


def test_field_toml(tmp_path):
    path = tmp_path / "cfg.toml"
    path.write_text("use_lora=false\n[attention]\nq_levels=16\n[fc]\nq_levels=32\nq_bypass=false\n")
    config = read_transform(path)
    assert (levels(config, ATTENTION), levels(config, WQ), levels(config, HEAD)) == (16, 32, None)


def test_field_yaml(tmp_path):
    path = tmp_path / "cfg.yaml"
    path.write_text(
        "use_regex: true\nlayer_name_to_config:\n  default: null\n"
        "  ? 'layers\\.[0-9]+\\.attention|layers\\.[0-9]+\\.attention\\.(wq|wk|wv|wo)'\n"
        '  : {q_levels: 256, q_lut_min: 0.020040, q_quantiles: null}\n  "output": null\n'
    )
    config = read_transform(path)
    assert (levels(config, ATTENTION), levels(config, WQ), levels(config, W1)) == (256, 256, None)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"layer_names_to_config": {}}, "did you mean 'layer_name_to_config'?"),
        ({"layer_name_to_config": {"default": {"q_level": 2}}}, "did you mean 'q_levels'?"),
        ({"layer_name_to_config": {"default": {"q_levels": 1}}}, "q_levels: got 1"),
        ({"layer_name_to_config": {"default": {"q_levels": "many"}}}, "q_levels"),
        ({"layer_name_to_config": {"default": {"q_quantiles": [0.9, 0.1]}}}, "q_quantiles"),
        ({"layer_name_to_config": {"default": {"attention_range": "x"}}}, "attention_range"),
        ({"layer_name_to_config": {"default": 3}}, "expected parameters or null"),
        ({"transform": "optica", "layer_name_to_config": {"default": {}}}, "mean 'optical'?"),
        ({"use_regex": True, "layer_name_to_config": {"(": {}}}, "not a regular expression"),
        ({"fc": {}, "lora": {"r": 0}}, "lora: r: got 0; expected 1 or more"),
        ({"fc": {}, "lora": {"rank": 8}}, "lora: rank: unknown key"),
        ({"fc": {}, "lora": {"r": 10**9}}, "lora: r: got 1000000000; expected at most 65536"),
        (
            {"fc": {}, "lora": {"alpha": float("nan")}},
            "lora: alpha: got .nan; expected a finite",
        ),
        ({"fc": {}, "lora": {"alpha": float("inf")}}, "lora: alpha: got .inf"),
        ({"fc": {}, "lora": {"alpha": 0}}, "lora: alpha: got 0"),
        ({"fc": {}, "lora": []}, "lora: got []; expected r and alpha"),
        ({"fc": {}, "use_lora": "no"}, "use_lora: got 'no'; expected true or false"),
        ({"fc": {}, "use_regex": "no"}, "use_regex: got 'no'; expected true or false"),
        ({"fc": {}, "use_regex": [0]}, "use_regex: got [0]; expected true or false"),
        ({"fc": {}, "use_regex": None}, "use_regex: got None; expected true or false"),
        ({"fc": {"q_init_seed": 10**24}}, "q_init_seed: got a whole number of 80 bits"),
        ({"transform": "bitflip", "fc": {"seed": 2**63}}, "seed: got a whole number of 64 bits"),
        ({"fc": {}, "layer_name_to_config": False}, "layer_name_to_config: got False; expected"),
        ({"layer_name_to_config": {1: {}}}, "layer_name_to_config: got 1 as a pattern"),
        ({"layer_name_to_config": {"": {}}}, "got the empty pattern ''; expected a name"),
        ({"layer_name_to_config": {" ": None}}, "got the empty pattern ' '; expected a name"),
        ({"fc": {}, "lora": 8}, "lora: got 8; expected r and alpha"),
        ({"fc": {"w_p_exp": 0.1}}, "these are parameters of `transform: bitflip`"),
        ({"transform": "bitflip", "attention": {}}, "bitflip has no simulation of it"),
        ({"transform": "bitflip", "fc": {"w_p_exp": 1.1}}, "w_p_exp: got 1.1"),
        ({"transform": "bitflip", "fc": {"x_p_frac": 1e-12}}, "x_p_frac: got 1e-12"),
        ({"transform": "bitflip", "fc": {"x_zero_out_t": 0}}, "x_zero_out_t: got 0"),
        ({"transforms": [{"fc": {}}], "use_regex": True}, "use_regex: got it beside transforms"),
        ({"transforms": {"fc": {}}}, "transforms: expected a list"),
        ({"transforms": []}, "nothing to transform"),
        ({"transforms": [{"fc": {}}, {"fc": {"q_levels": 1}}]}, "transforms[1]: fc: q_levels"),
        ({}, "nothing to transform"),
        ([1], "expected a mapping"),
    ],
)
def test_mistakes_are_named(data, said):
    with pytest.raises(ConfigError, match=r"t\.yaml") as caught:
        parse_transform(data, source="t.yaml")
    assert said in str(caught.value)


def test_all_mistakes_at_once():
    with pytest.raises(ConfigError) as caught:
        parse(layer_name_to_config={"a": {"q_levels": 1}, "b": {"q_smooth_factor": 2}}, x=1)
    assert len(caught.value.problems) == 3


def test_missing_file():
    with pytest.raises(UserError, match="no such transform config"):
        read_transform("nowhere.yaml")


def test_defaults_are_the_fields():
    assert OpticalParams() == OpticalParams(256, 0.020040, None, (0.0, 0.9), 0, False)
