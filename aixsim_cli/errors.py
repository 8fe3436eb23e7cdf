"""The errors that a user can cause, and how they are worded.

`UserError` and its subclasses carry a complete sentence for the terminal; `main` prints it and
picks the exit code. Everything else that is raised is a bug or a failed run.
"""

import difflib
import pickle
import signal
from collections.abc import Iterable

# what one message may take, and how many of them and of the words that they offer are shown
_LONGEST_MESSAGE = 2000
LONGEST_VALUE = 200
MOST_PROBLEMS = 20
_MOST_WORDS = 20
# of a signal that asks to stop; 75 is EX_TEMPFAIL, "try again later": what a scheduler may take
# for "start it again"
EXIT_CODES: dict[int, int] = {signal.SIGTERM: 75, signal.SIGINT: 130}


class _Told(Exception):
    """Its message goes to a terminal: bounded, and without characters that would steer it."""

    def __init__(self, message: str = "", *, limit: int = _LONGEST_MESSAGE) -> None:
        super().__init__(printable(shorten(message, limit)))


class UserError(_Told):
    """A user's mistake: the message says what is wrong, where, and what would be right (exit 2)."""


class ConfigError(UserError):
    """Everything that is wrong with a configuration, reported at once.

    Args:
        problems: one complete message each, `where: key: got X; expected Y`.
    """

    def __init__(self, problems: list[str]) -> None:
        told = [shorten(problem, _LONGEST_MESSAGE) for problem in problems[:MOST_PROBLEMS]]
        if len(problems) > MOST_PROBLEMS:
            told.append(f"… and {len(problems) - MOST_PROBLEMS} more")
        super().__init__("\n".join(told), limit=(MOST_PROBLEMS + 1) * (_LONGEST_MESSAGE + 1))
        self.problems = problems


class SaidElsewhere(UserError):
    """A mistake that another rank meets too, and speaks of: this one says nothing (exit 2)."""


class RunError(_Told):
    """A run that started and failed for a reason that can be named (exit 1)."""


class Stopped(BaseException):
    """A signal ended a command, which has put in order what it was at (exit `EXIT_CODES`).

    No `Exception`, as a KeyboardInterrupt is none: no library takes it for a failure of its own.

    Args:
        signal: its number.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


def loss_not_finite(of: str) -> RunError:
    """The failure of an evaluation that came to no number.

    Args:
        of: whose loss, as a message begins with it.
    """
    return RunError(
        f"{of} is not finite, though every weight is: numbers overflow in the forward; expected "
        "another --dtype: float32 has the widest range"
    )


def reason_of(error: BaseException) -> str:
    """What a library raised, in one line, without advice that would do harm.

    Libraries recommend to run the code of a folder, or to read its pickles unsafely, whoever it is
    of; that is said here as what it is.
    """
    text = str(error)
    if "trust_remote_code" in text:
        return (
            "it needs Python code of its own, which was not run; --trust-remote-code runs it, in "
            "the commands that have it, if you trust who wrote it"
        )
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in text:
        return (
            "its weights are a pickle that is damaged or holds more than tensors, and nothing of "
            "it was run; expected .safetensors files"
        )
    said = f"{type(error).__name__}; AIXSIM_DEBUG=1 shows the traceback"
    return f"{first_line(error)} ({said})"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, with the next where it ends in a colon.

    The name of its class where it says nothing.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first, *rest = lines or [type(error).__name__]
    return f"{first} {rest[0]}" if first.endswith(":") and rest else first


def closest(word: str, options: Iterable[str]) -> str | None:
    """The valid word that is most like what the user wrote; None = none is."""
    lowered = {option.lower(): option for option in sorted(set(options), reverse=True)}
    close = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    return lowered[close[0]] if close else None


def nearest(word: str, options: Iterable[str], *, prefix: str = "") -> str:
    """The end of an error message that offers the closest valid words.

    Args:
        word: what the user wrote.
        options: the valid words.
        prefix: shown before each of them, and not compared.

    Returns:
        `; did you mean 'x'?` when something is close, else `; expected one of …`.
    """
    valid = sorted(set(options))
    close = closest(word, valid)
    if close is not None:
        return f"; did you mean '{prefix}{close}'?"
    rest = f", … ({len(valid)} in all)" if len(valid) > _MOST_WORDS else ""
    return f"; expected one of: {', '.join(prefix + word for word in valid[:_MOST_WORDS])}{rest}"


def shown(value: object) -> str:
    """A value as a message shows it: Python's own form of it, its middle left out where long."""
    return shorten(repr(value), LONGEST_VALUE)


def shorten(text: str, limit: int) -> str:
    """A text of at most `limit` characters: what is too much is taken out of its middle.

    A message begins with what is wrong and ends with what would be right.
    """
    if len(text) <= limit:
        return text
    head = limit * 2 // 3
    return f"{text[:head]}…{text[len(text) - (limit - head - 1) :]}"


def printable(text: str) -> str:
    """A text without characters that would steer a terminal: they are shown as codes."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
