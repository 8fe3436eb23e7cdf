"""Both ways in which a CPU makes an operation's passes."""

import ctypes

import pytest
from aixsim_kernels.optical import native


def has_library():
    return isinstance(native.library(), ctypes.CDLL)


@pytest.fixture(scope="module", params=["C", "torch"])
def passes(request):
    """The operations of a module's tests run in C, then in torch."""
    if request.param == "C" and not has_library():
        pytest.skip(native.library())
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(native, "library", lambda: "a test does without")
        yield request.param
