"""What a resumed run takes from its config, what it refuses, and what it says."""

import json
import shutil

import pytest

from aixsim_cli.config.pretrain import PretrainConfig, dump_config, load_config
from aixsim_cli.config.recipe import default_dump_folder, follow
from aixsim_cli.data.tokenizer import resolve_tokenizer
from aixsim_cli.errors import UserError
from aixsim_cli.pretrain import resume
from aixsim_cli.run.inputs import read_inputs, write_inputs
from aixsim_cli.run.manifest import write_manifest

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
        "6-bit": "on optical (default: q_levels 256, use_regex true), this run asks for optical (d",
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
    assert done.stdout.strip() == f"nothing was trained; checkpoint: {run}/checkpoint/step-3"
    assert len(records(run)) == STEPS


def test_fewer_steps_than_trained_are_refused(aixsim, config, run):
    done = pretrain(aixsim, config, run, "--training.steps", 2, code=2)
    assert "training.steps: got 2" in done.stderr
    assert "step-3 is beyond it" in done.stderr


def test_another_data_set_is_read_from_its_start_if_asked_for(aixsim, config, run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Line {i} of quite another text." for i in range(2000)))
    data = ("--training.dataset", "local", "--training.dataset_path", text)
    more = ("--training.steps", 4, "--reliability.on_other_data", "continue")
    done = pretrain(aixsim, config, run, *more, *data)
    assert "the data are read from their start" in done.stderr
    assert [record["step"] for record in records(run)] == [1, 2, 3, 4]


MORE = {"training.steps": STEPS + 1}
TEXT = "".join(f"Line {i} of a text of its own.\n" for i in range(2000))


@pytest.fixture
def files(tmp_path):
    """Data and a tokenizer that can be moved and changed."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text(TEXT)
    (tmp_path / "data" / "b.txt").write_text(TEXT[::-1])
    shutil.copytree(resolve_tokenizer("builtin"), tmp_path / "tokenizer")
    return tmp_path


def settings(files, config, **changed):
    values = {
        "training.dataset": "local",
        "training.dataset_path": str(files / "data"),
        "model.hf_assets_path": str(files / "tokenizer"),
    }
    return load_config(config, values | changed)


@pytest.fixture
def folder(files, config):
    """What a checkpoint holds of the run that wrote it, after its last step."""
    folder = files / "step-3"
    folder.mkdir()
    saved = settings(files, config)
    dump_config(saved, folder / "config.yaml")
    write_inputs(resume.inputs_of(saved), folder)
    return folder


def check(folder, config, step=STEPS):
    """As a run does that finds this checkpoint; whether it reads the data from their start."""
    saved = resume.read_settings(folder)
    others = resume.other_inputs(saved, config, resume.inputs_of(config), folder)
    resume.check_resume(saved, config, folder, step, others=others)
    return resume.reads_other_data(saved, config, others)


@pytest.mark.parametrize(
    ("key", "value", "before"),
    [
        ("debug.seed", 43, "42"),
        ("model.flavor", "60M", "debug"),
        ("model.name", "llama3", "aixsim"),
    ],
)
@pytest.mark.parametrize("more", [{}, MORE], ids=["finished", "more steps"])
def test_another_seed_or_size_is_another_run(files, config, folder, key, value, before, more):
    asked = settings(files, config, **more)
    section, name = key.split(".")
    setattr(getattr(asked, section), name, value)
    with pytest.raises(UserError) as caught:
        check(folder, asked)
    said = (
        f"{key}: {folder} was trained with {before}, this run asks for {value}; expected the same"
    )
    assert str(caught.value).startswith(said) and "another job.dump_folder" in str(caught.value)


def test_a_finished_run_is_not_another_learning_rates(files, config, folder):
    with pytest.raises(UserError, match=r"step-3 has all 3 steps.*optimizer.lr 0.001 -> 1e-05"):
        check(folder, settings(files, config, **{"optimizer.lr": 1e-5}))
    assert check(folder, settings(files, config, **MORE, **{"optimizer.lr": 1e-5})) is False


def test_files_that_have_moved_are_the_same_run(files, config, folder):
    (files / "data").rename(files / "elsewhere")
    (files / "tokenizer").rename(files / "words")
    moved = {
        "training.dataset_path": str(files / "elsewhere"),
        "model.hf_assets_path": str(files / "words"),
    }
    assert check(folder, settings(files, config, **moved)) is False
    assert check(folder, settings(files, config, **moved, **MORE)) is False


def change_file(files):
    (files / "data" / "a.txt").write_text(TEXT.replace("Line 7 ", "Line 8 "))


def add_file(files):
    (files / "data" / "c.txt").write_text(TEXT)


def swap_files(files):
    (files / "data" / "a.txt").rename(files / "data" / "c.txt")


@pytest.mark.parametrize("change", [change_file, add_file, swap_files])
def test_other_data_under_the_same_name_are_told(files, config, folder, change):
    change(files)
    with pytest.raises(UserError, match=r"training.dataset_path: .* was trained on other data"):
        check(folder, settings(files, config, **MORE))
    go_on = {"reliability.on_other_data": "continue"}
    assert check(folder, settings(files, config, **MORE, **go_on)) is True
    with pytest.raises(UserError, match=r"has all 3 steps.*nothing would be trained"):
        check(folder, settings(files, config, **go_on))


def test_another_tokenizer_of_the_same_size_is_refused(files, config, folder):
    path = files / "tokenizer" / "tokenizer.json"
    words = json.loads(path.read_text())
    vocabulary = words["model"]["vocab"]
    first, last = list(vocabulary)[10], list(vocabulary)[-1]
    vocabulary[first], vocabulary[last] = vocabulary[last], vocabulary[first]
    path.write_text(json.dumps(words))
    with pytest.raises(UserError, match=r"model.hf_assets_path: .*another tokenizer"):
        check(folder, settings(files, config, **MORE))


def test_a_change_between_the_samples_of_a_large_file_is_told(files, config):
    path = files / "data" / "c.txt"
    path.write_text("a line of text\n" * 40_000)
    before = resume.inputs_of(settings(files, config))
    text = path.read_text()
    place = text.index("line", 20_000)
    path.write_text(text[:place] + "LINE" + text[place + 4 :])
    after = resume.inputs_of(settings(files, config))
    assert before.data == after.data, "a sample holds it"
    assert after.differing(before) == ["data"]


def test_another_end_of_text_is_another_tokenizer(files, config, folder):
    path = files / "tokenizer" / "tokenizer_config.json"
    word = list(json.loads((path.parent / "tokenizer.json").read_text())["model"]["vocab"])[9]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": word}))
    with pytest.raises(UserError, match=r"model.hf_assets_path: .*another tokenizer"):
        check(folder, settings(files, config, **MORE))


def test_a_checkpoint_that_says_nothing_of_its_inputs_goes_on(files, config, folder):
    (folder / "inputs.json").unlink()
    change_file(files)
    assert check(folder, settings(files, config, **MORE)) is False
    other = {"training.dataset": "builtin", "training.dataset_path": None}
    with pytest.raises(UserError, match=r"training.dataset: .* was trained on other data"):
        check(folder, settings(files, config, **MORE, **other))


@pytest.fixture
def starts(tmp_path):
    """Two folders of weights, the first with a manifest, the second another program's."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(name.encode() * 9)
    write_manifest(tmp_path / "one")
    return tmp_path


@pytest.fixture
def started(folder, files, config, starts):
    """The checkpoint of a run that began with the weights of a folder; "" = with random ones."""

    def write(name):
        saved = settings(files, config, **start(starts, name))
        dump_config(saved, folder / "config.yaml")
        write_inputs(resume.inputs_of(saved), folder)
        return folder

    return write


def start(starts, name):
    return {"checkpoint.initial_load_path": str(starts / name)} if name else {}


@pytest.mark.parametrize("more", [{}, MORE], ids=["finished", "more steps"])
@pytest.mark.parametrize(
    ("before", "now"), [("one", "two"), ("two", "one"), ("one", ""), ("", "two"), ("one", "gone")]
)
def test_other_weights_to_start_from_are_another_run(
    files, config, started, starts, before, now, more
):
    folder = started(before)
    with pytest.raises(UserError, match=r"checkpoint.initial_load_path: .* began with") as caught:
        check(folder, settings(files, config, **more, **start(starts, now)))
    assert "another job.dump_folder" in str(caught.value)
    # nor does one that says nothing of its inputs
    (folder / "inputs.json").unlink()
    with pytest.raises(UserError, match=r"checkpoint.initial_load_path: "):
        check(folder, settings(files, config, **more, **start(starts, now)))


@pytest.mark.parametrize("name", ["one", "two"])
def test_weights_to_start_from_may_move_and_go_but_not_change(files, config, started, starts, name):
    folder, path = started(name), starts / name
    assert check(folder, settings(files, config, **MORE, **start(starts, name))) is False
    path.rename(starts / "moved")
    assert check(folder, settings(files, config, **MORE, **start(starts, "moved"))) is False
    # is not there: nothing of it is needed any more
    assert check(folder, settings(files, config, **MORE, **start(starts, name))) is False
    path.mkdir()
    (path / "__0_0.distcp").write_bytes(b"others")
    with pytest.raises(UserError, match=r"checkpoint.initial_load_path: .* other weights"):
        check(folder, settings(files, config, **MORE, **start(starts, name)))


def test_a_finished_run_may_have_its_data_mended(files, config, folder):
    change_file(files)
    mended = {"reliability.on_other_data": "mended"}
    assert check(folder, settings(files, config, **mended)) is False
    assert check(folder, settings(files, config, **mended, **MORE)) is False


def test_a_second_seed_does_not_find_the_first_ones_model(aixsim, config, run):
    before = (run / "metrics.jsonl").read_text()
    done = pretrain(aixsim, config, run, "--debug.seed", 43, code=2)
    assert "debug.seed:" in done.stderr and "trained" not in done.stdout
    assert (run / "metrics.jsonl").read_text() == before
    assert read_inputs(run / "checkpoint" / "step-3").tokenizer is not None


def test_seeds_have_folders_of_their_own():
    config = follow(PretrainConfig())
    config.model.flavor = "debug"
    assert default_dump_folder(config) == "outputs/debug"
    config.debug.seed, config.transform = 43, {"fc": {}}
    del config.transform_config
    assert default_dump_folder(config) == "outputs/debug-optical-seed43"
    parts = [{"transform": "bitflip", "fc": {"x_p_exp": 0.5}}, {"attention": {}}]
    config.transform = {"transforms": parts}
    del config.transform_config
    assert default_dump_folder(config) == "outputs/debug-bitflip+optical-seed43"
