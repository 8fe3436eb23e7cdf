"""Set the ranges of a model that was never trained on its hardware."""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from aixsim_cli.errors import UserError
from aixsim_cli.eval.perplexity import batches
from aixsim_cli.models.load import LanguageModel
from aixsim_cli.transforms.state import SimulatedModule, TransformState


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

    And then lamps, whose light depends on these, to what the same batches send. What was set stays
    as it is. Weights are not touched.

    Args:
        model: simulated, in evaluation mode; it is left so.
        windows: (inputs, labels), from text that the model will not be scored on.
        batch_size: windows a forward.
        num_batches: how many of them.

    Raises:
        UserError: the text is shorter than one window.
    """
    assert model.state is not None
    inputs = [one for one, _ in islice(batches(windows, batch_size), num_batches)]
    if not inputs:
        raise UserError("nothing to calibrate on: the text is shorter than one window")
    ranges = [module.ranges for module in _modules(model)]
    own = {id(one) for one in ranges}
    for some in (ranges, [one for one in _ranges(model) if id(one) not in own]):
        if not all(one.isfinite().all() for one in some):
            _set(model, model.state, some, inputs)


def _set(
    model: LanguageModel, state: TransformState, some: list[Tensor], inputs: list[Tensor]
) -> None:
    """Set those of these ranges that were not."""
    running = list(_ranges(model))
    before = [ranges.clone() for ranges in running]
    device = next(model.module.parameters()).device
    state.begin_step(0)
    for module in state.modules.values():
        # these modules alone: a dropout elsewhere stays off
        module.training = True
    for one in inputs:
        model.logits(one.to(device))
    state.end_step()
    for module in state.modules.values():
        module.training = False
    wanted = {id(one) for one in some}
    for ranges, old in zip(running, before, strict=True):
        is_set = old.isfinite().all(dim=1, keepdim=True)
        ranges.copy_(torch.where(is_set, old, ranges) if id(ranges) in wanted else old)


def _modules(model: LanguageModel) -> Iterator[SimulatedModule]:
    return iter(model.state.modules.values() if model.state is not None else ())


def _ranges(model: LanguageModel) -> Iterator[Tensor]:
    return (ranges for module in _modules(model) for ranges in module.range_buffers().values())
