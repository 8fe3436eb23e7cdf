"""What a run does about a step that came to no number: it stops, skips it, or goes back."""

import logging
from collections.abc import Callable
from typing import Literal

from aixsim_cli.errors import RunError
from aixsim_cli.run.ranks import is_main

OnNonfinite = Literal["stop", "skip", "rollback"]

logger = logging.getLogger("aixsim")


class NonfinitePolicy:
    """Counts the steps that were given up since the last checkpoint.

    Args:
        action: "stop" the run; "skip" the step; "rollback" to the last checkpoint and go on with
            the data that follow.
        limit: steps skipped or rolled back between two checkpoints before the run stops.
        key: the setting of the limit, for messages.
    """

    def __init__(self, action: OnNonfinite, limit: int, key: str) -> None:
        self.action, self.limit, self.key = action, limit, key
        self._lost = 0
        self._counted_from: int | None = None
        self._last = -1

    def recover(
        self,
        step: int,
        what: str,
        *,
        spoilt: bool,
        saved: int | None,
        roll_back: Callable[[], int | None],
    ) -> None:
        """Leave a step out, or roll back; a collective, the same on all ranks.

        Args:
            step: the optimizer's step of which was not taken, or came to weights that are spoilt.
            what: is wrong.
            spoilt: the weights themselves, so that leaving out an update does not help.
            saved: the step of the newest checkpoint; None = there is none.
            roll_back: goes back to it, and returns its step; None = there is none.

        Raises:
            RunError: that was once too often, or there is no checkpoint to go back to.
        """
        # a checkpoint that was saved among steps left out in a row is no sign of recovery
        if saved != self._counted_from and step != self._last + 1:
            self._lost = 0
        self._counted_from, self._last = saved, step
        self._lost += 1
        if self._lost > self.limit:
            raise RunError(
                f"step {step}: {what}, {self._lost} times since the last checkpoint; "
                f"{self.key} allows {self.limit}"
            )
        if self.action == "skip" and not spoilt:
            went = "skipped"
        elif (now := roll_back()) is not None:
            went = f"rolled back to step {now}, on with the data that follow"
        else:
            raise RunError(f"step {step}: {what}, and there is no checkpoint to roll back to")
        if is_main():
            logger.warning(
                "step %d: %s; %s (%d of at most %d until the next checkpoint)",
                step,
                what,
                went,
                self._lost,
                self.limit,
            )
