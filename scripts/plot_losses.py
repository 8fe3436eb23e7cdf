"""Losses of several runs over their steps, and how far each is from the first, as a picture.

    plot_losses.py FILE.png digital=outputs/a/metrics.jsonl optical=outputs/b/metrics.jsonl

The distance is that of means over the `--window` steps before, in per cent of the first run's.
"""

import json
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Annotated

import typer
from matplotlib.figure import Figure


def main(
    picture: Path,
    runs: Annotated[list[str], typer.Argument(help="NAME=METRICS.jsonl, the first to compare to")],
    title: str = "",
    window: int = 40,
) -> None:
    curves = {name: _losses(Path(path)) for name, _, path in (run.partition("=") for run in runs)}
    if len({tuple(curve) for curve in curves.values()}) > 1:
        raise typer.BadParameter("the runs logged different steps; expected the same in all")
    first, *others = curves
    smooth = {name: _means(list(curve.values()), window) for name, curve in curves.items()}
    steps = list(curves[first])[window - 1 :]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, (name, values) in enumerate(smooth.items()):
        left.plot(steps, values, label=name, color=f"C{place}", linewidth=1.2)
    for place, name in enumerate(others, 1):
        away = [100 * (a / b - 1) for a, b in zip(smooth[name], smooth[first], strict=True)]
        right.plot(steps, away, label=name, color=f"C{place}", linewidth=1.2)
    right.axhline(0, color="C0", linewidth=1.2, label=first)
    left.set(xlabel="step", ylabel=f"training loss, mean of {window} steps", title=title)
    right.set(xlabel="step", ylabel=f"loss to {first}, %")
    left.legend(frameon=False)
    figure.savefig(picture, dpi=150)


def _losses(path: Path) -> dict[int, float]:
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def _means(values: list[float], window: int) -> list[float]:
    ends = [0, *range(window, len(values) + 1)]
    return [mean(values[end - window : end]) for _, end in pairwise(ends)]


if __name__ == "__main__":
    typer.run(main)
