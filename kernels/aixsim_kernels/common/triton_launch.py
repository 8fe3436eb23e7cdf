"""How every Triton kernel is launched."""

from typing import Any


def launch(kernel: Any, programs: int, **arguments: Any) -> None:
    """Launch a kernel; nothing where there are no programs.

    Products and sums are rounded each for itself, as on a CPU: whether a compiler makes one
    operation of them is a default that changes with its version.
    """
    if programs:
        kernel[(programs,)](**arguments, enable_fp_fusion=False)
