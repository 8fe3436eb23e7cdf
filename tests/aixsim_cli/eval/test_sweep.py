"""Sweeps of small models: each point is what `eval ppl` finds there, and a sweep can be cut off."""

import json
import math
import os
import re
import shutil
import statistics
from typing import cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PreTrainedModel

from aixsim_cli.data.tokenizer import resolve_tokenizer, vocab_size
from aixsim_cli.energy.account import token_energy
from aixsim_cli.energy.hardware import read_hardware
from aixsim_cli.energy.shape import shape_of_flavor
from aixsim_cli.errors import UserError
from aixsim_cli.eval import sweep as library
from aixsim_cli.eval.kept import Kept, kept_in
from aixsim_cli.eval.measure import Calibration, Text, calibrate_for, measure, needs_ranges
from aixsim_cli.eval.perplexity import Perplexity
from aixsim_cli.models.hf.saved import write_model
from aixsim_cli.models.load import load_model, simulated
from aixsim_cli.transforms.choice import DIGITAL, KEEP_OWN, read_choice
from aixsim_cli.transforms.read import parse_transform
from aixsim_cli.transforms.vary import parse_axis

TEXT = Text("builtin", None, 2, 2, 16)
SET = Calibration(1, None)
SHORT = ("--num-batches", 2, "--batch-size", 2, "--seq-len", 16, "--calibration-batches", 1)


@pytest.fixture(scope="module")
def titan(aixsim, tmp_path_factory):
    """A checkpoint of two steps on optical hardware."""
    folder = tmp_path_factory.mktemp("run")
    aixsim(
        "generate-cfg", "--model-flavor", "debug", "--tokenizer-path", "builtin", "--dataset",
        "builtin", "--batch-size", 2, "--seq-len", 32, "--steps", 2, "--learning-rate", "1e-3",
        "--mixed-precision-param", "float32", "--save-path", folder / "c.yaml",
        "--transform-config", "configs/transforms/optical.yaml",
    )  # fmt: skip
    aixsim("pretrain", "--config", folder / "c.yaml", "--job.dump_folder", folder / "run")
    return str(folder / "run" / "checkpoint" / "step-2")


def swept(source, *texts, choice=KEEP_OWN, text=TEXT, **options):
    return library.sweep(source, list(map(parse_axis, texts)), text, SET, choice, **options)


@pytest.fixture(scope="module")
def strict(trained, tmp_path_factory):
    return in_form("strict", trained, tmp_path_factory)


@pytest.fixture(scope="module")
def plain(trained, tmp_path_factory):
    return in_form("plain", trained, tmp_path_factory)


def in_form(form, source, tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("forms") / form, load_model(source)
    write_model(cast(PreTrainedModel, model.module), folder, form)
    model.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def transposed(tmp_path_factory):
    """A GPT-2, whose linears hold their weights the other way round, and no ranges."""
    folder = tmp_path_factory.mktemp("gpt2") / "m"
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=4096, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_tokenizer("builtin")).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "kind", ["titan", "trained", "strict", "plain", "calibrated", "transposed", "anew"]
)
def test_each_point_is_what_ppl_finds_there(kind, request, coarse, tmp_path):
    model = {"calibrated": "clean", "anew": "trained"}.get(kind, kind)
    source = request.getfixturevalue(model)
    own, is_new = 256 if kind == "titan" else 16, kind in ("calibrated", "transposed")
    choice = read_choice(coarse) if is_new else KEEP_OWN
    calibration = Calibration(1, None, anew=kind == "anew")
    axis = parse_axis(f"q_levels={own},4")
    found = library.sweep(source, [axis], TEXT, calibration, choice)
    as_it_is = measure(source, TEXT, calibration, choice)
    assert found["own"]["nll"] == found["points"][0]["nll"] == as_it_is["nll"]
    assert found["own"]["calibrated"] == as_it_is["calibrated"] == (is_new or kind == "anew")
    assert found["digital"]["nll"] == measure(source, TEXT, SET, DIGITAL)["nll"]
    path = tmp_path / "four.yaml"
    before = "[0.0, 0.9]"
    path.write_text(
        f"layer_name_to_config: {{default: {{q_levels: 4, q_smooth_factor: {before}}}}}"
    )
    there = measure(source, TEXT, calibration, read_choice(path))
    assert found["points"][1]["nll"] == there["nll"] != as_it_is["nll"]
    assert found["tokens"] == there["tokens"] and found["seq_len"] == 16


def test_ranges_that_training_did_not_set_are_set_and_the_others_stay(trained):
    own, digital = load_model(trained), load_model(trained, DIGITAL)
    assert own.transform is not None
    known = {name: ranges for name, ranges in own.ranges.items() if "mlp" in name}
    model = simulated(digital, own.transform, known)
    assert model.ranges.keys() == own.ranges.keys() > known.keys() and needs_ranges(model, SET)
    assert not any(module.training for module in model.module.modules())
    assert calibrate_for(model, TEXT, SET) and not needs_ranges(model, SET)
    for name, ranges in model.ranges.items():
        assert torch.equal(ranges, own.ranges[name]) == (name in known)
    # the digital model is as it was, and its weights are not copied
    assert digital.state is None and not digital.ranges
    assert {id(p) for p in model.module.parameters()} == {
        id(p) for p in digital.module.parameters()
    }


def test_flips_and_layers_can_be_varied(clean):
    flips = parse_transform({"transform": "bitflip", "fc": {"w_p_frac": 2**-8}}, source="t")
    found = swept(clean, "w_p_frac@.*q_proj=null,0.00390625,0.5", "seed=0,1", choice=flips)
    nlls = {tuple(point["values"].values()): point["nll"] for point in found["points"]}
    assert nlls[2**-8, 0] == found["own"]["nll"]
    assert len(set(nlls.values())) == 6
    # null in one layer: the others flip still
    assert nlls[None, 0] != found["digital"]["nll"]


def test_seeds_are_the_same_at_every_point_and_their_deviation_is_of_a_sample(trained):
    found = swept(trained, "q_levels=16,8", repeats=3)
    nlls = found["own"]["nlls"]
    assert found["points"][0]["nlls"] == nlls and len(set(nlls)) == 3
    assert nlls[0] == measure(trained, TEXT, SET)["nll"]
    for row in found["points"]:
        assert row["nll"] == pytest.approx(statistics.mean(row["nlls"]), rel=1e-12)
        assert row["stdev"] == pytest.approx(statistics.stdev(row["nlls"]), rel=1e-9)
        assert row["perplexity"] == math.exp(row["nll"])
    assert found["digital"]["stdev"] is None and len(found["digital"]["nlls"]) == 1


def test_the_error_of_the_difference_is_over_windows_each_compared_with_itself(
    clean, coarse, tmp_path
):
    path = tmp_path / "t.txt"
    path.write_text("the value of an expression is its result " * 7)
    text, calibration = Text("local", str(path), 2, None, 16), Calibration(1, str(path))
    axes = [parse_axis("q_levels=4")]
    options = {"repeats": 2, "folder": tmp_path / "o"}
    found = library.sweep(clean, axes, text, calibration, read_choice(coarse), **options)
    lines = (tmp_path / "o" / "losses.jsonl").read_text().splitlines()
    windows = {(str(r["values"]), r["repeat"]): r["windows"] for r in map(json.loads, lines)}
    digital, *seeds = (windows[k] for k in (("None", 0), *((str(VALUES), r) for r in (0, 1))))
    tokens = found["tokens"]
    lengths = [16] * (len(digital) - 1) + [tokens - 16 * (len(digital) - 1)]
    assert len(digital) > 2 and 0 < lengths[-1] < 16
    above = [(a + b) / 2 - d for a, b, d in zip(*seeds, digital, strict=True)]
    mean = sum(above) / tokens
    squares = sum((a - n * mean) ** 2 for a, n in zip(above, lengths, strict=True))
    n = len(digital)
    (point,) = found["points"]
    assert point["delta"] == pytest.approx(mean)
    assert point["delta_stderr"] == pytest.approx((n / (n - 1) * squares) ** 0.5 / tokens)
    assert found["digital"]["delta"] == found["digital"]["delta_stderr"] == 0
    # of one window there is none
    one = Text("local", str(path), 1, 1, 16)
    alone = library.sweep(clean, axes, one, calibration, read_choice(coarse))
    assert alone["points"][0]["delta_stderr"] is None


VALUES = {"q_levels": 4}
COMMAND = ("--vary", "q_levels=4,8", "--repeats", 2, *SHORT, "--json")


def killed_after_three():
    add, count = Kept.add, [0]

    def add_and_die(self, *arguments):
        add(self, *arguments)
        count[0] += 1
        if count[0] == 3:
            os._exit(9)

    Kept.add = add_and_die


def test_one_that_was_killed_goes_on_and_finds_the_same(aixsim, trained, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = aixsim("eval", "sweep", trained, *COMMAND, "--output", whole).stdout
    assert aixsim("eval", "sweep", trained, *COMMAND).stdout == expected
    aixsim("eval", "sweep", trained, *COMMAND, "--output", cut, code=9, fault=killed_after_three)
    losses = cut / "losses.jsonl"
    done = losses.read_bytes()
    assert done.count(b"\n") == 3
    # as if the kill had come in the middle of the fourth line
    losses.write_bytes(done + (whole / "losses.jsonl").read_bytes()[len(done) :][:40])
    again = aixsim("eval", "sweep", trained, *COMMAND, "--output", cut)
    assert again.stdout == expected
    assert losses.read_bytes() == (whole / "losses.jsonl").read_bytes()
    assert losses.read_bytes().startswith(done)
    # nothing is left to do
    assert aixsim("eval", "sweep", trained, *COMMAND, "--output", cut).stdout == expected
    assert losses.read_bytes() == (whole / "losses.jsonl").read_bytes()


def test_what_is_kept_is_not_measured_again(trained, tmp_path, monkeypatch):
    first = swept(trained, "q_levels=4,8", folder=tmp_path / "o")
    before = (tmp_path / "o" / "losses.jsonl").read_bytes()
    measured = []
    perplexity = library.perplexity

    def counted(*arguments, **options):
        measured.append(options["noise_seed"])
        return perplexity(*arguments, **options)

    monkeypatch.setattr(library, "perplexity", counted)
    more = swept(trained, "q_levels=4,16", repeats=2, folder=tmp_path / "o")
    # as it is and 4 with the other seed, 16 with both
    assert measured == [1, 1, 0, 1]
    assert more["points"][0]["nlls"][0] == first["points"][0]["nll"]
    assert (tmp_path / "o" / "losses.jsonl").read_bytes().startswith(before)


@pytest.mark.parametrize(
    "change, named",
    [
        (("--batch-size", 1), "--batch-size (2 there, 1 here)"),
        (("--num-batches", 1), "text (by its tokens)"),
        (("--seq-len", 8), "text (by its tokens)"),
        (("--dtype", "bfloat16"), "--dtype (float32 there, bfloat16 here)"),
        (("--transform-config", "configs/transforms/optical.yaml"), "another transform"),
        (("--calibration-batches", 2), "calibration"),
    ],
)
def test_a_folder_of_another_sweep_is_refused(aixsim, trained, tmp_path, kept, change, named):
    folder = shutil.copytree(kept, tmp_path / "o")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    words = ("eval", "sweep", trained, *COMMAND, "--output", folder, *change)
    done = aixsim(*words, code=2)
    assert f"--output: {folder}: holds a sweep of another" in done.stderr
    assert named in done.stderr and "expected the same, or another folder" in done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.fixture(scope="module")
def kept(aixsim, trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept") / "o"
    aixsim("eval", "sweep", trained, *COMMAND, "--output", folder)
    return folder


def test_other_weights_are_another_model(trained, kept, tmp_path):
    other = shutil.copytree(trained, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 0.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    folder = shutil.copytree(kept, tmp_path / "o")
    with pytest.raises(UserError, match="another model"):
        swept(str(other), "q_levels=4", folder=folder)
    # the same somewhere else is the same
    moved = shutil.copytree(trained, tmp_path / "moved")
    assert swept(str(moved), "q_levels=4", folder=folder)["points"]


def test_losses_that_are_none_are_refused(tmp_path):
    loss = Perplexity(4, 2.5, (5.0, math.nan))
    with kept_in(tmp_path / "o", {"a": 1}) as kept:
        kept.add({"q": 1}, 0, loss)
    path = tmp_path / "o" / "losses.jsonl"
    with kept_in(tmp_path / "o", {"a": 1}) as kept:
        found = kept.get({"q": 1}, 0)
        assert found is not None and found.nll == 2.5 and math.isnan(found.windows[1])
        assert kept.get({"q": 1}, 1) is kept.get({}, 0) is kept.get(None, 0) is None
    with path.open("a") as file:
        file.write("{}\n")
    with pytest.raises(UserError, match=r"losses.jsonl:2: not a loss"):
        kept_in(tmp_path / "o", {"a": 1}).__enter__()
    (tmp_path / "o" / "sweep.json").unlink()
    with pytest.raises(UserError, match=r"has no sweep.json beside it"):
        kept_in(tmp_path / "o", {"a": 1}).__enter__()


def test_a_loss_that_is_no_number_is_shown_and_a_failure(aixsim, trained, tmp_path):
    broken = shutil.copytree(trained, tmp_path / "m")
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"].fill_(3e38)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    words = ("eval", "sweep", broken, "--vary", "q_levels=4,8", *SHORT)
    output = ("--output", tmp_path / "o")
    done = aixsim(*words, "--json", *output, code=1)
    found = json.loads(done.stdout, parse_constant=lambda word: pytest.fail(word))
    assert [point["nll"] for point in found["points"]] == [None, None]
    assert "digital; as it is; q_levels=4; q_levels=8: the loss is not finite" in done.stderr
    done = aixsim(*words, *output, "--plot", tmp_path / "p.png", code=1)
    assert done.stdout.count(" nan ") >= 4, done.stdout
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_light_and_energy_stand_beside_the_loss(aixsim, titan, tmp_path):
    words = ("eval", "sweep", titan, "--vary", "photons_per_mac=null,0.5,2", *SHORT)
    found = json.loads(aixsim(*words, "--hardware", "engineered", "--json").stdout)
    assert found["hardware"] == "engineered"
    shape = shape_of_flavor("aixsim", "debug", vocab_size("builtin"))
    prices = read_hardware("engineered")
    for photons, point in zip((None, 0.5, 2), found["points"], strict=True):
        transform = {"attention": {"photons_per_mac": photons}, "fc": {"photons_per_mac": photons}}
        config = parse_transform(transform, source="t")
        expected = token_energy(shape, config, prices, seq_len=16)
        assert point["photons_per_token"] == pytest.approx(expected.photons_per_token)
        assert point["joules_per_token"] == pytest.approx(expected.joules_per_token)
    assert found["points"][0]["photons_per_token"] is None
    digital = token_energy(shape, None, prices, seq_len=16).joules_per_token
    assert found["digital"]["joules_per_token"] == pytest.approx(digital)
    # without prices the light alone, and no light where none is counted
    shown = aixsim(*words).stdout
    assert "photons/token" in shown and "energy/token" not in shown
    shown = aixsim("eval", "sweep", titan, "--vary", "q_levels=8", *SHORT).stdout
    assert "photons/token" not in shown


def test_the_table_and_what_is_said_meanwhile(aixsim, trained):
    words = ("--vary", "q_levels=4,8", "--vary", "q_lut_min=null,0.1")
    done = aixsim("eval", "sweep", trained, *words, "--hardware", "engineered", *SHORT)
    lines = [re.split("[┃│]", line) for line in done.stdout.splitlines()]
    rows = [[cell.strip() for cell in line[1:3]] for line in lines if len(line) > 3]
    assert rows == [
        ["q_levels", "q_lut_min"], ["digital", ""], ["as it is", ""],
        ["4", "null"], ["4", "0.1"], ["8", "null"], ["8", "0.1"],
    ]  # fmt: skip
    assert "energy/token" in done.stdout and "(optical on engineered)" in done.stdout
    said = done.stderr.splitlines()
    assert said[0] == f"loading {trained}"
    assert [line.partition(": nll")[0] for line in said if " of 6: " in line] == [
        "1 of 6: digital", "2 of 6: as it is",
        "3 of 6: q_levels=4, q_lut_min=null", "4 of 6: q_levels=4, q_lut_min=0.1",
        "5 of 6: q_levels=8, q_lut_min=null", "6 of 6: q_levels=8, q_lut_min=0.1",
    ]  # fmt: skip


def test_text_to_calibrate_on_is_asked_for_before_anything_is_measured(
    clean, trained, coarse, tmp_path, monkeypatch
):
    path = tmp_path / "t.txt"
    path.write_text("one two three four five " * 100)
    local = Text("local", str(path), 1, 1, 16)
    assert swept(trained, "q_levels=4", text=local)["points"]
    monkeypatch.setattr(library, "perplexity", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(UserError, match="--calibration-path: missing"):
        swept(clean, "q_levels=4", text=local, choice=read_choice(coarse))


def test_what_is_said_of_every_point_is_said_once(transposed, coarse, caplog):
    swept(transposed, "q_levels=4,8", choice=read_choice(coarse))
    said = [record.message for record in caplog.records if record.name == "aixsim"]
    assert len([message for message in said if "dropout" in message]) == 1
    assert len(said) == len(set(said))


def test_a_digital_model_has_nothing_to_vary(clean):
    with pytest.raises(UserError, match="is digital, and has no parameters to vary"):
        swept(clean, "q_levels=4")


def record(nll, stdev=None, **values):
    return {"values": values, "nll": nll, "stdev": stdev}


@pytest.mark.parametrize("suffix", ["svg", "pdf", "png"])
def test_a_picture_names_what_is_drawn_with_units(tmp_path, suffix):
    from aixsim_cli.eval.plot import plot_sweep

    first = {"key": "photons_per_mac", "scale": "log", "unit": "detected photons"}
    second = {"key": "encoding", "scale": "list", "unit": "", "values": ["differential", "offset"]}
    nlls = {0.1: 6.0, 1.0: math.nan, 10.0: 5.0, 100.0: 4.9}
    found = {
        "vary": [first | {"values": list(nlls)}, second], "transform": "optical",
        "digital": record(4.8), "own": record(4.85),
        "points": [
            record(nll, 0.1, photons_per_mac=photons, encoding=encoding)
            for photons, nll in nlls.items()
            for encoding in second["values"]
        ],
    }  # fmt: skip
    path = tmp_path / f"p.{suffix}"
    plot_sweep(found, path)
    start = {"svg": b"<?xml", "pdf": b"%PDF", "png": b"\x89PNG"}[suffix]
    assert path.read_bytes().startswith(start)
    if suffix == "svg":
        # text is text, not shapes
        text = re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())
        words = {"photons_per_mac (detected photons)", "loss (nats per token)", "encoding"}
        assert words | {"differential", "offset", "digital", "as it is"} <= set(text)
        assert {"0.1", "1", "10", "100"} <= set(text)
