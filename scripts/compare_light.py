"""Loss against light in tables: by width, encoding, training and kind of layer.

    compare_light.py SWEEPS [--budget BUDGET.yaml]

SWEEPS holds folders of `aixsim eval sweep --output`, known by their names (`light_curves.py`);
what is not there yet is said to be missing. All losses are nats a token above the same model's on
the same hardware with unlimited light (of limit-…), unless a table says otherwise. `--budget`
writes a transform file in which every kind of layer of the `kind-…` sweeps has the light that is
best for it, in all as much as with `--photons` a multiplication everywhere; `aixsim eval ppl` and
`sweep` measure it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import light_curves as curves
import numpy as np
import typer
import yaml
from light_curves import ALL, AWARE, KIND, LINEARS, OFFSET, TARGETS, Sweep

from aixsim_cli.energy.account import light_per_token
from aixsim_cli.transforms.read import parse_transform

_ENDS = (2.5, 97.5)
# words of the built-in tokenizer
VOCABULARY = 4096


def main(
    sweeps: Path,
    budget: Annotated[Path | None, typer.Option(help="Transform file to write.")] = None,
    photons: Annotated[float, typer.Option(help="A multiplication, if uniform.")] = 1.0,
) -> None:
    found = curves.read_sweeps(sweeps)
    if not found:
        raise typer.BadParameter(f"{sweeps}: holds no sweep that has losses yet")
    parts = (_folders, _losses, _exponents, _heights, _stars, _slopes, _encodings, _trainings)
    for part in parts:
        print("\n".join(part(found)), end="\n\n")
    print("\n".join(kinds(found, photons, budget)))


def of(found: Iterable[Sweep], role: str) -> dict[int, list[Sweep]]:
    """The sweeps of a role by the width of their models, ascending."""
    grouped: dict[int, list[Sweep]] = {}
    for sweep in sorted((s for s in found if s.role == role), key=lambda s: (s.width, s.seed)):
        grouped.setdefault(sweep.width, []).append(sweep)
    return grouped


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for row in (columns, ["---"] * len(columns), *rows):
        yield f"| {' | '.join(row)} |"


def _number(value: float | None, digits: int = 3) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:#.{digits}g}".rstrip(".")


def _spread(values: Any) -> float:
    """Standard deviation of a sample; nan of one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _mean_of(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean ± deviation (how many) of those that are known."""
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    spread = f" ± {_number(_spread(known), 2)}" if len(known) > 1 else ""
    return f"{_number(float(np.mean(known)), digits)}{spread} ({len(known)})"


def _folders(found: Sequence[Sweep]) -> Iterator[str]:
    yield "### Read\n"
    rows = [
        [s.name, f"{len(s.photons)}", f"{s.photons[0]:g} to {s.photons[-1]:g}",
         f"{s.runs.shape[1]}", f"{len(s.own)}", f"{s.seq_len}",
         f"{s.digital.mean():.5f}", f"{s.own.mean():.5f}",
         "limit" if s.limit else "transform unchanged"]
        for s in found
    ]  # fmt: skip
    columns = ("folder", "points", "photons a MAC", "noise seeds", "windows", "tokens each",
               "digital", "reference", "which is")  # fmt: skip
    yield from _table(columns, rows)


def _losses(found: Sequence[Sweep]) -> Iterator[str]:
    yield "### Lost to unlimited light, by photons a multiplication and width\n"
    yield "mean ± deviation over trainings ± mean deviation over noise seeds (trainings)\n"
    groups = of(found, ALL)
    lights = sorted({light for group in groups.values() for s in group for light in s.photons})
    rows = [
        ["unlimited, nll", *(_mean_of([s.own.mean() for s in g], 5) for g in groups.values())],
        ["… to digital", *(_mean_of([(s.own - s.digital).mean() for s in g], 2)
                           for g in groups.values())],
    ]  # fmt: skip
    # the reference's own noise is in every number below it
    noise = (float(np.mean([_spread(s.own_runs) for s in group])) for group in groups.values())
    rows.append(["… over noise seeds", *(f"± {_number(one, 2)}" for one in noise)])
    rows += [[f"{light:g}", *(_cell(g, light) for g in groups.values())] for light in lights]
    yield from _table(["photons", *(f"d = {width}" for width in groups)], rows)


def _cell(group: Sequence[Sweep], light: float) -> str:
    places = [(s, list(s.photons).index(light)) for s in group if light in s.photons]
    if not places:
        return "–"
    above = [s.above[i] for s, i in places]
    noise = float(np.mean([_spread(s.runs[i]) for s, i in places]))
    return (
        f"{np.mean(above):+.5f} ± {_number(_spread(above), 2)} ± {_number(noise, 2)} ({len(above)})"
    )


def _exponents(found: Sequence[Sweep]) -> Iterator[str]:
    yield "### How fast it falls: −d log loss / d log photons; 1 is a loss ∝ 1 / photons\n"
    spans = list(pairwise((0.1, 1.0, 10.0, 100.0)))
    rows = []
    for role, name in ((ALL, "all products"), (LINEARS, "linears")):
        for width, group in of(found, role).items():
            cells = (_mean_of([_exponent(s, *span) for s in group]) for span in spans)
            rows.append([name, f"{width}", *cells])
    yield from _table(["light in", "d", *(f"{low:g} to {high:g}" for low, high in spans)], rows)


def _exponent(sweep: Sweep, low: float, high: float) -> float | None:
    inside = (sweep.photons >= low) & (sweep.photons <= high)
    if sum(inside) < 3 or (sweep.above[inside] <= 0).any():
        return None
    return -float(curves.slope(np.log(sweep.photons[inside]), np.log(sweep.above[inside])))


def _heights(found: Sequence[Sweep]) -> Iterator[str]:
    yield "### At equal photons: slope of log loss on log width\n"
    rows = []
    for role, name in ((ALL, "all products"), (LINEARS, "linears")):
        sweeps = [s for group in of(found, role).values() for s in group]
        for light in sorted({light for s in sweeps for light in s.photons}):
            above = {s.name: _above(s, light) for s in sweeps if light in s.photons}
            mine = [s for s in sweeps if s.name in above]
            # a loss that noise has brought below nothing has no logarithm
            if len(of(mine, role)) < 2 or min(above.values()) <= 0:
                continue
            slopes = [
                _height(group, above)
                for seed in sorted({s.seed for s in mine})
                if len(group := [s for s in mine if s.seed == seed]) == len(of(mine, role))
            ]
            each = ", ".join(f"{one:.3f}" for one in slopes) or "–"
            rows.append([name, f"{light:g}", f"{_height(mine, above):.3f}", each])
    yield from _table(["light in", "photons", "slope", "by training"], rows)


def _above(sweep: Sweep, light: float) -> float:
    return float(sweep.above[list(sweep.photons).index(light)])


def _height(group: Sequence[Sweep], above: Mapping[str, float]) -> float:
    widths = np.log([float(s.width) for s in group])
    return float(curves.slope(widths, np.log([above[s.name] for s in group])))


def _stars(found: Sequence[Sweep]) -> Iterator[str]:
    yield "### Photons a multiplication at which that much is lost to unlimited light\n"
    rows = []
    for role, name in ((ALL, "all products"), (LINEARS, "linears")):
        for width, group in of(found, role).items():
            stars = {t: [curves.light_at(s, t) for s in group] for t in TARGETS}
            rows += [
                [name, f"{width}", f"{s.seed}", *(_number(stars[t][i]) for t in TARGETS)]
                for i, s in enumerate(group)
            ]
            rows.append([name, f"{width}", "mean", *(_mean_of(stars[t]) for t in TARGETS)])
    yield from _table(["light in", "d", "training", *TARGETS], rows)


def _slopes(found: Sequence[Sweep]) -> Iterator[str]:
    yield "### Slope of log photons on log width; −1 would be photons ∝ 1 / d, 0 none\n"
    yield (
        "In brackets 95 % of slopes of 2,000 samples with replacement: of the trainings within a "
        "width, of the windows of the text, of both. Few trainings a width: the first interval is "
        "too narrow (three drawn from three spread by √(2/3) of what three new ones would), and "
        "of one it is none.\n"
    )
    rows = []
    for role, name in ((ALL, "all products"), (LINEARS, "linears")):
        for target in TARGETS:
            known = [s for s in found if s.role == role and curves.light_at(s, target) is not None]
            groups = of(known, role)
            if len(groups) < 2:
                rows.append([name, target, "missing: two widths", *["–"] * 5])
                continue
            counts = ", ".join(f"{len(group)} of d = {w}" for w, group in groups.items())
            fits = [f"{fit_of(known, target):.3f}", _each(known, groups, target)]
            for seeds, windows in ((True, False), (False, True), (True, True)):
                slopes = curves.resampled_slopes(known, target, seeds=seeds, windows=windows)
                low, high = np.percentile(slopes, _ENDS)
                fits.append(f"[{low:.3f}, {high:.3f}]" if high > low else "–")
            rows.append([name, target, counts, *fits])
    columns = ("light in", "target", "trainings", "slope", "by training", "of trainings",
               "of windows", "of both")  # fmt: skip
    yield from _table(columns, rows)


def fit_of(sweeps: Sequence[Sweep], target: str) -> float:
    """The slope of log photons at a target on log width; all of the photons are known."""
    widths = np.log([float(s.width) for s in sweeps])
    return float(curves.slope(widths, np.log([curves.light_at(s, target) or 1 for s in sweeps])))


def _each(known: Sequence[Sweep], groups: Mapping[int, Sequence[Sweep]], target: str) -> str:
    """The slope of every training's seed that all widths have."""
    common = set.intersection(*({s.seed for s in group} for group in groups.values()))
    slopes = (fit_of([s for s in known if s.seed == seed], target) for seed in sorted(common))
    return ", ".join(f"{one:.3f}" for one in slopes) or "–"


def _encodings(found: Sequence[Sweep]) -> Iterator[str]:
    yield "### Signs by an offset against by differences: photons at equal loss\n"
    yield from _ratios(found, OFFSET, ("differential", "offset"), lambda sweep, partner: None)


def _trainings(found: Sequence[Sweep]) -> Iterator[str]:
    yield "### Trained with shot noise against trained without: photons at equal loss\n"
    yield (
        "Both above the loss of the model that was trained without, at unlimited light. The last "
        "columns: what the model trained with it has more loss than that one, digital, and at the "
        "most light that was measured.\n"
    )
    yield from _ratios(found, AWARE, ("without", "with"), lambda sweep, partner: partner.own)
    yield ""
    rows = []
    for sweep, partner in _pairs(found, AWARE):
        gain = [sweep.digital.mean() - partner.digital.mean(), sweep.nll[-1] - partner.own.mean()]
        rows.append([f"{sweep.width}", f"{sweep.seed}", *(f"{one:+.4f}" for one in gain),
                     f"{sweep.photons[-1]:g}"])  # fmt: skip
    yield from _table(["d", "training", "digital", "at most light", "photons"], rows)


def _pairs(found: Sequence[Sweep], role: str) -> list[tuple[Sweep, Sweep]]:
    """Each sweep of a role with that of light in every product, of the same size and seed."""
    plain = {(s.flavor, s.seed): s for s in found if s.role == ALL}
    mine = [s for group in of(found, role).values() for s in group]
    return [(s, plain[s.flavor, s.seed]) for s in mine if (s.flavor, s.seed) in plain]


def _ratios(
    found: Sequence[Sweep], role: str, names: tuple[str, str], reference: Any
) -> Iterator[str]:
    pairs = _pairs(found, role)
    if not pairs:
        yield f"missing: {role}-FLAVOR-SEED, beside FLAVOR-SEED"
        return
    rows = []
    for target in TARGETS:
        for width in sorted({s.width for s, _ in pairs}):
            ratios = []
            for sweep, partner in (pair for pair in pairs if pair[0].width == width):
                theirs = curves.light_at(partner, target)
                mine = curves.light_at(sweep, target, reference(sweep, partner))
                ratios.append(mine / theirs if mine and theirs else None)
                cells = map(_number, (theirs, mine, ratios[-1]))
                rows.append([target, f"{width}", f"{sweep.seed}", *cells])
            rows.append([target, f"{width}", "mean", "", "", _mean_of(ratios)])
    yield from _table(["target", "d", "training", *names, f"{names[1]} / {names[0]}"], rows)


def kinds(found: Sequence[Sweep], photons: float, budget: Path | None) -> Iterator[str]:
    """What light in one kind of layer alone loses, and the best budget; writes its file."""
    yield "### By kind of layer: c = loss · photons a multiplication, light in that kind alone\n"
    group = [s for s in found if s.role == KIND]
    if not group:
        yield "missing: kind-K-SEED"
        return
    if len({s.flavor for s in group}) > 1:
        raise typer.BadParameter("kind-…: of several flavors; expected one")
    macs = curves.macs_of(curves.shape_of(group[0].flavor, VOCABULARY), group[0].seq_len)
    lights = sorted({light for s in group for light in s.photons})
    costs = costs_of(group)
    known = {kind: cost for kind, cost in costs.items() if cost > 0}
    total = photons * sum(macs[kind] for kind in known)
    best = curves.best_budget(known, macs, total) if known else {}
    rows = []
    for kind in macs:
        mine = [s for s in group if s.kind == kind]
        cells = [
            _mean_of([_times(s, light) for s in mine if light in s.photons]) for light in lights
        ]
        rows.append([kind, f"{macs[kind]:,.0f}", *cells, _number(best.get(kind))])
    best_light = f"best photons, as much in all as {photons:g} everywhere"
    columns = ["kind", "MACs a token", *(f"c at {light:g}" for light in lights), best_light]
    yield from _table(columns, rows)
    yield ""
    yield from _prediction(found, group, known, macs, photons)
    missing = [kind for kind in macs if kind not in known]
    if missing:
        yield f"\nmissing: {', '.join(missing)}; the budget is of the others"
    if budget is not None and missing:
        raise typer.BadParameter(f"--budget: {', '.join(missing)}: not measured; expected all")
    if budget is not None:
        mapping = with_light(group[0].transform, best)
        shape = curves.shape_of(group[0].flavor, VOCABULARY)
        made = light_per_token(
            shape, parse_transform(mapping, source=str(budget)), seq_len=group[0].seq_len
        )
        budget.write_text(yaml.safe_dump(mapping, sort_keys=False), encoding="utf-8")
        yield f"\n{budget}: {sum(made.values()):,.0f} photons a token"


def _times(sweep: Sweep, light: float) -> float:
    return _above(sweep, light) * light


def costs_of(group: Sequence[Sweep]) -> dict[str, float]:
    """c of each kind, mean over trainings: at the most light, where the loss is most nearly c/rho.

    Args:
        group: sweeps of one kind each.
    """
    costs: dict[str, list[float]] = {}
    for sweep in group:
        costs.setdefault(sweep.kind, []).append(_times(sweep, sweep.photons[-1]))
    return {kind: float(np.mean(each)) for kind, each in costs.items()}


def _prediction(
    found: Sequence[Sweep],
    group: Sequence[Sweep],
    costs: Mapping[str, float],
    macs: Mapping[str, float],
    photons: float,
) -> Iterator[str]:
    lost = sum(costs.values())
    root = sum(math.sqrt(costs[kind] * macs[kind]) for kind in costs)
    ratio = root**2 / (lost * sum(macs[kind] for kind in costs))
    yield (
        f"Σ c / rho at {photons:g} everywhere: {lost / photons:.4f}; with the best budget of as "
        f"much light: {lost * ratio / photons:.4f}. Predicted light at equal loss: "
        f"{100 * (1 - ratio):.1f} % less."
    )
    seeds = {s.seed for s in group}
    both = [s for s in found if (s.role, s.flavor) == (ALL, group[0].flavor) and s.seed in seeds]
    same = [_above(s, photons) for s in both if photons in s.photons]
    if same:
        yield f"Measured with light in all kinds, {photons:g} everywhere: {np.mean(same):.4f}."


def with_light(transform: Mapping[str, Any], budget: Mapping[str, float]) -> dict[str, Any]:
    """A transform of which every kind of layer has its own light.

    Args:
        transform: as a file has it, with parameters for all layers (`default`) alone.
        budget: kind of layer -> photons a multiplication.
    """
    layers = transform["layer_name_to_config"]
    if list(layers) != ["default"]:
        raise ValueError(f"the sweeps' transform names {', '.join(layers)}; expected default alone")
    each = {
        # a copy each: YAML would write references to one list
        f".*{kind}": deepcopy(layers["default"]) | {curves.LIGHT: float(f"{light:.4g}")}
        for kind, light in budget.items()
    }
    return dict(transform) | {"use_regex": True, "layer_name_to_config": each}


if __name__ == "__main__":
    typer.run(main)
