"""The errors that a user can cause, and how they are worded.

`UserError` and its subclasses carry a complete sentence for the terminal; `main` prints it and
picks the exit code. Everything else that is raised is a bug or a failed run.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A user's mistake: the message says what is wrong, where, and what would be right (exit 2)."""


class ConfigError(UserError):
    """Everything that is wrong with a configuration, reported at once.

    Args:
        problems: one complete message each, `where: key: got X; expected Y`.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class RunError(Exception):
    """A run that started and failed for a reason that can be named (exit 1)."""


def nearest(word: str, options: Iterable[str]) -> str:
    """The end of an error message that offers the closest valid words.

    Args:
        word: what the user wrote.
        options: the valid words.

    Returns:
        `; did you mean 'x'?` when something is close, else `; expected one of …`.
    """
    valid = sorted(set(options))
    lowered = {option.lower(): option for option in reversed(valid)}
    close = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{lowered[close[0]]}'?"
    return f"; expected one of: {', '.join(valid)}"
