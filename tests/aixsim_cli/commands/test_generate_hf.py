"""generate-hf: which sampling a command line means; tests/e2e samples from real models."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from aixsim_cli.errors import UserError
from aixsim_cli.eval import generate, measure
from aixsim_cli.eval.generate import generate as generate_text
from aixsim_cli.main import app
from aixsim_cli.models.load import LanguageModel


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

    monkeypatch.setattr(measure, "load_for_generation", lambda *_, **__: None)
    monkeypatch.setattr(generate, "generate", call)
    return run


def test_sampling_as_asked(run):
    done = run("--do-sample", "true", "--temperature", "0.6", "--top-k", "20", "--seed", "3")
    assert done.exit_code == 0 and not done.stderr
    assert run.options == {
        "max_new_tokens": 100, "do_sample": True, "seed": 3,
        "temperature": 0.6, "top_k": 20, "top_p": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("words", [["--do-sample"], ["--do_sample", "True"], ["--do-sample=true"]])
def test_sampling_is_a_flag_that_takes_true_and_false(run, words):
    assert run(*words).exit_code == 0 and run.options["do_sample"] is True
    run(*words, "--do-sample", "false")
    assert run.options["do_sample"] is False


def test_options_of_the_sampling_without_it_are_told(run):
    done = run("--temperature", "0.5", "--top_p", "0.9")
    assert done.stderr == "aixsim: --temperature, --top-p: not used without --do-sample true\n"
    assert done.stdout == "x\n"
    assert run.options == {"max_new_tokens": 100, "do_sample": False, "seed": 0}
    assert run().stderr == ""


@pytest.mark.parametrize("temperature", ["0", "1e-300", "1e-5"])
def test_a_temperature_that_scores_cannot_be_divided_by_is_a_mistake(run, temperature):
    done = run("--do-sample", "true", "--temperature", temperature)
    assert isinstance(done.exception, UserError) and run.options is None
    said = f"--temperature: got {float(temperature)}; expected 0.0001 or more, or --do-sample false"
    assert said in str(done.exception)


@pytest.mark.parametrize("seed", ["100000000000000000000000", "-1"])
def test_a_seed_that_no_generator_takes_is_a_mistake(run, seed):
    done = run("--do-sample", "true", "--seed", seed)
    assert done.exit_code == 2 and "--seed" in done.stderr and run.options is None


CONTEXT = 16


@pytest.fixture(scope="module")
def model():
    """A small model of 16 positions, and a tokenizer of one token a character."""
    words = "abcdefgh "
    plain = Tokenizer(models.WordLevel({c: n for n, c in enumerate(words)}, unk_token=" "))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=CONTEXT, eos_token_id=None, pad_token_id=0,
        bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="a")
    return LanguageModel(module, tokenizer, CONTEXT, None, None)


def continue_text(model, prompt, tokens):
    return generate_text(model, prompt, max_new_tokens=tokens, do_sample=False, seed=0)


def test_a_continuation_ends_where_the_positions_do_and_that_is_said(model, caplog):
    whole = continue_text(model, "abcd", CONTEXT - 4)
    assert not caplog.messages
    assert continue_text(model, "abcd", 99999999999) == whole
    assert caplog.messages == [
        "--max-new-tokens 99999999999: the model has 16 positions, the prompt takes 4; expect at "
        "most 12 new tokens"
    ]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("length", [CONTEXT, 100_000])
def test_a_prompt_beyond_the_positions_is_refused(model, length):
    with pytest.raises(UserError, match=rf"--prompt: got {length} tokens; expected fewer than 16"):
        continue_text(model, "a" * length, 1)


def test_a_model_without_a_limit_takes_any_prompt(model):
    recurrent = MambaConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, state_size=4)
    module = AutoModelForCausalLM.from_config(recurrent).eval()
    free = LanguageModel(module, model.tokenizer, CONTEXT, None, None)
    assert free.positions is None
    assert continue_text(free, "ab" * CONTEXT, 2)


@pytest.mark.parametrize(("prompt", "said"), [("a\udcffb", "at character 1"), ("", "empty text")])
def test_a_prompt_that_is_no_text_is_refused(model, prompt, said):
    with pytest.raises(UserError, match=f"--prompt: .*{said}"):
        continue_text(model, prompt, 1)
