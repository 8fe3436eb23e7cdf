"""Time the simulated kernels against their digital twins, forward plus backward.

Digital, optical (on a CPU with passes in C, and in PyTorch; with little light) and, with `--peers`,
other simulators' layers take turns, so that a busy machine shifts all alike. A cell is the median
of the ratio to the digital time, and its quartiles.

    python scripts/bench_kernels.py --flavors 60M 200M --threads 1 --peers --json bench.json
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from unittest import mock

import bench_peers
import torch
import torch.nn.functional as F
from aixsim_kernels import Light, note_set, optical_attention, optical_linear
from aixsim_kernels.optical import native
from torch import Tensor

# flavor -> (dim, heads, key-value heads, hidden width of the FFN); the head dimension is 64
FLAVORS = {
    "60M": (384, 6, 2, 1408),
    "200M": (768, 12, 4, 2688),
    "1.1B": (1536, 24, 8, 5376),
}
HEAD_DIM = 64
OPTICAL = {"stream": 0, "levels": 256, "lut_min": 0.02004, "noise": True}
Step = Callable[[], None]
IN_TORCH = "without C"
IN_LIGHT = "with light"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Row:
    """One line of the table: medians, and the quartiles of the ratios to "digital"."""

    flavor: str
    op: str
    shape: str
    milliseconds: dict[str, float]
    ratios: dict[str, list[float]]


def milliseconds(step: Callable[[], None], device: str) -> float:
    """Time of a step; on a GPU between events around ten, so that the host runs ahead of it."""
    if device == "cpu":
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.Event(device, enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 10


def compare(
    flavor: str, op: str, shape: str, steps: dict[str, Step | None], args: argparse.Namespace
) -> Row:
    """Time the steps in turn, round after round."""
    present = {name: step for name, step in steps.items() if step is not None}
    times: dict[str, list[float]] = {name: [] for name in present}
    for i in range(args.pairs + 2):
        for name, step in present.items():
            took = milliseconds(step, args.device)
            if i >= 2:
                times[name].append(took)
    ratios = {
        name: quantiles([b / a for a, b in zip(times["digital"], mine, strict=True)], n=4)
        for name, mine in times.items()
        if name != "digital"
    }
    return Row(flavor, op, shape, {name: median(t) for name, t in times.items()}, ratios)


def training_step(
    forward: Callable[..., Tensor] | None, inputs: list[Tensor], grad: Tensor | None
) -> Step | None:
    """Forward and, if there is a gradient, backward; None where there is no forward."""
    if forward is None:
        return None

    def step() -> None:
        if grad is None:
            with torch.no_grad():
                forward(*inputs)
        else:
            torch.autograd.grad(forward(*inputs), inputs, grad)

    return step


def without_library(step: Step | None) -> Step | None:
    """The step as on a machine without a compiler."""
    if step is None or isinstance(native.library(), str):
        return None

    def in_torch() -> None:
        with mock.patch.object(native, "library", lambda: "for comparison"):
            step()

    return in_torch


def linear_rows(args: argparse.Namespace, flavor: str) -> Iterator[Row]:
    dim, _, kv_heads, hidden = FLAVORS[flavor]
    shapes = {
        "wq, wo": (dim, dim),
        "wk, wv": (dim, kv_heads * HEAD_DIM),
        "w1, w3": (dim, hidden),
        "w2": (hidden, dim),
    }
    like = {"device": args.device, "dtype": DTYPES[args.dtype]}
    key = torch.tensor(1, device=args.device)
    for name, (k, n) in shapes.items():
        x = torch.randn(args.tokens, k, **like, requires_grad=True)
        w = torch.randn(n, k, **like, requires_grad=True)
        # about what a running range holds of Gaussian operands
        wide = torch.tensor([4.0, 4.0, 4 * k**0.5], device=args.device)
        ranges = torch.stack([-wide, wide], 1)
        # as after the first step
        note_set(ranges)

        def optical(x: Tensor, w: Tensor, ranges: Tensor = ranges) -> Tensor:
            return optical_linear(x, w, None, ranges, key, **OPTICAL)[0]

        # a lamp that is set to what Gaussian operands send on a detector
        lit = torch.cat([ranges, torch.full((1, 2), 2 / torch.pi, device=args.device)])
        note_set(lit)

        def in_light(x: Tensor, w: Tensor, ranges: Tensor = lit) -> Tensor:
            return optical_linear(x, w, None, ranges, key, **OPTICAL, light=Light(1.0))[0]

        grad = None if args.forward else torch.randn(args.tokens, n, **like)
        forwards: dict[str, bench_peers.Forward | None]
        forwards = {"digital": F.linear, "aixsim": optical, IN_LIGHT: in_light}
        if args.peers:
            forwards["mase-triton"] = bench_peers.mase_linear(w)
            forwards["aihwkit-lightning"] = bench_peers.lightning_linear(w)
        steps = {name: training_step(f, [x, w], grad) for name, f in forwards.items()}
        if args.device == "cpu":
            steps[IN_TORCH] = without_library(steps["aixsim"])
        yield compare(flavor, name, f"{args.tokens}x{k}x{n}", steps, args)


def attention_row(args: argparse.Namespace, flavor: str) -> Row:
    _, heads, kv_heads, _ = FLAVORS[flavor]
    batch = max(1, args.tokens // args.length)
    like = {"device": args.device, "dtype": DTYPES[args.dtype]}
    key = torch.tensor(1, device=args.device)
    inputs = [
        torch.randn(batch, h, args.length, HEAD_DIM, **like, requires_grad=True)
        for h in (heads, kv_heads, kv_heads)
    ]
    wide = torch.tensor([4.0, 4.0, 40.0, 4.0, 4.0], device=args.device)
    ranges = torch.stack([-wide, wide], 1)
    note_set(ranges)

    def digital(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def optical(
        q: Tensor, k: Tensor, v: Tensor, ranges: Tensor = ranges, light: Light | None = None
    ) -> Tensor:
        return optical_attention(
            q, k, v, None, ranges, key, **OPTICAL,
            scale=HEAD_DIM**-0.5, is_causal=True, attention_range="unit", light=light,
        )[0]  # fmt: skip

    lit = torch.cat([ranges, torch.tensor([[0.6, 0.6], [0.01, 0.01]], device=args.device)])
    note_set(lit)

    def in_light(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return optical(q, k, v, lit, Light(1.0))

    grad = None if args.forward else torch.randn_like(inputs[0])
    forwards: dict[str, bench_peers.Forward | None]
    forwards = {"digital": digital, "aixsim": optical, IN_LIGHT: in_light}
    if args.peers:
        forwards["mase-triton"] = bench_peers.mase_attention(inputs[0], HEAD_DIM**-0.5)
    steps = {name: training_step(f, inputs, grad) for name, f in forwards.items()}
    if args.device == "cpu":
        steps[IN_TORCH] = without_library(steps["aixsim"])
    shape = f"B{batch} H{heads}/{kv_heads} L{args.length}"
    return compare(flavor, "attention", shape, steps, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flavors", nargs="+", choices=FLAVORS, default=list(FLAVORS))
    parser.add_argument("--tokens", type=int, default=2048, help="rows of the linears' input")
    parser.add_argument("--length", type=int, default=512, help="sequence length of attention")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--forward", action="store_true", help="no backward")
    parser.add_argument("--peers", action="store_true", help="also time other simulators' layers")
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    names = ["aixsim", IN_LIGHT]
    names += [IN_TORCH] if args.device == "cpu" else []
    names += ["mase-triton", "aihwkit-lightning"] if args.peers else []
    print("| flavor | op | shape | digital ms |", *(f" {name} |" for name in names), sep="")
    print("|---" * (4 + len(names)) + "|")
    rows = []
    for flavor in args.flavors:
        for row in [*linear_rows(args, flavor), attention_row(args, flavor)]:
            rows.append(row)
            cells = [
                "{1:.2f} ({0:.2f}–{2:.2f})".format(*row.ratios[name]) if name in row.ratios else "–"
                for name in names
            ]
            digital = row.milliseconds["digital"]
            print(f"| {row.flavor} | {row.op} | {row.shape} | {digital:.1f} |", end="")
            print(*(f" {cell} |" for cell in cells), sep="", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"settings": vars(args), "rows": [asdict(row) for row in rows]}, file)


if __name__ == "__main__":
    main()
