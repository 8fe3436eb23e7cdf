"""Optical attention as one opaque operator: compile, FSDP and recompute see a single call."""

from typing import Literal

import torch
from torch import Tensor

from aixsim_kernels.optical.attention import cpu
from aixsim_kernels.optical.settings import SCHEMA, Defects, Light, Settings, with_physics
from aixsim_kernels.optical.tiles import MAX_HEAD_DIM


def optical_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    ranges: Tensor,
    key: Tensor,
    *,
    stream: int,
    levels: int,
    lut_min: float,
    noise: bool,
    scale: float,
    is_causal: bool,
    attention_range: Literal["unit", "rowmax"],
    quantiles: tuple[float, float] | None = None,
    levels_out: int = 0,
    light: Light | None = None,
    defects: Defects | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`softmax(scale * q k^T + mask) v`, both matmuls on the optical hardware (arXiv 2302.10360).

    The detector reads the unscaled q k^T; softmax is digital float32; the probabilities are
    quantised and drive the second matmul. Memory is O(B H L D): no (B, H, M, L) tensor is held.

    Gradients are straight-through as in `optical_linear`. An additive mask gets the gradient of the
    scores it is added to, summed over what it is broadcast over; 0 where it shuts.

    Args:
        q: (B, H, M, D), float32, bfloat16 or float16, any strides.
        k: (B, G, L, D), with H a multiple of G; query head h uses key-value head h // (H / G).
        v: (B, G, L, Dv).
        mask: None, bool (True = attend) or additive floating; broadcastable to (B, H, M, L). An
            additive mask shuts what is at or below half its type's lowest number.
        ranges: float32 (5, 2), with light (7, 2); rows query, key, score, value, output, light a
            multiplication of the first and of the second product; columns lo, hi. A range never
            set, (+inf, -inf), is calibrated on this batch.
        key: int64, 0-d, on the device of q; selects the noise together with `stream`. `placed`,
            queries and heads are a part of a whole, and draw its noise.
        stream: hash of layer and seed.
        levels: quantisation levels of operands, probabilities and detectors, 2 to 65536.
        lut_min: floor of the modulators of k and v, as a share of their range; 0 for none.
        noise: whether the detectors add noise, see `optical_linear`.
        scale: factor of the detected scores.
        is_causal: query i sees keys up to i + L - M, of a whole that has L keys and M queries; goes
            together with a mask.
        attention_range: "unit" quantises the probabilities over [0, 1]; "rowmax" quantises them
            relative to their row's largest and multiplies by that after the detector.
        quantiles: probabilities that replace min and max in what is seen.
        levels_out: of the detectors, where they have others; 0 = `levels`.
        light: how much of it there is, in both products; None = without end.
        defects: of the pixels that show keys and values; None = they are all alike.

    Returns:
        out: (B, H, M, Dv) in the type of q, or in autocast's where autocast is on.
        seen: float32 (5, 3), with light (7, 3), for `observed_in` and `clipped_in`: this batch's
            ranges before any clamp, rounding or noise, the scores' over what the masks let through,
            empty where an end is not finite; shares of the elements of query, key and value that
            lie beyond the range that was used, with NaN, of the queries one of whose scores does,
            of those that attend to something, and of the queries one of whose outputs does. Not
            differentiable.
        kept_mass: float32 0-d, sum of the quantised probabilities of a row, averaged over the rows
            that attend to something; 1 without quantisation. Not differentiable.

    Raises:
        ValueError: `attention_range` is neither word, or H is not a multiple of G.
    """
    if attention_range not in ("unit", "rowmax"):
        raise ValueError(f"attention_range: got {attention_range!r}; expected 'unit' or 'rowmax'")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads: no multiple of {k.shape[1]} key-value heads")
    rowmax = attention_range == "rowmax"
    settings = Settings(
        stream, levels, lut_min, noise, quantiles, scale, is_causal, rowmax, levels_out
    )
    settings = with_physics(settings, light, defects)
    device = q.device.type
    autocast = torch.is_autocast_enabled(device)
    out_dtype = torch.get_autocast_dtype(device) if autocast else q.dtype
    results = _forward(q, k, v, mask, ranges, key, *settings, out_dtype)
    out, seen, kept_mass, *_ = results
    return out, seen, kept_mass


@torch.library.custom_op(
    "aixsim::optical_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor ranges, Tensor key, {SCHEMA}, "
    "ScalarType out_dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(q, k, v, mask, ranges, key, *settings_and_dtype):
    *fields, out_dtype = settings_and_dtype
    settings = Settings(*fields)
    # autocast would run the matmuls inside in 16 bits; triton launches on the current device
    with torch.autocast(q.device.type, enabled=False), torch.cuda.device_of(q):
        if _on_triton(q, v, settings):
            from aixsim_kernels.optical.attention import triton

            return triton.forward(q, k, v, mask, ranges, key, settings, out_dtype)
        results = cpu.forward(q, k, v, mask, ranges, key, settings, out_dtype)
    # its backward makes these again, with the block of scores it needs anyway
    return *results, q.new_empty(0, dtype=torch.float32), q.new_empty(0, dtype=out_dtype)


@_forward.register_fake
def _(q, k, v, mask, ranges, key, *settings_and_dtype):
    *fields, out_dtype = settings_and_dtype
    out = q.new_empty(*q.shape[:3], v.shape[3], dtype=out_dtype)
    rows = q.new_empty(2, *q.shape[:3], dtype=torch.float32)
    on_triton = _on_triton(q, v, Settings(*fields))
    return (
        out,
        ranges.new_empty(len(ranges), 3),
        q.new_empty((), dtype=torch.float32),
        ranges.new_empty(ranges.shape),
        rows if on_triton else rows.new_empty(0),
        torch.empty_like(out) if on_triton else out.new_empty(0),
    )


def _on_triton(q: Tensor, v: Tensor, settings: Settings) -> bool:
    fits = max(q.shape[3], v.shape[3]) <= MAX_HEAD_DIM and v.shape[2] > 0
    plain = settings.quantiles is None and not settings.has_defects
    return q.device.type == "cuda" and plain and fits


@torch.library.custom_op(
    "aixsim::optical_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor used, Tensor key, "
    f"Tensor rows, Tensor smooth, {SCHEMA}, bool wants_mask) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(grad, q, k, v, mask, used, key, rows, smooth, *settings_and_wish):
    *fields, wants_mask = settings_and_wish
    settings = Settings(*fields)
    with torch.autocast(q.device.type, enabled=False), torch.cuda.device_of(q):
        if smooth.numel():
            from aixsim_kernels.optical.attention import triton

            saved = (mask, used, key, rows, smooth)
            return triton.backward(grad, q, k, v, *saved, settings, wants_mask)
        return cpu.backward(grad, q, k, v, mask, used, key, settings, wants_mask)


@_backward.register_fake
def _(grad, q, k, v, mask, *rest):
    wants_mask = rest[-1]
    of_mask = mask.new_empty(mask.shape) if wants_mask else q.new_empty(0, dtype=torch.float32)
    return *(t.new_empty(t.shape) for t in (q, k, v)), of_mask


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, mask, _, key, *settings, _ = inputs
    _, seen, kept_mass, used, rows, smooth = output
    ctx.mark_non_differentiable(seen, kept_mass, used, rows, smooth)
    # no zeros of the size of the codes for outputs that have no gradient
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, mask, used, key, rows, smooth)
    ctx.settings = settings


def _autograd(ctx, grad, *_):
    wants_mask = ctx.needs_input_grad[3]
    *grads, of_mask = _backward(grad, *ctx.saved_tensors, *ctx.settings, wants_mask)
    # none for the ranges, the key, the type
    return *grads, of_mask if wants_mask else None, *[None] * (len(ctx.settings) + 3)


_forward.register_autograd(_autograd, setup_context=_setup_context)
