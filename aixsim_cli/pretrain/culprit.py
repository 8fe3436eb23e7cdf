"""Which module made a loss or gradient that is not finite."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def first_culprit(model: nn.Module, inputs: Sequence[Tensor]) -> str:
    """The first module in the order of computation whose output or gradient is not finite.

    Args:
        model: with the gradients of the step.
        inputs: (B, L) int64, the step's.
    """
    for tokens in inputs:
        found = first_nonfinite_output(model, tokens)
        if found is not None:
            return f"first seen in the output of {found}"
    names = [name for name, p in model.named_parameters() if not _grad_is_finite(p)]
    # backward runs from the last module to the first
    return f"first seen in the gradient of {names[-1]}" if names else "no module found"


def first_nonfinite_output(model: nn.Module, tokens: Tensor) -> str | None:
    """Run the model forward once, and name the first module whose output is not finite.

    Args:
        model: left as it was; nothing is recorded.
        tokens: (B, L) int64.
    """
    found: list[str] = []

    def hook(name: str):
        def check(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not found and not torch.isfinite(output).all():
                found.append(name)

        return check

    handles = [
        module.register_forward_hook(hook(name.replace("_orig_mod.", "")))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    model.eval()
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        model.train()
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _grad_is_finite(parameter: nn.Parameter) -> bool:
    gradient = parameter.grad
    if gradient is None:
        return True
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient  # pyright: ignore
    return bool(torch.isfinite(local).all())
