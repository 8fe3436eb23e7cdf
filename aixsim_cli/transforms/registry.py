"""Paradigms by name; third parties add theirs through the entry-point group `aixsim.transforms`."""

import inspect
import typing
from collections.abc import Iterable
from dataclasses import fields
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from aixsim_cli.errors import UserError, nearest
from aixsim_cli.transforms.protocol import Paradigm, as_in_file

PARADIGMS = {
    "bitflip": "aixsim_cli.transforms.bitflip_params:Bitflip",
    "optical": "aixsim_cli.transforms.optical_params:Optical",
}
ENTRY_POINT_GROUP = "aixsim.transforms"


def paradigm_names() -> list[str]:
    """All names that `transform:` accepts."""
    return sorted({*PARADIGMS, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def get_paradigm(name: str) -> type[Paradigm]:
    """The paradigm registered under `name`.

    Raises:
        UserError: no paradigm has that name, or the package that brings it cannot be imported.
    """
    if name in PARADIGMS:
        module, _, attribute = PARADIGMS[name].partition(":")
        return getattr(import_module(module), attribute)
    for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        try:
            return point.load()
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"transform: {name} ({point.value}): cannot be imported: {error}"
            ) from error
    raise UserError(f"transform: unknown paradigm {name!r}{nearest(name, paradigm_names())}")


def paradigms_with(parameters: Iterable[str]) -> dict[str, type[Paradigm]]:
    """Our own paradigms that have all of these parameters, by name."""
    wanted = set(parameters)
    found = {name: get_paradigm(name) for name in PARADIGMS}
    return {
        name: paradigm
        for name, paradigm in found.items()
        if wanted and wanted <= {field.name for field in fields(paradigm.params)}
    }


def describe_paradigms() -> list[dict[str, str]]:
    """Every paradigm: its name, the kinds of places it simulates, its summary, where it is from."""
    points = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    rows = []
    for name in paradigm_names():
        paradigm = get_paradigm(name)
        rows.append(
            {
                "name": name,
                "simulates": "linear, attention" if paradigm.has_attention() else "linear",
                "what": (inspect.getdoc(paradigm) or "").split("\n")[0],
                "from": "aixsim" if name in PARADIGMS else points[name].value,
            }
        )
    return rows


def describe_params(params: type) -> list[dict[str, Any]]:
    """Every field of a parameters' dataclass: name, type, default, unit, meaning, source."""
    hints = typing.get_type_hints(params)
    return [
        {
            "parameter": field.name,
            "type": _type_name(hints[field.name]),
            "default": as_in_file(field.default),
            **{key: field.metadata.get(key, "") for key in ("unit", "meaning", "source")},
        }
        for field in fields(params)
    ]


def _type_name(hint: Any) -> str:
    if hint is type(None):
        return "null"
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, arguments))
    if typing.get_origin(hint) is tuple:
        return f"[{', '.join(map(_type_name, arguments))}]"
    return " or ".join(map(_type_name, arguments)) if arguments else hint.__name__
