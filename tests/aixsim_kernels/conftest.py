"""The noise once more, in numpy's integers, and Triton kernels compiled for an H100.

What the optical kernels are held to is `aixsim_kernels.optical.definition`, in float64.
"""

import importlib.util
import shutil
import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
WORD = np.uint64(0xFFFFFFFF)


def mix(x):
    x = np.asarray(x, np.uint64) & WORD
    x ^= x >> np.uint64(16)
    x = (x * np.uint64(0x7FEB352D)) & WORD
    x ^= x >> np.uint64(15)
    x = (x * np.uint64(0x846CA68B)) & WORD
    return x ^ (x >> np.uint64(16))


def noise(rows, columns, key, stream, op):
    """u of the first `rows` x `columns` outputs, from the words of every counter."""
    h = np.uint64(0x9E3779B9)
    for word in (stream, stream >> 32, op, key, key >> 32):
        h = mix(h ^ np.uint64(word & 0xFFFFFFFF))
    row = np.arange(rows, dtype=np.uint64)
    row_key = mix(mix(h ^ row) ^ (row >> np.uint64(32)))
    column = np.arange(columns, dtype=np.uint64)
    x = row_key[:, None] ^ (column >> np.uint64(1))
    x = (x * np.uint64(0x7FEB352D)) & WORD
    x ^= x >> np.uint64(15)
    x = (x * np.uint64(0x846CA68B)) & WORD
    x ^= x >> np.uint64(16)
    half = np.where(column % 2 == 0, x & np.uint64(0xFFFF), x >> np.uint64(16))
    return (half.astype(np.uint16).view(np.int16).reshape(rows, columns) + 0.5) / 65536


@pytest.fixture(scope="session")
def integers():
    """The noise by its definition, in numpy's 64-bit integers."""
    return SimpleNamespace(mix=mix, noise=noise)


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Compile a Triton kernel for an H100: (PTX, SASS instructions, those of each inner loop).

    The built function takes the kernel; types of what is not a float32 pointer or an int64 seed;
    constants; names of arguments that 16 divides; and a tile with `warps` and `stages`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.language import target_info

    from tests.aixsim_kernels.launches import loops, tool

    target = GPUTarget("cuda", 90, 32)

    def current_target():
        return target

    # kernels ask which machine they are for
    current_target.__triton_builtin__ = True
    monkeypatch.setattr(target_info, "current_target", current_target)

    def build(kernel, types, constants, aligned, tile):
        names = kernel.arg_names
        kinds = {name: "*fp32" if name.endswith("_ptr") else "i64" for name in names}
        kinds |= {"key_ptr": "*i64"} | types | dict.fromkeys(constants, "constexpr")
        attributes = {
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if name in aligned
        }
        made = triton.compile(
            ASTSource(kernel, kinds, constexprs=constants, attrs=attributes),
            target=target,
            options={
                "num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False,
            },
        )  # fmt: skip
        path = tmp_path / "kernel.cubin"
        path.write_bytes(made.asm["cubin"])
        return made.asm["ptx"], *loops(tool("nvdisasm", path))

    return build


@pytest.fixture(scope="session")
def script():
    """A script of the repository as a module, by its name."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as patch:
            # one imports the other
            patch.syspath_prepend(ROOT / "scripts")
            spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def extension():
    """What pyproject.toml says of the C library: sources and flags."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (found,) = project["tool"]["setuptools"]["ext-modules"]
    return SimpleNamespace(
        sources=[ROOT / name for name in found["sources"]], flags=found["extra-compile-args"]
    )


@pytest.fixture
def compile_library(extension, tmp_path):
    """The C library as some other call of the compiler makes it: its path."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler")

    def build(*more):
        out = tmp_path / f"native{len(list(tmp_path.iterdir()))}.so"
        command = ["cc", "-shared", "-fPIC", *extension.flags, *more, "-o", out]
        subprocess.run([*command, *extension.sources], check=True)
        return str(out)

    return build
