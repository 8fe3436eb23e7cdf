"""`aixsim energy`: tables that fit a terminal, JSON, and no torch for a flavor."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from aixsim_cli.commands import output
from aixsim_cli.main import app

HEAVY = ("torch", "torchtitan", "transformers", "datasets", "wandb", "triton")
OPTICAL = "configs/transforms/optical.yaml"


@pytest.mark.parametrize("transform", ["optical", "bitflip-optical", "optical-fc"])
def test_a_flavor_needs_neither_torch_nor_weights(transform):
    words = ["energy", "60M", "--transform-config", f"configs/transforms/{transform}.yaml"]
    program = (
        "import sys\n"
        f"sys.argv = ['aixsim', *{words!r}]\n"
        "from aixsim_cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print('ended', end.code)\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "ended 0\nHEAVY []" in done.stdout, done.stdout + done.stderr


def test_json_holds_what_the_tables_show(aixsim):
    words = ("energy", "60M", "--hardware", "tiles-512", "--transform-config", OPTICAL)
    found = json.loads(aixsim(*words, "--decode", "--batch", 8, "--json").stdout)
    assert found["hardware"]["name"] == "tiles-512" and found["transform"] == "optical"
    assert (found["decode"], found["batch"], found["seq_len"]) == (True, 8, 2048)
    said = aixsim(*words).stdout
    for word in ("q kᵀ", "others", "300 fJ/MAC", "a training of 1.39e+09 tokens", "assumptions:"):
        assert word in said


def test_tables_fit_eighty_columns(monkeypatch):
    monkeypatch.setattr(output, "_PIPE_WIDTH", 80)
    said = CliRunner().invoke(app, ["energy", "1.1B", "--transform-config", OPTICAL]).stdout
    assert max(map(len, said.split("\n"))) <= 80
    heads = [line for line in said.split("\n") if "weights ┃" in line]
    assert heads and "┃ layers ┃ light ┃ DAC" in heads[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["61M"], "did you mean '60M'?"),
        (["60M", "--hardware", "engineerd"], "did you mean 'engineered'?"),
        (["60M", "--transform-config", OPTICAL, "--no-transform"], "expected at most one of them"),
    ],
)
def test_mistakes_are_named_with_exit_code_2(aixsim, words, said):
    assert said in aixsim("energy", *words, code=2).stderr


def test_a_bad_price_list_is_refused_by_line(aixsim, tmp_path):
    (tmp_path / "bad.yaml").write_text(
        "base: engineered\nhardware: bad\nadc: {value: -1, unit: pJ, source: x}\n"
    )
    done = aixsim("energy", "60M", "--hardware", tmp_path / "bad.yaml", code=2)
    assert "bad.yaml:3: adc: value: got -1.0; expected 0 <= low <= nominal <= high" in done.stderr
