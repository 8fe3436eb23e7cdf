"""What commands print: tables for people, JSON for programs that read it strictly."""

import json
import math
import sys
from collections.abc import Iterable
from typing import Any

# columns of a pipe or file, which has no width of its own
_PIPE_WIDTH = 200


def print_table(columns: Iterable[str], rows: Iterable[Iterable[Any]], title: str = "") -> None:
    """Print a table as wide as the terminal, or as a file can take; cells too long are folded.

    Args:
        columns: their heads.
        rows: of cells; null, true and false as YAML has them.
        title: above it.
    """
    # rich takes longer to import than most commands run
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(_cell, row))
    Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(table)


def light_cell(photons: float | None) -> str:
    """Photons a token, as tables have them; None = there is no light, or its amount is not said."""
    return "-" if photons is None else f"{photons:.2e}"


def energy_cell(joules: Iterable[float]) -> str:
    """Joules a token, [low, nominal, high], as tables have them."""
    low, nominal, high = (each * 1e6 for each in joules)
    return f"{nominal:.3g} µJ ({low:.3g} to {high:.3g})"


def to_json(value: Any, **options: Any) -> str:
    """JSON of `value`; a number that is not finite, for which JSON has no word, is null.

    Args:
        value: of dicts, lists and plain values.
        options: of `json.dumps`.
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> str:
    # as YAML has it; square brackets are text here
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else str(value)
    return text.replace("[", "\\[")
