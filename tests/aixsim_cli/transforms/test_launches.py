"""How many kernels a GPU would be given by a simulated block: what `docs/results.md` says."""

from collections import Counter

import pytest
import torch
from aixsim_kernels.optical.attention import op as attention_op
from aixsim_kernels.optical.linear import op as linear_op
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aixsim_cli.config.flavors import FLAVORS
from aixsim_cli.transforms.apply import apply_transform
from aixsim_cli.transforms.protocol import Site
from aixsim_cli.transforms.read import parse_transform

FLAVOR = FLAVORS["aixsim"]["60M"]
LENGTH = 32
# of a linear layer and of an attention, forward and backward; docs/results.md has them
LINEAR, ATTENTION, PRODUCTS = 11, 11, 2


class Launches(TorchDispatchMode):
    """Counts torch's operations that are a kernel: not views, nor what makes room."""

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name
        is_ours, makes_room = name.startswith("aixsim"), "empty" in name or name == "aten::detach"
        if not is_ours and not makes_room and (name.endswith("_") or not self._is_view(args, out)):
            self.counts[name] += 1
        return out

    @staticmethod
    def _is_view(args, out):
        """Whether it returns what it was given, which `contiguous` and `to` may or may not."""
        tensors = [t for t in tree_leaves((args[:1], out)) if isinstance(t, torch.Tensor)]
        return bool(args) and len({t.untyped_storage().data_ptr() for t in tensors}) == 1


class Block(nn.Module):
    """Linear layers and the attention of a block, each with an input of its own."""

    def __init__(self):
        super().__init__()
        dim, ffn = FLAVOR.dim, FLAVOR.ffn_dim
        kv = dim // FLAVOR.n_heads * FLAVOR.n_kv_heads
        sizes = [(dim, dim), (dim, kv), (dim, kv), (dim, dim), (dim, ffn), (dim, ffn), (ffn, dim)]
        self.linears = nn.ModuleList(
            nn.Linear(*size, bias=False, dtype=torch.bfloat16) for size in sizes
        )
        self.attention = nn.Module()
        self.attention.parameter = nn.Parameter(torch.zeros(1))

    def forward(self, inputs, q, k, v):
        """Heads as models have them, transposed: (1, LENGTH, heads, head dimension)."""
        outs = [linear(x) for linear, x in zip(self.linears, inputs, strict=True)]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return [*outs, self.attention.inner_attention(q, k, v).transpose(1, 2)]


def tensor(*shape):
    return torch.randn(shape, dtype=torch.bfloat16).requires_grad_()


@pytest.fixture
def launches(monkeypatch):
    """Counts of what would be launched: Triton's by the kernel's name, torch's by the operation's.

    The operations take their way on a GPU, with tensors of the CPU; Triton runs nothing.
    """
    pytest.importorskip("triton")
    from aixsim_kernels.optical import tiles
    from aixsim_kernels.optical.attention import triton as attention
    from aixsim_kernels.optical.linear import triton as linear
    from triton.runtime.jit import JITFunction

    counts = Counter()
    mode = Launches(counts)

    def run(self, *args, grid, warmup, **options):
        counts[self.fn.__name__] += 1

    def watched(function):
        def call(*args):
            # within an operator torch has left the mode
            with mode:
                return function(*args)

        return call

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(tiles, "capability", lambda device: "9.0")
    monkeypatch.setattr(linear_op.cpu, "forward", watched(linear.forward))
    monkeypatch.setattr(linear_op.cpu, "backward", watched(linear.backward))
    monkeypatch.setattr(attention_op, "_on_triton", lambda *args: True)
    monkeypatch.setattr(attention, "forward", watched(attention.forward))
    monkeypatch.setattr(attention, "backward", watched(attention.backward))

    def product(a, b, out):
        # on a GPU it is one call, whatever the result's type
        return torch.mm(a, b).new_empty(len(a), b.shape[1], dtype=out)

    monkeypatch.setattr(linear, "_matmul", product)
    return counts, mode


def test_launches_of_a_block(launches):
    counts, mode = launches
    block = Block()
    config = parse_transform({"layer_name_to_config": {"default": {}}}, source="t.yaml")
    names = [f"linears.{i}" for i in range(7)]
    sites = [Site(name, name, "linear") for name in names]
    state, _ = apply_transform(block, config, [*sites, Site("attention", "attention", "attention")])
    state.begin_step(0)
    with torch.no_grad():
        for module in state.modules.values():
            module.ranges.copy_(torch.tensor([-1.0, 1.0]).expand_as(module.ranges))
    for _ in range(2):
        # the second call looks at the ranges
        state.next_call()
    head_dim = FLAVOR.dim // FLAVOR.n_heads
    inputs = [tensor(LENGTH, linear.in_features) for linear in block.linears]
    heads = [tensor(1, LENGTH, n, head_dim) for n in (FLAVOR.n_heads, *[FLAVOR.n_kv_heads] * 2)]
    with mode:
        outs = block(inputs, *heads)
    grads = [torch.randn_like(out).contiguous() for out in outs]
    with mode:
        torch.autograd.grad(outs, [*inputs, *heads, *block.linears.parameters()], grads)
    of_torch = {name: n for name, n in counts.items() if name.startswith("aten")}
    assert of_torch == {
        # products of the backward, noise keys, records, kept mass, the attention's gradient
        "aten::mm": 7 * PRODUCTS,
        "aten::bitwise_xor": 8,
        "aten::clamp_": 8,
        "aten::copy_": 1,
        "aten::contiguous": 1,
    }
    assert counts.total() == 7 * LINEAR + ATTENTION == 88
    # a step of the 60M flavor, without what is digital
    assert FLAVOR.n_layers * counts.total() < 2000
