"""What a run records: a record that cannot be written costs that record alone, and is told."""

import json
import logging

import pytest
from torchtitan.components.metrics import BaseLogger, TensorBoardLogger

from aixsim_cli.pretrain.metrics import MetricsFile, Sturdy


def records(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("left", ["", '{"step": 1}\n'])
def test_records_are_appended(tmp_path, left):
    path = tmp_path / "metrics.jsonl"
    path.write_text(left)
    for step in (2, 3):
        MetricsFile(path).log({"step": step, "loss": float("nan")}, step)
    assert records(path) == ([1] if left else []) + [2, 3]
    assert path.read_text().endswith('{"step": 3, "loss": NaN}\n')


def test_a_cut_line_costs_no_other(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    MetricsFile(path).log({"step": 2}, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2, "lo\n{"step": 2}\n'


class Failing(BaseLogger):
    def __init__(self):
        self.broken, self.got = True, []

    def log(self, metrics, step):
        if self.broken:
            raise OSError(28, "No space left on device")
        self.got.append(step)

    def close(self):
        raise ConnectionError("gone")


def test_a_failure_is_told_once_and_counted(tmp_path, caplog):
    inner = Failing()
    sturdy = Sturdy(inner, tmp_path / "tb")
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            sturdy.log({}, step)
        inner.broken = False
        sturdy.log({}, 4)
        sturdy.close()
    assert inner.got == [4]
    assert [line.removeprefix(f"{tmp_path}/tb: ") for line in caplog.messages] == [
        "step 1 could not be recorded: No space left on device; the run goes on, and tries again",
        "recorded again; 3 records are lost",
        "could not be closed: ConnectionError: gone",
    ]


def test_a_device_that_is_full(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    sturdy = Sturdy(MetricsFile(path), path)
    with caplog.at_level(logging.WARNING):
        sturdy.log({"step": 1}, 1)
        sturdy.close()
    assert f"{path}: step 1 could not be recorded: No space left on device" in caplog.text
    assert f"{path}: the last 1 records are lost" in caplog.text


# its writer is a thread, which dies of it
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_fills_up_under_tensorboard(tmp_path, caplog):
    sturdy = Sturdy(TensorBoardLogger(str(tmp_path / "tb")), tmp_path / "tb")
    sturdy.inner.writer.file_writer.event_writer._async_writer._writer.write = _no_space
    with caplog.at_level(logging.WARNING):
        for step in range(3000):
            sturdy.log({"loss": 1.0}, step)
        sturdy.close()
    assert f"{tmp_path}/tb: " in caplog.text and "No space left on device" in caplog.text


def _no_space(*arguments):
    raise OSError(28, "No space left on device")
