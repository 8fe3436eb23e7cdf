"""Loss, light and energy as pictures for a paper's column, each as .pdf and as .png.

    plot_light.py OUT SWEEPS [--run RUN]

SWEEPS holds folders of `aixsim eval sweep --output`, known by their names (`light_curves.py`); RUN
is the folder of a training with shot noise, for what it measured of its layers. Into OUT go
light-loss, light-width, light-energy, energy-parts, energy-width and light-layers; a picture of
which there is no data yet is left out, and named.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import light_curves as curves
import numpy as np
import typer
from compare_light import VOCABULARY, fit_of, of
from light_curves import ALL, LINEARS, Sweep
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from aixsim_cli.config.flavors import FLAVORS, Flavor
from aixsim_cli.energy.account import PARTS, light_per_token, token_energy
from aixsim_cli.energy.hardware import Hardware, read_hardware
from aixsim_cli.energy.shape import shape_of_flavor, shape_of_llama
from aixsim_cli.energy.source import shape_of_source
from aixsim_cli.transforms.read import parse_transform

# inches of a column; points of every text
_WIDTH, _FONT = 3.4, 8
_STYLE: Any = {
    "font.size": _FONT, "axes.labelsize": _FONT, "legend.fontsize": _FONT, "xtick.labelsize": _FONT,
    "ytick.labelsize": _FONT, "axes.linewidth": 0.6, "lines.linewidth": 1.1, "lines.markersize": 4,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "hatch.linewidth": 0.5, "pdf.fonttype": 42, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4, "ytick.minor.width": 0.4, "errorbar.capsize": 1.5,
}  # fmt: skip
_MARKS, _LINES = ("o", "s", "^", "D"), ("-", "--", "-.", ":")
_GUIDE = {"color": "0.55", "lw": 0.8, "zorder": 1}
_SIZES = ("60M", "200M", "400M", "600M", "1.1B")
# as docs/energy.md has them: GPT-3's and MT-NLG's size, and 10^15 and 4 * 10^15 parameters
_LARGE = (
    Flavor(12288, 96, 96, 96, None, 128),
    Flavor(20480, 105, 128, 128, None, 128),
    Flavor(409600, 500, 1024, 1024, None, 128),
    Flavor(819200, 500, 2048, 2048, None, 128),
)
_WORDS = (49152, 50257)
_STATE_OF_THE_ART = 300e-15
_LOGGED = 10


def main(
    out: Path,
    sweeps: Path,
    run: Annotated[Path | None, typer.Option(help="Of a training with shot noise.")] = None,
    hardware: Annotated[str, typer.Option(help="Price list.")] = "engineered",
) -> None:
    found = curves.read_sweeps(sweeps)
    prices = read_hardware(hardware)
    out.mkdir(parents=True, exist_ok=True)
    with rc_context(_STYLE):
        _picture(out / "light-loss", draw_losses, found)
        _picture(out / "light-width", draw_widths, found)
        _picture(out / "light-energy", draw_joules, found, prices)
        _picture(out / "energy-parts", draw_parts, prices)
        _picture(out / "energy-width", draw_advantage)
        if run is not None:
            _picture(out / "light-layers", draw_layers, run)


def _picture(path: Path, draw: Callable[..., str | None], *args: object) -> None:
    """Draw one, and say what came of it."""
    figure = Figure(layout="constrained", figsize=(_WIDTH, 2.6))
    if missing := draw(figure, *args):
        print(f"{path.name}: left out: {missing}")
        return
    # the same bytes from the same data
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    figure.savefig(path.with_suffix(".png"), dpi=200)
    print(f"{path.name}: {path.with_suffix('.pdf')}, {path.with_suffix('.png')}")


def _look(place: int, count: int) -> dict[str, Any]:
    """Dark to light, so that the order shows in grey too."""
    shade = colormaps["viridis"](0.75 * place / max(1, count - 1))
    return {"color": shade, "marker": _MARKS[place % 4], "ls": _LINES[place % 4]}


def _line(axes: Axes, x: Any, y: Any, bars: Any, label: str, look: dict[str, Any]) -> None:
    """A line with error bars, which its legend does not show."""
    axes.plot(x, y, label=label, **look)
    axes.errorbar(x, y, bars, fmt="none", ecolor=look["color"], elinewidth=0.8)


def _plain_ticks(axis: Any) -> None:
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: "")


def draw_losses(figure: Figure, found: Sequence[Sweep]) -> str | None:
    """(a) What is lost to unlimited light over photons, a line a width."""
    groups = of(found, ALL)
    if not groups:
        return "no FLAVOR-SEED"
    axes = figure.add_subplot()
    for place, (width, group) in enumerate(groups.items()):
        lights, means, spreads = _over_runs(group)
        # what is within its own deviation of nothing says nothing on this scale
        shown = means > spreads
        label = f"$d$ = {width} ({len(group)})"
        _line(axes, lights[shown], means[shown], spreads[shown], label, _look(place, 3))
    ends = np.array([0.3, 20.0])
    lowest = min(float(np.interp(1.0, *_over_runs(group)[:2])) for group in groups.values())
    axes.plot(ends, 0.2 * lowest / ends, **_GUIDE)
    axes.annotate(r"$\propto 1/\rho$", (1.6, 0.11 * lowest), ha="right", va="top", color="0.35")
    axes.set(xscale="log", yscale="log", ylim=(2e-4, 4))
    axes.set_xlabel(r"detected photons a multiplication, $\rho$")
    axes.set_ylabel("loss above unlimited light\n(nats per token)")
    _plain_ticks(axes.xaxis)
    axes.legend(title="width (trainings)", title_fontsize=_FONT, handlelength=2.8)
    return None


def _over_runs(group: Sequence[Sweep]) -> tuple[Any, Any, Any]:
    """Photons, and mean and deviation over trainings and noise seeds of what is lost."""
    lights = sorted({light for s in group for light in s.photons})
    means, spreads = [], []
    for light in lights:
        above = [
            s.runs[list(s.photons).index(light)] - s.own.mean() for s in group if light in s.photons
        ]
        runs = np.concatenate(above)
        means.append(runs.mean())
        spreads.append(runs.std(ddof=1) if len(runs) > 1 else 0.0)
    return np.array(lights), np.array(means), np.array(spreads)


def draw_widths(figure: Figure, found: Sequence[Sweep]) -> str | None:
    """(b) Photons at a tolerated loss over the width, with slopes."""
    series = [(ALL, "+1 %"), (ALL, "+0.04 nats"), (LINEARS, "+1 %")]
    figure.set_figheight(3.0)
    axes, drawn = figure.add_subplot(), []
    for place, (role, target) in enumerate(series):
        known = [s for s in found if s.role == role and curves.light_at(s, target) is not None]
        groups = of(known, role)
        if len(groups) < 2:
            continue
        drawn.append((known, target))
        _draw_slope(axes, known, target, place, "linears" if role else "all products")
    if not drawn:
        return "light at a target for two widths"
    known, target = drawn[0]
    widths = np.log([s.width for s in known])
    middle = np.mean([math.log(curves.light_at(s, target) or 1) for s in known])
    ends = np.array([58.0, 290.0])
    for steep in (-1, 0):
        line = np.exp(middle + steep * (np.log(ends) - widths.mean()))
        axes.plot(ends, line, ls=(0, (1, 1.5)), **_GUIDE)
        at, aside = (0, "left") if steep else (1, "right")
        axes.annotate(f"slope {steep}".replace("-", "−"), (ends[at], line[at]), xytext=(0, 3),
                      textcoords="offset points", ha=aside, color="0.35")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(50, 320))
    axes.set_xticks([64, 128, 256])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
    _plain_ticks(axes.xaxis)
    _plain_ticks(axes.yaxis)
    axes.set_xlabel("width $d$ of the model")
    axes.set_ylabel(r"photons a multiplication, $\rho^*$")
    figure.legend(loc="outside upper center", handlelength=2.8, title_fontsize=_FONT,
                  title="light in, tolerated loss: slope [95 %]")  # fmt: skip
    return None


def _draw_slope(axes: Axes, known: Sequence[Sweep], target: str, place: int, name: str) -> None:
    widths = np.array([float(s.width) for s in known])
    stars = np.array([curves.light_at(s, target) or 1 for s in known])
    fit = fit_of(known, target)
    slopes = curves.resampled_slopes(known, target, seeds=True, windows=True)
    low, high = np.percentile(slopes, (2.5, 97.5))
    look = _look(place, 3)
    label = f"{name}, {target}: {fit:.2f} [{low:.2f}, {high:.2f}]".replace("-", "−")
    aside = 1.05 ** (place - 1)
    groups = of(known, known[0].role)
    for width in groups:
        mine = stars[widths == width]
        spread = mine.std(ddof=1) if len(mine) > 1 else None
        axes.errorbar(
            width * aside, mine.mean(), spread, color=look["color"], marker=look["marker"],
            mfc="white" if place == 1 else look["color"], elinewidth=0.8,
        )  # fmt: skip
    ends = np.array([60.0, 270.0])
    line = np.exp(np.log(stars).mean() + fit * (np.log(ends) - np.log(widths).mean()))
    axes.plot(ends * aside, line, color=look["color"], ls=look["ls"])
    # what the legend shows: a line with its marker
    axes.plot([], [], label=label, mfc="white" if place == 1 else look["color"], **look)


def draw_joules(figure: Figure, found: Sequence[Sweep], prices: Hardware) -> str | None:
    """(c) Loss over the energy of light; the whole energy, and digital machines, as marks."""
    groups = of(found, ALL)
    if not groups:
        return "no FLAVOR-SEED"
    figure.set_figheight(3.0)
    axes = figure.add_subplot()
    for place, (width, group) in enumerate(groups.items()):
        look, first = _look(place, 3), group[0]
        shape, seq_len = curves.shape_of(first.flavor, VOCABULARY), first.seq_len
        macs, price = _lit_macs(first), prices.light.joules()[1]
        lights, above, spreads = _over_runs(group)
        level = float(np.mean([s.own.mean() for s in group]))
        _line(axes, lights * macs * price, above + level, spreads, f"$d$ = {width}", look)
        optical = parse_transform(dict(first.transform), source="sweep")
        energy = token_energy(shape, optical, prices, seq_len=seq_len)
        axes.plot(energy.joules_per_token[1], level, marker="*", ms=8, color=look["color"])
        digital = float(np.mean([s.digital.mean() for s in group]))
        around = shape.digital_ops((seq_len + 1) / 2) * prices.digital_op.joules()[1]
        for name, mac in prices.references.items():
            there = energy.macs * mac.joules()[1] + around
            axes.vlines(there, digital - 0.08, digital + 0.08, color="0.3", lw=1.1)
            if place == 0:
                # two of them stand close to each other
                side = "right" if mac.joules()[1] == _STATE_OF_THE_ART else "left"
                axes.annotate(name, (there, digital + 0.22), rotation=90, ha=side, color="0.2")
    _draw_price(axes, prices)
    axes.set(xscale="log")
    axes.set_xlabel("energy per token (J)")
    axes.set_ylabel("loss (nats per token)")
    marks = [Line2D([], [], marker="*", ms=8, ls="", color="0.3", label="all parts"),
             Line2D([], [], marker="|", ms=8, ls="", color="0.3", label="digital")]  # fmt: skip
    handles, _ = axes.get_legend_handles_labels()
    figure.legend(handles=[*handles, *marks], loc="outside upper center", ncols=3,
                  handlelength=2.4, title=f"lines: light alone ({prices.name}); marks: machines",
                  title_fontsize=_FONT)  # fmt: skip
    return None


def _draw_price(axes: Axes, prices: Hardware) -> None:
    """How far the price of light goes, low to high, as a bar of that length."""
    low, nominal, high = prices.light.joules()
    at, height = 3e-11, 5.9
    ends = [[at - at * low / nominal], [at * high / nominal - at]]
    axes.errorbar([at], [height], xerr=ends, fmt="|", color="0.3", elinewidth=0.8)
    axes.annotate("price of light,\nlow to high", (at, height), xytext=(0, -4), va="top",
                  textcoords="offset points", ha="center", color="0.2")  # fmt: skip


def _lit_macs(sweep: Sweep) -> float:
    """Multiplications of a token that have light."""
    return sum(curves.macs_of(curves.shape_of(sweep.flavor, VOCABULARY), sweep.seq_len).values())


def draw_parts(figure: Figure, prices: Hardware) -> str | None:
    """(d) Energy of a token by part over the size of the model, nominal."""
    axes = figure.add_subplot()
    optical = parse_transform(_everything(), source="plot")
    tall = np.zeros(len(_SIZES))
    found = [
        token_energy(shape_of_flavor("aixsim", size, _WORDS[0]), optical, prices) for size in _SIZES
    ]
    hatches = ("", "", "////", "", "....", "")
    used = [part for part in PARTS if any(_of_part(one, part) > 0 for one in found)]
    for place, part in enumerate(used):
        height = np.array([_of_part(one, part) * 1e6 for one in found])
        shade = colormaps["cividis"](0.05 + 0.9 * place / (len(used) - 1))
        most = 100 * max(_of_part(one, part) / one.joules_per_token[1] for one in found)
        # what is too thin to be seen
        label = part if most > 1 else f"{part} (< {math.ceil(100 * most) / 100:g} %)"
        axes.bar(_SIZES, height, 0.62, tall, label=label, hatch=hatches[place], edgecolor="white",
                 lw=0.5, color=shade)  # fmt: skip
        tall += height
    for place, one in enumerate(found):
        axes.annotate(f"{1e15 * one.joules_per_token[1] / one.macs:.0f} fJ/MAC",
                      (place, tall[place]), xytext=(0, 2), textcoords="offset points",
                      ha="center")  # fmt: skip
    axes.set_xlabel("model (parameters)")
    axes.set_ylabel("energy per token (µJ)")
    axes.set_ylim(top=1.3 * tall[-1])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="upper left", handlelength=1.6)
    return None


def _of_part(energy: Any, part: str) -> float:
    return sum(row.joules[part][1] for row in energy.rows)


def _everything(**params: Any) -> dict[str, Any]:
    """A transform of all products, the output projection too."""
    layers = {"output|lm_head": params, "default": params}
    return {"use_regex": True, "layer_name_to_config": layers}


def draw_advantage(figure: Figure) -> str | None:
    """(e) 300 fJ a multiplication over what it takes, by width, beside the abstract's claims."""
    axes = figure.add_subplot()
    sizes = [*((FLAVORS["aixsim"][size], _WORDS[0]) for size in _SIZES),
             *((size, _WORDS[1]) for size in _LARGE)]  # fmt: skip
    widths = [size.dim for size, _ in sizes]
    lists = (("engineered", {}), ("paper-like", {}), ("future", {"q_levels": 16}))
    for place, (name, params) in enumerate(lists):
        optical, prices = parse_transform(_everything(**params), source="plot"), read_hardware(name)
        ratios = []
        for size, words in sizes:
            found = token_energy(shape_of_llama("model", size, words), optical, prices)
            ratios.append([_STATE_OF_THE_ART * found.macs / j for j in found.joules_per_token])
        best, middle, worst = np.array(ratios).T
        look = _look(place, 3)
        axes.plot(widths, middle, label=f"{name}{', 4 bit' if params else ''}", **look)
        axes.fill_between(widths, worst, best, color=look["color"], alpha=0.13, lw=0)
    regime = (widths[-2], widths[-1])
    claims = [((widths[-4], widths[-3]), 100, "100×"), (regime, 8e3, ">8,000×"),
              (regime, 1e5, ">100,000×")]  # fmt: skip
    for ends, ratio, text in claims:
        axes.plot(ends, [ratio, ratio], color="black", lw=2.2, solid_capstyle="butt", zorder=4)
        axes.annotate(text, (ends[1], ratio), xytext=(4, -3), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlim=(300, 9e6), ylim=(1, 5e6))
    axes.set_xlabel("width $d$ of the model")
    axes.set_ylabel("300 fJ/MAC over energy per MAC")
    handles, _ = axes.get_legend_handles_labels()
    claimed = Line2D([], [], color="black", lw=2.2, label="abstract's claims")
    axes.legend(handles=[*handles, claimed], loc="upper left", handlelength=2.8)
    return None


def draw_layers(figure: Figure, run: Path) -> str | None:
    """(f) Signal to noise that a training measured, and its light, by kind of layer."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [row for row in map(json.loads, lines) if any(k.startswith("snr/") for k in row)]
    checkpoints = sorted((run / "checkpoint").glob("step-*"), key=lambda p: int(p.name[5:]))
    if not records or not checkpoints:
        return f"{run} has no snr/… in metrics.jsonl, or no checkpoint"
    snr = snr_of(records[-_LOGGED:])
    shape, transform = shape_of_source(str(checkpoints[-1]))
    seq_len = _seq_len(checkpoints[-1] / "config.yaml")
    light = _by_kind(light_per_token(shape, transform, seq_len=seq_len))
    kinds = [kind for kind in light if kind in snr]
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(kinds))
    dark = colormaps["viridis"](0.2)
    means, spreads = zip(*(snr[kind] for kind in kinds), strict=True)
    left.errorbar(means, places, xerr=spreads, fmt="o", color=dark, elinewidth=0.8)
    right.barh(places, [light[kind] / 1e3 for kind in kinds], 0.55, color="0.6")
    left.set_yticks(places, kinds)
    left.invert_yaxis()
    left.set_xlim(left=0)
    left.set_xlabel("signal to shot noise\n(ratio of deviations)")
    right.set_xlabel("detected photons\nper token (thousands)")
    right.tick_params(axis="y", left=False)
    return None


def snr_of(records: Iterable[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Mean and deviation over records of `metrics.jsonl`, by kind of layer as a file names it."""
    names = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo",
             "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # fmt: skip
    found: dict[str, list[float]] = {}
    for record in records:
        for key, value in record.items():
            if key.startswith("snr/"):
                kind = key.removeprefix("snr/")
                found.setdefault(names.get(kind, kind), []).append(value)
    return {kind: (float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else 0.0)
            for kind, v in found.items()}  # fmt: skip


def _by_kind(light: dict[str, float]) -> dict[str, float]:
    """An attention's two products as one."""
    made: dict[str, float] = {}
    for kind, photons in light.items():
        name = curves.ATTENTION if kind in (curves.SCORES, curves.VALUES) else kind
        made[name] = made.get(name, 0.0) + photons
    return made


def _seq_len(config: Path) -> int:
    import yaml

    return int(yaml.safe_load(config.read_text(encoding="utf-8"))["training"]["seq_len"])


if __name__ == "__main__":
    typer.run(main)
