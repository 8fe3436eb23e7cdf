"""The definition: what docs/optical.md says, in plain torch. cpu.py is held to it, Triton to that.

For reading, and for tests in float64: all scores are held at once, and gradients are autograd's.
Values are finite. A range is (lo, hi) in a tensor (2,), never set where lo > hi.
"""

import torch
from torch import Tensor

from aixsim_kernels.common.noise import uniform_noise
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


def noise(like: Tensor, key: Tensor, s: Settings, op: int) -> Tensor:
    """u of every output, a number of its own by row and column: (..., N) -> (..., N)."""
    u = uniform_noise(like[..., 0].numel(), like.shape[-1], key, s.stream, op=op)  # (rows, N)
    return u.to(like).view_as(like) * s.noise


def detect(acc: Tensor, bounds: Tensor, levels: int, u: Tensor) -> Tensor:
    """What a detector reads: (...) -> (...). Straight-through, also where it clips."""
    bounds = used(bounds, acc)  # (2,)
    code = (position(acc, bounds, levels) + u).round().clamp(0, levels - 1)  # (...)
    return acc + (value(code, bounds, levels) - acc).detach()


def optical_linear(x, weight, bias, ranges, key, s: Settings):
    """x (M, K), weight (N, K), bias (N,) -> y (M, N), and what its three ranges are taken of."""
    w_hat = modulate(weight, ranges[1], s.levels, s.lut_min)  # (N, K)
    acc = modulate(x, ranges[0], s.levels) @ w_hat.T  # (M, N)
    y = detect(acc, ranges[2], s.levels, noise(acc, key, s, op=0))  # (M, N)
    return y if bias is None else y + bias, [x, weight, acc]


def optical_attention(q, k, v, mask, ranges, key, s: Settings):
    """q (B, H, M, D), k (B, G, L, D), v (B, G, L, V) -> out (B, H, M, V), as above, kept mass."""
    times, later = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    k_hat = modulate(k, ranges[1], s.levels, s.lut_min).repeat_interleave(times, 1)  # (B, H, L, D)
    v_hat = modulate(v, ranges[3], s.levels, s.lut_min).repeat_interleave(times, 1)  # (B, H, L, V)
    acc = modulate(q, ranges[0], s.levels) @ k_hat.mT  # (B, H, M, L)
    added = torch.zeros(()) if mask is None else mask
    added = torch.where(added, 0.0, -torch.inf) if added.dtype == torch.bool else added
    sees = (added > torch.finfo(added.dtype).min / 2).expand_as(acc)  # (B, H, M, L)
    sees = sees.tril(later) if s.is_causal else sees
    read = detect(acc, used(ranges[2], acc[sees]), s.levels, noise(acc, key, s, op=0))
    score = (s.scale * read + added).masked_fill(~sees, -torch.inf)  # (B, H, M, L)
    p = score.softmax(-1).masked_fill(~sees, 0)  # (B, H, M, L), 0 in a row that sees nothing
    peak = p.detach().amax(-1, keepdim=True)  # (B, H, M, 1)
    full = peak if s.rowmax else (peak > 0).to(peak)  # (B, H, M, 1), what full light stands for
    shown = modulate(p / (full + (full == 0)), torch.tensor([0.0, 1.0]), s.levels)  # (B, H, M, L)
    light = shown @ v_hat  # (B, H, M, V)
    out = detect(light, ranges[4], s.levels, noise(light, key, s, op=1)) * full  # (B, H, M, V)
    return out, [q, k, acc[sees], v, light], (shown * full).sum() / (peak > 0).sum()
