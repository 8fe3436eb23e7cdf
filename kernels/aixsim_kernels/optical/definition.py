"""The definition: what docs/optical.md says, in plain torch. cpu.py is held to it, Triton to that.

For reading, and for tests in float64: all scores are held at once, and gradients are autograd's.
Values are finite. A range is (lo, hi) in a tensor (2,), never set where lo > hi.
"""

import torch
from torch import Tensor

from aixsim_kernels.common.noise import normal_noise, uniform_noise
from aixsim_kernels.optical import pixels
from aixsim_kernels.optical.settings import Settings


def used(bounds: Tensor, x: Tensor) -> Tensor:
    """The range that x (...) is worked with, (2,): the one that was set, or x's extremes."""
    return (bounds if bounds[0] <= bounds[1] else torch.stack(x.detach().aminmax())).to(x)


def position(x: Tensor, bounds: Tensor, levels: int) -> Tensor:
    """Where x lies on the grid of its range, in levels, before it is rounded: (...) -> (...)."""
    lo, hi = bounds
    return (x - lo) / (hi - lo + (hi == lo)) * (levels - 1)


def value(code: Tensor, bounds: Tensor, levels: int) -> Tensor:
    """What a code stands for: (...) -> (...)."""
    return bounds[0] + code * (bounds[1] - bounds[0]) / (levels - 1)


def modulate(x: Tensor, bounds: Tensor, levels: int, lut_min: float = 0.0) -> Tensor:
    """What a modulator shows: (...) -> (...). Straight-through, without gradient where it clips."""
    lo, hi = bounds = used(bounds, x)  # (2,)
    clipped = x.clamp(lo, hi)  # (...)
    shown = value(position(clipped, bounds, levels).round(), bounds, levels)  # (...)
    above, below = shown.clamp(min=lut_min * hi), shown.clamp(max=-lut_min * lo.abs())  # (...)
    dark = shown.abs() <= 2.0**-22 * bounds.abs().max()  # (...), 0 but for float32's rounding
    shown = torch.where(dark, shown, torch.where(shown > 0, above, below))  # (...)
    return clipped + (shown - clipped).detach()


def shown_by_pixels(b: Tensor, bounds: Tensor, bright: Tensor | float, s: Settings) -> Tensor:
    """What pixels of these brightnesses make of shown values: (...) -> (...)."""
    dark = bounds[0] if s.offset else 0.0
    return dark + bright * (b - dark)


def light(a: Tensor, b: Tensor, lo_a: Tensor, lo_b: Tensor, s: Settings) -> Tensor:
    """Light on the detectors, in units of a b^T: (..., M, K), (..., N, K) -> (..., M, N)."""
    a, b = a.detach(), b.detach()
    return (a - lo_a) @ (b - lo_b).mT if s.offset else a.abs() @ b.abs().mT


def by_margins(lit: Tensor, b: Tensor, s: Settings) -> Tensor:
    """What a linear with weights b (N, K) takes for its light (M, N), that of rows on average."""
    of_column = b.detach().abs().sum(1)  # (N,)
    return lit if s.offset else lit.mean(1, keepdim=True) * of_column / of_column.mean()


def noise(like: Tensor, key: Tensor, s: Settings, op: int) -> Tensor:
    """u of every output, a number of its own by row and column: (..., N) -> (..., N)."""
    draw = normal_noise if s.has_light else uniform_noise
    u = draw(like[..., 0].numel(), like.shape[-1], key, s.stream, op=op)  # (rows, N)
    return u.to(like).view_as(like) * s.noise


def shot_noise(lit: Tensor, mean: Tensor, bounds: Tensor, key: Tensor, s: Settings, op: int):
    """Noise in levels of outputs that get the light `lit`, its mean a multiplication `mean`."""
    electron = mean / s.photons  # what one is worth
    reads = 1 if s.offset else 4
    deviation = (electron * lit + reads * (electron * s.read_noise) ** 2).sqrt()  # (..., N)
    return noise(lit, key, s, op) * position(bounds[0] + deviation, bounds, s.detector_levels)


def detect(acc: Tensor, bounds: Tensor, levels: int, u: Tensor) -> Tensor:
    """What a detector reads: (...) -> (...). Straight-through, also where it clips."""
    code = (position(acc, bounds, levels) + u).round().clamp(0, levels - 1)  # (...)
    return acc + (value(code, bounds, levels) - acc).detach()


def lamp(bounds: Tensor, lit: Tensor, multiplications: Tensor | int) -> Tensor:
    """Mean light a multiplication that a lamp is set to: the middle of its range, or this one."""
    own = lit.sum() / multiplications
    return own if bounds[0] > bounds[1] else bounds.mean().to(own)


def optical_linear(x, weight, bias, ranges, key, s: Settings):
    """x (M, K), weight (N, K), bias (N,) -> y (M, N), and what its ranges are taken of."""
    x_at, w_at = used(ranges[0], x), used(ranges[1], weight)
    w_hat = modulate(weight, w_at, s.levels, s.lut_min)  # (N, K)
    if s.has_defects:
        w_hat = shown_by_pixels(w_hat, w_at, pixels.brightness(weight, key, s).to(x), s)
    x_hat = modulate(x, x_at, s.levels)  # (M, K)
    acc = x_hat @ w_hat.T  # (M, N)
    y_at = used(ranges[2], acc)
    if s.has_light:
        lit = by_margins(light(x_hat, w_hat, x_at[0], w_at[0], s), w_hat, s)  # (M, N)
        u = shot_noise(lit, lamp(ranges[3], lit, lit.numel() * x.shape[1]), y_at, key, s, op=0)
    else:
        u = noise(acc, key, s, op=0)  # (M, N)
    y = detect(acc, y_at, s.detector_levels, u)  # (M, N)
    return y if bias is None else y + bias, [x, weight, acc]


def optical_attention(q, k, v, mask, ranges, key, s: Settings):
    """q (B, H, M, D), k (B, G, L, D), v (B, G, L, V) -> out (B, H, M, V), as above, kept mass."""
    times, later = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    levels_out = s.detector_levels
    q_at, k_at, v_at = (used(ranges[i], x) for i, x in ((0, q), (1, k), (3, v)))
    k_hat = modulate(k, k_at, s.levels, s.lut_min)  # (B, G, L, D)
    v_hat = modulate(v, v_at, s.levels, s.lut_min)  # (B, G, L, V)
    if s.has_defects:
        how = {"key": key, "settings": s, "repeats": times}
        k_hat = shown_by_pixels(k_hat, k_at, pixels.brightness(k, array=0, **how).to(q), s)
        v_hat = shown_by_pixels(v_hat, v_at, pixels.brightness(v, array=1, **how).to(q), s)
    k_hat, v_hat = (t.repeat_interleave(times, 1) for t in (k_hat, v_hat))  # (B, H, L, D or V)
    q_hat = modulate(q, q_at, s.levels)  # (B, H, M, D)
    acc = q_hat @ k_hat.mT  # (B, H, M, L)
    added = torch.zeros(()) if mask is None else mask
    added = torch.where(added, 0.0, -torch.inf) if added.dtype == torch.bool else added
    sees = (added > torch.finfo(added.dtype).min / 2).expand_as(acc)  # (B, H, M, L)
    sees = sees.tril(later) if s.is_causal else sees
    score_at = used(ranges[2], acc[sees])
    if s.has_light:
        lit = light(q_hat, k_hat, q_at[0], k_at[0], s)  # (B, H, M, L)
        mean = lamp(ranges[5], lit * sees, sees.sum() * q.shape[-1])
        u = shot_noise(lit, mean, score_at, key, s, op=0)  # (B, H, M, L)
    else:
        u = noise(acc, key, s, op=0)  # (B, H, M, L)
    read = detect(acc, score_at, levels_out, u)
    score = (s.scale * read + added).masked_fill(~sees, -torch.inf)  # (B, H, M, L)
    p = score.softmax(-1).masked_fill(~sees, 0)  # (B, H, M, L), 0 in a row that sees nothing
    peak = p.detach().amax(-1, keepdim=True)  # (B, H, M, 1)
    full = peak if s.rowmax else (peak > 0).to(peak)  # (B, H, M, 1), what full light stands for
    shown = modulate(p / (full + (full == 0)), torch.tensor([0.0, 1.0]), s.levels)  # (B, H, M, L)
    product = shown @ v_hat  # (B, H, M, V)
    out_at = used(ranges[4], product)
    if s.has_light:
        lit = light(shown, v_hat.mT, torch.zeros(()), v_at[0], s)  # (B, H, M, V)
        mean = lamp(ranges[6], lit, sees.sum() * v.shape[-1])
        u = shot_noise(lit, mean, out_at, key, s, op=1)  # (B, H, M, V)
    else:
        u = noise(product, key, s, op=1)  # (B, H, M, V)
    out = detect(product, out_at, levels_out, u) * full  # (B, H, M, V)
    kept = (shown * full).sum() / (peak > 0).sum()
    return out, [q, k, acc[sees], v, product], kept
