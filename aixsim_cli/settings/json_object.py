"""JSON files of which an object is expected, with mistakes named by file and line."""

import json
from pathlib import Path
from typing import Any

from aixsim_cli.errors import UserError
from aixsim_cli.files import read_text

# the largest tokenizer.json of today has a seventh of it
_MAX_SIZE = 1 << 28


def load_json_object(path: str | Path) -> dict[str, Any]:
    """The object that a file holds.

    Raises:
        UserError: it cannot be read, is no JSON, or holds something else.
    """
    text = read_text(path, limit=_MAX_SIZE)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}"
        raise UserError(f"{where}: is no JSON ({error.msg}); expected an object") from None
    except (RecursionError, ValueError):
        raise UserError(f"{path}: is no JSON that can be read; expected an object") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: got a {type(value).__name__}; expected an object, {{…}}")
    return value
