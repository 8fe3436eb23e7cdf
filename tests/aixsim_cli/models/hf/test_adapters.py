"""PEFT on a simulated model: an adapter carries the ranges that it was trained with."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from aixsim_cli.models.hf.transform import transform_hf_model
from aixsim_cli.transforms.state import state_of

from .conftest import VOCAB, make_inputs, make_model, optical

TARGETS = ["q_proj", "v_proj", "down_proj"]
ADAPTERS = {
    "lora": LoraConfig(target_modules=TARGETS, r=4, task_type="CAUSAL_LM"),
    "dora": LoraConfig(target_modules=TARGETS, r=4, use_dora=True, task_type="CAUSAL_LM"),
    "ia3": IA3Config(
        target_modules=TARGETS, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.fixture
def base(tmp_path):
    """A folder with a simulated model whose ranges are set."""
    model = make_model("llama")
    state, _ = transform_hf_model(model, optical(q_levels=64))
    with torch.no_grad():
        model.train()(**make_inputs("llama"))
    state.end_step()
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def train_steps(model, steps=3):
    state = state_of(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    model.train()
    for step in range(steps):
        state.begin_step(step)
        inputs = make_inputs("llama")
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state.end_step()


@torch.no_grad()
def logits(model):
    state_of(model).begin_step(0)
    return model.eval()(**make_inputs("llama")).logits


def ranges(model):
    return torch.cat([m.ranges for m in state_of(model).modules.values()])


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_reloaded_adapter_computes_what_was_trained(base, tmp_path, kind):
    torch.manual_seed(0)
    model = get_peft_model(load(base), copy.deepcopy(ADAPTERS[kind]))
    train_steps(model)
    model.save_pretrained(tmp_path / "adapter")
    fresh = load(base)
    assert not torch.equal(ranges(fresh), ranges(model))
    fresh = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert torch.equal(ranges(fresh), ranges(model))
    assert torch.equal(logits(fresh), logits(model))


def test_adapter_of_transformers_own_methods(base, tmp_path, monkeypatch):
    # it asks for a release that may be newer than the newest one
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    model = load(base)
    model.add_adapter(copy.deepcopy(ADAPTERS["lora"]))
    train_steps(model)
    model.save_pretrained(tmp_path / "adapter")
    fresh = load(base)
    fresh.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(ranges(fresh), ranges(model))
    assert torch.equal(logits(fresh), logits(model))


class Rows(torch.utils.data.Dataset):
    """Rows that differ, so that their order matters."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        row = torch.randint(3, VOCAB, (20,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": row, "labels": row}


def run(model, folder, resume=None, **options):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=0.01,
        gradient_accumulation_steps=2, use_cpu=True, report_to="none", disable_tqdm=True,
        save_strategy="steps", save_steps=2, **options,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_resume_of_an_adapters_run_is_exact(base, tmp_path):
    torch.manual_seed(0)
    whole = get_peft_model(load(base), copy.deepcopy(ADAPTERS["lora"]))
    run(whole, tmp_path / "run")
    torch.manual_seed(1)
    resumed = get_peft_model(load(base), copy.deepcopy(ADAPTERS["lora"]))
    run(resumed, tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-2"))
    expected, found = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert not torch.equal(ranges(whole), ranges(load(base)))


def test_the_best_adapter_comes_back_with_its_ranges(base, tmp_path):
    model = get_peft_model(load(base), copy.deepcopy(ADAPTERS["lora"]))
    trainer = run(
        model, tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
        metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-2")
    assert torch.equal(ranges(model), ranges(PeftModel.from_pretrained(load(base), best)))
    last = PeftModel.from_pretrained(load(base), tmp_path / "checkpoint-4")
    assert not torch.equal(ranges(model), ranges(last))


@pytest.fixture
def adapters(base, tmp_path):
    """Folders of two adapters of different targets and training."""
    folders = []
    for steps, targets in ((1, TARGETS), (3, ["q_proj", "o_proj"])):
        torch.manual_seed(steps)
        model = get_peft_model(load(base), LoraConfig(target_modules=targets, r=4))
        train_steps(model, steps)
        folders.append(tmp_path / f"adapter-{steps}")
        model.save_pretrained(folders[-1])
    return folders


def test_an_adapter_beside_another_leaves_the_ranges_and_is_told(base, adapters, caplog):
    model = PeftModel.from_pretrained(load(base), adapters[0], adapter_name="first")
    before = ranges(model)
    assert "beside" not in caplog.text
    model.load_adapter(adapters[1], "second")
    assert torch.equal(ranges(model), before)
    assert "adapter second is loaded beside first" in caplog.text


def test_names_do_not_depend_on_what_else_is_wrapped(base, adapters, tmp_path):
    model = PeftModel.from_pretrained(load(base), adapters[0], adapter_name="first")
    model.load_adapter(adapters[1], "second")
    # o_proj is wrapped now
    model.save_pretrained(tmp_path / "both", selected_adapters=["first"])
    again = PeftModel.from_pretrained(load(base), tmp_path / "both" / "first")
    assert torch.equal(ranges(again), ranges(model))


def test_an_adapter_swapped_in_brings_its_ranges(base, adapters, tmp_path):
    other = get_peft_model(load(base), LoraConfig(target_modules=TARGETS, r=4))
    train_steps(other, 4)
    other.save_pretrained(tmp_path / "other")
    model = PeftModel.from_pretrained(load(base), adapters[0])
    hotswap_adapter(model, str(tmp_path / "other"), "default", torch_device="cpu")
    assert torch.equal(ranges(model), ranges(other))
    assert torch.equal(logits(model), logits(other))


def test_an_adapter_on_a_digital_base_is_told(adapters, caplog):
    PeftModel.from_pretrained(make_model("llama"), adapters[0])
    assert "was trained on optical, and the model is on digital hardware" in caplog.text
    caplog.clear()
    # of an earlier version
    path = adapters[0] / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["aixsim.transform"]
    save_file(tensors, path, metadata={"format": "pt"})
    PeftModel.from_pretrained(make_model("llama"), adapters[0])
    assert "this model has none" in caplog.text


def test_an_adapter_on_other_hardware_is_told(base, adapters, caplog):
    PeftModel.from_pretrained(load(base), adapters[0])
    assert not caplog.text
    other = make_model("llama")
    transform_hf_model(other, optical(q_levels=32))
    PeftModel.from_pretrained(other, adapters[0])
    assert "adapter default was trained on optical" in caplog.text
    assert "q_levels 64), and the model is on optical" in caplog.text
    assert "q_levels 32)" in caplog.text


@pytest.mark.parametrize("damage", [b"{", b"[1]", b"\xff\xfe", b'{"name": "nothing"}', b"", None])
def test_hardware_of_an_adapter_that_cannot_be_read_is_told(base, adapters, caplog, damage):
    path = adapters[1] / "adapter_model.safetensors"
    tensors = load_file(path)
    assert "aixsim.transform" in tensors
    tensors["aixsim.transform"] = torch.rand(2, 3)
    if damage is not None:
        tensors["aixsim.transform"] = torch.tensor(list(damage), dtype=torch.uint8)
    save_file(tensors, path, metadata={"format": "pt"})
    model = PeftModel.from_pretrained(load(base), adapters[1])
    assert "adapter default: what hardware it was trained on is unknown" in caplog.text
    assert not torch.equal(ranges(model), ranges(load(base)))


def test_an_adapter_without_ranges_is_told(base, tmp_path, caplog):
    digital = get_peft_model(make_model("llama"), LoraConfig(target_modules=TARGETS))
    digital.save_pretrained(tmp_path / "digital")
    assert not caplog.text
    simulated = load(base)
    before = ranges(simulated)
    PeftModel.from_pretrained(simulated, tmp_path / "digital")
    assert "holds no ranges of 16 simulated modules" in caplog.text
    assert torch.equal(ranges(simulated), before)


@pytest.mark.parametrize("kind", ["lora", "safe", "pissa"])
def test_weights_that_an_adapter_changes_are_changed_in_a_conv1d_too(kind, tmp_path):
    # PEFT assigns to `module.weight.data`, and here that is the transpose of the parameter
    model, name = make_model("gpt2"), "transformer.h.0.attn.c_attn"
    transform_hf_model(model, optical(q_noise=False, q_levels=65536, q_lut_min=None))
    before = model.get_submodule(name).weight.detach().clone()
    initial = "pissa" if kind == "pissa" else True
    config = LoraConfig(target_modules=["c_attn"], r=4, init_lora_weights=initial)
    adapted = get_peft_model(model, config)
    layer = adapted.base_model.model.get_submodule(name)

    def effective():
        weight = layer.get_base_layer().weight + layer.get_delta_weight("default")
        return weight.detach()

    torch.testing.assert_close(effective(), before)
    assert torch.equal(layer.get_base_layer().weight, before) == (kind != "pissa")
    train_steps(adapted, 2)
    expected = effective()
    assert not torch.equal(expected, before)
    merged = adapted.merge_and_unload(safe_merge=kind == "safe")
    torch.testing.assert_close(merged.get_submodule(name).weight.detach(), expected)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(merged))
