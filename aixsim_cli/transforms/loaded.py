"""What was loaded must be numbers: files can be whole and hold nonsense."""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from aixsim_cli.errors import UserError
from aixsim_cli.run.finite import are_ranges

logger = logging.getLogger("aixsim")


@torch.no_grad()
def check_numbers(tensors: Mapping[str, Tensor], where: str) -> None:
    """See that weights are finite and ranges are ranges.

    A range (lo, hi) is not set, (+inf, -inf), or finite with lo <= hi; of a module that has only
    ever seen zeros it is (0, 0), which is told.

    Args:
        tensors: weights, and ranges float32 (n, 2) under names that end in `.ranges`.
        where: folder or hub name, for the message.

    Raises:
        UserError: naming the first tensor that is neither.
    """
    zero = []
    for name, tensor in tensors.items():
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        if name.endswith(".ranges"):
            _check_ranges(tensor, name, where)
            if tensor.numel() and bool((tensor == 0).all(dim=-1).any()):
                zero.append(name)
        elif not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise UserError(
                f"{where}: {name}: {bad} of {tensor.numel()} numbers are NaN or infinite; expected "
                "a model whose training did not break down, as an earlier checkpoint may be"
            )
    if zero:
        logger.warning(
            "%s: %d modules have a range from 0 to 0, so that they give zeros: %s",
            where,
            len(zero),
            ", ".join(zero[:3]),
        )


def _check_ranges(ranges: Tensor, name: str, where: str) -> None:
    wrong = ~are_ranges(ranges)
    if bool(wrong.any()):
        shown = ranges[wrong][0].tolist()
        raise UserError(f"{where}: {name}: got the range {shown}; expected lo <= hi, both finite")
