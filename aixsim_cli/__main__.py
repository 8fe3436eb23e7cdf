"""The `aixsim` command, `python -m aixsim_cli`, and `torchrun -m aixsim_cli`."""

import errno
import io
import os
import sys
from typing import Any, NoReturn


class _Output(io.FileIO):
    """A standard output that does not end a run: what it cannot take is remembered, and dropped."""

    lost: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.lost = error
            return memoryview(data).nbytes


def main() -> NoReturn:
    """Run the command line, whatever its outputs are; the imports can be interrupted too."""
    outputs = [_open(number) for number in (1, 2)]
    code: Any = 0
    try:
        from aixsim_cli.main import main as run

        run()
    except KeyboardInterrupt:
        print("aixsim: interrupted", file=sys.stderr)
        code = 130
    except SystemExit as end:
        code = end.code
    finally:
        # what is raised here would not be shown
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    sys.exit(code or _code_of(outputs))


def _open(number: int) -> _Output:
    """Put an `_Output` in the place of Python's own stream.

    A file that is opened later must not take the number of one that is closed: it would become the
    standard output of some library.
    """
    for lower in range(number + 1):
        try:
            os.fstat(lower)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    name = {1: "stdout", 2: "stderr"}[number]
    old = getattr(sys, name)
    output = _Output(number, "w", closefd=False)
    output.name = f"<{name}>"
    unbuffered = getattr(old, "write_through", False)
    stream = io.TextIOWrapper(
        output if unbuffered else io.BufferedWriter(output),  # pyright: ignore[reportArgumentType]
        encoding=old.encoding if old else "utf-8",
        errors=old.errors if old else "backslashreplace",
        line_buffering=number == 2 or output.isatty(),
        write_through=unbuffered,
    )
    setattr(sys, name, stream)
    return output


def _code_of(outputs: list[_Output]) -> int:
    """The exit code of a command that did what it should, by what its outputs lost of it."""
    for output in outputs:
        # a reader that has left, as `head` does, has what it wanted; a terminal that has gone, too
        if output.lost is not None and output.lost.errno not in (errno.EPIPE, errno.EIO):
            said = f"what it says could not be written: {output.lost.strerror}"
            print(f"aixsim: run failed: {said}", file=sys.stderr, flush=True)
            return 1
    return 0


if __name__ == "__main__":
    main()
