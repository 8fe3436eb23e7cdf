"""Every launch compiles for the GPUs that the kernels are for, as the JIT specialises it there."""

import json
import os
import pkgutil
import subprocess
import sys
from collections import Counter
from importlib import import_module
from importlib.metadata import requires, version
from pathlib import Path

import aixsim_kernels
import pytest
from packaging.specifiers import SpecifierSet

SCRIPT = Path(__file__).with_name("launches.py")
# what the CUDA wheels of torch 2.11, 2.12 and 2.13 pin
TRITONS = ["3.6.0", "3.7.0", "3.7.1"]
LONG = pytest.mark.skipif("AIXSIM_TEST_LONG" not in os.environ, reason="AIXSIM_TEST_LONG=1 runs it")


def launches(*arguments, path=""):
    """The lines that the script prints; a process of its own, as it replaces Triton's driver.

    `path` is a folder with another triton than the installed one.
    """
    pytest.importorskip("triton")
    environment = {key: v for key, v in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(path), os.environ.get("PYTHONPATH")])
    )
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    failed = {(line["case"], line["kernel"], line["error"]) for line in lines if "error" in line}
    assert not failed
    return lines


def kernels():
    """Every Triton function of the package: "module:name" -> itself."""
    from triton.runtime.jit import JITFunction

    found = {}
    for info in pkgutil.walk_packages(aixsim_kernels.__path__, "aixsim_kernels."):
        if info.name.endswith("._native"):
            continue  # a plain library
        for value in vars(import_module(info.name)).values():
            if isinstance(value, JITFunction):
                found[f"{value.fn.__module__}:{value.fn.__qualname__}"] = value
    return found


def called_by(kernel):
    """A kernel and all Triton functions that it calls."""
    names = kernel.fn.__code__.co_names
    called = [kernel.fn.__globals__[n] for n in names if n in kernel.fn.__globals__]
    called = [other for other in called if hasattr(other, "fn") and other is not kernel]
    return {kernel}.union(*(called_by(other) for other in called))


def check_products(lines):
    """Tensor cores wherever the result has 16 bits, and nowhere a rounding to tf32."""
    assert not any(line.get("tf32") for line in lines)
    passes = ("_product", "_pass")
    for line in lines:
        if line["kernel"].endswith(passes):
            exact = "float32" in line["case"] or "levels" in line["case"]
            # AMD's matrix cores multiply float32 itself; `_xf32` would be rounded
            rounded = [name for name in line["products"] if not name.endswith("_f32")]
            assert bool(rounded) != exact, line


def check_spills(lines):
    """No register of a tile of 16-bit operands lies in memory where tiles are multiplied.

    But for few, by rowmax or with a mask that is no causal one; and few more around the loops.
    """
    for line in lines:
        exact = "float32" in line["case"] or "levels" in line["case"]
        odd = any(word in line["case"] for word in ("rowmax", "mask", "padding"))
        assert exact or line["spills_in_loops"] <= (32 if odd else 0), line
        wide = odd or any(word in line["case"] for word in ("bare", "128, autocast"))
        around = (0.05 if wide else 0.01) * line["instructions"]
        assert exact or line["spills"] <= around, line


def check_room(lines, shared):
    """A program fits into a multiprocessor: its shared memory, in bytes."""
    assert all(line["shared"] <= shared and line["registers"] <= 255 for line in lines)


def check_conversions(lines):
    """No loop over 16-bit operands converts an integer, which is slow."""
    assert any(line["kernel"].endswith("_product") for line in lines)
    for line in lines:
        # the places of a tile that shares a mask are divided, by way of a float
        exempt = "float32" in line["case"] or line["kernel"].endswith("mask_grad_pass")
        assert exempt or line["conversions_in_loops"] == 0, line


def check_rounding(lines):
    """A product and a sum are one operation only where a kernel says so."""
    assert not any(line["fuses"] for line in lines)


def check_offsets(lines):
    """No offset into a mask is counted in 32 bits."""
    assert not any(line["narrow"] for line in lines)


LINE = {"case": "attention, bfloat16", "kernel": "attention:row_pass", "instructions": 1000}


@pytest.mark.parametrize(
    "spoilt", [{"spills_in_loops": 1}, {"spills": 11}], ids=["in a loop", "outside"]
)
def test_a_spilled_register_is_found(spoilt):
    line = LINE | {"spills": 10, "spills_in_loops": 0}
    check_spills([line])
    with pytest.raises(AssertionError):
        check_spills([line | spoilt])


def test_loops_are_found_in_a_disassembly():
    from tests.aixsim_kernels.launches import loops

    code = """
        /*0000*/                   LDL R1, [R2] ;
.L_x_1:
        /*0010*/                   I2F R1, R2 ;
.L_x_2:
        /*0020*/              @!P0 HGMMA.64x64x16.F32 R24, gdesc ;
        /*0030*/                   STL [R1], R2 ;
        /*0040*/               @P0 BRA `(.L_x_2) ;
        /*0050*/              @!P1 BRA `(.L_x_1) ;
.L_x_3:
        /*0060*/                   FADD R1, R2, R3 ;
        /*0070*/                   BRA `(.L_x_3) ;
"""
    instructions, (inner,) = loops(code)
    assert len(instructions) == 8
    assert [i.split(" ")[0] for i in inner] == ["HGMMA.64x64x16.F32", "STL", "BRA"]


@pytest.mark.parametrize(
    "product", ["v_mfma_f32_16x16x8_xf32", "v_mfma_f32_32x32x8_f16", "mma.sync.aligned.m16n8k8.f32"]
)
def test_a_rounding_product_in_an_exact_case_is_found(product):
    line = {"case": "linear, float32", "kernel": "linear:_product", "tf32": False}
    check_products([line | {"products": ["v_mfma_f32_32x32x2_f32"]}])
    with pytest.raises(AssertionError):
        check_products([line | {"products": [product]}])


@pytest.mark.timeout(600)
def test_every_kernel_compiles_for_sm_90_and_uses_its_tensor_cores_under_autocast(script):
    lines = launches("cuda", "90")
    parts = script("profile_step").KERNELS
    unknown = {line["kernel"] for line in lines if not any(p in line["kernel"] for p in parts)}
    assert not unknown, "profile_step does not know whose time theirs is"
    every = kernels()
    launched = [every[line["kernel"]] for line in lines]
    assert set.union(*map(called_by, launched)) == set(every.values()), "a kernel is not launched"
    check_products(lines)
    check_spills(lines)
    check_conversions(lines)
    check_rounding(lines)
    check_offsets(lines)
    # as docs/design.md and scripts/estimate_step.py count, forward and backward; what looks at a
    # tensor runs twice in the first step, and a mask's gradient is one more
    of_case = Counter(line["case"] for line in lines)
    assert of_case["linear, autocast"] == 3 + 4 + 3
    assert of_case["linear, after the first step"] == 4 + 3
    assert of_case["attention, autocast"] == 3 + 4 + 3 + 1
    assert of_case["attention, after the first step"] == 4 + 3
    for line in lines:
        if line["kernel"].endswith(("_product", "_pass")) and "small" not in line["case"]:
            assert any(product.startswith("wgmma") for product in line["products"]), line


@pytest.fixture(scope="module", params=TRITONS)
def triton_path(request, tmp_path_factory):
    """A folder with this triton in it; "" where it is the one that is installed."""
    if request.param == version("triton"):
        return ""
    folder = tmp_path_factory.mktemp(f"triton-{request.param}")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    subprocess.run([*pip, f"triton=={request.param}"], check=True)
    return folder


@LONG
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ["90", "80"])
def test_every_case_compiles(triton_path, arch):
    lines = launches("cuda", arch, "more", path=triton_path)
    check_products(lines)
    check_spills(lines)
    check_conversions(lines)
    check_rounding(lines)
    check_offsets(lines)
    # NVIDIA's CUDA C++ Programming Guide, compute capabilities: of a block
    check_room(lines, {"90": 227, "80": 163}[arch] * 1024)


@LONG
@pytest.mark.timeout(900)
def test_every_case_compiles_for_amd(triton_path):
    check_products(launches("hip", "gfx942", "more", path=triton_path))


def test_the_tritons_are_those_that_aixsim_takes():
    wanted = next(r for r in requires("aixsim") if r.startswith("triton"))
    bounds = SpecifierSet(wanted.partition("triton")[2].partition(";")[0])
    assert all(bounds.contains(one) for one in TRITONS)
    assert not bounds.contains("3.5.1") and not bounds.contains("3.8.0")
