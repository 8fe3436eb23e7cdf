"""Measure the launch parameters of the Triton kernels on the device at hand, and write the table.

Every pass of every class of shapes is timed with each candidate, the others left as they are; the
fastest goes into `aixsim_kernels/optical/tiles.json` under the device's compute capability. What
counts is the time of that pass's kernel on the device, by torch's profiler: around it are other
launches, and Python.

    python scripts/tune_kernels.py                     # needs a CUDA device
    python scripts/tune_kernels.py --classes large 64  # the shapes of 16-bit training alone
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from copy import deepcopy
from itertools import product
from typing import Any

import torch
from aixsim_kernels import note_set, optical_attention, optical_linear
from aixsim_kernels.optical import tiles
from torch.profiler import ProfilerActivity, profile

OPTICAL = {"stream": 0, "levels": 256, "lut_min": 0.02004, "noise": True}
# class -> type, rows, depth, columns
LINEAR_SHAPES = {
    "large": (torch.bfloat16, 16384, 1536, 1536),
    "small": (torch.bfloat16, 32, 1536, 1536),
    "exact": (torch.float32, 4096, 768, 768),
}
# class -> type, batches, heads, key-value heads, length, head dimension
ATTENTION_SHAPES = {
    "64": (torch.bfloat16, 8, 12, 4, 2048, 64),
    "128": (torch.bfloat16, 4, 12, 4, 2048, 128),
    "256": (torch.bfloat16, 2, 12, 4, 2048, 256),
    "exact": (torch.float32, 1, 6, 2, 1024, 64),
}
# pass of an attention -> its kernel
PASSES = {
    "rows": "row_pass",
    "values": "value_pass",
    "query_grad": "query_grad_pass",
    "key_grad": "key_grad_pass",
}


def linear_candidates(shapes: str) -> list[list[int]]:
    """Tiles (m, n, k, warps, stages) to try."""
    heights = {"large": (128, 256), "small": (16, 32, 64), "exact": (32, 64, 128)}[shapes]
    depth = 32 if shapes == "exact" else 64
    return [list(c) for c in product(heights, (64, 128, 256), (depth,), (4, 8), (3, 4))]


def attention_candidates() -> list[list[int]]:
    """Tiles (m, n, warps, stages) to try."""
    tiles = [(128, 64), (128, 32), (64, 64), (64, 32), (32, 64), (32, 32)]
    return [[*tile, *rest] for tile in tiles for rest in product((4, 8), (1, 2, 3))]


def linear_step(shapes: str) -> Callable[[], None]:
    """The forward; the backward's products are the vendor library's."""
    dtype, rows, depth, columns = LINEAR_SHAPES[shapes]
    x = torch.randn(rows, depth, device="cuda", dtype=dtype)
    w = torch.randn(columns, depth, device="cuda", dtype=dtype)
    wide = torch.tensor([4.0, 4.0, 4 * depth**0.5], device="cuda")
    ranges, key = torch.stack([-wide, wide], 1), torch.tensor(1, device="cuda")
    note_set(ranges)
    return lambda: optical_linear(x, w, None, ranges, key, **OPTICAL) and None


def attention_step(shapes: str) -> Callable[[], None]:
    """Forward and backward of causal attention."""
    dtype, batches, heads, kv_heads, length, head_dim = ATTENTION_SHAPES[shapes]
    q, k, v = inputs = [
        torch.randn(batches, h, length, head_dim, device="cuda", dtype=dtype, requires_grad=True)
        for h in (heads, kv_heads, kv_heads)
    ]
    wide = torch.tensor([4.0, 4.0, 40.0, 4.0, 4.0], device="cuda")
    ranges, key = torch.stack([-wide, wide], 1), torch.tensor(1, device="cuda")
    note_set(ranges)
    grad = torch.randn_like(inputs[0])

    def step() -> None:
        out, *_ = optical_attention(
            q, k, v, None, ranges, key, **OPTICAL,
            scale=head_dim**-0.5, is_causal=True, attention_range="unit",
        )  # fmt: skip
        torch.autograd.grad(out, inputs, grad)

    return step


def milliseconds(step: Callable[[], None], kernel: str, repeats: int) -> float:
    """Time of a kernel on the device, a step; infinite with parameters that it cannot have."""
    from triton.runtime.errors import TritonError

    try:
        step()  # compiles
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(repeats):
                step()
            torch.cuda.synchronize()
    except (TritonError, RuntimeError) as error:
        print(f"{kernel}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        return float("inf")
    return kernel_time(profiler.events() or [], kernel) / 1e3 / repeats


def kernel_time(events: Iterable[Any], kernel: str) -> float:
    """Microseconds that a kernel ran on the device.

    Raises:
        ValueError: it did not run.
    """
    times = [event.device_time_total for event in events if event.name.startswith(kernel)]
    if not times:
        raise ValueError(f"no kernel {kernel} ran")
    return sum(times)


def fastest(
    name: str,
    place: dict,
    key: str,
    candidates: list[list[int]],
    step: Callable[[], None],
    kernel: str,
    repeats: int,
) -> None:
    """Leave in `place[key]` the candidate with which the kernel takes the least time."""
    times = {}
    for candidate in [place[key], *candidates]:
        place[key] = candidate
        times[tuple(candidate)] = milliseconds(step, kernel, repeats)
    best = min(times, key=lambda tile: times[tile])
    place[key] = list(best)
    print(f"{name}: {place[key]}, {times[best]:.3f} ms", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=10)
    classes = list(dict.fromkeys([*LINEAR_SHAPES, *ATTENTION_SHAPES]))
    parser.add_argument(
        "--classes", nargs="+", choices=classes, default=classes, help="what to measure"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the table, write nothing")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune_kernels: no CUDA device; expected one to measure on", file=sys.stderr)
        return 2

    device = tiles.capability(torch.device("cuda"))
    table = tiles.table()
    mine = table.setdefault(device, deepcopy(table["other"]))
    for shapes in args.classes:
        if shapes in LINEAR_SHAPES:
            step, candidates = linear_step(shapes), linear_candidates(shapes)
            place = mine["linear"]
            fastest(f"linear {shapes}", place, shapes, candidates, step, "_product", args.repeats)
        if shapes in ATTENTION_SHAPES:
            step, passes = attention_step(shapes), mine["attention"][shapes]
            for name in passes:
                label = f"attention {shapes} {name}"
                candidates, kernel = attention_candidates(), PASSES[name]
                fastest(label, passes, name, candidates, step, kernel, args.repeats)
    # "other" stays last, as what everything else falls back to
    table["other"] = table.pop("other")
    if args.dry_run:
        print(json.dumps(mine))
    else:
        tiles.write(table)
        print(f"wrote {tiles.TABLE}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
