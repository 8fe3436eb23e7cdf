"""Plots of evaluations, by matplotlib (extra `eval`)."""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from aixsim_cli.errors import RunError, UserError
from aixsim_cli.files import check_new
from aixsim_cli.transforms.vary import as_word


def check_plot(path: Path) -> None:
    """See that a picture can be drawn.

    Args:
        path: where it is to go.

    Raises:
        UserError: a format that is not written, matplotlib is not installed, something is there,
            or it cannot be written.
    """
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot: got {path}; expected a .png, .pdf or .svg file")
    if find_spec("matplotlib") is None:
        raise UserError("--plot: matplotlib is not installed; expected: pip install 'aixsim[eval]'")
    check_new(path, "--plot")


def plot_perplexities(records: list[dict[str, Any]], path: Path) -> None:
    """Draw a bar for every record.

    Args:
        records: of `aixsim eval compare`.
        path: the picture to write; its suffix tells the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 0.45 * len(records)), layout="constrained")
    axes = figure.add_subplot()
    labels = [f"{_name(r['source'])}\n{r['transform'] or 'digital'}" for r in records]
    bars = axes.barh(range(len(records)), [r["perplexity"] for r in records])
    axes.set_yticks(range(len(records)), labels)
    axes.invert_yaxis()
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_xlabel("perplexity")
    # room for the numbers beside the bars
    axes.margins(x=0.12)
    _save(figure, path)


# told apart in print without colours too
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES = ("-", "--", "-.", ":")
# what a journal's column takes: inches, points
_SIZE, _FONT_SIZE = (5.0, 3.6), 9
_POINTS_AN_INCH = 72
# of a label, in characters: three such stand beside each other
_SHORT = 16
_GREY = "0.45"
# between the ends of an axis, from which on a label a decade is enough
_MANY = 100


def plot_sweep(found: dict[str, Any], path: Path) -> None:
    """Draw the loss over the first parameter of a sweep, a line for each value of the others.

    Bars are the standard deviation over noise seeds. What is not finite is not drawn.

    Args:
        found: what `aixsim eval sweep` found.
        path: the picture to write; its suffix tells the format.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    first, *others = found["vary"]
    lines: dict[str, list[dict[str, Any]]] = {}
    for point in found["points"]:
        words = [as_word(point["values"][axis["key"]]) for axis in others]
        lines.setdefault(", ".join(words) or found["transform"], []).append(point)
    columns = 3 if max(map(len, lines)) < _SHORT else 2
    rows = math.ceil((len(lines) + 2) / columns) + 1 if others else 0
    # text in a vector format stays text
    with rc_context({"font.size": _FONT_SIZE, "pdf.fonttype": 42, "svg.fonttype": "none"}):
        size = (_SIZE[0], _SIZE[1] + rows * _FONT_SIZE * 1.6 / _POINTS_AN_INCH)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        drawn = [
            _draw_line(axes, first, points, label, place / max(1, len(lines) - 1), place)
            for place, (label, points) in enumerate(lines.items())
        ]
        for record, label, style in (("own", "as it is", ":"), ("digital", "digital", "-")):
            if math.isfinite(nll := found[record]["nll"]):
                drawn.append(axes.axhline(nll, color=_GREY, ls=style, lw=1, label=label, zorder=1))
        _scale_x(axes, first)
        axes.set_xlabel(_titled(first))
        axes.set_ylabel("loss (nats per token)")
        axes.grid(which="major", color="0.9", lw=0.5)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        style = {"frameon": False, "fontsize": _FONT_SIZE - 1, "handlelength": 3.2}
        if others:
            style |= {"title": ", ".join(map(_titled, others)), "title_fontsize": _FONT_SIZE - 1}
            figure.legend(handles=drawn, loc="outside upper center", ncols=columns, **style)
        else:
            axes.legend(handles=drawn, **style)
        _save(figure, path)


def _draw_line(
    axes: Any,
    first: dict[str, Any],
    points: list[dict[str, Any]],
    label: str,
    shade: float,
    at: int,
) -> Any:
    from matplotlib import colormaps

    values = [point["values"][first["key"]] for point in points]
    if not _are_numbers(first["values"]):
        words = list(map(as_word, first["values"]))
        values = [words.index(as_word(value)) for value in values]
    deviations = [point["stdev"] or 0.0 for point in points]
    return axes.errorbar(
        values,
        [point["nll"] if math.isfinite(point["nll"]) else math.nan for point in points],
        yerr=deviations if any(deviations) else None,
        label=label,
        # dark to light, so that the order shows in grey too
        color=colormaps["viridis"](0.8 * shade),
        marker=_MARKERS[at % len(_MARKERS)],
        ls=_LINES[at % len(_LINES)],
        ms=4,
        lw=1.2,
        elinewidth=0.8,
        capsize=2,
        zorder=2,
    )


def _scale_x(axes: Any, first: dict[str, Any]) -> None:
    """The scale that the values are evenly spaced on, with numbers as people write them."""
    from matplotlib.ticker import LogLocator, NullFormatter

    values = first["values"]
    if not _are_numbers(values):
        axes.set_xticks(range(len(values)), list(map(as_word, values)))
    elif first["scale"] == "log":
        axes.set_xscale("log")
        few = max(values) / min(values) < _MANY
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())


def _titled(axis: dict[str, Any]) -> str:
    return axis["key"] + (f" ({axis['unit']})" if axis["unit"] else "")


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=200)
    except OSError as error:
        raise RunError(f"{path}: the plot cannot be written: {error.strerror}") from error


def _name(source: str) -> str:
    """A source in a word or two: of a run's checkpoint, `RUN/checkpoint/step-N`, the run too."""
    path = Path(source)
    run = path.parents[1].name if path.parent.name == "checkpoint" else ""
    return f"{run}/{path.name}" if run else path.name
