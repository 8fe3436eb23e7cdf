"""Random bit-flips as one opaque operator: compile, FSDP and recompute see a single call."""

import torch
from torch import Tensor

from aixsim_kernels.bitflip import cpu


def bitflip(
    x: Tensor,
    key: Tensor,
    *,
    stream: int,
    p_exp: float = 0.0,
    p_frac: float = 0.0,
    zero_out: float | None = None,
) -> Tensor:
    """A copy of x, each of its bits flipped with a probability; then what grew too large is zeroed.

    The bits are independent. A probability is honoured to a multiple of 2**-32, 0 and 1 exactly.
    The result is a pure function of the arguments; a value's flips depend on its index in x, or,
    where the key is `placed`, in the whole that x is a part of.

    The gradient is straight-through: that of y, zero where y was zeroed.

    Args:
        x: (..., rows, columns), any shape and strides; float32, bfloat16 or float16. NaN,
            infinities and subnormal numbers are bits like any others.
        key: int64, 0-d, on the device of x; selects the flips together with `stream`.
        stream: tells the operands of one layer apart.
        p_exp: probability that a sign or exponent bit flips, in [0, 1].
        p_frac: probability that a fraction bit flips, in [0, 1].
        zero_out: y becomes 0 unless |y| < zero_out, so NaN becomes 0; None = whatever comes out.

    Returns:
        y: shape and type of x, contiguous.

    Raises:
        ValueError: a probability is outside [0, 1], the type has no bit fields here, or x is a part
            of a whole that ends within a word of two 16-bit values.
    """
    if x.dtype not in cpu.FIELDS:
        raise ValueError(f"bitflip: got {x.dtype}; expected float32, bfloat16 or float16")
    if not (0 <= p_exp <= 1 and 0 <= p_frac <= 1):
        raise ValueError(f"bitflip: got probabilities {p_exp} and {p_frac}; expected 0 to 1")
    if key.dim() and (x.shape[-1] if x.dim() else 1) * x.element_size() % 4:
        raise ValueError(f"bitflip: got a part of {x.shape[-1:]} columns; expected an even number")
    return _forward(x, key, stream, float(p_exp), float(p_frac), zero_out)[0]


@torch.library.custom_op("aixsim::bitflip", mutates_args=())
def _forward(
    x: Tensor, key: Tensor, stream: int, p_exp: float, p_frac: float, zero_out: float | None
) -> tuple[Tensor, Tensor]:
    return cpu.forward(x, key, stream, p_exp, p_frac, zero_out)


@_forward.register_kernel("cuda")
def _(x, key, stream, p_exp, p_frac, zero_out):
    from aixsim_kernels.bitflip import triton

    # triton launches on the current device, wherever the tensors are
    with torch.cuda.device_of(x):
        return triton.forward(x, key, stream, p_exp, p_frac, zero_out)


@_forward.register_fake
def _(x, key, stream, p_exp, p_frac, zero_out):
    kept = x.new_empty(0 if zero_out is None else x.shape, dtype=torch.bool)
    return torch.empty_like(x, memory_format=torch.contiguous_format), kept


def _setup_context(ctx, inputs, output) -> None:
    _, kept = output
    ctx.mark_non_differentiable(kept)
    # no zeros of the size of the mask for an output that has no gradient
    ctx.set_materialize_grads(False)
    ctx.zeroes = inputs[-1] is not None
    ctx.save_for_backward(*([kept] if ctx.zeroes else []))


def _autograd(ctx, grad, _):
    if ctx.zeroes:
        (kept,) = ctx.saved_tensors
        grad = torch.where(kept, grad, 0)
    return grad, *[None] * 5


_forward.register_autograd(_autograd, setup_context=_setup_context)
