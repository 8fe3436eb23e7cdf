"""What is in a run's way, or missing around it, is said before it trains; nothing is left."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from aixsim_cli.config.pretrain import PretrainConfig
from aixsim_cli.errors import UserError
from aixsim_cli.pretrain import train
from aixsim_cli.run import folder, launcher
from aixsim_cli.run.manifest import verify
from tests.faults.conftest import make_model, steps


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder)
    return folder


@pytest.fixture
def config_of(tmp_path):
    config = PretrainConfig()
    config.checkpoint.enable = config.metrics.enable_tensorboard = True
    config.job.dump_folder = str(tmp_path / "run")
    return config


@pytest.mark.parametrize("kind", ["file", "folder", "fifo"])
@pytest.mark.parametrize(
    "name", ["checkpoint", "checkpoint.set-aside", "metrics.jsonl", "tb", "comm_traces"]
)
def test_what_is_in_the_way_is_found_before_the_training(config_of, tmp_path, name, kind):
    path = tmp_path / "run" / name
    path.parent.mkdir()
    {"file": path.touch, "folder": path.mkdir, "fifo": lambda: os.mkfifo(path)}[kind]()
    wanted = "file" if name == "metrics.jsonl" else "folder"
    if kind == wanted:
        with train._held(config_of, tmp_path / "run"):
            return
    with (
        pytest.raises(
            UserError, match=rf"job.dump_folder: {path}: got .*; expected a {wanted}, or"
        ),
        train._held(config_of, tmp_path / "run"),
    ):
        pytest.fail("trained")
    assert path.exists() and path.parent.exists()


def test_a_link_to_a_device_takes_the_metrics(config_of, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/null")
    with train._held(config_of, tmp_path / "run"):
        pass


@pytest.mark.parametrize("error", [UserError, ValueError, None])
@pytest.mark.parametrize("existed", [True, False])
def test_a_refused_run_takes_its_folder_away(tmp_path, error, existed):
    home = tmp_path / "outputs"
    if existed:
        home.mkdir()
    try:
        with folder.locked(home / "a" / "run", "key"):
            (home / "a" / "run" / "comm_traces").mkdir()
            if error:
                raise error("refused")
    except (UserError, ValueError):
        pass
    assert (home / "a").exists() is (error is not UserError)
    assert home.exists() is (existed or error is not UserError)


def test_a_refused_run_leaves_what_is_not_its_own(tmp_path):
    with pytest.raises(UserError), folder.locked(tmp_path / "run", "key"):
        (tmp_path / "run" / "notes").touch()
        raise UserError("refused")
    assert (tmp_path / "run" / "notes").exists()


LAUNCHED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}
LAUNCHED |= {"MASTER_ADDR": "host"}


@pytest.fixture
def environment_of(monkeypatch):
    def set_all(**variables):
        for name in LAUNCHED:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    yield set_all
    for name in LAUNCHED:
        os.environ.pop(name, None)


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "1"}, 1),
        (LAUNCHED, 2),
        ({"LOCAL_RANK": "0"}, 1),
        # as a pod of one sets it
        ({"RANK": "0", "WORLD_SIZE": "1"}, 1),
    ],
)
def test_launched_or_alone(environment_of, variables, ranks):
    environment_of(**variables)
    assert launcher.complete_environment() == ranks
    assert os.environ["WORLD_SIZE"] == str(ranks)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"WORLD_SIZE": None}, "WORLD_SIZE: not set; expected a number, as torchrun sets it"),
        ({"RANK": None}, "RANK: not set; expected a number, as torchrun sets it, or neither RANK"),
        ({"RANK": "x"}, "RANK: got 'x'; expected 0 to 1"),
        ({"RANK": "2"}, "RANK: got '2'; expected 0 to 1"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE: got '-1'; expected 1 to"),
        ({"LOCAL_RANK": None}, "LOCAL_RANK: not set"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT: got '0'; expected 1 to 65535"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR: not set; expected the host of rank 0"),
    ],
)
def test_half_of_what_a_launcher_sets_is_refused(environment_of, change, said):
    variables = {k: v for k, v in (LAUNCHED | change).items() if v is not None}
    environment_of(**variables)
    with pytest.raises(UserError) as caught:
        launcher.complete_environment()
    assert str(caught.value).startswith(said)


def test_a_port_in_use_is_named(train, tmp_path):
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = train(tmp_path / "run", env={**alone, "MASTER_PORT": str(port)}, code=2)
    assert f"MASTER_PORT: got {port}, which another program uses; expected a free one" in said


def test_a_port_in_use_is_named_by_continual_pretrain(aixsim, model, tmp_path):
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = aixsim(
            "continual-pretrain", "--model_name_or_path", model, "--dataset_name", "builtin",
            "--do_train", "--max_steps", 1, "--output_dir", tmp_path / "run", code=2,
            **launched, MASTER_PORT=port,
        )  # fmt: skip
    assert f"MASTER_PORT: got {port}, which another program uses" in done.stderr


def asleep():
    """Rank 1 comes too late to the third step, and answers nobody."""
    train._ANSWER_SECONDS = 2
    optimize = train.PretrainTrainer.train_step

    def fault(self, data):
        if self.step == 3 and os.environ["RANK"] == "1":
            time.sleep(20)
            os._exit(1)
        optimize(self, data)

    train.PretrainTrainer.train_step = fault


def test_a_rank_that_does_not_answer_is_named(train, tmp_path):
    words = ("--budget.num_ranks", 2, "--comm.train_timeout_seconds", 3)
    said = train(tmp_path / "run", *words, fault=asleep, ranks=2, code=1)
    assert (
        "step 3: ranks waited for each other longer than 3 s (comm.train_timeout_seconds)" in said
    )
    assert "no answer from rank 1" in said


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_as_many_checkpoints_are_kept_as_asked(train, tmp_path, mode):
    words = ("--checkpoint.interval", 1, "--checkpoint.async_mode", mode)
    train(tmp_path / "run", *words, "--checkpoint.keep_latest_k", 2)
    left = {path.name for path in (tmp_path / "run" / "checkpoint").iterdir()}
    assert left == {"step-3", "step-4"}


def test_an_odd_length_trains(train, tmp_path):
    train(tmp_path / "run", "--training.seq_len", 31)
    assert steps(tmp_path / "run") == [1, 2, 3, 4]


def nobody_reads():
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(writer, 2)


def full():
    for number in (1, 2):
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)


def closed():
    for number in range(3):
        os.close(number)


def one_line_is_read():
    """As `| head -1` reads: the pipe breaks while the run prints."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    os.close(writer)

    def read():
        os.read(reader, 1)
        os.close(reader)

    threading.Thread(target=read, daemon=True).start()


OUTPUTS = {nobody_reads: 0, one_line_is_read: 0, closed: 0, full: 1}


@pytest.mark.parametrize("outputs", OUTPUTS, ids=lambda f: f.__name__)
def test_a_run_trains_whatever_its_outputs_are(train, tmp_path, outputs):
    assert train(tmp_path / "run", fault=outputs, code=OUTPUTS[outputs]) == ""
    assert steps(tmp_path / "run") == [1, 2, 3, 4]


@pytest.mark.parametrize("outputs", OUTPUTS, ids=lambda f: f.__name__)
def test_continual_pretrain_trains_whatever_its_outputs_are(aixsim, model, tmp_path, outputs):
    aixsim(
        "continual-pretrain", "--model_name_or_path", model, "--dataset_name", "builtin",
        "--do_train", "--max_steps", 2, "--logging_steps", 1, "--block_size", 16,
        "--max_train_samples", 8, "--report_to", "none", "--output_dir", tmp_path / "run",
        fault=outputs, code=OUTPUTS[outputs],
    )  # fmt: skip
    verify(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 2


@pytest.mark.parametrize("variables", [{"RANK": "0"}, {"WORLD_SIZE": "x"}, {"WORLD_SIZE": "2"}])
def test_half_a_launcher_is_refused_by_both(train, aixsim, model, tmp_path, variables):
    name = "WORLD_SIZE" if variables != {"WORLD_SIZE": "2"} else "RANK"
    assert f"aixsim: error: {name}: " in train(tmp_path / "run", env=variables, code=2)
    done = aixsim(
        "continual-pretrain", "--model_name_or_path", model, "--dataset_name", "builtin",
        "--do_train", "--max_steps", 1, "--output_dir", tmp_path / "other", code=2, **variables,
    )  # fmt: skip
    assert f"aixsim: error: {name}: " in done.stderr
    assert not (tmp_path / "other").exists()


def python(*words, **how):
    return subprocess.run([sys.executable, *words], timeout=100, text=True, **how)


def test_a_command_says_when_what_it_says_is_lost():
    for fault, code in OUTPUTS.items():
        done = python("-m", "aixsim_cli", "transforms", "list", preexec_fn=fault)
        assert done.returncode == code, fault
        done = python("-m", "aixsim_cli", "transforms", "show", "nothing", preexec_fn=fault)
        assert done.returncode == 2, fault
    with open("/dev/full", "w") as out:
        done = python("-m", "aixsim_cli", "transforms", "list", stdout=out, stderr=subprocess.PIPE)
    said = "aixsim: run failed: what it says could not be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_interrupted_while_it_is_still_importing():
    program = (
        "import runpy, sys\n"
        "class Interrupt:\n"
        "    def find_spec(name, path, target=None):\n"
        "        if name == 'typer':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt)\n"
        "runpy.run_module('aixsim_cli', run_name='__main__')\n"
    )
    done = python("-c", program, capture_output=True)
    assert (done.returncode, done.stderr) == (130, "aixsim: interrupted\n")
