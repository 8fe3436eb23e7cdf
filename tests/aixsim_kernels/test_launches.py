"""Every launch compiles for the GPUs that the kernels are for, as the JIT specialises it there."""

import json
import os
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import aixsim_kernels
import pytest

SCRIPT = Path(__file__).with_name("launches.py")
LONG = pytest.mark.skipif("AIXSIM_TEST_LONG" not in os.environ, reason="AIXSIM_TEST_LONG=1 runs it")


def launches(*arguments):
    """The lines that the script prints; a process of its own, as it replaces Triton's driver."""
    pytest.importorskip("triton")
    environment = {key: v for key, v in os.environ.items() if key != "TRITON_INTERPRET"}
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
        if info.name.endswith("._passes"):
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


@pytest.mark.parametrize(
    "product", ["v_mfma_f32_16x16x8_xf32", "v_mfma_f32_32x32x8_f16", "mma.sync.aligned.m16n8k8.f32"]
)
def test_a_rounding_product_in_an_exact_case_is_found(product):
    line = {"case": "linear, float32", "kernel": "linear:_product", "tf32": False}
    check_products([line | {"products": ["v_mfma_f32_32x32x2_f32"]}])
    with pytest.raises(AssertionError):
        check_products([line | {"products": [product]}])


@pytest.mark.timeout(600)
def test_every_kernel_compiles_for_sm_90_and_uses_its_tensor_cores_under_autocast():
    lines = launches("cuda", "90")
    every = kernels()
    launched = [every[line["kernel"]] for line in lines]
    assert set.union(*map(called_by, launched)) == set(every.values()), "a kernel is not launched"
    check_products(lines)
    for line in lines:
        if line["kernel"].endswith(("_product", "_pass")):
            assert any(product.startswith("wgmma") for product in line["products"]), line


@LONG
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", ["cuda 90", "cuda 80", "hip gfx942"])
def test_every_case_compiles(target):
    check_products(launches(*target.split(), "more"))
