"""Triton kernels run by its interpreter, or on a GPU where there is one.

Triton must know before its import that it is to interpret: see `test_interpreted.py`.
"""

import os

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def run():
    """Call a function of tensors on the device that Triton runs on; results come back."""
    device = "cpu" if INTERPRETED else "cuda"

    def move(values, to):
        return tree_map(lambda v: v.to(to) if isinstance(v, torch.Tensor) else v, values)

    return lambda function, *args: move(function(*move(args, device)), "cpu")


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch):
    """Triton 3.7's interpreter holds bfloat16 as uint16, and multiplies these as integers."""
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    product = InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return product(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
