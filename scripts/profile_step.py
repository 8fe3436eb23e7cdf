"""A simulated training step beside a digital one, and where its time goes.

    python scripts/profile_step.py --flavor 60M --layers 2 --batch 1 --length 1024

A step of torchtitan's model is forward, backward, AdamW and, simulated, the update of the ranges.
First both models take steps in turn; then one simulated step runs under torch's profiler, on an
accelerator if there is one. On a CPU every operation counts for the part of the simulation that
asked for it, of which an attention's blocks, products and all, are one; on a GPU kernels are told
by their names, and the detector is inside the product.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from aixsim_kernels.optical.native import NativePasses
from aixsim_kernels.optical.passes import Passes
from bench_kernels import Step, compare
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from aixsim_cli.run.device import device_type

# passes of the CPU's operations -> part of the step
PARTS = {
    "modulate": "quantise",
    "decode": "quantise",
    "detect_": "detector",
    "row_keys": "detector",
    "mask_packed_": "clip masks",
    "mask_clipped_": "clip masks",
    "attend": "scores, softmax, values",
    "attend_grad": "scores, softmax, values",
}
# parts of kernels' names on a GPU -> part of the step; the first that fits
KERNELS = {
    "_settle": "observe ranges", "_code": "quantise", "_operand": "quantise",
    "_pack": "quantise", "_row_light": "quantise", "_product": "product with detector",
    "_backward_kernel": "sums of the gradient", "_input_grad": "clip masks",
    "_weight_grad": "clip masks", "row_pass": "attention", "value_pass": "attention",
    "query_grad_pass": "attention", "key_grad_pass": "attention", "mask_grad_pass": "attention",
    "_flip": "bit-flips",
    "gemm": "products", "nvjet": "products", "cutlass": "products", "cublas": "products",
}  # fmt: skip
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"}


def label_parts() -> None:
    """Make the passes known to the profiler, in C and in torch."""
    for kind in (Passes, NativePasses):
        for name, part in PARTS.items():
            if name in vars(kind):
                setattr(kind, name, _labelled(vars(kind)[name], f"part: {part}"))


def _labelled(function: Callable, label: str) -> Callable:
    def labelled(*args, **kwargs):
        with record_function(label):
            return function(*args, **kwargs)

    return labelled


def part_of(event: FunctionEvent) -> str:
    """Part of the step that an operation on the CPU belongs to."""
    part, product = None, event.name in PRODUCTS
    region = "digital"
    ancestor = event
    while ancestor is not None:
        if ancestor.name.startswith("part: ") and part is None:
            part = ancestor.name.removeprefix("part: ")
        if ancestor.name.startswith("aixsim::optical_linear"):
            region = "linear"
        if ancestor.name.startswith("aixsim::optical_attention"):
            region = "attention"
        if ancestor.name in ("update of ranges", "optimizer"):
            return ancestor.name
        ancestor = ancestor.cpu_parent
    return f"{region}: {part or ('products' if product else 'the rest')}"


def training_step(sizes: Any, tokens: Tensor, transform: str | None) -> Step:
    """A step of a model of these sizes, freshly made."""
    from aixsim_cli.models.titan.model import meta_model
    from aixsim_cli.models.titan.sites import titan_sites
    from aixsim_cli.transforms.apply import apply_transform
    from aixsim_cli.transforms.read import read_transform

    model, state = meta_model(sizes), None
    if transform is not None:
        state = apply_transform(model, read_transform(transform), titan_sites(model))[0]
    model.to_empty(device=tokens.device)
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights()
    if state is not None:
        state.reset()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    index = count()

    def step() -> None:
        if state is not None:
            state.begin_step(next(index))
            state.next_call()
        logits = model(tokens)
        F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()).backward()
        with record_function("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
        if state is not None:
            with record_function("update of ranges"):
                state.end_step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flavor", default="60M")
    parser.add_argument("--layers", type=int, help="how many of the flavor's; default: all")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--transform", default="configs/transforms/optical.yaml")
    parser.add_argument("--pairs", type=int, default=9, help="steps of each that are timed")
    args = parser.parse_args()
    device = args.device = device_type()
    # torchtitan looks for its device when it is imported
    from aixsim_cli.models.titan.model import model_args

    sizes = model_args("aixsim", args.flavor, 4096)
    sizes = replace(sizes, n_layers=args.layers or sizes.n_layers, max_seq_len=args.length)
    tokens = torch.randint(4096, (args.batch, args.length), device=device)
    steps: dict[str, Step | None] = {
        "digital": training_step(sizes, tokens, None),
        "simulated": training_step(sizes, tokens, args.transform),
    }
    shape = f"{sizes.n_layers} layers, {args.batch} x {args.length} tokens"
    row = compare(args.flavor, "step", shape, steps, args)
    ratio = "{1:.2f} ({0:.2f}–{2:.2f})".format(*row.ratios["simulated"])
    told = ", ".join(f"{name} {taken:.0f} ms" for name, taken in row.milliseconds.items())
    print(f"{row.flavor}, {row.shape}, {device}, {torch.get_num_threads()} threads")
    print(f"a step: {told}, ratio {ratio}")
    label_parts()
    step = steps["simulated"]
    assert step is not None
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        step()
        if device == "cuda":
            torch.cuda.synchronize()

    spent: dict[str, float] = defaultdict(float)
    for event in profiler.events() or []:
        if device == "cuda":
            if event.device_type == torch.autograd.DeviceType.CUDA:
                fits = (part for name, part in KERNELS.items() if name in event.name)
                spent[next(fits, "the rest")] += event.device_time_total
        else:
            spent[part_of(event)] += event.self_cpu_time_total
    total = sum(spent.values())
    print("\n| part | ms | share |\n|---|---|---|")
    for part, microseconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"| {part} | {microseconds / 1e3:.1f} | {microseconds / total:.1%} |")


if __name__ == "__main__":
    main()
