"""Paradigms from outside: a package of the entry-point group, and the guide's own example."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aixsim_cli.errors import UserError
from aixsim_cli.transforms.registry import describe_paradigms, get_paradigm

REPOSITORY = Path(__file__).parents[3]
GUIDE = REPOSITORY / "docs" / "transforms.md"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a package into a temporary folder that the commands of this test import from."""

    def run(package):
        command = [
            sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
            "--no-index", "--no-compile", "--target", str(tmp_path / "site"), str(package),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))

    return run


def files_of_guide():
    """The guide's blocks that have a file name before them, and its commands."""
    text = GUIDE.read_text(encoding="utf-8").partition("\n## Add a paradigm\n")[2]
    blocks = dict(re.findall(r"`([\w.]+)`[^`]*:\n\n```\w+\n(.*?)```", text, re.DOTALL))
    (commands,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return blocks, commands


def test_a_package_of_the_entry_point_group(aixsim, install, tmp_path):
    # pip builds in the source tree: not in the repository's
    package = tmp_path / "package"
    package.mkdir()
    for path in (REPOSITORY / "tests" / "packages" / "gain").iterdir():
        if path.is_file():
            (package / path.name).write_text(path.read_text())
    install(package)
    (row,) = [row for row in describe_paradigms() if row["name"] == "gain"]
    assert (row["simulates"], row["from"]) == ("linear, attention", "aixsim_gain:Gain")
    (tmp_path / "t.yaml").write_text(
        "transform: gain\nlayer_name_to_config: {default: {gain: 1.1}}\n"
    )
    aixsim(
        "generate-cfg", "--model-flavor", "debug", "--tokenizer-path", "builtin", "--dataset",
        "builtin", "--batch-size", 2, "--seq-len", 32, "--steps", 4, "--learning-rate", "3e-3",
        "--mixed-precision-param", "float32", "--transform-config", tmp_path / "t.yaml",
        "--save-path", tmp_path / "c.yaml",
    )  # fmt: skip
    run = tmp_path / "run"
    config = ("--config", tmp_path / "c.yaml", "--metrics.log_freq", 1)
    done = aixsim("pretrain", *config, "--job.dump_folder", run)
    assert "gain: 16 modules match default" in done.stderr
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_the_guides_example_runs_as_it_stands(install, tmp_path):
    files, commands = files_of_guide()
    assert set(files) == {"crossbar.py", "pyproject.toml", "crossbar.yaml"}
    assert sum(len(text.splitlines()) for text in files.values()) < 60
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert commands.startswith("pip install .\n")
    install(tmp_path)
    script = commands.removeprefix("pip install .\n")
    script = re.sub(r"^aixsim ", f"{sys.executable} -m aixsim_cli ", script, flags=re.MULTILINE)
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "width of a conductance's error" in done.stdout
    assert "crossbar: 14 modules match default" in done.stdout
    assert (tmp_path / "outputs" / "crossbar" / "checkpoint" / "step-12").is_dir()


def test_a_package_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    found = tmp_path / "broken-1.dist-info"
    found.mkdir()
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (found / "entry_points.txt").write_text("[aixsim.transforms]\nbroken = no_such_module:Broken\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    said = r"broken \(no_such_module:Broken\): cannot be imported"
    with pytest.raises(UserError, match=said):
        get_paradigm("broken")
