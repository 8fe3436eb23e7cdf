"""Tables on the standard output."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

# columns of a pipe or file, which has no width of its own
_PIPE_WIDTH = 200


def show(table: "Table") -> None:
    """Print a table as wide as the terminal, or as a file can take."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(table)
