"""`aixsim transforms`: what exists, what a paradigm takes, what a file would do."""

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from aixsim_cli.commands.transforms import app
from aixsim_cli.errors import ConfigError, UserError
from aixsim_cli.transforms.bitflip import BitflipParams
from aixsim_cli.transforms.optical import OpticalParams
from aixsim_cli.transforms.protocol import as_in_file


def run(*words):
    done = CliRunner().invoke(app, words)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_list():
    rows = {row["name"]: row for row in json.loads(run("list", "--json"))}
    assert rows["bitflip"]["simulates"] == "linear"
    assert rows["optical"]["simulates"] == "linear, attention"
    text = run("list")
    assert all(name in text for name in rows)


@pytest.mark.parametrize(
    ("name", "params"), [("bitflip", BitflipParams), ("optical", OpticalParams)]
)
def test_show_explains_every_parameter(name, params):
    shown = json.loads(run("show", name, "--json"))
    rows = {row["parameter"]: row for row in shown["parameters"]}
    for field in dataclasses.fields(params):
        assert rows[field.name]["default"] == as_in_file(field.default)
        assert rows[field.name]["meaning"] and rows[field.name]["source"]
    assert {row["parameter"]: row["default"] for row in shown["lora"]} == {"r": 32, "alpha": 32}


def test_show_prints_tables():
    text = run("show", "optical")
    assert "unit or rowmax" in text and "float or null" in text and "[float, float]" in text
    assert "true" in text and "lora: {…}, for any transform" in text


def test_show_of_an_unknown_paradigm():
    with pytest.raises(UserError, match="did you mean 'bitflip'"):
        run("show", "bitflips")


def test_check_on_a_flavor():
    checked = json.loads(
        run("check", "configs/transforms/bitflip-lora.yaml", "--flavor", "debug", "--json")
    )
    assert len(checked["simulated"]) == 14
    first = checked["simulated"][0]
    assert (first["module"], first["kind"]) == ("layers.0.attention.wq", "linear")
    assert first["parameters"]["w_zero_out_t"] == 1.25
    assert first["lora"] == {"r": 32, "alpha": 32}
    assert checked["digital"] == ["layers.0.attention", "layers.1.attention", "output"]


def test_check_prints_a_table_and_the_sum():
    text = run("check", "configs/transforms/bitflip-optical.yaml", "--flavor", "debug")
    assert "layers.1.feed_forward.w2" in text and "w_p_frac=0.0009765625" in text
    assert "optical: 2 modules match attention\nbitflip: 14 modules match fc" in text


@pytest.mark.parametrize("architecture", ["GPTNeoXForCausalLM", "BertForMaskedLM", None])
def test_check_on_a_hugging_face_model(tmp_path, architecture):
    config = {
        "model_type": "bert" if architecture == "BertForMaskedLM" else "gpt_neox",
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 48, "vocab_size": 64,
    }  # fmt: skip
    if architecture:
        config["architectures"] = [architecture]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ("--model", str(tmp_path), "--json")
    checked = json.loads(run("check", "configs/transforms/bitflip-fc.yaml", *model))
    names = [row["module"] for row in checked["simulated"]]
    part = "attention.self.query" if config["model_type"] == "bert" else "query_key_value"
    assert any(name.endswith(part) for name in names), names
    assert {row["kind"] for row in checked["simulated"]} == {"linear"}


def test_check_refuses_what_apply_would(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text(
        "transforms:\n- transform: bitflip\n  fc: {w_p_frac: 0.1}\n- fc: {q_levels: 16}\n"
    )
    with pytest.raises(ConfigError, match=r"wq: simulated by bitflip \(fc\) and by optical"):
        run("check", str(path), "--flavor", "debug")


@pytest.fixture
def gemma2(tmp_path):
    """A folder whose attentions cap their scores, which the simulation does not."""
    config = {
        "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "vocab_size": 64,
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
        "num_key_value_heads": 1, "intermediate_size": 48,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_check_refuses_an_attention_out_of_reach_as_apply_does(tmp_path, gemma2):
    path = tmp_path / "t.yaml"
    path.write_text("use_regex: true\nlayer_name_to_config:\n  '.*self_attn.*': {q_levels: 64}\n")
    with pytest.raises(ConfigError, match=r"Gemma2Attention \(softcap\) cannot be intercepted"):
        run("check", str(path), "--model", gemma2)


def test_check_names_what_is_out_of_reach(gemma2):
    words = ("check", "configs/transforms/optical.yaml", "--model", gemma2)
    checked = json.loads(run(*words, "--json"))
    assert {row["kind"] for row in checked["simulated"]} == {"linear"}
    attentions = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert set(checked["digital"]) == {"lm_head", *attentions}
    assert any("2 x Gemma2Attention (softcap) stay digital" in n for n in checked["notes"])
    assert "note: 2 x Gemma2Attention (softcap) stay digital" in run(*words)


@pytest.mark.parametrize("words", [(), ("--flavor", "debug", "--model", "x")])
def test_check_needs_one_model(words):
    with pytest.raises(UserError, match="expected one of them"):
        run("check", "configs/transforms/bitflip-fc.yaml", *words)


def test_check_of_a_missing_model(tmp_path):
    (tmp_path / "step-3").mkdir()
    (tmp_path / "step-3" / ".metadata").touch()
    for name, message in {
        tmp_path: "nor a Hugging Face model",
        tmp_path / "step-3": "a torchtitan checkpoint; expected a Hugging Face folder",
        "docs/nowhere": "docs/nowhere: no such folder",
        "nobody/nothing": "nobody/nothing: no such folder, and not loaded from the hub",
    }.items():
        with pytest.raises(UserError, match=message):
            run("check", "configs/transforms/bitflip-fc.yaml", "--model", str(name))


def test_through_the_command_line(aixsim):
    done = aixsim(
        "transforms", "check", "configs/transforms/optical.yaml", "--flavor", "6M", code=2
    )
    assert "did you mean '60M'?" in done.stderr
