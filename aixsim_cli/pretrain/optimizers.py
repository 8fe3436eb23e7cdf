"""torchtitan's optimizers, asked before each step whether it may be taken."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import Optimizer as OptimizerConfig
from torchtitan.distributed import ParallelDims


class WatchedOptimizers(OptimizersContainer):
    """A step that may not be taken changes no weight and no moment.

    torchtitan computes the gradient's norm inside `train_step` and shows it to nobody before the
    weights have been changed by it; here is the one place between the two.
    """

    may_step: Callable[[], bool] = staticmethod(lambda: True)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """torchtitan's, if the trainer agrees."""
        if self.may_step():
            super().step(*args, **kwargs)


def build_optimizers(
    model_parts: list[nn.Module], config: OptimizerConfig, parallel_dims: ParallelDims
) -> WatchedOptimizers:
    """torchtitan's hook for optimizers.

    Args:
        config: checked: Adam or AdamW, and none that steps within the backward.
    """
    settings = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "fused": config.implementation == "fused",
        "foreach": config.implementation == "foreach",
    }
    return WatchedOptimizers(model_parts, getattr(torch.optim, config.name), settings)


def clipped_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """What tells of a gradient after clipping, on this rank, mostly without a look at all of it.

    Clipping multiplies every gradient by one number: NaN where the norm of all was NaN, 0 where it
    was infinite. So the vectors among the weights, a few thousand numbers, tell of the rest.

    Args:
        parameters: of the model, with gradients.

    Returns:
        () float32, a sum of norms: NaN = the gradient was not finite; 0 = its norm was infinite, or
        these are 0 by themselves, and all of them tell (`whole_norm`).
    """
    return whole_norm([p for p in parameters if p.dim() < 2])


def whole_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """As `clipped_norm`, of all of a gradient: it is 0 where its norm overflowed."""
    gradients = [_local(p.grad) for p in parameters if p.grad is not None]
    held = [gradient for gradient in gradients if gradient.numel()]
    if not held:
        return torch.zeros(())
    return torch.stack(torch._foreach_norm(held)).float().sum()


def _local(gradient: Tensor) -> Tensor:
    to_local = getattr(gradient, "to_local", None)
    return to_local() if to_local is not None else gradient
