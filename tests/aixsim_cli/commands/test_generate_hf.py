"""generate-hf: which sampling a command line means; tests/e2e samples from real models."""

import pytest
from typer.testing import CliRunner

from aixsim_cli.backends.titan import device

device.prepare()

from aixsim_cli.errors import UserError  # noqa: E402
from aixsim_cli.eval import generate, measure  # noqa: E402
from aixsim_cli.main import app  # noqa: E402


@pytest.fixture
def run(monkeypatch):
    """Run the command on no model; `run.options` are those of `generate`, if it was called."""

    def words(*flags):
        run.options = None
        return CliRunner().invoke(app, ["generate-hf", "folder", "--prompt", "x", *flags])

    run = words

    def call(model, prompt, **options):
        run.options = options
        return prompt

    monkeypatch.setattr(measure, "load_for_generation", lambda *_: None)
    monkeypatch.setattr(generate, "generate", call)
    return run


def test_sampling_as_asked(run):
    done = run("--do-sample", "true", "--temperature", "0.6", "--top-k", "20", "--seed", "3")
    assert done.exit_code == 0 and not done.stderr
    assert run.options == {
        "max_new_tokens": 100, "do_sample": True, "seed": 3,
        "temperature": 0.6, "top_k": 20, "top_p": 1.0,
    }  # fmt: skip


def test_options_of_the_sampling_without_it_are_told(run):
    done = run("--temperature", "0.5", "--top_p", "0.9")
    assert done.stderr == "aixsim: --temperature, --top-p: not used without --do-sample true\n"
    assert done.stdout == "x\n"
    assert run.options == {"max_new_tokens": 100, "do_sample": False, "seed": 0}
    assert run().stderr == ""


def test_no_temperature_is_a_mistake(run):
    done = run("--do-sample", "true", "--temperature", "0")
    assert isinstance(done.exception, UserError) and run.options is None
    assert "--temperature: got 0.0; expected more than 0" in str(done.exception)
