"""Optical linear layer as one opaque operator: compile, FSDP and recompute see a single call."""

import torch
from torch import Tensor

from aixsim_kernels.optical.linear import cpu
from aixsim_kernels.optical.settings import SCHEMA, Defects, Light, Settings, with_physics


def optical_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ranges: Tensor,
    key: Tensor,
    *,
    stream: int,
    levels: int,
    lut_min: float,
    noise: bool,
    quantiles: tuple[float, float] | None = None,
    levels_out: int = 0,
    light: Light | None = None,
    defects: Defects | None = None,
) -> tuple[Tensor, Tensor]:
    """`x @ weight.T + bias` on the optical matmul (arXiv 2302.10360).

    Both operands are quantised, products accumulate in float32, the detector adds noise and
    quantises, the bias is added digitally. The result is a pure function of the arguments.

    Gradients are straight-through: grad_x = g @ w^ and grad_w = g^T @ x^, zero where the operand
    was clipped; a clipped output passes its gradient.

    Args:
        x: (..., K), float32, bfloat16 or float16, any strides, may be empty.
        weight: (N, K), any of these types.
        bias: (N,) or None.
        ranges: float32 (3, 2), with light (4, 2); rows input, weight, output, light a
            multiplication (`optical/light.py`); columns lo, hi. A range never set, (+inf, -inf), is
            calibrated on this batch.
        key: int64, 0-d, on the device of x; selects the noise together with `stream`. `placed`,
            x and weight are a part of a whole, and draw its noise.
        stream: hash of layer and seed.
        levels: quantisation levels of both operands and of the detector, 2 to 65536.
        lut_min: smallest magnitude the weight's modulator can show, as a share of its range; 0 for
            none.
        noise: whether the detector adds noise: U(-1/2, 1/2) of a level or, with light, its own.
        quantiles: probabilities that replace min and max in what is seen.
        levels_out: of the detector, where it has others; 0 = `levels`.
        light: how much of it there is; None = without end.
        defects: of the pixels that show the weight; None = they are all alike.

    Returns:
        y: (..., N) in the type of x, or in autocast's where autocast is on.
        seen: float32 (3, 3), with light (4, 3), for `observed_in` and `clipped_in`: this batch's
            ranges before any clamp, rounding or noise, the output's before the bias, empty where an
            end is not finite; shares of the inputs, weights and outputs that lie beyond the range
            that was used, with NaN. Not differentiable.
    """
    settings = Settings(stream, levels, lut_min, noise, quantiles, levels_out=levels_out)
    settings = with_physics(settings, light, defects)
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    out_dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    rows = x.reshape(-1, x.shape[-1])
    y, seen, *_ = _forward(rows, weight, bias, ranges, key, *settings, out_dtype)
    return y.view(*x.shape[:-1], weight.shape[0]), seen


@torch.library.custom_op(
    "aixsim::optical_linear",
    mutates_args=(),
    schema=f"(Tensor x, Tensor weight, Tensor? bias, Tensor ranges, Tensor key, {SCHEMA}, "
    "ScalarType out_dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(x, weight, bias, ranges, key, *settings_and_dtype):
    *fields, out_dtype = settings_and_dtype
    settings = Settings(*fields)
    # autocast would run the matmul inside in 16 bits; triton launches on the current device
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        if x.is_cuda and settings.quantiles is None and not settings.has_defects:
            from aixsim_kernels.optical.linear import triton

            return triton.forward(x, weight, bias, ranges, key, settings, out_dtype)
        return cpu.forward(x, weight, bias, ranges, key, settings, out_dtype)


@_forward.register_fake
def _(x, weight, bias, ranges, key, *settings_and_dtype):
    *fields, out_dtype = settings_and_dtype
    return (
        x.new_empty(x.shape[0], weight.shape[0], dtype=out_dtype),
        ranges.new_empty(len(ranges), 3),
        ranges.new_empty(ranges.shape),
        x.new_empty(x.shape, dtype=cpu.code_dtype(Settings(*fields).levels)),
        x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8),
    )


@torch.library.custom_op(
    "aixsim::optical_linear_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x_code, Tensor x_inside, Tensor weight, Tensor used, Tensor key, "
    f"{SCHEMA}, ScalarType x_dtype, bool wants_bias) -> (Tensor, Tensor, Tensor)",
)
def _backward(grad, x_code, x_inside, weight, used, key, *settings_and_wishes):
    *fields, x_dtype, wants_bias = settings_and_wishes
    settings = Settings(*fields)
    saved = (x_code, x_inside, weight, used, key)
    with torch.autocast(grad.device.type, enabled=False), torch.cuda.device_of(grad):
        if grad.is_cuda and not settings.has_defects:
            from aixsim_kernels.optical.linear import triton

            return triton.backward(grad, *saved, settings, x_dtype, wants_bias)
        return cpu.backward(grad, *saved, settings, x_dtype, wants_bias)


@_backward.register_fake
def _(grad, x_code, x_inside, weight, used, key, *settings_and_wishes):
    *_, x_dtype, wants_bias = settings_and_wishes
    return (
        x_code.new_empty(x_code.shape, dtype=x_dtype),
        weight.new_empty(weight.shape),
        grad.new_empty(grad.shape[1] if wants_bias else 0, dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, _, key, *settings, _ = inputs
    _, seen, used, x_code, x_inside = output
    ctx.mark_non_differentiable(seen, used, x_code, x_inside)
    # no zeros of the size of the codes for outputs that have no gradient
    ctx.set_materialize_grads(False)
    # the weight itself, not its codes: it lives on anyway, and coding it again is cheap
    ctx.save_for_backward(x_code, x_inside, weight, used, key)
    ctx.settings, ctx.x_dtype = settings, x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _autograd(ctx, grad, *_):
    wants_bias = ctx.needs_input_grad[2]
    rest = (*ctx.settings, ctx.x_dtype, wants_bias)
    grad_x, grad_w, grad_b = _backward(grad, *ctx.saved_tensors, *rest)
    grad_b = grad_b.to(ctx.bias_dtype) if wants_bias else None
    # none for the ranges, the key, the type
    return grad_x, grad_w, grad_b, *[None] * (len(ctx.settings) + 3)


_forward.register_autograd(_autograd, setup_context=_setup_context)
