"""Whether weights are numbers: what is saved must be, whatever the loss of the step before was."""

import torch
from torch import Tensor, nn


def all_finite(model: nn.Module) -> Tensor:
    """Whether every weight that this rank holds is finite.

    Args:
        model: sharded or not.

    Returns:
        () bool on the model's device; not synchronised.
    """
    parameters = [_local(parameter) for parameter in model.parameters()]
    held = [p for p in parameters if p.is_floating_point() and p.numel()]
    # the largest magnitude, not the sum of squares, which overflows long before a weight does
    norms = torch._foreach_norm(held, ord=float("inf"))
    return torch.stack([norm.isfinite() for norm in norms]).all()


def _local(parameter: Tensor) -> Tensor:
    to_local = getattr(parameter, "to_local", None)
    return (to_local() if to_local is not None else parameter).detach()
