"""Where the time of an optical training step goes: products, quantising, detector, ranges.

    python scripts/profile_step.py --flavor 60M --layers 2 --batch 1 --length 1024

One step of torchtitan's model (forward, backward, AdamW, update of the ranges) under torch's
profiler, on an accelerator if there is one. On the CPU every operation counts for the innermost
part of the simulation that asked for it; on a GPU its kernels are told by their names, and the
detector is inside the product.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from aixsim_kernels.optical.attention import cpu as attention_cpu
from aixsim_kernels.optical.attention import scores
from aixsim_kernels.optical.linear import cpu as linear_cpu
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from aixsim_cli.run.device import device_type

# functions of the CPU path -> part of the step
PARTS = {
    "modulate": "quantise",
    "decode": "quantise",
    "observe": "observe ranges",
    "detect_": "detector",
    "pack_inside": "clip masks",
    "mask_packed_": "clip masks",
    "mask_clipped_": "clip masks",
}
# parts of kernels' names on a GPU -> part of the step; the first that fits
KERNELS = {
    "_extremes": "observe ranges", "_settle": "observe ranges", "_code": "quantise",
    "_operand": "quantise", "_row_sums": "quantise", "_centred": "quantise",
    "_product": "product with detector", "_grad_kernel": "clip masks", "row_pass": "attention",
    "value_pass": "attention", "query_grad_pass": "attention", "key_grad_pass": "attention",
    "gemm": "products", "nvjet": "products", "cutlass": "products", "cublas": "products",
}  # fmt: skip
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"}


def label_parts() -> None:
    """Make the CPU path's functions known to the profiler, wherever they were imported."""
    for module in (linear_cpu, attention_cpu, scores):
        for name, part in PARTS.items():
            if hasattr(module, name):
                setattr(module, name, _labelled(getattr(module, name), f"part: {part}"))


def _labelled(function: Callable, label: str) -> Callable:
    def labelled(*args, **kwargs):
        with record_function(label):
            return function(*args, **kwargs)

    return labelled


def part_of(event: FunctionEvent) -> str:
    """Part of the step that an operation on the CPU belongs to."""
    part = "products" if event.name in PRODUCTS else None
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
    rest = "softmax and the rest" if region == "attention" else "the rest"
    return f"{region}: {part or rest}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flavor", default="60M")
    parser.add_argument("--layers", type=int, help="how many of the flavor's; default: all")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--transform", default="configs/transforms/optical.yaml")
    args = parser.parse_args()
    device = device_type()
    label_parts()

    # torchtitan looks for its device when it is imported
    from aixsim_cli.models.titan.model import meta_model, model_args
    from aixsim_cli.models.titan.sites import titan_sites
    from aixsim_cli.transforms.apply import apply_transform
    from aixsim_cli.transforms.read import read_transform

    sizes = model_args("aixsim", args.flavor, 4096)
    sizes = replace(sizes, n_layers=args.layers or sizes.n_layers, max_seq_len=args.length)
    model = meta_model(sizes)
    transform = read_transform(args.transform)
    state = apply_transform(model, transform, titan_sites(model))[0]
    model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights()
    state.reset()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(4096, (args.batch, args.length), device=device)

    def step(index: int) -> None:
        state.begin_step(index)
        state.next_call()
        logits = model(tokens)
        F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()).backward()
        with record_function("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
        with record_function("update of ranges"):
            state.end_step()

    for index in range(2):
        step(index)
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        step(2)
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
    print(f"{args.flavor}, {sizes.n_layers} layers, {args.batch} x {args.length} tokens, {device}")
    print("\n| part | ms | share |\n|---|---|---|")
    for part, microseconds in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"| {part} | {microseconds / 1e3:.1f} | {microseconds / total:.1%} |")


if __name__ == "__main__":
    main()
