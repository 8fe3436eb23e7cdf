"""What client software does to a simulated model without asking: simulated still, or refused."""

import copy
import os

import pytest
import torch
from accelerate import init_empty_weights
from torch._dynamo.testing import CompileCounter
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from aixsim_cli.errors import UserError
from aixsim_cli.models.hf.config import AixsimConfig
from aixsim_cli.models.hf.transform import transform_hf_model
from aixsim_cli.transforms.read import parse_transform
from aixsim_cli.transforms.state import state_of

from .conftest import VOCAB, make_inputs, make_model, optical


@pytest.fixture
def model():
    model = make_model("llama")
    transform_hf_model(model, optical(q_levels=64))
    return model


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def ranges(model):
    return torch.cat([m.ranges for m in state_of(model).modules.values()])


LONG = pytest.mark.skipif("AIXSIM_TEST_LONG" not in os.environ, reason="AIXSIM_TEST_LONG=1 runs it")


class Rows(torch.utils.data.Dataset):
    """The same row over and over."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        row = make_inputs("llama")["input_ids"][0]
        return {"input_ids": row, "labels": row}


class Wrapped(torch.nn.Module):
    """A model around a model, as value heads and distillation have it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, labels):
        return self.inner(input_ids=input_ids, labels=labels)


def arguments(folder, **options):
    return TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, use_cpu=True,
        report_to="none", disable_tqdm=True, **options,
    )  # fmt: skip


def train_step(model, optimizer):
    inputs = make_inputs("llama")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["model", "model_init", "wrapped"])
def test_a_plain_trainer_moves_the_ranges(model, tmp_path, kind):
    assert ranges(model).isinf().all()
    # a search of hyper-parameters makes a model for each trial
    given = (
        {"model_init": lambda: copy.deepcopy(model)} if kind == "model_init" else {"model": model}
    )
    if kind == "wrapped":
        given = {"model": Wrapped(model)}
    trainer = Trainer(**given, args=arguments(tmp_path), train_dataset=Rows())
    trainer.train()
    trained = trainer.model.inner if kind == "wrapped" else trainer.model
    assert ranges(trained).isfinite().all()
    assert state_of(trained).step == 3


def test_a_plain_trainer_trains_digital_models_as_ever(tmp_path):
    model = make_model("llama")
    before = copy.deepcopy(model.state_dict())
    Trainer(model=model, args=arguments(tmp_path), train_dataset=Rows()).train()
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_the_best_model_comes_back_with_its_ranges(model, tmp_path):
    trainer = Trainer(
        model=model,
        # the largest loss is the first one
        args=arguments(
            tmp_path / "run", learning_rate=0.1, load_best_model_at_end=True,
            metric_for_best_model="loss", greater_is_better=True,
            eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        ),
        train_dataset=Rows(),
        eval_dataset=Rows(),
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-1")
    expected = AutoModelForCausalLM.from_pretrained(best)
    assert torch.equal(ranges(model), ranges(expected))
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-3")
    assert not torch.equal(ranges(last), ranges(expected))


@pytest.mark.parametrize("when", ["loaded first", "simulated later"])
def test_several_gpus_in_one_process_are_refused(model, tmp_path, monkeypatch, when):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 2))
    message = r"n_gpu: got 2; expected one GPU a process: start `torchrun --nproc-per-node 2"

    def trainer(model):
        return Trainer(model=model, args=arguments(tmp_path), train_dataset=Rows())

    if when == "loaded first":
        # `evaluate` alone would use them too
        with pytest.raises(UserError, match=message):
            trainer(model)
        return
    later = make_model("llama")
    made = trainer(later)
    transform_hf_model(later, optical(q_levels=64))
    with pytest.raises(UserError, match=message):
        made.train()


@pytest.fixture
def patience(monkeypatch):
    monkeypatch.setattr("aixsim_cli.transforms.watch.PATIENCE", 2)
    return 2


@pytest.mark.parametrize("ends_steps", [False, True])
def test_a_loop_that_leaves_the_ranges_is_told_once(model, caplog, patience, ends_steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()
    for step in range(patience + 3):
        if ends_steps:
            state_of(model).begin_step(step)
        train_step(model, optimizer)
        if ends_steps:
            state_of(model).end_step()
    told = [r.getMessage() for r in caplog.records if "did not move" in r.getMessage()]
    assert len(told) == (0 if ends_steps else 1)
    assert all("state.end_step()" in text for text in told)


def test_accumulation_and_evaluation_are_not_told(model, caplog, patience):
    other = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=1e-3)
    for _ in range(2 * patience):
        model.train()(**make_inputs("llama"))
    for _ in range(2 * patience):
        optimizer.step()
        with torch.no_grad():
            model.train()(**make_inputs("llama"))
        model.eval()(**make_inputs("llama"))
    assert "did not move" not in caplog.text


SWITCHES = {
    "method": lambda model: model.set_attn_implementation("eager"),
    "config": lambda model: setattr(model.config, "_attn_implementation", "eager"),
}


@torch.no_grad()
@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_another_attention_is_refused_before_it_computes(model, tmp_path, switch):
    name, inputs = model.config._attn_implementation, make_inputs("llama")
    state_of(model).begin_step(0)
    expected = model(**inputs).logits
    switch(model)
    for called in (model, model.model, copy.deepcopy(model)):
        with pytest.raises(UserError, match="attn_implementation: got eager"):
            called(**inputs)
    # its folder says what the hardware is, and is that
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(state_of(loaded).modules) == len(state_of(model).modules)
    for same in (model, loaded):
        same.set_attn_implementation(name)
        state_of(same).begin_step(0)
        assert torch.equal(same(**inputs).logits, expected)


def test_a_model_from_a_config_alone_is_refused(model, folder):
    config = AutoConfig.from_pretrained(folder)
    builders = [
        AutoModelForCausalLM.from_config,
        type(model),
        type(model.model),
        type(model)._from_config,
    ]
    for build in builders:
        for description in (config, model.config):
            with pytest.raises(UserError, match="quantization_config: got aixsim"):
                build(description)
    with init_empty_weights(), pytest.raises(UserError, match="from_pretrained"):
        AutoModelForCausalLM.from_config(config)


def test_a_load_that_fails_does_not_open_the_guard(tmp_path, monkeypatch):
    make_model("llama").save_pretrained(tmp_path)
    section = AixsimConfig({"layer_name_to_config": {"default": {"q_levels": 64}}})

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.__init__", fail)
        LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=section)
    config = make_model("llama").config
    config.quantization_config = section
    with pytest.raises(UserError, match="quantization_config: got aixsim"):
        AutoModelForCausalLM.from_config(config)
    assert state_of(LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=section))


def test_a_config_is_of_use_without_its_hardware(folder, tmp_path):
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    assert state_of(model) is None
    transform_hf_model(model, optical(q_levels=64))
    model.save_pretrained(tmp_path / "other")
    assert state_of(AutoModelForCausalLM.from_pretrained(tmp_path / "other")) is not None


def test_loading_leaves_the_config_of_the_caller_alone(folder):
    config = AutoConfig.from_pretrained(folder)
    before = copy.deepcopy(config.to_dict())
    loaded = AutoModelForCausalLM.from_pretrained(folder, config=config)
    assert state_of(loaded) is not None
    assert config.to_dict() == before
    assert "_is_loading" not in str(loaded.config.to_dict())


@torch.no_grad()
def test_a_copy_has_ranges_of_its_own(model):
    averaged = copy.deepcopy(model)
    model.train()(**make_inputs("llama"))
    state_of(model).end_step()
    assert ranges(model).isfinite().all() and ranges(averaged).isinf().all()
    averaged.load_state_dict(model.state_dict())
    assert torch.equal(ranges(averaged), ranges(model))
    state_of(averaged).reset()
    assert ranges(model).isfinite().all()


@pytest.fixture
def small():
    """One layer, one simulated linear, its ranges set: what is traced takes seconds a module."""
    config = make_model("llama").config
    config.num_hidden_layers = 1
    model = AutoModelForCausalLM.from_config(config)
    patterns = {"model.layers.0.self_attn.q_proj": {"q_levels": 64}, "default": None}
    transform_hf_model(model, parse_transform({"layer_name_to_config": patterns}, source="t.yaml"))
    with torch.no_grad():
        model.train()(**make_inputs("llama"))
    state_of(model).end_step()
    return model.eval()


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=LONG)])
def test_an_exported_program_is_said_to_keep_its_noise(small, caplog, tmp_path, strict):
    model = small
    inputs = {"input_ids": make_inputs("llama")["input_ids"], "use_cache": False}
    program = torch.export.export(model, (), kwargs=inputs, strict=strict)
    assert caplog.text.count("same noise in every call") == 1
    torch.export.save(program, tmp_path / "model.pt2")
    exported = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        first, second = exported(**inputs).logits, exported(**inputs).logits
        assert torch.equal(first, second)
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_a_compiled_model_draws_new_noise_without_being_compiled_again(small):
    model, inputs = small, make_inputs("llama")
    state_of(model).begin_step(0)
    expected = [model(**inputs).logits for _ in range(4)]
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    state_of(model).begin_step(0)
    for logits in expected:
        assert torch.equal(compiled(**inputs).logits, logits)
    assert counter.frame_count == 1
    assert not torch.equal(expected[0], expected[1])


@torch.no_grad()
def test_a_seed_does_not_rewind_the_noise_and_a_step_does(model):
    def logits():
        return model(**make_inputs("llama")).logits

    torch.manual_seed(0)
    state_of(model).begin_step(5)
    first = logits()
    torch.manual_seed(0)
    assert not torch.equal(logits(), first)
    state_of(model).begin_step(5)
    assert torch.equal(logits(), first)


def test_types_change_and_ranges_stay_float32(model, folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for cast in (loaded.half, loaded.float):
        with pytest.raises(ValueError, match="not supported for quantized model"):
            cast()
    loaded.to(torch.bfloat16)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert ranges(loaded).dtype == torch.float32


@torch.no_grad()
def test_a_part_that_is_called_by_itself_draws_new_noise_too(model):
    def hidden():
        return model.model(**inputs).last_hidden_state

    state, inputs = state_of(model), make_inputs("llama")
    state.begin_step(1)
    whole = model(**inputs, output_hidden_states=True).hidden_states[-1]
    assert state.call == 1
    with pytest.raises(ValueError, match="exactly one"):
        model(input_ids=None)
    state.begin_step(1)
    first, second = hidden(), hidden()
    assert torch.equal(first, whole) and not torch.equal(second, first)
    copied = copy.deepcopy(model)
    state_of(copied).begin_step(1)
    assert torch.equal(copied.model(**inputs).last_hidden_state, whole)
    assert state.call == 2


@torch.no_grad()
def test_generation_draws_an_encoders_noise_by_the_step():
    config = BartConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32,
        decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2, dropout=0.0,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BartForConditionalGeneration(config).eval()
    state, _ = transform_hf_model(model, optical(q_levels=64))

    def generate(step):
        state.begin_step(step)
        options = {"max_new_tokens": 2, "do_sample": False, "num_beams": 1}
        made = model.generate(
            make_inputs("llama")["input_ids"], output_scores=True, return_dict_in_generate=True,
            output_hidden_states=True, **options,
        )  # fmt: skip
        return made.encoder_hidden_states[-1]

    first, other, again = generate(1), generate(2), generate(1)
    assert torch.equal(first, again) and not torch.equal(first, other)
