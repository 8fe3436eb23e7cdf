"""Plots of evaluations, by matplotlib (extra `eval`)."""

from pathlib import Path
from typing import Any

from aixsim_cli.errors import UserError


def plot_perplexities(records: list[dict[str, Any]], path: Path) -> None:
    """Draw a bar for every record.

    Args:
        records: of `aixsim eval compare`.
        path: the picture to write; its suffix tells the format.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UserError(
            "--plot: matplotlib is not installed; expected: pip install 'aixsim[eval]'"
        ) from error
    figure = Figure(figsize=(7, 1 + 0.45 * len(records)), layout="constrained")
    axes = figure.add_subplot()
    labels = [f"{Path(r['source']).name}\n{r['transform'] or 'digital'}" for r in records]
    bars = axes.barh(range(len(records)), [r["perplexity"] for r in records])
    axes.set_yticks(range(len(records)), labels)
    axes.invert_yaxis()
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_xlabel("perplexity")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
