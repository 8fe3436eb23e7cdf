"""What a resumed run takes from its config, what it refuses, and what it says."""

import json
import shutil

import pytest

STEPS = 3


@pytest.fixture(scope="module")
def make(aixsim, tmp_path_factory):
    """Writes a config of the debug flavor; options of generate-cfg."""

    def write(name, *options):
        path = tmp_path_factory.mktemp("config") / name
        aixsim(
            "generate-cfg", "--model-flavor", "debug", "--tokenizer-path", "builtin", "--dataset",
            "builtin", "--batch-size", 2, "--seq-len", 32, "--steps", STEPS, "--learning-rate",
            "1e-3", "--mixed-precision-param", "float32", "--save-path", path, *options,
        )  # fmt: skip
        return path

    return write


@pytest.fixture(scope="module")
def config(make):
    return make("optical.yaml", "--transform-config", "configs/transforms/optical.yaml")


@pytest.fixture(scope="module")
def trained(aixsim, config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    pretrain(aixsim, config, folder)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a run of three optical steps."""
    return shutil.copytree(trained, tmp_path / "run")


def pretrain(aixsim, config, folder, *options, **how):
    words = ("--config", config, "--job.dump_folder", folder, "--metrics.log_freq", 1)
    return aixsim("pretrain", *words, *options, **how)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_learning_rate_is_the_configs(aixsim, config, run):
    more = ("--training.steps", STEPS + 2, "--optimizer.lr", "1e-5")
    done = pretrain(aixsim, config, run, *more)
    assert f"resumed from {run}/checkpoint/step-3; changed since:" in done.stderr
    assert "optimizer.lr 0.001 -> 1e-05" in done.stderr
    assert "training.steps 3 -> 5" in done.stderr
    before, after = records(run)[STEPS - 1], records(run)[STEPS:]
    assert before["lr"] > 1e-4
    assert [record["step"] for record in after] == [4, 5]
    # the first resumed step too: cosine from the peak of 1e-5, not what was left of the old one
    assert 1e-6 <= after[1]["lr"] < after[0]["lr"] <= 1e-5


@pytest.mark.parametrize("kind", ["digital", "6-bit", "bitflip"])
def test_other_hardware_is_refused(aixsim, config, make, run, tmp_path, kind):
    other, options = config, ()
    if kind == "digital":
        other = make("digital.yaml")
    elif kind == "6-bit":
        file = tmp_path / "six.yaml"
        file.write_text("transform: optical\nlayer_name_to_config: {default: {q_levels: 64}}\n")
        options = ("--transform-config", file)
    else:
        options = ("--transform-config", "configs/transforms/bitflip-fc.yaml")
    before = (run / "metrics.jsonl").read_text()
    done = pretrain(aixsim, other, run, "--training.steps", 4, *options, code=2)
    said = {
        "digital": "was trained on optical, this run asks for digital hardware",
        "6-bit": "on optical (default: q_levels 256), this run asks for optical (default: q_levels",
        "bitflip": "was trained on optical, this run asks for bitflip",
    }[kind]
    assert said in done.stderr
    assert (run / "metrics.jsonl").read_text() == before
    assert not (run / "checkpoint" / "step-4").exists()


def test_the_same_hardware_in_other_words_goes_on(aixsim, config, run, tmp_path):
    file = tmp_path / "same.yaml"
    # every other parameter by default, which is what configs/transforms/optical.yaml spells out
    file.write_text("use_regex: true\nlayer_name_to_config: {default: {q_noise: true}}\n")
    done = pretrain(aixsim, config, run, "--training.steps", 4, "--transform-config", file)
    assert "changed since: training.steps 3 -> 4\n" in done.stderr


def test_a_finished_run_says_so(aixsim, config, run):
    done = pretrain(aixsim, config, run)
    assert f"{run}/checkpoint/step-3 has all 3 steps; nothing to train\n" in done.stderr
    assert len(records(run)) == STEPS


def test_fewer_steps_than_trained_are_refused(aixsim, config, run):
    done = pretrain(aixsim, config, run, "--training.steps", 2, code=2)
    assert "training.steps: got 2" in done.stderr
    assert "step-3 is beyond it" in done.stderr


def test_another_data_set_is_read_from_its_start(aixsim, config, run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Line {i} of quite another text." for i in range(2000)))
    data = ("--training.dataset", "local", "--training.dataset_path", text)
    done = pretrain(aixsim, config, run, "--training.steps", 4, *data)
    assert "the new data are read from their start" in done.stderr
    assert [record["step"] for record in records(run)] == [1, 2, 3, 4]
