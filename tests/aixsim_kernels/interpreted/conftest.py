"""Triton must know before its import that it is to interpret: see `test_interpreted.py`."""

import os

import numpy as np
import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch):
    """Triton 3.7's interpreter holds bfloat16 as uint16, and multiplies these as integers."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    product = InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return product(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
