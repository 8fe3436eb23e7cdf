"""Paradigms by name; third parties add theirs through the entry-point group `aixsim.transforms`."""

from importlib import import_module
from importlib.metadata import entry_points

from aixsim_cli.errors import UserError, nearest
from aixsim_cli.transforms.protocol import Paradigm

PARADIGMS = {
    "optical": "aixsim_cli.transforms.optical:Optical",
}
ENTRY_POINT_GROUP = "aixsim.transforms"


def paradigm_names() -> list[str]:
    """All names that `transform:` accepts."""
    return sorted({*PARADIGMS, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def get_paradigm(name: str) -> type[Paradigm]:
    """The paradigm registered under `name`.

    Raises:
        UserError: no paradigm has that name.
    """
    if name in PARADIGMS:
        module, _, attribute = PARADIGMS[name].partition(":")
        return getattr(import_module(module), attribute)
    for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        return point.load()
    raise UserError(f"transform: unknown paradigm {name!r}{nearest(name, paradigm_names())}")
