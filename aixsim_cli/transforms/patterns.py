"""The patterns of a transform: names, or regular expressions of a stranger's file.

A regular expression can take any time and any memory, to compile as to match. What it asks for is
therefore counted before it is compiled, and the matching of a transform has a time limit.
"""

import re
import time
from collections.abc import Iterator, Sequence

import regex

from aixsim_cli.errors import ConfigError

MAX_NAMES = 10_000
MAX_EXPRESSIONS = 500
# of one expression with its counted repetitions written out, and of all of them together
MAX_LENGTH = 10_000
MAX_TOTAL_LENGTH = 100_000
MAX_DEPTH = 40
SECONDS = 1
# of each match so much is not counted: an ordinary one takes microseconds
_QUICK = 2e-5
# no match is stopped before: a pause of the process would look like a slow one
_SHORTEST = 1e-2
_LONGEST_SHOWN = 80
_COUNT = re.compile(r"\{(\d*),?(\d*)\}")
# what may follow a bracket: no recursion, no call of another group, no condition, no comment
_GROUP = re.compile(r"\((\?(:|>|=|!|<=|<!|P?<\w+>|[aimsu-]+:)|(?![?*]))")
_FLAGS = re.compile(r"\(\?[aimsu]+\)")
_ESCAPE = re.compile(r"\\(?:[pPN]\{[^}]*\}|g<[^>]*>|.)", re.DOTALL)
_CLASS = re.compile(r"\[\^?(?:\\.|[^\]\\])*\]", re.DOTALL)


def quoted(pattern: str) -> str:
    """A pattern as a message shows it: in quotes where it is empty, cut where it is long."""
    if not pattern.strip():
        return repr(pattern)
    return pattern if len(pattern) <= _LONGEST_SHOWN else f"{pattern[:_LONGEST_SHOWN]}…"


def problems_of(patterns: Sequence[str], *, use_regex: bool) -> Iterator[str]:
    """What is wrong with the patterns of one transform; none is matched, few are compiled.

    Args:
        patterns: in order.
        use_regex: whether they are regular expressions.
    """
    most = MAX_EXPRESSIONS if use_regex else MAX_NAMES
    if len(patterns) > most:
        kind = "regular expressions" if use_regex else "names"
        yield f"layer_name_to_config: got {len(patterns):,} {kind}; expected at most {most:,}"
        return
    total = 0
    for pattern in patterns:
        if not pattern.strip():
            yield f"layer_name_to_config: got the empty pattern {pattern!r}; expected a name"
        elif use_regex:
            try:
                total += length_written_out(pattern)
                if total > MAX_TOTAL_LENGTH:
                    yield (
                        f"layer_name_to_config: its expressions come to more than "
                        f"{MAX_TOTAL_LENGTH:,} characters; expected shorter ones"
                    )
                    return
                regex.compile(pattern)
            except (regex.error, ValueError, RecursionError, OverflowError) as error:
                yield f"{quoted(pattern)}: not a regular expression that is taken: {error}"


def length_written_out(pattern: str) -> int:
    """How many items a regular expression has with its counted repetitions written out.

    `((a{1000}){1000}){1000}` has a thousand million, and takes as much memory.

    Raises:
        ValueError: too many, too deep, or a construct without a bound.
    """
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"it has {len(pattern):,} characters; expected at most {MAX_LENGTH:,}")
    open_groups = [0]  # items of each group that is open
    last = 0  # items of what a repetition would repeat
    place = 0
    while place < len(pattern):
        letter = pattern[place]
        found = None
        if letter == "(":
            found = _FLAGS.match(pattern, place)
            last = 0
            if found is None:
                found = _group_at(pattern, place)
                open_groups.append(0)
            if len(open_groups) > MAX_DEPTH:
                raise ValueError(f"its groups are more than {MAX_DEPTH - 1} deep")
        elif letter == ")" and len(open_groups) > 1:
            last = max(1, open_groups.pop())
            open_groups[-1] += last
        elif letter == "{":
            found = _COUNT.match(pattern, place)
            times = [int(digits[:6]) for digits in found.groups() if digits] if found else []
            if found is None or not times:
                raise ValueError(f"got '{pattern[place : place + 8]}'; expected {{m}} or {{m,n}}")
            more = last * (max(1, *times) - 1)
            open_groups[-1] += more
            last += more
        elif letter not in "*+?|":
            found = _ESCAPE.match(pattern, place) or _CLASS.match(pattern, place)
            if letter == "[" and found is None:
                raise ValueError("a '[' is not closed")
            last = 1
            open_groups[-1] += 1
        if sum(open_groups) > MAX_LENGTH:
            raise ValueError(f"written out it has more than {MAX_LENGTH:,} items")
        place = found.end() if found else place + 1
    return max(len(pattern), sum(open_groups))


def _group_at(pattern: str, place: int) -> "re.Match[str]":
    found = _GROUP.match(pattern, place)
    if found is None:
        raise ValueError(
            f"got '{pattern[place : place + 6]}'; expected groups without recursion, calls, "
            "conditions and comments"
        )
    return found


class Matcher:
    """Finds the first pattern that matches a name in full.

    Args:
        patterns: without problems, in order.
        use_regex: whether they are regular expressions.
        source: the file, for messages.
    """

    def __init__(self, patterns: Sequence[str], *, use_regex: bool, source: str) -> None:
        self._names = {} if use_regex else {name: i for i, name in enumerate(patterns)}
        self._expressions = [regex.compile(p) for p in patterns] if use_regex else []
        self._source = source
        self._spent = 0.0

    def first(self, names: Sequence[str]) -> int | None:
        """The place in the order of the first pattern that matches any of the names.

        Raises:
            ConfigError: the patterns take too long.
        """
        found = [self._names[name] for name in names if name in self._names]
        if found:
            return min(found)
        return next((i for i in range(len(self._expressions)) if self.matches(i, names)), None)

    def matches(self, place: int, names: Sequence[str]) -> bool:
        """Whether one pattern matches any of the names.

        Raises:
            ConfigError: the patterns take too long.
        """
        if not self._expressions:
            return any(self._names.get(name) == place for name in names)
        return any(self._fullmatch(self._expressions[place], name) for name in names)

    def _fullmatch(self, expression: "regex.Pattern[str]", name: str) -> bool:
        start = time.process_time()
        try:
            found = expression.fullmatch(name, timeout=max(_SHORTEST, SECONDS - self._spent))
        except TimeoutError:
            raise self._too_slow(expression, name) from None
        except MemoryError:
            raise ConfigError(
                [f"{self._source}: {quoted(expression.pattern)}: takes too much memory to match"]
            ) from None
        self._spent += max(0.0, time.process_time() - start - _QUICK)
        if self._spent > SECONDS:
            raise self._too_slow(expression, name)
        return found is not None

    def _too_slow(self, expression: "regex.Pattern[str]", name: str) -> ConfigError:
        return ConfigError(
            [
                f"{self._source}: {quoted(expression.pattern)}: takes more than {SECONDS} s to "
                f"match {name}, with all that was matched before; expected patterns without a "
                "repetition of repetitions"
            ]
        )
