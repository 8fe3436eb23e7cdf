"""The variables by which a launcher tells each process its rank, as torchrun names them."""

import os

from aixsim_cli.errors import UserError

_FROM_LAUNCHER = "as torchrun sets it, or neither RANK nor WORLD_SIZE"


def is_launched() -> bool:
    """Whether a launcher has started this process, as one of some or alone."""
    return "RANK" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1"


def check_environment() -> int:
    """Check what a launcher has set.

    Returns:
        The number of ranks.

    Raises:
        UserError: a variable is missing, or is not what a launcher sets.
    """
    if os.environ.get("RANK") == "0" and os.environ.get("WORLD_SIZE") == "1":
        # pods of one set no more than these two
        for name, value in {
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
        }.items():
            os.environ.setdefault(name, value)
    size = _whole_number("WORLD_SIZE", 1, 2**31)
    _whole_number("RANK", 0, size)
    _whole_number("LOCAL_RANK", 0, size)
    _whole_number("MASTER_PORT", 0 if size == 1 else 1, 2**16)
    if not os.environ.get("MASTER_ADDR"):
        raise UserError(f"MASTER_ADDR: not set; expected the host of rank 0, {_FROM_LAUNCHER}")
    return size


def _whole_number(name: str, least: int, end: int) -> int:
    text = os.environ.get(name)
    if text is None:
        raise UserError(f"{name}: not set; expected a number, {_FROM_LAUNCHER}")
    if not text.isdecimal() or not least <= int(text) < end:
        raise UserError(f"{name}: got {text!r}; expected {least} to {end - 1}, {_FROM_LAUNCHER}")
    return int(text)


def port_in_use() -> str:
    """What to say where rank 0 cannot listen."""
    return (
        f"MASTER_PORT: got {os.environ.get('MASTER_PORT')}, which another program uses; expected a "
        "free one"
    )


def complete_environment() -> int:
    """`check_environment`; without a launcher, make this process the only rank.

    Returns:
        The number of ranks.

    Raises:
        UserError: as `check_environment`.
    """
    if not is_launched():
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    return check_environment()
