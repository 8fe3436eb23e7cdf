"""Both ways in which a CPU makes an operation's passes."""

import ctypes
import os

import pytest
from aixsim_kernels.optical import native


def has_library():
    return isinstance(native.library(), ctypes.CDLL)


@pytest.fixture(scope="module", params=["C", "torch"])
def passes(request):
    """The operations of a module's tests run in C; in the long run, or without it, in torch too.

    What the passes are held to each other by is test_native.py, always.
    """
    if request.param == "C" and not has_library():
        pytest.skip(native.library())
    if request.param == "torch" and has_library() and "AIXSIM_TEST_LONG" not in os.environ:
        pytest.skip("AIXSIM_TEST_LONG=1 runs it")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(native, "library", lambda: "a test does without")
        yield request.param
