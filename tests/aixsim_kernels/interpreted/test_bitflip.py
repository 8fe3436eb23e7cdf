"""The bit-flips' Triton kernel computes, bit for bit, what the CPU computes."""

import pytest
import torch
from aixsim_kernels.bitflip import cpu
from aixsim_kernels.bitflip import triton as gpu
from aixsim_kernels.common.noise import Place, placed

KEY = torch.tensor(-8765432109876543)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "p_exp", "p_frac", "zero_out"),
    [
        ((3, 5), 0.3, 2**-11, None),
        ((33, 37), 0.03, 0.0, 1.003),
        ((7,), 1.0, 0.25, 30.0),
        ((2, 1021), 0.0, 1.0, 1.25),
        ((0, 4), 0.5, 0.5, 1.0),
    ],
)
def test_triton_kernel_is_the_cpus(run, dtype, shape, p_exp, p_frac, zero_out):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected, expected_kept = cpu.forward(x, KEY, 1, p_exp, p_frac, zero_out)
    y, kept = run(gpu.forward, x, KEY, 1, p_exp, p_frac, zero_out)
    assert torch.equal(y.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(kept, expected_kept)


def test_triton_kernel_in_the_second_block(run, monkeypatch):
    x = torch.zeros(5000)
    for module in (gpu, cpu):
        monkeypatch.setattr(module, "BLOCK", 4096)
    # of C it is a constant
    monkeypatch.setattr(cpu, "library", lambda: "a test does without")
    expected, _ = cpu.forward(x, KEY, 0, 0.25, 0.25, None)
    assert torch.equal(
        run(gpu.forward, x, KEY, 0, 0.25, 0.25, None)[0].view(torch.uint8),
        expected.view(torch.uint8),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "place", [Place(5, 9, 3), Place(5, 9, 0, first_column=24, of_columns=700), Place(2, 5, 1)]
)
def test_a_part_of_a_whole(run, monkeypatch, dtype, place):
    for module in (gpu, cpu):
        monkeypatch.setattr(module, "BLOCK", 4096)
    monkeypatch.setattr(cpu, "library", lambda: "a test does without")
    x = torch.randn(10, 346, generator=torch.Generator().manual_seed(0)).to(dtype)
    how = (x, placed(KEY, place), 1, 0.25, 0.3, 1.25)
    (y, kept), (expected, expected_kept) = run(gpu.forward, *how), cpu.forward(*how)
    assert torch.equal(y.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(kept, expected_kept)
