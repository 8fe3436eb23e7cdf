"""Compiles every launch of the Triton kernels for a GPU that is not there, and runs none.

A script: it puts a driver into Triton that knows nothing but the GPU's architecture, and calls the
operations with tensors of the CPU. Each launch is specialised and compiled as Triton's JIT would
for these arguments. Prints a line of JSON a launch: case, kernel, and an error or the instructions
that multiply matrices.

Arguments: "cuda" and a compute capability (90), or "hip" and an architecture (gfx942); "more" for
the cases of `more_cases` too.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from aixsim_kernels import empty_ranges, note_set
from aixsim_kernels.bitflip import triton as bitflip
from aixsim_kernels.common.noise import Place, placed
from aixsim_kernels.optical import tiles
from aixsim_kernels.optical.attention import triton as attention
from aixsim_kernels.optical.linear import triton as linear
from aixsim_kernels.optical.settings import Settings
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
KEY = torch.tensor(123)
PART = placed(KEY, Place(64, 256, 64, 8, 2))
# what multiplies tiles, in PTX and in AMD's assembly
PRODUCTS = re.compile(r"(?:wgmma\.mma_async|mma\.sync|v_mfma)\S*")

# ".L_x_3:", or "    /*0a10*/    @P0 BRA `(.L_x_3) ;": address, predicate, instruction
LABEL_OR_INSTRUCTION = re.compile(
    r"^\s*(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\S.*?);", re.MULTILINE
)


class Driver:
    """As much of a driver as compiling takes."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def some_ranges(n, known):
    """Ranges never set, or such as the host knows to be set."""
    if not known:
        return empty_ranges(n)
    ranges = torch.tensor([[-1.0, 1.0]] * n)
    note_set(ranges)
    return ranges


def linear_case(
    dtype,
    out_dtype,
    rows=256,
    depth=128,
    columns=192,
    levels=256,
    key=KEY,
    known=False,
    bare=False,
    **light,
):
    """A forward and a backward; under autocast dtype is another than out_dtype.

    A bare one has no bias, noise or floor.
    """
    x, weight = torch.randn(rows, depth, dtype=dtype), torch.randn(columns, depth, dtype=dtype)
    bias = None if bare else torch.randn(columns, dtype=dtype)
    how = Settings(7, levels, 0.0 if bare else 0.02, not bare, **light)
    ranges = some_ranges(4 if light else 3, known)
    y, _, used, codes, inside = linear.forward(x, weight, bias, ranges, key, how, out_dtype)
    linear.backward(y, codes, inside, weight, used, key, how, dtype, True)


def attention_case(
    dtype,
    out_dtype,
    head_dim=64,
    mask=None,
    levels=256,
    rowmax=False,
    key=KEY,
    known=False,
    is_causal=None,
    noise=True,
    **light,
):
    """A forward and a backward of grouped heads; causal where there is no mask, or where asked."""
    q = torch.randn(2, 6, 256, head_dim, dtype=dtype)
    k, v = (torch.randn(2, 2, 256, head_dim, dtype=dtype) for _ in range(2))
    is_causal = mask is None if is_causal is None else is_causal
    how = Settings(7, levels, 0.02, noise, None, head_dim**-0.5, is_causal, rowmax, **light)
    ranges = some_ranges(7 if light else 5, known)
    out, *_, used, rows, smooth = attention.forward(q, k, v, mask, ranges, key, how, out_dtype)
    wants_mask = mask is not None and mask.dtype != torch.bool
    attention.backward(out, q, k, v, mask, used, key, rows, smooth, how, wants_mask)


def bitflip_case(dtype, key=KEY, p_exp=2.0**-8, p_frac=2.0**-4, zero_out=1.5):
    columns = 63 if key is KEY else 64
    bitflip.forward(torch.randn(64, columns, dtype=dtype), key, 7, p_exp, p_frac, zero_out)


def cases():
    """Every kernel once, as under autocast: float32 inputs, bfloat16 results."""
    yield "linear, autocast", linear_case, (FLOAT32, BFLOAT16)
    yield "linear, autocast, a small tile", linear_case, (FLOAT32, BFLOAT16, 32, 100, 48)
    yield "linear, nothing", linear_case, (BFLOAT16, BFLOAT16, 0)
    # an argument of 1 is a constant
    yield "linear, one input", linear_case, (BFLOAT16, BFLOAT16, 256, 1)
    learned = torch.randn(1, 6, 256, 256)
    yield "attention, autocast", attention_case, (FLOAT32, BFLOAT16, 64, learned)
    yield "bitflip, float32", bitflip_case, (FLOAT32,)
    after = {"known": True}
    yield "linear, after the first step", linear_case, (FLOAT32, BFLOAT16), after
    yield "attention, after the first step", attention_case, (FLOAT32, BFLOAT16), after

    light = {"known": True, "photons": 1.0}
    yield "linear, light", linear_case, (FLOAT32, BFLOAT16), light
    yield "attention, light", attention_case, (FLOAT32, BFLOAT16), light


def more_cases():
    learned = torch.randn(256, 1)
    padding = torch.ones(2, 1, 1, 256, dtype=torch.bool)
    yield "linear, float32", linear_case, (FLOAT32, FLOAT32)
    yield "linear, bfloat16", linear_case, (BFLOAT16, BFLOAT16)
    yield "linear, float16", linear_case, (torch.float16, torch.float16)
    yield "linear, few rows", linear_case, (BFLOAT16, BFLOAT16, 1, 100, 3)
    yield "linear, 65536 levels", linear_case, (BFLOAT16, BFLOAT16, 256, 128, 192, 65536)
    yield "attention, float32", attention_case, (FLOAT32, FLOAT32, 64, learned)
    yield "attention, bfloat16", attention_case, (BFLOAT16, BFLOAT16)
    yield "attention, padding", attention_case, (BFLOAT16, BFLOAT16, 64, padding, 256, True)
    yield "attention, 65536 levels", attention_case, (BFLOAT16, BFLOAT16, 24, None, 65536)
    yield "linear, a part", linear_case, (BFLOAT16, BFLOAT16, 256, 128, 192, 256, PART)
    yield "attention, a part", attention_case, (BFLOAT16, BFLOAT16, 64, None, 256, False, PART)
    yield "attention, 128", attention_case, (BFLOAT16, BFLOAT16, 128)
    yield "attention, 256", attention_case, (BFLOAT16, BFLOAT16, 256)
    yield "linear, bare", linear_case, (BFLOAT16, BFLOAT16), {"bare": True}
    bias = torch.randn(2, 1, 256, 256, dtype=BFLOAT16)
    yield "attention, 128, autocast", attention_case, (FLOAT32, BFLOAT16, 128)
    yield "attention, 128, float16", attention_case, (torch.float16, torch.float16, 128)
    yield "attention, no noise", attention_case, (BFLOAT16, BFLOAT16), {"noise": False}
    for size in (64, 128):
        masked = (BFLOAT16, BFLOAT16, size)
        yield f"attention, rowmax, {size}", attention_case, (*masked, None, 256, True)
        yield f"attention, mask of padding, {size}", attention_case, (*masked, padding)
        causal = {"is_causal": True}
        yield f"attention, mask beside causal, {size}", attention_case, (*masked, padding), causal
        yield f"attention, mask that is added, {size}", attention_case, (*masked, bias), causal
    for offset in (False, True):
        light = {"photons": 1.0, "offset": offset, "read_noise": 3.0, "levels_out": 64}
        kind = "offset" if offset else "differential"
        yield f"linear, {kind} light", linear_case, (BFLOAT16, BFLOAT16), light
        yield f"linear, {kind} light, float32", linear_case, (FLOAT32, FLOAT32), light
        yield f"attention, {kind} light", attention_case, (BFLOAT16, BFLOAT16, 128), light
        yield f"attention, {kind} light, float32", attention_case, (FLOAT32, FLOAT32), light
        masked = (BFLOAT16, BFLOAT16, 64, padding)
        yield f"attention, {kind} light, a mask", attention_case, masked, light
    for p_exp, p_frac, zero_out in ((0.0, 1.0, None), (1.0, 0.0, 1.5), (0.25, 0.0, None)):
        how = {"p_exp": p_exp, "p_frac": p_frac, "zero_out": zero_out}
        yield f"bitflip, {p_exp}, {p_frac}", bitflip_case, (torch.float16,), how
    yield "bitflip, bfloat16", bitflip_case, (BFLOAT16,)
    yield "bitflip, a part", bitflip_case, (BFLOAT16, PART)


def tool(name, *arguments):
    """What a tool of NVIDIA's, which comes with Triton, prints."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def loops(code):
    """All instructions of a disassembly, and those of each innermost loop that multiplies tiles."""
    instructions, labels, found = [], {}, []
    for label, instruction in LABEL_OR_INSTRUCTION.findall(code):
        if label:
            labels[label] = len(instructions)
            continue
        instructions.append(instruction)
        target = re.search(r"^BRA.*\((\.L_x_\d+)\)", instruction)
        if target and target[1] in labels:
            found.append((labels[target[1]], len(instructions)))
    inner = [
        instructions[first:last]
        for first, last in found
        if not any(first <= a and b <= last for a, b in found if (a, b) != (first, last))
    ]
    products = ("HGMMA", "HMMA")
    return instructions, [loop for loop in inner if any(i.startswith(products) for i in loop)]


def resources(made):
    """What a compiled kernel takes of an NVIDIA GPU; spills are instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        instructions, inner = loops(tool("nvdisasm", file.name))

    def count(names, *prefixes):
        return sum(name.startswith(prefixes) for name in names)

    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[-1]),
        "shared": made.metadata.shared,
        "warps": made.metadata.num_warps,
        "fuses": made.metadata.enable_fp_fusion,
        "instructions": len(instructions),
        "spills": count(instructions, "LDL", "STL"),
        "spills_in_loops": sum(count(loop, "LDL", "STL") for loop in inner),
        "conversions_in_loops": sum(count(loop, "I2F") for loop in inner),
    }


def compile_all(target, found, every):
    """Call found(case, kernel, compiled or error) for every launch of every case."""
    driver.set_active(Driver(target))
    if target.backend == "cuda":
        major, minor = divmod(target.arch, 10)
        tiles.capability = lambda device: f"{major}.{minor}"
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        try:
            made = run(self, *args, grid=grid, warmup=True, **options)
        except Exception as error:
            while error.__cause__ is not None:
                error = error.__cause__
            made = error
        found(self, made)

    JITFunction.run = compile_only
    for name, case, arguments, *named in [*cases(), *(more_cases() if every else [])]:
        found.case = name
        case(*arguments, **dict(*named))


def main():
    backend, arch, *every = sys.argv[1:]
    is_cuda = backend == "cuda"
    target = GPUTarget(backend, int(arch) if is_cuda else arch, 32 if is_cuda else 64)

    def found(kernel, made):
        line = {"case": found.case, "kernel": f"{kernel.fn.__module__}:{kernel.fn.__qualname__}"}
        if isinstance(made, Exception):
            line["error"] = f"{type(made).__name__}: {made}"
        else:
            text = made.asm["ptx" if is_cuda else "amdgcn"]
            # a mask of a whole batch has more elements than 32 bits count
            line["narrow"] = re.findall(r"arith\.muli .*%stride_\w+.* : i32", made.asm["ttir"])
            line |= {"products": sorted(set(PRODUCTS.findall(text))), "tf32": "tf32" in text}
            line |= resources(made) if is_cuda else {}
        print(json.dumps(line), flush=True)

    compile_all(target, found, bool(every))


if __name__ == "__main__":
    main()
