"""A step of continual pretraining, optical against digital, alternating in one process.

    python scripts/bench_continual.py MODEL [--batch 4] [--length 1024] [--steps 9]

MODEL is a Hugging Face folder. A step is what HF's Trainer does with a batch: forward, backward,
clipping, AdamW, and for the optical model the update of its ranges. Prints medians and their ratio.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from aixsim_cli.models.hf.saved import load_model
from aixsim_cli.transforms.choice import DIGITAL
from aixsim_cli.transforms.read import read_transform
from aixsim_cli.transforms.state import state_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--transform", default="configs/transforms/optical.yaml")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=9)
    arguments = parser.parse_args()
    transform = read_transform(arguments.transform)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = {
        "digital": _stepper(load_model(arguments.model, DIGITAL), arguments, device),
        "simulated": _stepper(load_model(arguments.model, transform), arguments, device),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(arguments.steps + 2):
        for name, step in steps.items():
            started = time.perf_counter()
            step(index)
            # the first two warm up
            if index >= 2:
                times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    threads = torch.get_num_threads()
    print(f"{arguments.batch} x {arguments.length} tokens, {device}, {threads} threads")
    for name, seconds in medians.items():
        print(f"{name:10} {seconds:.3f} s a step")
    print(f"ratio      {medians['simulated'] / medians['digital']:.2f}")


def _stepper(
    model: PreTrainedModel, arguments: argparse.Namespace, device: str
) -> Callable[[int], None]:
    # pyright reads transformers' wrapped `to` as unbound
    torch.nn.Module.to(model, device)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    state = state_of(model)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    shape = (arguments.batch, arguments.length)
    tokens = torch.randint(vocabulary, shape, generator=generator).to(device)

    def step(index: int) -> None:
        if state is not None:
            state.begin_step(index)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if state is not None:
            state.end_step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


if __name__ == "__main__":
    main()
