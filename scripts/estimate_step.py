"""What a training step is estimated to take on an H100 or H200, from counts. No measurement.

    estimate_step.py [FLAVOR …]

Counts are of the compiled kernels (instructions a score and an output, held by
tests/aixsim_kernels/optical/*/test_triton.py) and of the bytes and launches of docs/design.md. The
rates below are assumptions: what a well-written kernel reaches of the peak. Digital training is
estimated at the same rates. `scripts/gpu_check.sh` measures what this guesses.
"""

import sys
from dataclasses import dataclass

from aixsim_cli.config.flavors import FLAVORS, Flavor

# NVIDIA's data sheet of the H100 SXM and the H200: 132 SMs at 1.75 GHz, each 4 x 32 lanes
LANES = 132 * 4 * 32 * 1.75e9
# bfloat16, dense, at that clock; of which a GEMM, by the model's width, and attention reach
TENSOR = 790e12
GEMM, WIDE_GEMM, ATTENTION = 0.65, 0.80, 0.35
# share of the instructions that could be issued; bytes a second; what a launch takes by itself
ISSUED, BYTES, LAUNCH = 0.7, 3.2e12, 2.5e-6
SEQUENCES, LENGTH, VOCABULARY = 48, 2048, 49152
# a logit: made, cast, its softmax and its gradient; a residual element of a layer: norms, rotary
# embedding, SwiGLU, sums, both ways; a parameter: AdamW in float32
LOGIT, RESIDUAL, PARAMETER = 20, 60, 28


@dataclass(frozen=True)
class Kernels:
    """Counts of the simulation's kernels for heads of 64 in 16 bits.

    Args:
        passes: name, instructions a score of tiles that are seen whole and of the others, products
            of tiles, queries and keys of a tile.
        epilogue: instructions an output of a linear layer.
        forward: bytes an input and an output of a linear layer.
        backward: likewise.
        launches: of a linear layer and of an attention, both ways, its products aside.
    """

    passes: tuple[tuple[str, float, float, int, int, int], ...]
    epilogue: float
    forward: tuple[float, float]
    backward: tuple[float, float]
    launches: tuple[int, int]


BEFORE = Kernels(
    passes=(
        ("rows", 46.9, 46.9, 1, 128, 64),
        ("values", 47.8, 47.8, 3, 128, 64),
        ("query_grad", 47.3, 47.3, 3, 128, 64),
        ("key_grad", 85.5, 85.5, 4, 64, 32),
    ),
    epilogue=43,
    forward=(4.1, 2),
    backward=(15.1, 8),
    launches=(22, 40),
)
NOW = Kernels(
    passes=(
        ("rows", 24.0, 28.5, 1, 128, 64),
        ("values", 25.1, 28.8, 3, 128, 64),
        ("query_grad", 23.2, 27.0, 3, 128, 64),
        ("key_grad", 38.0, 40.7, 4, 32, 128),
    ),
    epilogue=30.5,
    forward=(4.1, 2),
    backward=(11.1, 6),
    launches=(9, 11),
)


def linears(flavor: Flavor) -> list[tuple[int, int]]:
    """Inputs and outputs of a block's seven linear layers."""
    dim, kv, ffn = flavor.dim, flavor.dim // flavor.n_heads * flavor.n_kv_heads, flavor.ffn_dim
    return [(dim, dim), (dim, kv), (dim, kv), (dim, dim), (dim, ffn), (dim, ffn), (ffn, dim)]


def tiles(queries: int, keys: int) -> tuple[int, int]:
    """How many tiles of a causal head are seen whole, and how many in part."""
    whole = sum(first // keys for first in range(1, LENGTH + 1, queries))
    some = sum(-(-(first + queries) // keys) for first in range(0, LENGTH, queries))
    return whole, some - whole


def step(flavor: Flavor, kernels: Kernels | None) -> dict[str, float]:
    """Seconds of the parts of a step; of digital training where there are no kernels."""
    tokens, heads = SEQUENCES * LENGTH, SEQUENCES * flavor.n_heads
    tensor = TENSOR * (WIDE_GEMM if flavor.dim >= 1024 else GEMM)
    k, n = (sum(sizes) for sizes in zip(*linears(flavor), strict=True))
    products = 2 * tokens * sum(a * b for a, b in linears(flavor)) / tensor
    forward, backward = (2, 2), (4, 4)
    if kernels:
        forward, backward = kernels.forward, kernels.backward
    of_bytes = [tokens * (f * k + g * n) / BYTES for f, g in (forward, backward)]
    linear = max(products, of_bytes[0]) + max(2 * products, of_bytes[1])
    attention = 7 * heads * LENGTH**2 * 64 / (TENSOR * ATTENTION)
    launches = 0.0
    if kernels:
        linear += tokens * n * kernels.epilogue / (LANES * ISSUED)
        attention = 0.0
        for _, free, masked, of_tiles, queries, keys in kernels.passes:
            whole, some = tiles(queries, keys)
            instructions = heads * queries * keys * (whole * free + some * masked)
            attention += instructions / (LANES * ISSUED)
            # as if nothing of it ran beside the rest
            flops = 2 * 64 * of_tiles * heads * queries * keys * (whole + some)
            attention += flops / (TENSOR * GEMM)
        launches = (7 * kernels.launches[0] + kernels.launches[1]) * LAUNCH
    size = sum(a * b for a, b in linears(flavor)) * flavor.n_layers + 2 * flavor.dim * VOCABULARY
    rest = 6 * tokens * flavor.dim * VOCABULARY / tensor + tokens * VOCABULARY * LOGIT / BYTES
    rest += (flavor.n_layers * tokens * flavor.dim * RESIDUAL + size * PARAMETER) / BYTES
    layers = flavor.n_layers
    return {
        "linear layers": layers * linear,
        "attention": layers * attention,
        "launches": layers * launches,
        "the rest": rest,
    }


def main(names: list[str]) -> None:
    print("| ms of a step, estimated | before | now | digital |\n|---|---|---|---|")
    for name in names:
        flavor = FLAVORS["aixsim"][name]
        columns = [step(flavor, kernels) for kernels in (BEFORE, NOW, None)]
        for part in columns[0]:
            cells = " | ".join(f"{1e3 * column[part]:.0f}" for column in columns)
            print(f"| {name}: {part} | {cells} |")
        total = [sum(column.values()) for column in columns]
        cells = " | ".join(f"{1e3 * t:.0f} ({t / total[2]:.2f})" for t in total)
        print(f"| {name}: whole step (to digital) | {cells} |")


if __name__ == "__main__":
    main(sys.argv[1:] or ["60M", "1.1B"])
