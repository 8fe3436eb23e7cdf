"""Loss against light, as `compare_light.py` and `plot_light.py` read and compare it.

A folder of `aixsim eval sweep --vary photons_per_mac=… --output FOLDER` is known by its name:

    FLAVOR-SEED              light in every product of a model that was trained without shot noise
    linears-FLAVOR-SEED      in the linears alone
    kind-K-[FLAVOR-]SEED     in the layers of kind K alone; without a flavor, of `debug`
    offset-FLAVOR-SEED       in every product, encoding=offset
    light-FLAVOR-SEED        of a model that was trained with shot noise
    limit-FLAVOR-SEED        photons_per_mac=1e8: what the others are compared with

SEED is that of the training. Losses are nats a token. Without `photons_per_mac` a detector has a
level of uniform noise, and with it shot noise in its place: what much light tends to is not the
transform unchanged, but that without this noise. Where there is no limit-… it stands in.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aixsim_cli.config.flavors import FLAVORS
from aixsim_cli.energy.account import token_energy
from aixsim_cli.energy.hardware import read_hardware
from aixsim_cli.energy.layout import SCORES, VALUES
from aixsim_cli.energy.shape import Shape, shape_of_flavor

Numbers = NDArray[np.float64]
LIGHT, ATTENTION = "photons_per_mac", "attention"
ALL, LINEARS, KIND, OFFSET, AWARE, LIMIT = "", "linears", "kind", "offset", "light", "limit"
# what is tolerated above a loss, by its name
TARGETS: dict[str, Callable[[Any], Any]] = {
    "+1 %": lambda nll: 0.01 * nll,
    "+0.04 nats": lambda nll: 0.04 + 0.0 * nll,
}
_NAME = re.compile(
    r"(?:(?P<role>light|limit|linears|offset)-|kind-(?P<kind>[a-z0-9]+)-)?"
    rf"(?:(?P<flavor>{'|'.join(map(re.escape, FLAVORS['aixsim']))})-)?(?P<seed>\d+)"
)


@dataclass(frozen=True)
class Sweep:
    """One folder.

    Args:
        name: of the folder.
        role: ALL, LINEARS, KIND, OFFSET, AWARE or LIMIT.
        kind: of layer that has light; "" = not of one.
        flavor: of the model.
        seed: of its training.
        text: what tells the text that was scored.
        transform: that was varied, as a file has it.
        seq_len: tokens of a window.
        digital: (windows,) loss of the digital model.
        own: (windows,) with unlimited light, mean over the noise seeds: of limit-…, where light is
            in every product; else, or where there is none, of the transform unchanged.
        own_runs: (noise seeds,) the same of each.
        photons: (points,) a multiplication, ascending.
        runs: (points, noise seeds) loss of each.
        nats: (points, windows) mean over the noise seeds.
        limit: whether `own` is of limit-….
    """

    name: str
    role: str
    kind: str
    flavor: str
    seed: int
    text: str
    transform: Mapping[str, Any]
    seq_len: int
    digital: Numbers
    own: Numbers
    own_runs: Numbers
    photons: Numbers
    runs: Numbers
    nats: Numbers
    limit: bool = False

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return FLAVORS["aixsim"][self.flavor].dim

    @property
    def nll(self) -> Numbers:
        """(points,)"""
        return self.nats.mean(1)

    @property
    def above(self) -> Numbers:
        """(points,) over the loss of unlimited light."""
        return self.nll - self.own.mean()


def read_sweeps(folder: Path) -> list[Sweep]:
    """Every sweep of a folder that has losses yet, those that still run with what they have.

    Raises:
        ValueError: they are of different texts, or the transform of one has light of its own.
    """
    found = []
    for path in sorted(folder.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match and (path / "sweep.json").is_file() and (path / "losses.jsonl").is_file():
            found += _read(path, match)
    if len({sweep.text for sweep in found}) > 1:
        raise ValueError(f"{folder}: holds sweeps of several texts; expected one")
    limits = {(sweep.flavor, sweep.seed): sweep for sweep in found if sweep.role == LIMIT}
    return [_limited(sweep, limits) for sweep in found]


def _limited(sweep: Sweep, limits: Mapping[tuple[str, int], Sweep]) -> Sweep:
    limit = limits.get((sweep.flavor, sweep.seed))
    if limit is None or sweep.role not in (ALL, OFFSET):
        return sweep
    return replace(sweep, own=limit.nats[-1], own_runs=limit.runs[-1], limit=True)


def _read(path: Path, match: re.Match[str]) -> list[Sweep]:
    identity = json.loads((path / "sweep.json").read_text(encoding="utf-8"))
    whole = (path / "losses.jsonl").read_text(encoding="utf-8")
    # the line that is being written has no end yet
    rows = [json.loads(line) for line in whole[: whole.rfind("\n") + 1].splitlines()]
    losses: dict[float, list[dict[str, Any]]] = {}
    for row in rows:
        losses.setdefault(_light_of(row["values"]), []).append(row)
    digital, own = losses.pop(-1.0, []), losses.pop(math.inf, [])
    repeats = max(map(len, losses.values()), default=0)
    # a point that lacks noise seeds is being measured
    photons = [each for each in sorted(losses) if len(losses[each]) == repeats]
    if not (digital and own and photons):
        return []
    role = match["role"] or (KIND if match["kind"] else ALL)
    layers = identity["transform"].get("layer_name_to_config", {}).values()
    if role != AWARE and any(params and params.get(LIGHT) is not None for params in layers):
        raise ValueError(f"{path}: its transform sets {LIGHT}; expected light-FLAVOR-SEED")
    count = len(digital[0]["windows"])
    seq_len = digital[0]["tokens"] // count

    def windows(rows: Sequence[dict[str, Any]]) -> Numbers:
        return np.array([row["windows"] for row in rows], float).mean(0) / seq_len

    return [
        Sweep(
            path.name, role, match["kind"] or "", match["flavor"] or "debug", int(match["seed"]),
            identity["text (by its tokens)"], identity["transform"], seq_len,
            windows(digital), windows(own), np.array([row["nll"] for row in own], float),
            np.array(photons),
            np.array([[row["nll"] for row in losses[each]] for each in photons], float),
            np.array([windows(losses[each]) for each in photons]),
        )
    ]  # fmt: skip


def _light_of(values: Mapping[str, Any] | None) -> float:
    """Of a point; -1 = digital, infinite = the transform unchanged."""
    if values is None:
        return -1.0
    said = [v for key, v in values.items() if key.partition("@")[0] == LIGHT]
    return math.inf if not said or said[0] is None else float(said[0])


def crossing(photons: Numbers, above: Numbers, target: float) -> float | None:
    """The light from which on a loss stays below a target, by interpolation of both logarithms.

    Args:
        photons: (points,), ascending.
        above: (points,) what is lost.
        target: that is tolerated.

    Returns:
        None where the points do not enclose it: nothing is extrapolated.
    """
    beyond = np.flatnonzero(~(above < target))
    if not len(beyond) or beyond[-1] == len(above) - 1:
        return None
    i = beyond[-1]
    upper, lower = above[i], above[i + 1]
    # what noise has brought below nothing has no logarithm
    height = np.log if lower > 0 else float
    share = (height(upper) - height(target)) / (height(upper) - height(lower))
    return float(math.exp(math.log(photons[i]) + share * math.log(photons[i + 1] / photons[i])))


def light_at(sweep: Sweep, target: str, reference: Numbers | None = None) -> float | None:
    """The photons a multiplication at which a target of TARGETS is met.

    Args:
        sweep: to read it off.
        target: its name.
        reference: (windows,) the loss that it is above of; None = that of unlimited light.
    """
    nll = float((sweep.own if reference is None else reference).mean())
    return crossing(sweep.photons, sweep.nll - nll, TARGETS[target](nll))


def slope(x: Numbers, y: Numbers) -> Any:
    """Of the line of least squares.

    Args:
        x: (..., points)
        y: (..., points)
    """
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    return (x * y).sum(-1) / (x * x).sum(-1)


def resampled_slopes(
    sweeps: Sequence[Sweep],
    target: str,
    *,
    seeds: bool,
    windows: bool,
    draws: int = 2000,
) -> Numbers:
    """Slopes of log photons on log width, of samples drawn with replacement.

    Args:
        sweeps: of two widths or more.
        target: of TARGETS.
        seeds: draw from the trainings, within each width.
        windows: draw from the windows of the text, the same in every sweep.
        draws: samples.

    Returns:
        Of those samples in which every photon number is known.
    """
    random = np.random.default_rng(0)
    count = len(sweeps[0].own)
    weights = np.ones((draws, count))
    if windows:
        weights = random.multinomial(count, np.full(count, 1 / count), draws).astype(float)
    stars = np.array([_stars(sweep, target, weights / count) for sweep in sweeps])
    columns, widths = [], np.array([sweep.width for sweep in sweeps])
    for width in sorted(set(widths)):
        mine = np.flatnonzero(widths == width)
        chosen = random.choice(mine, (draws, len(mine))) if seeds else np.tile(mine, (draws, 1))
        columns.append(chosen)
    chosen = np.concatenate(columns, 1)
    logs = np.log(np.take_along_axis(stars.T, chosen, 1))
    known = np.isfinite(logs).all(1)
    return slope(np.log(widths[chosen[known]].astype(float)), logs[known])


def _stars(sweep: Sweep, target: str, weights: Numbers) -> list[float]:
    """Photons at a target under each weighting (draws, windows) of the windows; nan = unknown."""
    own, nll = weights @ sweep.own, weights @ sweep.nats.T
    wanted = TARGETS[target](own)
    found = (
        crossing(sweep.photons, row - base, goal)
        for row, base, goal in zip(nll, own, wanted, strict=True)
    )
    return [math.nan if star is None else star for star in found]


def shape_of(flavor: str, vocab_size: int) -> Shape:
    """What a flavor multiplies."""
    return shape_of_flavor("aixsim", flavor, vocab_size)


def macs_of(shape: Shape, seq_len: int) -> dict[str, float]:
    """Multiplications a token by kind of layer, an attention's products as one; no projection."""
    macs: dict[str, float] = {}
    for row in token_energy(shape, None, read_hardware("engineered"), seq_len=seq_len).rows:
        kind = ATTENTION if row.kind in (SCORES, VALUES) else row.kind
        if row.macs and kind != "output":
            macs[kind] = macs.get(kind, 0.0) + row.macs
    return macs


def best_budget(costs: Mapping[str, float], macs: Mapping[str, float], light: float) -> dict:
    """The photons a multiplication of each kind at which least is lost, Σ c / rho, of some light.

    Args:
        costs: c of each kind: what is lost at one photon a multiplication.
        macs: of each kind.
        light: photons in all, Σ rho · macs.

    Returns:
        kind -> rho = light · √(c / macs) / Σ √(c · macs).
    """
    total = sum(math.sqrt(costs[kind] * macs[kind]) for kind in costs)
    return {kind: light * math.sqrt(costs[kind] / macs[kind]) / total for kind in costs}
