"""Set the ranges of a model that was never trained on its hardware."""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from aixsim_cli.errors import UserError
from aixsim_cli.eval.perplexity import batches
from aixsim_cli.models.load import LanguageModel
from aixsim_cli.transforms.state import SimulatedModule


def has_ranges(model: LanguageModel) -> bool:
    """Whether a simulated module has running ranges."""
    return any(module.range_buffers() for module in _modules(model))


def needs_calibration(model: LanguageModel) -> bool:
    """Whether a simulated module has a range that was never set."""
    return any(not ranges.isfinite().all() for ranges in _ranges(model))


@torch.no_grad()
def calibrate(
    model: LanguageModel,
    windows: Iterable[tuple[Tensor, Tensor]],
    *,
    batch_size: int,
    num_batches: int,
) -> None:
    """Set unset ranges to the extremes of some batches, all seen with the same ranges.

    Ranges that were set stay as they are. Weights are not touched.

    Args:
        model: simulated, in evaluation mode; it is left so.
        windows: (inputs, labels), from text that the model will not be scored on.
        batch_size: windows a forward.
        num_batches: how many of them.

    Raises:
        UserError: the text is shorter than one window.
    """
    assert model.state is not None
    modules = list(_modules(model))
    running = list(_ranges(model))
    before = [ranges.clone() for ranges in running]
    device = next(model.module.parameters()).device
    model.state.begin_step(0)
    for module in modules:
        # these modules alone: a dropout elsewhere stays off
        module.training = True
    seen = 0
    for inputs, _ in islice(batches(windows, batch_size), num_batches):
        model.logits(inputs.to(device))
        seen += 1
    model.state.end_step()
    for module in modules:
        module.training = False
    for ranges, old in zip(running, before, strict=True):
        is_set = old.isfinite().all(dim=1, keepdim=True)
        ranges.copy_(torch.where(is_set, old, ranges))
    if not seen:
        raise UserError("nothing to calibrate on: the text is shorter than one window")


def _modules(model: LanguageModel) -> Iterator[SimulatedModule]:
    return iter(model.state.modules.values() if model.state is not None else ())


def _ranges(model: LanguageModel) -> Iterator[Tensor]:
    return (ranges for module in _modules(model) for ranges in module.range_buffers().values())
