"""Optical attention on a CPU, in blocks of queries; what `triton.py` is compared with.

Neither pass ever holds all scores: memory is O(B H L D) plus one block.
"""

from math import prod

import torch
from torch import Tensor

from aixsim_kernels.common.noise import row_keys, seed_word
from aixsim_kernels.optical.attention.scores import Block, Scores, range_of
from aixsim_kernels.optical.clipping import are_clipped, clipped_share, mask_clipped_
from aixsim_kernels.optical.grid import detect_, grid, modulate
from aixsim_kernels.optical.ranges import (
    calibrate,
    empty_ranges,
    is_empty,
    merge_observed,
    observe,
    only_finite,
)
from aixsim_kernels.optical.settings import Settings

_SCORE_OP, _OUTPUT_OP = 0, 1


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    ranges: Tensor,
    key: Tensor,
    settings: Settings,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Forward pass; tensors as in `optical_attention`.

    Returns:
        out (B, H, M, Dv) in `out_dtype`; observed ranges, float32 (5, 2); clipped shares, float32
        (5,); kept mass, float32 0-d; used ranges, float32 (5, 2).
    """
    quantiles = settings.quantiles
    seen_q, seen_k, seen_v = seen = [observe(t, quantiles) for t in (q, k, v)]
    used = [calibrate(r, s) for r, s in zip(ranges[[0, 1, 3]], seen, strict=True)]
    # quantiles do not tell whether all is held
    known_extremes = seen if quantiles is None else [None] * 3
    clipped = [clipped_share(*of) for of in zip((q, k, v), used, known_extremes, strict=True)]
    scores, v_hat = _operands(q, k, v, mask, used, settings)
    # a range never set needs the scores twice: once for their range, once to detect them in it
    known = None if quantiles is None and not is_empty(ranges[2]) else scores.range(quantiles)
    score_range = ranges[2] if known is None else calibrate(ranges[2], known)
    score_grid = grid(score_range, settings.levels)
    keys = _noise_keys(scores, key, settings, _SCORE_OP)

    seen_score = empty_ranges(1, q.device)[0]
    acc = v_hat.new_zeros(*scores.shape[:4], v.shape[-1])
    factor = v_hat.new_zeros(*scores.shape[:4], 1)
    kept, clipped_score = v_hat.new_zeros(2), v_hat.new_zeros(())
    for block in scores.blocks():
        raw = scores.accumulate(block)
        extremes = scores.row_extremes(block, raw)
        if known is None:
            seen_score = merge_observed(seen_score, range_of(*extremes))
        clipped_score += are_clipped(*extremes, score_range).sum()
        weights, total = scores.exponentials(block, raw, score_grid, keys)
        modulated, peak = _modulate(weights, total, settings)
        product = modulated.flatten(2, 3) @ v_hat[block.batch, block.heads, : block.keys]
        _rows(acc, block).copy_(product.unflatten(2, peak.shape[2:4]))
        _rows(factor, block).copy_(peak)
        kept += torch.stack([(modulated.sum(-1, keepdim=True) * peak).sum(), (total > 0).sum()])
    seen_out = observe(acc, quantiles)
    out_range = calibrate(ranges[4], seen_out)
    clipped_out = acc.new_zeros(())
    if acc.numel():
        clipped_out = are_clipped(acc.amin(-1), acc.amax(-1), out_range).mean()
    out_keys = _noise_keys(scores, key, settings, _OUTPUT_OP)
    detect_(acc, grid(out_range, settings.levels), out_keys)
    out = acc.mul_(factor).flatten(1, 2)
    attending = kept[1].clamp(min=1)
    # rows of NaN are clipped, but attend to nothing
    clipped_score = (clipped_score / attending).clamp(max=1)
    observed = [seen_q, seen_k, only_finite(seen_score) if known is None else known]
    return (
        out.to(out_dtype),
        torch.stack([*observed, seen_v, seen_out]),
        torch.stack([*clipped[:2], clipped_score, clipped[2], clipped_out]),
        kept[0] / attending,
        torch.stack([*used[:2], score_range, used[2], out_range]),
    )


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

    The softmax's own gradient needs the probabilities before they were quantised, hence not
    FlashAttention's rowsum(grad * out): `out` holds the quantised ones and the detector's noise.

    Args:
        grad: (B, H, M, Dv), gradient of out.
        q: (B, H, M, D).
        k: (B, G, L, D).
        v: (B, G, L, Dv).
        mask: as in the forward.
        used: float32 (5, 2), the ranges that the forward used.
        key: as in the forward.
        settings: as in the forward.
        wants_mask: whether the mask, an additive one, gets a gradient.

    Returns:
        Gradients of q, k, v and mask, of their shapes and types; of the mask an empty one, (0,),
        unless it is asked for.
    """
    scores, v_hat = _operands(q, k, v, mask, [used[0], used[1], used[3]], settings)
    score_grid = grid(used[2], settings.levels)
    keys = _noise_keys(scores, key, settings, _SCORE_OP)
    grad = grad.float().unflatten(1, scores.shape[1:3])
    grad_q, grad_k = torch.zeros_like(scores.q), torch.zeros_like(scores.k)
    grad_v = torch.zeros_like(v_hat)
    grad_mask = q.new_zeros(_by_group(mask, scores) if wants_mask else 0, dtype=torch.float32)
    for block in scores.blocks():
        seen = (block.batch, block.heads, slice(block.keys))
        raw = scores.accumulate(block)
        weights, total = scores.exponentials(block, raw, score_grid, keys)
        modulated, peak = _modulate(weights, total, settings)
        g = _rows(grad, block)
        grad_v[seen] += modulated.flatten(2, 3).mT @ (g * peak).flatten(2, 3)
        p = weights.div_(total.clamp(min=1)).flatten(2, 3)
        ds = g.flatten(2, 3) @ v_hat[seen].mT
        ds.sub_((p * ds).sum(-1, keepdim=True)).mul_(p)
        if wants_mask:
            # added behind the scale
            own = _part(grad_mask, block)
            own += ds.unflatten(2, g.shape[2:4]).sum_to_size(own.shape)
        ds.mul_(settings.scale)
        _rows(grad_q, block).copy_((ds @ scores.k[seen]).unflatten(2, g.shape[2:4]))
        grad_k[seen] += ds.mT @ _rows(scores.q, block).flatten(2, 3)
    return (
        mask_clipped_(grad_q.flatten(1, 2), q, used[0]).to(q.dtype),
        mask_clipped_(grad_k, k, used[1]).to(k.dtype),
        mask_clipped_(grad_v, v, used[3]).to(v.dtype),
        grad_mask.view(mask.shape).to(mask.dtype) if mask is not None and wants_mask else grad_mask,
    )


def _operands(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, used: list[Tensor], settings: Settings
) -> tuple[Scores, Tensor]:
    """What the modulators show: the scores' operands, and v (B, G, L, Dv)."""
    q_grid, *rest = [grid(bounds, settings.levels) for bounds in used]
    q_hat = modulate(q, q_grid)
    k_hat, v_hat = (modulate(t, at, settings.lut_min) for t, at in zip((k, v), rest, strict=True))
    split = (k.shape[1], q.shape[1] // k.shape[1])
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2]).unflatten(1, split)
    q_hat = q_hat.unflatten(1, split)
    return Scores(q_hat, k_hat, mask, settings.scale, settings.is_causal), v_hat


def _noise_keys(scores: Scores, key: Tensor, settings: Settings, op: int) -> Tensor | None:
    """Noise key of each row of the scores or of the output: int32 (B, G, R, M)."""
    if not settings.noise:
        return None
    shape = scores.shape[:4]
    rows = torch.arange(prod(shape), device=key.device).view(shape)
    return row_keys(rows, key, seed_word(settings.stream, op))


def _rows(t: Tensor, block: Block) -> Tensor:
    """A block's part of a tensor (B, G, R, M, ...)."""
    return t[block.batch, block.heads, :, block.queries]


def _by_group(mask: Tensor | None, scores: Scores) -> tuple[int, ...]:
    """The mask's own shape, as five dimensions that broadcast to the scores'."""
    assert mask is not None
    batches, heads, queries, keys = (1,) * (4 - mask.dim()) + mask.shape
    return batches, *(scores.shape[1:3] if heads > 1 else (1, 1)), queries, keys


def _part(t: Tensor, block: Block) -> Tensor:
    """A block's part of a tensor that broadcasts to the scores."""
    whole = slice(None)
    parts = (block.batch, block.heads, whole, block.queries, slice(block.keys))
    return t[tuple(p if n > 1 else whole for p, n in zip(parts, t.shape, strict=True))]


def _modulate(weights: Tensor, total: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Probabilities as the modulator shows them, over [0, 1].

    Args:
        weights: float32 (..., keys), exponentials with row maximum 1.
        total: float32 (..., 1), their sums.
        settings: of the call.

    Returns:
        The modulated values (..., keys) and what the product has to be multiplied by (..., 1): the
        row's largest probability if the modulator is driven at full range, else 1. Both are 0 in
        a row with nothing to attend to.
    """
    peak = (total > 0) / total.clamp(min=1)
    shown = weights if settings.rowmax else weights * peak
    code = (shown * (settings.levels - 1)).round_()
    code.mul_(1 / (settings.levels - 1))
    return code, peak if settings.rowmax else (total > 0).float()
