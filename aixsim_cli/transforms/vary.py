"""Which values parameters of a transform take in a sweep, and the transform at each of its points.

NAME=LO:HI:N            N values, evenly spaced in their logarithm, both ends among them
NAME=LO:HI:N:lin        evenly spaced themselves
NAME=A,B,C              these, as a transform file writes them: null, differential, [0.1, 0.9]
NAME@PATTERN=…          in the modules alone whose name the regular expression matches in full
"""

import itertools
import json
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from aixsim_cli.errors import UserError, nearest, shown
from aixsim_cli.settings.build import build_dataclass
from aixsim_cli.settings.formats import parse_yaml
from aixsim_cli.transforms.config import LIST_KEY, TransformConfig
from aixsim_cli.transforms.patterns import Matcher, problems_of
from aixsim_cli.transforms.plan import Simulation, plan_transform
from aixsim_cli.transforms.protocol import Site, as_in_file
from aixsim_cli.transforms.read import parse_transform

Scale = Literal["log", "linear", "list"]
MAX_POINTS = 10_000
_FORMS = "NAME=LO:HI:N, NAME=LO:HI:N:lin or NAME=A,B,C"
# of a value between two ends
_DIGITS = 4


@dataclass(frozen=True)
class Axis:
    """One parameter of a sweep.

    Args:
        name: of the parameter.
        layers: a regular expression that names the modules; None = all that have the parameter.
        values: in order, each once.
        scale: how they are spaced; "list" = as they were given.
        unit: of the values, once it is known which parameter it is; "" = none.
    """

    name: str
    layers: str | None
    values: tuple[Any, ...]
    scale: Scale
    unit: str = ""

    @property
    def key(self) -> str:
        """What stands before the `=`."""
        return self.name if self.layers is None else f"{self.name}@{self.layers}"


@dataclass(frozen=True)
class Point:
    """One point of a sweep.

    Args:
        values: of each axis, by its key, as a transform file has them.
        transform: with these values.
    """

    values: Mapping[str, Any]
    transform: TransformConfig

    def __str__(self) -> str:
        return said(self.values)


def said(values: Mapping[str, Any]) -> str:
    """The values of a point as a message shows them: `q_levels=16, read_noise=2.0`."""
    return ", ".join(f"{key}={as_word(value)}" for key, value in values.items())


def as_word(value: Any) -> str:
    """A value as `--vary` takes it; numbers in their shortest form."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    # JSON's words for the rest are YAML's too
    return value if isinstance(value, str) else json.dumps(value)


def parse_axis(text: str) -> Axis:
    """Read one `--vary`.

    Raises:
        UserError: it is of none of the forms above.
    """
    # the pattern may hold an equals sign, values do not
    key, equals, given = text.rpartition("=")
    name, at, layers = key.partition("@")
    if not equals or not name.strip() or not given.strip() or (at and not layers.strip()):
        raise UserError(f"--vary: got {shown(text)}; expected {_FORMS}")
    name = name.strip().replace("-", "_")
    for problem in problems_of([layers] if at else [], use_regex=True):
        raise UserError(f"--vary {key}: {problem}")
    if ":" in given:
        values, scale = _spaced(given, f"--vary {text}")
    else:
        values, scale = _listed(given, f"--vary {text}"), "list"
    return Axis(name, layers if at else None, values, scale)


def _listed(given: str, where: str) -> tuple[Any, ...]:
    values, _ = parse_yaml(f"[{given}]", where)
    if not isinstance(values, list):
        raise UserError(f"{where}: expected {_FORMS}")
    return tuple(values)


def _spaced(given: str, where: str) -> tuple[tuple[float, ...], Scale]:
    try:
        low, high, count, *rest = given.split(":")
        ends, number = (float(low), float(high)), int(count)
    except ValueError:
        raise UserError(f"{where}: got {shown(given)}; expected {_FORMS}") from None
    if rest not in ([], ["lin"]):
        raise UserError(f"{where}: got {shown(given)}; expected LO:HI:N, or LO:HI:N:lin")
    if not 2 <= number <= MAX_POINTS:
        raise UserError(f"{where}: got {number} points; expected 2 to {MAX_POINTS:,}")
    if not all(map(math.isfinite, ends)) or ends[0] == ends[1]:
        raise UserError(f"{where}: got {low} and {high}; expected two numbers, not the same")
    if not rest and min(ends) <= 0:
        raise UserError(
            f"{where}: got {low} and {high}; expected both above 0, or LO:HI:N:lin: the values "
            "are evenly spaced in their logarithm"
        )
    first, last = ends if rest else map(math.log, ends)
    inner = (first + (last - first) * i / (number - 1) for i in range(1, number - 1))
    between = (float(f"{x if rest else math.exp(x):.{_DIGITS}g}") for x in inner)
    return (ends[0], *between, ends[1]), "linear" if rest else "log"


def points_of(
    config: TransformConfig, axes: Sequence[Axis], sites: Sequence[Site]
) -> tuple[list[Axis], list[Point]]:
    """Every combination of the axes' values, and the transform with each.

    Args:
        config: whose parameters are changed, in the modules that it simulates.
        axes: the first changes slowest.
        sites: every linear and attention of the model.

    Returns:
        The axes with their values as the parameters have them, each once, whole numbers where
        these are; and the points.

    Raises:
        UserError: nothing has a parameter, or two axes reach the same one of a module.
        ConfigError: a value that a parameter cannot have, in the paradigm's own words.
    """
    places = plan_transform(config, sites).simulated
    reached = [_reached(axis, places, config) for axis in axes]
    _check_apart(axes, reached)
    axes = [_typed(axis, found) for axis, found in zip(axes, reached, strict=True)]
    number = math.prod(len(axis.values) for axis in axes)
    if number > MAX_POINTS:
        raise UserError(f"--vary: got {number:,} points; expected at most {MAX_POINTS:,}")
    points: dict[str, Point] = {}
    for values in itertools.product(*(axis.values for axis in axes)):
        point = _point(config, places, list(zip(axes, values, reached, strict=True)))
        points.setdefault(said(point.values), point)
    found = list(points.values())
    return [_as_built(axis, found) for axis in axes], found


def _reached(
    axis: Axis, places: Sequence[Simulation], config: TransformConfig
) -> dict[Site, Simulation]:
    """The places whose parameter an axis changes."""
    having = {place.site: place for place in places if axis.name in _names(place.rule.params)}
    if not having:
        known = {name for t in config.transforms for name in _names(t.paradigm.params)}
        if axis.name not in known:
            raise UserError(
                f"--vary {axis.key}: {config.name} has no such parameter{nearest(axis.name, known)}"
            )
        raise UserError(
            f"--vary {axis.key}: {config.source} simulates no module that has it; expected a "
            "transform that does: a module that is bypassed stays digital"
        )
    if axis.layers is None:
        return having
    matcher = Matcher([axis.layers], use_regex=True, source=f"--vary {axis.name}")
    found = {site: place for site, place in having.items() if matcher.matches(0, site.names)}
    if not found:
        like = ", ".join([site.name for site in having][:8])
        raise UserError(f"--vary {axis.key}: matches no module that has it; they are like {like}")
    return found


def _check_apart(axes: Sequence[Axis], reached: Sequence[Mapping[Site, Simulation]]) -> None:
    """Each parameter of a module has one value at a point."""
    taken: dict[tuple[Site, str], int] = {}
    for place, (axis, sites) in enumerate(zip(axes, reached, strict=True)):
        for site in sites:
            other = taken.setdefault((site, axis.name), place)
            if other != place:
                raise UserError(
                    f"--vary {axes[other].key} and {axis.key}: both change "
                    f"{axis.name} of {site.name}; expected one of them, or patterns that have no "
                    "module in common"
                )


def _names(params: Any) -> list[str]:
    return [field.name for field in fields(params) if field.init]


def _plain(params: Any) -> dict[str, Any]:
    """Parameters as a file has them."""
    return {name: as_in_file(getattr(params, name)) for name in _names(params)}


def _typed(axis: Axis, reached: Mapping[Site, Simulation]) -> Axis:
    """An axis with its parameter's unit; where that takes whole numbers alone, with such."""
    params: Any = type(next(iter(reached.values())).rule.params)
    unit = next(f.metadata.get("unit", "") for f in fields(params) if f.name == axis.name)
    hint = typing.get_type_hints(params)[axis.name]
    types, values = set(typing.get_args(hint)) or {hint}, axis.values
    if axis.scale != "list" and int in types and float not in types:
        values = tuple(map(round, values))
    return replace(axis, values=values, unit=unit)


def _point(
    config: TransformConfig,
    places: Sequence[Simulation],
    given: Sequence[tuple[Axis, Any, Mapping[Site, Simulation]]],
) -> Point:
    """The point at which each axis, in the places that it reaches, has the value beside it."""
    where = f"--vary {said({axis.key: value for axis, value, _ in given})}"
    params: dict[Site, Any] = {}
    for place in places:
        own = place.rule.params
        change = {axis.name: value for axis, value, reached in given if place.site in reached}
        params[place.site] = build_dataclass(type(own), _plain(own) | change, where=where)
    values = {
        axis.key: as_in_file(getattr(params[next(iter(reached))], axis.name))
        for axis, _, reached in given
    }
    return Point(values, _by_module(config, places, params, where))


def _by_module(
    config: TransformConfig, places: Sequence[Simulation], params: Mapping[Site, Any], where: str
) -> TransformConfig:
    """A transform config that gives each module parameters of its own, by its name."""
    parts = []
    for transform in config.transforms:
        layers = {
            place.site.name: _plain(params[place.site])
            for place in places
            if place.transform is transform
        }
        if layers:
            parts.append({"transform": transform.name, "layer_name_to_config": layers})
    return parse_transform({LIST_KEY: parts}, source=where)


def _as_built(axis: Axis, points: Sequence[Point]) -> Axis:
    values = {as_word(point.values[axis.key]): point.values[axis.key] for point in points}
    return replace(axis, values=tuple(values.values()))
