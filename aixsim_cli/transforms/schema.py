"""The JSON Schema of transform files, for editors: what every paradigm takes, and why."""

from collections.abc import Sequence
from typing import Any

from aixsim_cli.settings.build import json_schema
from aixsim_cli.transforms.config import DEFAULT, LIST_KEY
from aixsim_cli.transforms.protocol import Lora
from aixsim_cli.transforms.registry import describe_params, get_paradigm, paradigm_names

# of a file that names no paradigm
_FIRST = "optical"


def transform_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a transform file, with every installed paradigm."""
    names = paradigm_names()
    kinds: dict[str, Any] = {name: _one(name) for name in names}
    kinds |= {f"{name} parameters": _params(get_paradigm(name).params) for name in names}
    each = [{"$ref": f"#/$defs/{name}"} for name in names]
    several = {"type": "array", "items": {"anyOf": each}, "minItems": 1}
    listed = _mapping({LIST_KEY: several}, required=[LIST_KEY])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Transform",
        "description": "Which modules are simulated, how, and with which parameters.",
        "anyOf": [*each, listed],
        "$defs": kinds | {"lora": _lora()},
    }


def _one(name: str) -> dict[str, Any]:
    """A mapping with one paradigm."""
    params = _or_null(f"{name} parameters", "Parameters; null = digital.")
    has_attention = get_paradigm(name).has_attention()
    attention = params | {"description": "All attentions."} if has_attention else {"type": "null"}
    flag = {"type": "boolean", "default": False}
    keys = {
        "transform": {"const": name, "default": _FIRST, "description": "The paradigm."},
        "use_regex": flag | {"description": "Whether patterns are regular expressions."},
        "layer_name_to_config": {
            "type": "object",
            "description": "Pattern: parameters; the first that matches a module's whole name.",
            "properties": {DEFAULT: params | {"description": "Where no pattern matches."}},
            "additionalProperties": params,
        },
        "attention": attention,
        "fc": params | {"description": "All linears but the output projection."},
        "lora": _or_null("lora", "A low-rank update to train, alone; null = the weights."),
        "use_lora": flag | {"description": "Whether to train one, with the values of lora."},
    }
    return _mapping(keys, required=[] if name == _FIRST else ["transform"])


def _mapping(keys: dict[str, Any], *, required: Sequence[str]) -> dict[str, Any]:
    needed = {"required": list(required)} if required else {}
    return {"type": "object", "properties": keys, "additionalProperties": False, **needed}


def _or_null(name: str, description: str) -> dict[str, Any]:
    return {"anyOf": [{"$ref": f"#/$defs/{name}"}, {"type": "null"}], "description": description}


def _params(params: type) -> dict[str, Any]:
    """Parameters with their type, default, and a text of meaning, unit and source."""
    schema = json_schema(params)
    for row in describe_params(params):
        words = (row["meaning"], row["unit"] and f"unit: {row['unit']}", row["source"])
        schema["properties"][row["parameter"]]["description"] = "; ".join(filter(None, words))
    keys = ("type", "title", "properties", "additionalProperties", "required")
    return {key: schema[key] for key in keys if key in schema}


def _lora() -> dict[str, Any]:
    schema = _params(Lora)
    # NewComputeBench's word for it
    schema["properties"]["lora_alpha"] = schema["properties"]["alpha"]
    return schema
