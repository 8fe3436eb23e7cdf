"""JSON on the standard output, for programs that read it strictly."""

import json
import math
from typing import Any


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
