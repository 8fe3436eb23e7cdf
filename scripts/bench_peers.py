"""The layers of other simulators, for `bench_kernels.py`; each None where it is not installed.

    pip install --no-deps mase-triton==0.0.7 aihwkit-lightning==2.1.0 && pip install colorlog

mase-triton's attention is what NewComputeBench makes of its matmul: the raw product for its range,
both matmuls on the hardware, the scores held.
"""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout

import torch
from torch import Tensor

LEVELS, LUT_MIN = 256, 0.02004
Forward = Callable[..., Tensor]


def mase_linear(weight: Tensor) -> Forward | None:
    """mase-triton's `OpticalTransformerLinear`, training: x -> y."""
    try:
        from mase_triton.optical_compute.layers import OpticalTransformerLinear  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    columns, depth = weight.shape
    layer = OpticalTransformerLinear(
        depth, columns, bias=False, device=weight.device, dtype=weight.dtype
    )
    del layer.weight
    layer.weight = weight
    return lambda x, _: layer(x)


def mase_attention(q: Tensor, scale: float) -> Forward | None:
    """Causal attention over mase-triton's `ot_qmatmul_fn`: q, k, v -> out."""
    try:
        from mase_triton.optical_compute.functional import ot_qmatmul_fn  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    length = q.shape[2]
    bias = torch.full((length, length), -torch.inf, device=q.device, dtype=q.dtype).triu(1)

    def matmul(a: Tensor, b: Tensor) -> Tensor:
        a, b = a.contiguous(), b.contiguous()
        with torch.no_grad():
            raw = a @ b
            ends = [float(end) for t in (a, b, raw) for end in (t.min(), t.max())]
        return ot_qmatmul_fn(a, b, *ends[:4], LUT_MIN, *ends[4:], LEVELS, 0)[0]

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        repeats = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(repeats, 1) for t in (k, v))
        scores = matmul(q, k.transpose(2, 3)) * scale + bias
        return matmul(scores.softmax(-1), v)

    return forward


def lightning_linear(weight: Tensor) -> Forward | None:
    """aihwkit-lightning's `AnalogLinear` with 8-bit input and output and output noise: x -> y."""
    try:
        # it prints what it finds
        with redirect_stdout(sys.stderr):
            from aihwkit_lightning.nn import AnalogLinear  # pyright: ignore[reportMissingImports]
            from aihwkit_lightning.simulator.configs import TorchInferenceRPUConfig  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    config = TorchInferenceRPUConfig()
    config.forward.inp_res = config.forward.out_res = 2**8 - 2
    config.forward.out_bound = 12.0
    config.forward.out_noise = 0.06
    config.pre_post.input_range.enable = True
    config.mapping.max_input_size = -1
    columns, depth = weight.shape
    layer = AnalogLinear(
        depth, columns, bias=False, device=weight.device, dtype=weight.dtype, rpu_config=config
    )
    del layer.weight
    layer.weight = weight
    return lambda x, _: layer(x)
