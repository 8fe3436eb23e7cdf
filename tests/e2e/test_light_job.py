"""Little light from the first step to the last file: lamps are trained, saved, resumed, calibrated.

And a model that was trained without them is put into little light, and back.
"""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from aixsim_cli.models.titan.saved import read_checkpoint

STEPS = 6
TRANSFORMS = {
    "dither": "transform: optical\nlayer_name_to_config: {default: {}}\n",
    "light": "layer_name_to_config: {default: {photons_per_mac: 2.0, read_noise: 1.0}}\n",
    "offset": "layer_name_to_config: {default: {photons_per_mac: 1.0e+5, encoding: offset}}\n",
    "pixels": "layer_name_to_config: {default: {pixel_gain_std: 0.1, dead_pixels: 0.05}}\n",
    "another specimen": "layer_name_to_config: {default: "
    "{pixel_gain_std: 0.1, dead_pixels: 0.05, device_seed: 1}}\n",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("light")
    for name, text in TRANSFORMS.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def trained(files, aixsim):
    """(transform) -> the folder of a finished run, which is made once."""
    made = {}

    def train(name, *more, folder=None, ranks=1, batch=4):
        key = folder or name
        if key not in made:
            made[key] = files / key
            config = files / f"{key}.config.yaml"
            aixsim(
                "generate-cfg", "--model-flavor", "debug-64", "--tokenizer-path", "builtin",
                "--dataset", "builtin", "--batch-size", batch, "--seq-len", 64, "--steps", STEPS,
                "--learning-rate", "3e-3", "--mixed-precision-param", "float32",
                "--transform-config", files / f"{name}.yaml", "--save-path", config,
                *(["--data-parallel-replicate-degree", ranks] if ranks > 1 else []),
            )  # fmt: skip
            aixsim(
                "pretrain", "--config", config, "--job.dump_folder", made[key],
                "--metrics.log_freq", 1, "--checkpoint.interval", 3, *more, ranks=ranks,
            )  # fmt: skip
        return made[key]

    return train


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state(folder, step=STEPS):
    return read_checkpoint(folder / "checkpoint" / f"step-{step}").state_dict


@pytest.fixture(scope="module")
def source_of(trained, files, aixsim):
    """(transform, form) -> a finished run in that form: titan, or one of transformers'."""
    made = {}

    def convert(name, form):
        source = trained(name) / "checkpoint" / f"step-{STEPS}"
        if form == "titan":
            return source
        if (name, form) not in made:
            made[name, form] = target = files / f"{name}-{form}"
            aixsim("convert-ckpt", "aixsim", "debug-64", source, target, "--form", form)
        return made[name, form]

    return convert


def nll(aixsim, source, *more):
    done = aixsim("eval", "ppl", source, "--num-batches", 1, "--batch-size", 2, "--seq-len", 64,
                  *more, "--json")  # fmt: skip
    return json.loads(done.stdout)["nll"], done.stderr


def test_what_a_run_logs_and_saves(trained):
    logged = records(trained("light"))
    kinds = {key.removeprefix("snr/") for key in logged[-1] if key.startswith("snr/")}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
                     "attention"}  # fmt: skip
    assert all(math.isfinite(logged[-1][f"snr/{kind}"]) for kind in kinds)
    # two photons in each of a token's multiplications: of the linears, and of two products of two
    # heads of 32 over the 32.5 keys that a token sees on average
    macs = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 256 + 2 * 2 * 32 * 32.5)
    assert logged[0]["photons_per_token"] == pytest.approx(2 * macs, rel=1e-3)
    # the lamps follow: later batches have more or less light than what they are set to
    assert logged[-1]["photons_per_token"] == pytest.approx(2 * macs, rel=0.5)
    assert not any(key.startswith(("snr/", "photons")) for key in records(trained("dither"))[-1])
    lamps = {k: v for k, v in state(trained("light")).items() if k.endswith(".lamp.ranges")}
    assert len(lamps) == 16 and all(v.isfinite().all() and (v > 0).all() for v in lamps.values())
    assert {tuple(v.shape) for v in lamps.values()} == {(1, 2), (2, 2)}


def resumed(aixsim, files, name, whole):
    """A run that goes on from the middle of another one."""
    part = files / f"{name}, from step 3"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoint" / f"step-{STEPS}")
    aixsim("pretrain", "--config", files / f"{name}.config.yaml", "--job.dump_folder", part,
           "--metrics.log_freq", 1)  # fmt: skip
    return part


def test_a_resumed_run_is_the_run(trained, aixsim, files):
    whole = trained("light")
    part = resumed(aixsim, files, "light", whole)
    assert [r["step"] for r in records(part)] == [*range(1, STEPS + 1), *range(4, STEPS + 1)]
    assert [r["loss"] for r in records(part)[STEPS:]] == [r["loss"] for r in records(whole)[3:]]
    mine, theirs = state(part), state(whole)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_every_form_of_a_model_keeps_its_lamps(trained, source_of, aixsim, files):
    expected, said = nll(aixsim, source_of("light", "titan"))
    assert "ranges set" not in said
    for form in ("aixsim", "plain", "strict"):
        found, said = nll(aixsim, source_of("light", form))
        assert found == pytest.approx(expected, abs=2e-3), form
        assert "ranges set" not in said
    folder = source_of("light", "aixsim")
    saved = load_file(folder / "model.safetensors")
    ours = state(trained("light"))
    name = "layers.0.attention.wq.lamp.ranges"
    assert torch.equal(saved["model.layers.0.self_attn.q_proj.lamp.ranges"], ours[name])
    # and back
    aixsim("convert-ckpt", "aixsim", "debug-64", folder, files / "back")
    assert torch.equal(read_checkpoint(files / "back").state_dict[name], ours[name])


@pytest.mark.parametrize("form", ["titan", "aixsim", "plain"])
def test_a_model_that_knows_no_lamp_is_calibrated(source_of, aixsim, files, form):
    source = source_of("dither", form)
    own, said = nll(aixsim, source)
    assert "ranges set" not in said
    dim, said = nll(aixsim, source, "--transform-config", files / "light.yaml")
    assert "ranges set on 8 batches" in said
    bright, said = nll(aixsim, source, "--transform-config", files / "offset.yaml")
    assert "ranges set on 8 batches" in said
    assert len({own, dim, bright}) == 3 and all(map(math.isfinite, (own, dim, bright)))
    other, said = nll(aixsim, source, "--transform-config", files / "pixels.yaml")
    # pixels have no state: nothing is to be set
    assert "ranges set" not in said and other != own
    another, _ = nll(aixsim, source, "--transform-config", files / "another specimen.yaml")
    assert another not in (other, own)


@pytest.mark.parametrize("form", ["titan", "aixsim"])
def test_lamps_are_left_where_there_is_light_without_end(source_of, aixsim, files, form):
    dither = ("--transform-config", files / "dither.yaml")
    found, said = nll(aixsim, source_of("light", form), *dither)
    assert "ranges set" not in said and math.isfinite(found)


@pytest.mark.parametrize(("before", "after"), [("dither", "light"), ("light", "dither")])
def test_pretraining_goes_on_in_other_light(trained, before, after):
    start = trained(before) / "checkpoint" / f"step-{STEPS}"
    more = ("--checkpoint.initial_load_path", start)
    folder = trained(after, *more, folder=f"{before} to {after}")
    losses = [record["loss"] for record in records(folder)]
    assert losses[0] < records(trained(before))[0]["loss"] - 0.1
    assert any(".lamp." in key for key in state(folder)) == (after == "light")


def test_two_ranks_agree_on_their_lamps(trained):
    """The lamp is set to what both saw: none of them is brighter than the other's."""
    both = state(trained("light", folder="two ranks", ranks=2, batch=2))
    alone = state(trained("light"))
    name = "layers.1.feed_forward.w2.lamp.ranges"
    low, high = both[name][0]
    assert low <= high
    # of the same tokens in two halves
    assert float(both[name].mean()) == pytest.approx(float(alone[name].mean()), rel=0.2)
    losses = [[r["loss"] for r in records(trained("light", folder=key))] for key in
              ("two ranks", None)]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_a_specimen_is_the_same_after_a_resume(trained, aixsim, files):
    whole = trained("pixels")
    part = resumed(aixsim, files, "pixels", whole)
    assert records(part)[-1]["loss"] == records(whole)[-1]["loss"]
    another = trained("another specimen")
    assert records(another)[-1]["loss"] != records(whole)[-1]["loss"]


def test_few_photons_are_told_of_once(aixsim, files):
    path = files / "dark.yaml"
    path.write_text("layer_name_to_config: {default: {photons_per_mac: 0.05}}\n")
    done = aixsim(
        "generate-cfg", "--model-flavor", "debug-64", "--tokenizer-path", "builtin", "--dataset",
        "builtin", "--transform-config", path, "--save-path", files / "dark.config.yaml",
    )  # fmt: skip
    done = aixsim(
        "pretrain", "--config", files / "dark.config.yaml", "--job.dump_folder", files / "dark",
        "--training.steps", 1, "--training.seq_len", 32, "--training.local_batch_size", 1,
        fresh=True,
    )  # fmt: skip
    told = [line for line in done.stderr.splitlines() if "Poisson" in line]
    assert len(told) == 3
    assert any("in sums of 64, are 3.2 a detector: below 20" in line for line in told)
