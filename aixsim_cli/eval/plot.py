"""Plots of evaluations, by matplotlib (extra `eval`)."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from aixsim_cli.errors import RunError, UserError
from aixsim_cli.files import check_new


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
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise RunError(f"{path}: the plot cannot be written: {error.strerror}") from error


def _name(source: str) -> str:
    """A source in a word or two: of a run's checkpoint, `RUN/checkpoint/step-N`, the run too."""
    path = Path(source)
    run = path.parents[1].name if path.parent.name == "checkpoint" else ""
    return f"{run}/{path.name}" if run else path.name
