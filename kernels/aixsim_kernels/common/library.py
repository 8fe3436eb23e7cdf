"""The operations' C on a CPU, called by ctypes: where it is, and what its functions take.

It needs a C compiler when the package is installed, and of torch, when it runs, only the address of
its matrix product, so that any version will do. Where it is missing, operations are made in torch,
which is slower.
"""

import ctypes
import logging
from ctypes import c_float, c_int, c_int64, c_long, c_uint32, c_void_p
from functools import cache
from importlib.util import find_spec

import torch

logger = logging.getLogger("aixsim")

# of what the C takes and does
VERSION = 7
# p a tensor or a structure, l a long, i an int, f a float, u and k 32 and 64 bits
SIGNATURES = {
    "aixsim_row_keys": "lkup",
    "aixsim_modulate": "pppiplfppi",
    "aixsim_decode": "piplpi",
    "aixsim_mask_range": "pplpi",
    "aixsim_mask_packed": "ppli",
    "aixsim_detect": "pplllppipi",
    "aixsim_room": "pp",
    "aixsim_attend": "pppppp",
    "aixsim_attend_grad": "ppppppp",
    "aixsim_flip": "ppplpuupiiui",
}
_TYPES = {"p": c_void_p, "l": c_long, "i": c_int, "f": c_float, "u": c_uint32, "k": c_int64}


@cache
def library() -> ctypes.CDLL | str:
    """What was compiled when aixsim was installed, or why nothing was."""
    spec = find_spec("aixsim_kernels.common._native")
    if spec is None or spec.origin is None:
        found = "no C compiler was there when aixsim was installed"
    else:
        found = opened(spec.origin)
    if not isinstance(found, str) and matrix_product() is None:
        found = "this torch has no sgemm to be called"
    if isinstance(found, str):
        # once a process: the result is kept
        logger.info("simulated operations on a CPU are made in PyTorch, which is slower: %s", found)
    return found


def opened(path: str) -> ctypes.CDLL | str:
    """A shared library, or what is wrong with it."""
    try:
        found = ctypes.CDLL(path)
        version = c_int.in_dll(found, "aixsim_version").value
    except (OSError, ValueError) as error:
        return str(error)
    if version != VERSION:
        return f"{path} has version {version}, expected {VERSION}: install aixsim again"
    for name, signature in SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = [*map(_TYPES.get, signature)], None
    return found


@cache
def matrix_product() -> int | None:
    """Address of the `sgemm` of the BLAS that torch itself uses."""
    try:
        return ctypes.cast(ctypes.CDLL(torch._C.__file__).sgemm_, c_void_p).value
    except (OSError, AttributeError):
        return None
