"""The operators on a GPU: as on the CPU, compiled, captured in a graph, and without a wait."""

import pytest
import torch
from aixsim_kernels import empty_ranges, optical_attention, optical_linear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
OPTICAL = {"stream": 7, "levels": 256, "lut_min": 0.02, "noise": True}
LINEAR = torch.tensor([[-4.0, 4.0], [-0.2, 0.2], [-6.0, 6.0]])
ATTENTION = torch.tensor([[-4.0, 4.0], [-4.0, 4.0], [-30.0, 30.0], [-4.0, 4.0], [-2.0, 2.0]])


def linear(x, weight, ranges, key):
    return optical_linear(x, weight, None, ranges, key, **OPTICAL)[0]


def attention(q, k, v, ranges, key):
    return optical_attention(
        q, k, v, None, ranges, key, **OPTICAL,
        scale=0.125, is_causal=True, attention_range="unit",
    )[0]  # fmt: skip


def case(name):
    """Operator, operands on the CPU, ranges."""
    generator = torch.Generator().manual_seed(0)
    if name == "linear":
        x, w = torch.randn(200, 96, generator=generator), torch.randn(80, 96, generator=generator)
        return linear, [x, w * 0.05], LINEAR
    shapes = [(2, 6, 100, 64), (2, 2, 100, 64), (2, 2, 100, 64)]
    return attention, [torch.randn(s, generator=generator) for s in shapes], ATTENTION


def with_gradients(function, operands, ranges, device, dtype):
    operands = [t.to(device, dtype).requires_grad_() for t in operands]
    out = function(*operands, ranges.to(device), torch.tensor(5, device=device))
    grads = torch.autograd.grad(out.float().square().sum(), operands)
    return [t.detach().float().cpu() for t in (out, *grads)]


@pytest.mark.parametrize("unset", [False, True])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-2), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("name", ["linear", "attention"])
def test_as_on_the_cpu(name, dtype, most, unset):
    function, operands, ranges = case(name)
    ranges = empty_ranges(len(ranges)) if unset else ranges
    found = with_gradients(function, operands, ranges, "cuda", dtype)
    expected = with_gradients(function, operands, ranges, "cpu", dtype)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() <= most * theirs.norm()


@pytest.mark.parametrize("name", ["linear", "attention"])
def test_compiled_without_a_break(name):
    function, operands, ranges = case(name)
    compiled = torch.compile(function, fullgraph=True)
    found = with_gradients(compiled, operands, ranges, "cuda", torch.bfloat16)
    expected = with_gradients(function, operands, ranges, "cuda", torch.bfloat16)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() <= 1e-2 * theirs.norm()


@pytest.mark.parametrize("name", ["linear", "attention"])
def test_captured_in_a_graph(name):
    function, operands, ranges = case(name)
    operands = [t.cuda().bfloat16() for t in operands]
    ranges, key = ranges.cuda(), torch.tensor(5, device="cuda")
    # compiles the kernels
    expected = function(*operands, ranges, key)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*operands, ranges, key)
    graph.replay()
    assert torch.equal(out, expected)
    # the noise follows the key without another capture
    key.add_(1)
    graph.replay()
    assert not torch.equal(out, expected)


@pytest.mark.parametrize("name", ["linear", "attention"])
def test_never_waits_for_the_device(name):
    function, operands, ranges = case(name)
    operands = [t.cuda().bfloat16().requires_grad_() for t in operands]
    ranges, key = ranges.cuda(), torch.tensor(5, device="cuda")
    grad = torch.ones_like(function(*operands, ranges, key))
    # the first round compiles the kernels
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            torch.autograd.grad(function(*operands, ranges, key), operands, grad)
        finally:
            torch.cuda.set_sync_debug_mode("default")
