"""A transform that was saved means what it meant, whatever a default becomes."""

import enum
import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from aixsim_cli.config.pretrain import PretrainConfig
from aixsim_cli.models.hf.saved import load_model, write_model
from aixsim_cli.models.hf.transform import transform_hf_model
from aixsim_cli.pretrain.converter import TransformConverter
from aixsim_cli.transforms import read
from aixsim_cli.transforms.config import difference
from aixsim_cli.transforms.protocol import Paradigm, defaults_before, param
from aixsim_cli.transforms.read import parse_transform, read_transform
from aixsim_cli.transforms.state import state_of

BARE = {"transform": "optical", "layer_name_to_config": {"default": {"q_levels": 16}}}


@pytest.fixture(autouse=True)
def earlier(monkeypatch):
    """As if an earlier version had had another default."""
    monkeypatch.setattr(read, "defaults_before", lambda params: {"q_smooth_factor": 0.625})


def smooth_of(transform):
    (part,) = transform.transforms
    return part.rules[0].params.q_smooth_factor


def test_what_is_saved_names_every_parameter(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text(yaml.safe_dump(BARE | {"attention": None}))
    saved = read_transform(path).mapping
    params = saved["layer_name_to_config"]["default"]
    assert params["q_levels"] == 16 and {"q_smooth_factor", "q_noise", "q_quantiles"} < set(params)
    assert saved["attention"] is None
    # as it comes back from a file
    again = parse_transform(json.loads(json.dumps(saved)), source="s", saved=True)
    assert again.mapping == saved
    assert smooth_of(again) == smooth_of(parse_transform(BARE, source="s")) != 0.625


class Mode(enum.Enum):
    A = "a"


@dataclass(frozen=True)
class Strange:
    """What a stranger's parameters may be, and no file can hold; and what it can."""

    mode: Mode = Mode.A
    clip: float = float("inf")
    gain: float = param(1.0, "of the detector", before=9.0)


@dataclass(frozen=True)
class Derived:
    """Of which a part follows from the others."""

    levels: int = 4
    steps: int = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "steps", self.levels - 1)


@pytest.mark.parametrize(
    ("params", "saved"), [(Strange, {"mode": "a", "gain": 1.0}), (Derived, {"levels": 4})]
)
def test_parameters_that_a_file_cannot_hold_are_left_as_written(monkeypatch, params, saved):
    paradigm = type("Own", (Paradigm,), {"params": params, "modules": {}, "attention": None})
    monkeypatch.setattr(read, "get_paradigm", lambda name: paradigm)
    monkeypatch.setattr(read, "defaults_before", defaults_before)
    found = parse_transform({"transform": "own", "fc": {}}, source="s")
    assert found.mapping == {"transform": "own", "fc": saved}
    assert parse_transform(found.mapping, source="s", saved=True).transforms == found.transforms


def test_low_rank_updates_are_written_out():
    mapping = parse_transform(BARE | {"use_lora": True}, source="s").mapping
    assert mapping["lora"] == {"r": 32, "alpha": 32}


def test_a_list_of_transforms_is_written_out_part_by_part():
    parts = [{"transform": "bitflip", "fc": {"w_p_frac": 0.5}}, {"attention": {"q_levels": 4}}]
    bitflip, optical = parse_transform({"transforms": parts}, source="s").mapping["transforms"]
    assert bitflip["fc"]["x_p_exp"] is None and optical["attention"]["q_noise"] is True


def test_a_bare_one_means_what_its_version_meant():
    assert smooth_of(parse_transform(BARE, source="s", saved=True)) == 0.625
    named = {"transform": "optical", "fc": {"q_smooth_factor": 0.1}}
    assert smooth_of(parse_transform(named, source="s", saved=True)) == 0.1


def test_pretraining_reads_it_so():
    job = PretrainConfig(transform=BARE)
    assert smooth_of(TransformConverter(job, SimpleNamespace(tp_enabled=False)).config) == 0.625


@pytest.mark.parametrize("form", ["aixsim", "strict", "plain"])
def test_folders_are_read_so(tmp_path, form):
    made = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(made)
    transform_hf_model(model, parse_transform(BARE, source="s"))
    write_model(model, tmp_path, form)
    path = tmp_path / ("transform.yaml" if form == "plain" else "config.json")
    text = path.read_text()
    assert "q_smooth_factor" in text
    data = yaml.safe_load(text) if form == "plain" else json.loads(text)
    transform = data if form == "plain" else data["quantization_config"]["transform"]
    del transform["layer_name_to_config"]["default"]["q_smooth_factor"]
    path.write_text(yaml.safe_dump(data) if form == "plain" else json.dumps(data))
    loaded = load_model(str(tmp_path))
    assert {m.smooth for m in state_of(loaded).modules.values()} == {0.625}


def test_a_resume_compares_it_so():
    named = parse_transform({"transform": "optical", "fc": {"q_smooth_factor": 0.625}}, source="s")
    bare = {"transform": "optical", "fc": {}}
    saved = parse_transform(bare, source="s", saved=True)
    assert difference(saved, named) is None
    assert difference(saved, parse_transform(bare, source="s")) is not None
