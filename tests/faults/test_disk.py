"""A disk that is full, or cannot be written to."""

import subprocess

import pytest

from tests.faults.conftest import STEPS, steps


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 40 MiB: room for one checkpoint of the debug model (about 19 MiB), not for two."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def whole_ones(folder):
    return sorted(path.parent.name for path in (folder / "checkpoint").glob("*/manifest.json"))


def test_full_disk_stops_the_run(start, small_disk):
    said = start(small_disk).end(code=1)
    assert "could not be written to disk" in said and "No space left on device" in said
    assert "the newest complete one is" in said
    assert whole_ones(small_disk) == ["step-10", "step-5"] or whole_ones(small_disk) == ["step-5"]
    left = {path.name for path in (small_disk / "checkpoint").iterdir()}
    assert left == set(whole_ones(small_disk))


def test_full_disk_and_the_run_goes_on(start, small_disk):
    said = start(small_disk, "--reliability.on_save_error", "continue").end(code=0)
    assert "No space left on device" in said and "the run goes on" in said
    # records are lost, too
    assert f"step {STEPS}/{STEPS}" in said
    assert whole_ones(small_disk)


def test_disk_that_is_full_at_the_start(start, small_disk):
    (small_disk / "ballast").write_bytes(bytes(30 << 20))
    said = start(small_disk).end(code=2)
    assert "MiB left; a checkpoint takes about" in said and not steps(small_disk)


def test_limit_on_the_size_of_files(start, tmp_path):
    """As a full disk, where nothing may be mounted."""
    limit = 2 << 20
    run = start(tmp_path, limit_files=limit)
    said = run.end(code=1)
    assert "step-5: could not be written to disk: [Errno 27] File too large" in said
    assert not whole_ones(tmp_path) and steps(tmp_path) == [1, 2, 3, 4, 5]


def test_read_only_folder(start, tmp_path):
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs")
    try:
        said = start(mount / "run").end(code=2)
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)
    assert f"job.dump_folder: {mount}/run cannot be written to: Read-only file system" in said
