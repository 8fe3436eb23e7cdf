"""Signals that ask a run to stop: it writes a checkpoint after the step at hand, and ends."""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from aixsim_cli.errors import EXIT_CODES, Stopped

_IMPATIENT_AFTER = 1.0

logger = logging.getLogger("aixsim")


class StopSignals:
    """Remembers a SIGTERM or SIGINT while it is entered.

    A second SIGINT, a second or more after the first, interrupts at once; a launcher may pass the
    same Ctrl-C on twice.
    """

    def __init__(self) -> None:
        self.received = 0  # number of the signal
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in EXIT_CODES}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received == signal.SIGINT == number and now - self._at > _IMPATIENT_AFTER:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self._at = number, now


@contextmanager
def ends_on_sigterm() -> Iterator[None]:
    """Make a SIGTERM in the block end it as an exception does, so that it cleans up after itself.

    Raises:
        Stopped: where one came.
    """
    stop = Stopped(signal.SIGTERM)
    received = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = True
        # once: cleaning up is not interrupted
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        logger.warning("stopped by SIGTERM")
        raise stop

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except BaseException:
        # a library may have made another exception of it
        if received:
            raise stop from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def say_stopped(number: int, step: int, kept: str) -> None:
    """Log the end of a run that a signal stopped.

    Args:
        number: of the signal.
        step: the last one.
        kept: what there is of it, and how to go on.
    """
    name = signal.Signals(number).name
    logger.info("stopped by %s after step %d, %s", name, step, kept)
