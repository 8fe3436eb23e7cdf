"""The `aixsim` command, `python -m aixsim_cli`, and `torchrun -m aixsim_cli`."""

import os
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line, whatever its outputs are; the imports can be interrupted too."""
    _open_closed_outputs()
    try:
        from aixsim_cli.main import main as run

        run()
    except KeyboardInterrupt:
        print("aixsim: interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        _drop_what_nobody_reads()


def _open_closed_outputs() -> None:
    """A file that is opened later must not become the standard output of some library."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8")  # noqa: SIM115


def _drop_what_nobody_reads() -> None:
    """What a pipe that is closed did not take would be an error at Python's own end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    main()
