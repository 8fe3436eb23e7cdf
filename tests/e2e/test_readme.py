"""Every command of the README runs; its main job on a small model and the built-in text."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
# what a machine without a network and a GPU has instead; the commands are otherwise as they stand
SMALL = {
    "60M": "debug",
    "--batch-size 48": "--batch-size 2 --seq-len 64 --steps 2 --tokenizer-path builtin"
    " --dataset builtin",
    "--compile true": "--compile false",
    "step-7075": "step-2",
    "--dataset_name Salesforce/wikitext": "--dataset_name builtin",
    "--dataset_config_name wikitext-103-raw-v1": "--block_size 64 --max_train_samples 8",
    "--max_steps 100": "--max_steps 2",
    "--dataset wikitext": "--dataset builtin --num-batches 2 --seq-len 64",
    "--max-new-tokens 100": "--max-new-tokens 4",
}


def commands():
    """The README's block, and each of its commands."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    block = text.partition("## The main job, by hand")[2].partition("```bash\n")[2]
    script = block.partition("```")[0].replace("\\\n", " ")
    return [line for line in script.splitlines() if line and not line.startswith("#")]


def test_the_main_job_runs_as_it_stands(tmp_path):
    install, *lines = commands()
    assert install == "pip install -e ." and len(lines) == 8
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    script = "\n".join(lines).replace("configs/tutorial", "tutorial")
    for said, small in SMALL.items():
        assert re.search(rf"{re.escape(said)}\b", script), said
        script = script.replace(said, small)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euxc", script], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("checkpoint: outputs/debug-optical/checkpoint/step-2") == 3
    assert "perplexity" in done.stdout and done.stdout.splitlines()[-1].startswith("London is")


def test_every_command_of_the_table_exists(aixsim):
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[a-z][^|]*`) \|", text.partition("| command |")[2], re.MULTILINE)
    named = re.findall(r"`([a-z][\w -]*)`", " ".join(rows))
    help_text = aixsim("--help").stdout + aixsim("eval", "--help").stdout
    assert {"pretrain", "eval ppl", "schema"} <= set(named)
    for name in named:
        assert name.split()[-1] in help_text, name


@pytest.mark.skipif("AIXSIM_TEST_LONG" not in os.environ, reason="AIXSIM_TEST_LONG=1 runs it")
def test_the_quickstart_runs(tmp_path):
    # in a clone, whose environment is this one; what the other command runs are these tests
    subprocess.run(["git", "clone", "--quiet", REPOSITORY, tmp_path / "clone"], check=True)
    folder = tmp_path / "clone"
    setup = folder / "scripts" / "setup.sh"
    setup.write_text(setup.read_text(encoding="utf-8") + "\nsetup_venv() { :; }\n")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = f"{folder}:{folder / 'kernels'}"
    done = subprocess.run(
        ["bash", folder / "scripts" / "quickstart.sh"], env=environment, capture_output=True,
        text=True, timeout=850,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "outputs" / "quickstart" / "hf" / "model.safetensors").is_file()
