"""Triton kernels run by its interpreter, or on a GPU where there is one.

Triton must know before its import that it is to interpret: see `test_interpreted.py`.
"""

import os

import numpy as np
import pytest
import torch
from aixsim_kernels.optical.ranges import is_empty, note_set
from torch.utils._pytree import tree_leaves, tree_map

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def run():
    """Call a function of tensors on the device that Triton runs on; results come back.

    The host knows of ranges that they are set, where they are, as it does after the first step.
    """
    device = "cpu" if INTERPRETED else "cuda"

    def move(values, to):
        return tree_map(lambda v: v.to(to) if isinstance(v, torch.Tensor) else v, values)

    def call(function, *args):
        moved = move(args, device)
        for ranges in tree_leaves(moved):
            is_range = (
                isinstance(ranges, torch.Tensor) and ranges.dim() == 2 and ranges.shape[1] == 2
            )
            if is_range and not is_empty(ranges).any():
                note_set(ranges)
        return move(function(*moved), "cpu")

    return call


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
