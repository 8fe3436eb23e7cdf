"""What a run says on its standard error, and what it keeps quiet of."""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


def set_up(*, is_main: bool, others: int = logging.WARNING, noise: Sequence[str] = ()) -> None:
    """Our own lines on stderr, of rank 0; those of libraries from warnings up, or in debug.

    Args:
        is_main: this is rank 0, or the only one.
        others: the level from which the other ranks speak.
        noise: pieces of libraries' warnings that tell a user nothing.
    """
    debug = os.environ.get("AIXSIM_DEBUG") == "1"
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    if not debug:
        handler.addFilter(lambda record: not any(piece in record.getMessage() for piece in noise))
        # they warn of each other's deprecated calls, once a rank
        among = r"torch(titan|data|\.distributed|\._dynamo|\._inductor)\b"
        warnings.filterwarnings("ignore", category=UserWarning, module=among)
    root = logging.getLogger()
    # in the place of one that a library has put there; who listens otherwise goes on
    root.handlers[:] = [h for h in root.handlers if type(h) is not logging.StreamHandler]
    root.addHandler(handler)
    root.setLevel(logging.INFO if debug else logging.WARNING)
    logging.getLogger("aixsim").setLevel(logging.INFO if is_main else others)


@contextmanager
def each_once() -> Iterator[None]:
    """Of our own lines say none a second time while the block runs."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        known = record.getMessage() in said
        said.add(record.getMessage())
        return not known

    logger = logging.getLogger("aixsim")
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)
