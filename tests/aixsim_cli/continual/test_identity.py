"""What a run of continual-pretrain is: no flag that shapes a training is passed over."""

import dataclasses

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from aixsim_cli.continual import identity
from aixsim_cli.continual.arguments import DataArguments, parse_arguments
from aixsim_cli.continual.data import tokens_digest
from aixsim_cli.errors import UserError
from aixsim_cli.run.inputs import Inputs

FIELDS = [
    item.name for kind in (TrainingArguments, DataArguments) for item in dataclasses.fields(kind)
]


@pytest.fixture
def settings(tmp_path):
    def make(*flags):
        words = ["--model_name_or_path", "m", "--train_file", "t.txt", "--do_train"]
        arguments = parse_arguments([*words, "--output_dir", str(tmp_path / "o"), *map(str, flags)])
        return identity.settings_of(arguments, steps=4, block_size=8, blocks=9, held_out=None)

    return make


def test_every_flag_is_compared_or_known_to_shape_nothing(settings):
    compared = settings().keys()
    assert not [name for name in FIELDS if (name in compared) == (name in identity._NOT_COMPARED)]
    assert not set(identity._NOT_COMPARED) - set(FIELDS), "no such flags"
    of_streams = settings("--streaming", "--max_steps", 4).keys() - compared
    assert of_streams == {"stream workers", "streamed samples"}
    assert set(identity._ORDER) <= compared | of_streams
    assert set(identity._PLACES) <= compared


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("label_smoothing_factor", 0.5), ("neftune_noise_alpha", 5.0), ("optim_args", "a=1"),
        ("train_sampling_strategy", "sequential"), ("dataloader_drop_last", "true"),
        ("average_tokens_across_devices", "false"), ("max_grad_norm", 2.0), ("adam_beta2", 0.9),
        ("lr_scheduler_type", "cosine"), ("tf32", "false"), ("full_determinism", "true"),
        ("num_train_epochs", 2), ("validation_split_percentage", 7), ("max_train_samples", 3),
        ("accelerator_config", '{"split_batches": true}'),
    ],
)  # fmt: skip
def test_a_flag_that_shapes_the_training_is_told(settings, flag, value):
    changed = identity.changes(settings(), settings(f"--{flag}", value))
    assert flag in changed and changed.keys() <= {flag, "full_determinism"}


def test_a_step_of_as_many_sequences_is_a_step(settings):
    one = settings("--per_device_train_batch_size", 8)
    two = settings("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2)
    assert "sequences a step" not in identity.changes(one, two)
    four = settings("--per_device_train_batch_size", 4)
    assert identity.changes(one, four)["sequences a step"] == (8, 4)


def test_tokens_are_told_apart_by_each_of_them_and_their_order():
    rows = [[1, 2, 3], [4, 5, 6]]
    digests = {
        tokens_digest(Dataset.from_dict({"input_ids": found}))
        for found in (rows, rows[::-1], [[1, 2, 3], [4, 5, 7]], rows[:1])
    }
    assert len(digests) == 4 and None not in digests
    again = Dataset.from_dict({"input_ids": [[0, 0, 0], *rows]}).select([1, 2])
    assert tokens_digest(again) in digests
    assert tokens_digest(Dataset.from_dict({"input_ids": rows}).to_iterable_dataset()) is None


@pytest.mark.parametrize(
    ("mine", "theirs", "differing"),
    [
        ({"blocks": "a", "data": "1"}, {"blocks": "a", "data": "2"}, []),
        ({"blocks": "a", "data": "1"}, {"blocks": "b", "data": "1"}, ["data"]),
        ({"data": "1"}, {"blocks": "b", "data": "2"}, ["data"]),
        ({"frame": "0"}, {"frame": "1"}, ["tokenizer"]),
        ({"frame": "0", "tokenizer": "a"}, {"frame": "1", "tokenizer": "b"}, ["tokenizer"]),
        ({"start": "a"}, {}, []),
    ],
)
def test_what_differs_is_named_once(mine, theirs, differing):
    assert Inputs(**mine).differing(Inputs(**theirs)) == differing


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rms_norm_eps": 0.5}, "rms_norm_eps 1e-06 -> 0.5"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 10.0}},
            "rope_theta 1.* -> 10",
        ),
        ({"attention_dropout": 0.1}, "attention_dropout 0.0 -> 0.1"),
        ({"eos_token_id": 5}, None),
        ({"use_cache": False}, None),
    ],
)
def test_another_config_is_another_model(tmp_path, change, said):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 8,
        "num_attention_heads": 2,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **change))
    words = ["--model_name_or_path", "m", "--train_file", "t.txt", "--do_train"]
    arguments = parse_arguments([*words, "--output_dir", str(tmp_path / "o")])
    if said is None:
        identity.check_model(tmp_path, model, arguments)
        return
    with pytest.raises(UserError, match=said):
        identity.check_model(tmp_path, model, arguments)
