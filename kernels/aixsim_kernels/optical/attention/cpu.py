"""Optical attention on a CPU, in blocks of queries; what `triton.py` is compared with.

Neither pass ever holds all scores: memory is O(B H L D) plus one block.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from aixsim_kernels.common.noise import place_in, seed_word
from aixsim_kernels.optical.attention.scores import Scores
from aixsim_kernels.optical.light import Lamp, Lit, lamp_results, lamps_of
from aixsim_kernels.optical.native import passes_of
from aixsim_kernels.optical.passes import Attended, Passes, Range, full_light
from aixsim_kernels.optical.pixels import brightness, show
from aixsim_kernels.optical.settings import Settings

_SCORE_OP, _OUTPUT_OP = 0, 1
# arrays of pixels
_KEYS, _VALUES = 0, 1


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    ranges: Tensor,
    key: Tensor,
    settings: Settings,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward pass; tensors as in `optical_attention`.

    Returns:
        out (B, H, M, Dv) in `out_dtype`; what was seen, float32 (n, 3); kept mass, float32 0-d;
        used ranges, float32 (n, 2).
    """
    passes, quantiles = _passes(q, settings), settings.quantiles
    ranges_used = q_at, k_at, score_at, v_at, out_at = _ranges(passes, ranges, settings)
    lamps = lamps_of(ranges[5:], settings)
    for t, at in ((q, q_at), (k, k_at), (v, v_at)):
        at.look(t, quantiles)
    scores, v_hat = _operands(passes, q, k, v, mask, key, ranges_used, settings)
    passes.look_at_scores(scores, v_hat, score_at, quantiles)
    keys = _noise_keys(passes, scores, key, settings, _SCORE_OP)

    found = passes.attend(
        scores, v_hat, score_at, keys, rowmax=settings.rowmax, lamp=lamps[0] if lamps else None
    )
    light, total, kept, *_ = found
    attending = (total > 0).sum()
    full = full_light(total, settings.rowmax)
    out_at.look(light, quantiles)
    out_keys = _noise_keys(passes, scores, key, settings, _OUTPUT_OP)
    lit = _lit(lamps[1], found, v_at) if lamps else None
    passes.detect_(light, out_at, out_keys, by_row=True, lit=lit)
    # of scores and outputs queries are counted
    sizes = q.numel(), k.numel(), attending, v.numel(), total.numel()
    seen, used = lamp_results(lamps, *passes.results(ranges_used, sizes))
    out = light.mul_(full).flatten(1, 2).to(out_dtype)
    return out, seen, (kept * full).sum() / attending.clamp(min=1), used


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    used: Tensor,
    key: Tensor,
    settings: Settings,
    wants_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Straight-through gradients; the probabilities are computed again with the same noise.

    Args:
        grad: (B, H, M, Dv), gradient of out.
        q: (B, H, M, D).
        k: (B, G, L, D).
        v: (B, G, L, Dv).
        mask: as in the forward.
        used: float32 (n, 2), the ranges that the forward used.
        key: as in the forward.
        settings: as in the forward.
        wants_mask: whether the mask, an additive one, gets a gradient.

    Returns:
        Gradients of q, k, v and mask, of their shapes and types; of the mask an empty one, (0,),
        unless it is asked for.
    """
    passes = _passes(q, settings)
    ranges = q_at, k_at, score_at, v_at, _ = _ranges(passes, used, settings)
    scores, v_hat = _operands(passes, q, k, v, mask, key, ranges, settings)
    keys = _noise_keys(passes, scores, key, settings, _SCORE_OP)
    lamps = lamps_of(used[5:], settings)
    grad_mask = q.new_zeros(_by_group(mask, scores) if wants_mask else 0, dtype=torch.float32)
    grad_q, grad_k, grad_v = passes.attend_grad(
        scores, v_hat, score_at, keys, grad.float().unflatten(1, scores.shape[1:3]),
        rowmax=settings.rowmax, grad_mask=grad_mask if wants_mask else None,
        lamp=lamps[0] if lamps else None,
    )  # fmt: skip
    if settings.has_defects:
        for x, grad_x, array in ((k, grad_k, _KEYS), (v, grad_v, _VALUES)):
            grad_x.mul_(_brightness(x, q, key, settings, array))
    return (
        passes.mask_clipped_(grad_q.flatten(1, 2), q, q_at).to(q.dtype),
        passes.mask_clipped_(grad_k, k, k_at).to(k.dtype),
        passes.mask_clipped_(grad_v, v, v_at).to(v.dtype),
        grad_mask.view(mask.shape).to(mask.dtype) if mask is not None and wants_mask else grad_mask,
    )


def _passes(q: Tensor, settings: Settings) -> Passes:
    """In C, but with light: that is in torch alone."""
    return Passes() if settings.has_light else passes_of(q)


def _ranges(passes: Passes, ranges: Tensor, settings: Settings) -> Sequence[Range]:
    """Of query, key, score, value and output."""
    shown, read = settings.levels, settings.detector_levels
    return passes.ranges(ranges[:5], (shown, shown, read, shown, read))


def _lit(lamp: Lamp, found: Attended, v_at: Range) -> Lit:
    """The light on the detectors of the output; the lamp sees it."""
    whole = found.lit
    if whole is None:
        # the probabilities' range begins with 0; where there are no keys the values' has no ends
        whole = found.light - v_at.bounds[0].nan_to_num(0.0, 0.0, 0.0) * found.kept
    keys = found.pairs / max(found.kept.numel(), 1)
    lamp.see(whole.sum(dtype=torch.float64), whole.numel(), keys)
    return lamp.on(whole=whole.view(-1, whole.shape[-1]))


def _brightness(x: Tensor, q: Tensor, key: Tensor, settings: Settings, array: int) -> Tensor:
    """Of the pixels that show keys or values."""
    return brightness(x, key, settings, array=array, repeats=q.shape[1] // x.shape[1])


def _operands(
    passes: Passes,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key: Tensor,
    ranges: Sequence[Range],
    settings: Settings,
) -> tuple[Scores, Tensor]:
    """What the modulators show: the scores' operands, and v (B, G, L, Dv)."""
    q_at, k_at, _, v_at, _ = ranges
    q_hat = passes.modulate(q, q_at)
    k_hat, v_hat = (passes.modulate(t, at, settings.lut_min) for t, at in ((k, k_at), (v, v_at)))
    if settings.has_defects:
        for x, at, shown, array in ((k, k_at, k_hat, _KEYS), (v, v_at, v_hat, _VALUES)):
            show(shown, _brightness(x, q, key, settings, array), at.bounds[0], settings)
    split = (k.shape[1], q.shape[1] // k.shape[1])
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2]).unflatten(1, split)
    shift = _shift(q, key)
    q_hat = q_hat.unflatten(1, split)
    lowest = torch.stack([q_at.bounds[0], k_at.bounds[0]]) if settings.offset else None
    how = (settings.scale, settings.is_causal, settings.levels, lowest, shift)
    return Scores(q_hat, k_hat, mask, *how), v_hat


def _shift(q: Tensor, key: Tensor) -> int | Tensor:
    """Of queries (B, H, M, D) that are a part of a whole: `Scores.shift`."""
    place = place_in(key)
    if place is None:
        return 0
    # integers on the device, as those of a place are
    shift = torch.as_tensor(q.shape[2] + place.first_row - place.of_rows)
    return shift if shift.is_cuda else int(shift)


def _noise_keys(
    passes: Passes, scores: Scores, key: Tensor, settings: Settings, op: int
) -> Tensor | None:
    """Noise key of each row of the scores or of the output: int32 (B, G, R, M)."""
    if not settings.noise:
        return None
    return passes.row_keys(scores.shape[:4], key, seed_word(settings.stream, op))


def _by_group(mask: Tensor | None, scores: Scores) -> tuple[int, ...]:
    """The mask's own shape, as five dimensions that broadcast to the scores'."""
    assert mask is not None
    batches, heads, queries, keys = (1,) * (4 - mask.dim()) + mask.shape
    return batches, *(scores.shape[1:3] if heads > 1 else (1, 1)), queries, keys
