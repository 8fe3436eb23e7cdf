"""JSON that any program reads."""

import json

from aixsim_cli.commands.output import to_json


def test_numbers_that_are_none_are_null():
    value = {"a": float("nan"), "b": [1.5, float("inf")], "c": ({"d": float("-inf")},), "e": None}
    text = to_json(value)
    assert json.loads(text, parse_constant=lambda word: 1 / 0) == {
        "a": None, "b": [1.5, None], "c": [{"d": None}], "e": None,
    }  # fmt: skip
