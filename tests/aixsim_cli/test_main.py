"""The command line's contract: light help, one spelling of options, messages and exit codes."""

import subprocess
import sys

import pytest

COMMANDS = ["generate-cfg", "pretrain", "convert-ckpt", "eval", "energy", "generate-hf", "schema"]
HEAVY = ("torch", "torchtitan", "transformers", "datasets", "wandb", "triton")
LIGHT_LINES = [
    ["--help"],
    ["--show-completion"],
    ["no-such-command"],
    ["generate-cfg", "--no-such-option"],
    ["generate-cfg"],
    ["eval", "ppl", "--help"],
    *([command, "--help"] for command in COMMANDS),
]


@pytest.mark.parametrize("words", LIGHT_LINES, ids=" ".join)
def test_help_and_usage_errors_import_nothing_heavy(words):
    program = (
        "import sys\n"
        f"sys.argv = ['aixsim', *{words!r}]\n"
        "from aixsim_cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "HEAVY []" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(aixsim, command):
    assert "Usage: " in aixsim(command, "--help").stdout


def test_version_names_what_it_runs_on(aixsim):
    said = aixsim("--version").stdout
    for word in ("aixsim 0.", "torch 2.", "torchtitan 0.2.2", "transformers 5.", "device: "):
        assert word in said
    assert "simulated operations on a CPU: " in said


def test_underscores_are_dashes(aixsim):
    dashed = aixsim("generate-cfg", "--model-flavor", "60M", "--num-gpus", 2, "--dry-run")
    underscored = aixsim("generate_cfg", "--model_flavor", "60M", "--num_gpus", 2, "--dry_run")
    assert dashed.stdout == underscored.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate-cfg", "--model-flavor", "60m", "--dry-run"], "did you mean '60M'?"),
        (["generate-cfg", "--model-flavor", "60M"], "--save-path: missing"),
        (["generate-cfg", "--model-flavor", "60M", "--dataset", "fineweb_edu", "--dry-run"],
         "did you mean 'fineweb-edu'?"),
        (["generate-cfg", "--model-flavor", "60M", "--dataset", "local", "--dry-run"],
         "training.dataset_path"),
        (["generate-cfg", "--model-flavor", "60M", "--transform-config", "no.yaml", "--dry-run"],
         "no.yaml: no such transform config"),
        (["generate-cfg", "--model-flavor", "60M", "--tokenizer-path", "./nowhere", "--dry-run"],
         "nowhere"),
        (["pretrain", "--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["convert-ckpt", "aixsim", "60M", "./nowhere", "out"], "./nowhere: no such folder"),
        (["convert-ckpt", "aixsim", "61M", "./nowhere", "out"], "did you mean '60M'?"),
        (["eval", "ppl", "docs"], "holds neither"),
        (["generate-hf", "./nowhere", "--prompt", "x"], "no such folder"),
    ],
)  # fmt: skip
def test_mistakes_are_named_on_stderr_with_exit_code_2(aixsim, words, said):
    done = aixsim(*words, code=2)
    assert said in done.stderr and done.stderr.startswith("aixsim: error: ")
    assert done.stdout == ""


def test_debug_shows_the_traceback():
    program = [sys.executable, "-m", "aixsim_cli", "pretrain", "--config", "nowhere.yaml"]
    done = subprocess.run(program, capture_output=True, text=True, env={"AIXSIM_DEBUG": "1"})
    assert "Traceback" in done.stderr
