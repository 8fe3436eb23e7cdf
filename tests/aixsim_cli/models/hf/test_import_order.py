"""What aixsim extends may have been imported before it: in every other test aixsim comes first."""

import subprocess
import sys
import textwrap

from aixsim_cli.models.hf.transform import transform_hf_model

from .conftest import make_model, optical

SCRIPT = """
    # Trainer's module imports peft; the functions are held under names of this script's too
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft import get_peft_model_state_dict as adapter_state
    from peft.utils.hotswap import hotswap_adapter

    import aixsim_cli
    import sys
    import torch
    from safetensors.torch import load_file
    from aixsim_cli.models.hf.callback import SimulationCallback
    from aixsim_cli.errors import UserError
    from aixsim_cli.transforms.state import state_of

    base, made = sys.argv[1:]

    def load():
        return AutoModelForCausalLM.from_pretrained(base)

    def ranges(model):
        return torch.cat([module.ranges for module in state_of(model).modules.values()])

    def holds_ranges(saved):
        return sum(name.endswith(".ranges") for name in saved) == len(state_of(model).modules)

    # the quantizer; a strict folder's model type
    model = load()
    assert state_of(model) is not None, "loaded digitally"
    assert AutoConfig.for_model("aixsim").model_type == "aixsim"

    # the guard
    try:
        AutoModelForCausalLM.from_config(model.config)
    except UserError:
        pass
    else:
        raise AssertionError("built digitally")

    # the trainer's callback and what simulates attention; the adapter's file
    lora = LoraConfig(target_modules=["q_proj"], r=4)
    model = get_peft_model(model, lora)
    row = torch.randint(3, 97, (16,))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(made, max_steps=2, use_cpu=True, report_to="none"),
        train_dataset=[{"input_ids": row, "labels": row}] * 4,
    )
    trainer.train()
    callbacks = trainer.callback_handler.callbacks
    assert sum(isinstance(each, SimulationCallback) for each in callbacks) == 1
    assert ranges(model).isfinite().all(), "the ranges did not move"
    model.save_pretrained(f"{made}/adapter")
    assert holds_ranges(load_file(f"{made}/adapter/adapter_model.safetensors"))
    assert holds_ranges(adapter_state(model)), "a name of the script's holds what was replaced"
    again = PeftModel.from_pretrained(load(), f"{made}/adapter")
    assert torch.equal(ranges(again), ranges(model))
    swapped = get_peft_model(load(), lora)
    hotswap_adapter(swapped, f"{made}/adapter", "default", torch_device="cpu")
    assert torch.equal(ranges(swapped), ranges(model))
"""


def test_what_is_extended_may_be_imported_first(tmp_path):
    model = make_model("llama")
    transform_hf_model(model, optical(q_levels=64))
    model.save_pretrained(tmp_path / "base")
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, script, tmp_path / "base", tmp_path / "made"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
