"""schema: what is printed is JSON Schema, takes every shipped file, and refuses what we refuse."""

import json
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner

from aixsim_cli.main import app
from aixsim_cli.settings.document import load_yaml
from aixsim_cli.transforms.registry import describe_params, get_paradigm, paradigm_names

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture(scope="module")
def schemas():
    printed = {
        kind: CliRunner().invoke(app, ["schema", kind]) for kind in ("pretrain", "transform")
    }
    return {kind: json.loads(done.stdout) for kind, done in printed.items()}


@pytest.mark.parametrize("kind", ["pretrain", "transform"])
def test_it_is_json_schema_and_takes_every_shipped_file(schemas, kind):
    checker = jsonschema.Draft202012Validator
    checker.check_schema(schemas[kind])
    files = sorted((CONFIGS / {"transform": "transforms"}.get(kind, kind)).glob("*.yaml"))
    assert files
    for path in files:
        checker(schemas[kind]).validate(load_yaml(path).data)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("pretrain", {"training": {"stepz": 1}}),
        ("pretrain", {"training": {"steps": "many"}}),
        ("pretrain", {"training": {"steps": True}}),
        ("pretrain", {"reliability": {"on_nonfinite": "rest"}}),
        ("pretrain", {"transform": {"fc": {"q_levelz": 4}}}),
        ("transform", {"fc": {"q_levels": "many"}}),
        ("transform", {"fc": {"attention_range": "half"}}),
        ("transform", {"transform": "bitflip", "fc": {"q_levels": 16}}),
        ("transform", {"transform": "nothing", "fc": {}}),
        ("transform", {"transforms": []}),
        ("transform", {"transforms": [{"layers": {}}]}),
        ("transform", {"fc": {}, "lora": {"rank": 4}}),
    ],
)
def test_what_a_command_refuses_is_no_instance(schemas, kind, data):
    assert not jsonschema.Draft202012Validator(schemas[kind]).is_valid(data)


def test_parameters_have_meaning_unit_and_default(schemas):
    for name in paradigm_names():
        keys = schemas["transform"]["$defs"][f"{name} parameters"]["properties"]
        rows = {row["parameter"]: row for row in describe_params(get_paradigm(name).params)}
        assert keys.keys() == rows.keys()
        for key, row in rows.items():
            assert keys[key]["default"] == row["default"]
            assert row["meaning"] in keys[key]["description"]
            assert row["unit"] in keys[key]["description"]


def test_torchtitans_keys_are_explained(schemas):
    training = schemas["pretrain"]["$defs"]["Training"]["properties"]
    assert training["seq_len"]["description"] == "Sequence length"
    assert training["seq_len"]["default"] == 2048


@pytest.mark.parametrize("section", ["Reliability", "Budget"])
def test_our_own_keys_are_explained(schemas, section):
    keys = schemas["pretrain"]["$defs"][section]["properties"]
    assert keys and all(key.get("description") for key in keys.values())
