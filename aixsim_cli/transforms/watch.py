"""Tells a training loop that leaves the ranges where they are: once, and out loud.

Our trainers, and every Trainer of transformers, end a step by `TransformState.end_step`. A loop of
somebody's own may forget it, and its loss falls all the same.
"""

import logging
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

logger = logging.getLogger("aixsim")
# a loop may have several optimizers, and update one of them more often
PATIENCE = 8
_taken = 0


def _count(*_: Any) -> None:
    global _taken
    # inside a compiled step a counter would be a constant
    if not torch.compiler.is_compiling():
        _taken += 1


# every optimizer of the process: a model does not know its own
register_optimizer_step_post_hook(_count)


class StepWatch:
    """Counts the optimizer steps between training calls that no `end_step` followed.

    Args:
        has_ranges: whether there is something to move.
    """

    def __init__(self, has_ranges: bool) -> None:
        self.seen = _taken
        self.idle = 0
        self.told = not has_ranges

    def moved(self) -> None:
        """The ranges were updated."""
        self.idle = 0

    def called(self) -> None:
        """The model is called for training; micro-batches of one step count once."""
        if self.seen == _taken:
            return
        self.seen = _taken
        self.idle += 1
        if self.idle >= PATIENCE and not self.told:
            self.told = True
            logger.warning(
                "%d optimizer steps, and the ranges of the simulated modules did not move: what "
                "is saved is not what was trained; expected `state.begin_step(step)` before each "
                "step and `state.end_step()` after it, with state = model.transform_state",
                self.idle,
            )
