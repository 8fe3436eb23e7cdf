"""Whether what is saved, or was loaded, can be trained on: no NaN, no infinity anywhere."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def all_finite(model: nn.Module, optimizers: Iterable[Optimizer] = ()) -> Tensor:
    """Whether every weight, range and moment that this rank holds is finite.

    Each number is read once: a NaN or an infinity stays in the extremes.

    Args:
        model: sharded or not. Ranges that are not yet set, (+inf, -inf), are fine.
        optimizers: of the model; a moment that is not finite spoils the next step.

    Returns:
        () bool on the model's device; not synchronised.
    """
    held = [_local(p) for p in model.parameters()]
    held += [_local(moment) for optimizer in optimizers for moment in _moments(optimizer)]
    held = [t for t in held if t.is_floating_point() and t.numel()]
    extremes = [torch.stack(torch.aminmax(t)).float() for t in held]
    ends = torch.cat(extremes) if extremes else torch.zeros(1)
    finite = ends.isfinite().all()
    ranges = [b for name, b in model.named_buffers() if name.endswith("ranges") and b.numel()]
    return finite & are_ranges(torch.cat(ranges)).all() if ranges else finite


def first_nonfinite(model: nn.Module) -> str | None:
    """The first weight that is not finite, of those that this rank holds."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not _local(parameter).isfinite().all():
            return name
    return None


def are_ranges(ranges: Tensor) -> Tensor:
    """Which pairs are ranges: finite with lo <= hi, or not yet set, (+inf, -inf).

    Args:
        ranges: (..., 2), (lo, hi) each.

    Returns:
        (...) bool, on the same device.
    """
    low, high = ranges.unbind(-1)
    is_set = low.isfinite() & high.isfinite() & (low <= high)
    return is_set | (low.isposinf() & high.isneginf())


def _moments(optimizer: Optimizer) -> Iterator[Tensor]:
    """Its state but for counts of steps, which may be on another device."""
    for state in optimizer.state.values():
        yield from (v for v in state.values() if isinstance(v, Tensor) and v.dim() > 0)


def _local(parameter: Tensor) -> Tensor:
    to_local = getattr(parameter, "to_local", None)
    return (to_local() if to_local is not None else parameter).detach()
