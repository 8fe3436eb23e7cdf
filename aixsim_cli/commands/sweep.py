"""`aixsim eval sweep`: the loss over parameters of the hardware."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from aixsim_cli.commands.output import print_table, to_json
from aixsim_cli.errors import loss_not_finite
from aixsim_cli.options import (
    AsJson,
    BatchSize,
    CalibrationBatches,
    CalibrationPath,
    Dataset,
    DatasetPath,
    DTypeName,
    NumBatches,
    Recalibrate,
    SeqLen,
    Source,
    TransformConfigPath,
    TrustRemoteCode,
)


def sweep(
    source: Source,
    vary: Annotated[
        list[str],
        typer.Option(
            help="NAME=LO:HI:N, N values evenly spaced in their logarithm; NAME=LO:HI:N:lin, "
            "evenly spaced; NAME=A,B,C, these. NAME@PATTERN=… in modules of such names alone. "
            "Given several times: every combination."
        ),
    ],
    repeats: Annotated[
        int, typer.Option(min=1, help="Noise seeds, the same at every point; mean and deviation.")
    ] = 1,
    dataset: Dataset = "builtin",
    dataset_path: DatasetPath = None,
    batch_size: BatchSize = 8,
    num_batches: NumBatches = None,
    seq_len: SeqLen = None,
    dtype: DTypeName = "float32",
    transform_config: TransformConfigPath = None,
    calibration_batches: CalibrationBatches = 8,
    calibration_path: CalibrationPath = None,
    recalibrate: Recalibrate = False,
    trust_remote_code: TrustRemoteCode = False,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps every loss: the same command goes on where it ended."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw loss over the first --vary: a .pdf, .svg or .png.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The loss at every value of parameters of the hardware, on the same tokens.

    Beside it are the loss of the digital model and that under its transform unchanged. "to digital"
    is the difference in nats per token, with its standard error over the windows of the text.
    """
    if plot is not None:
        from aixsim_cli.eval.plot import check_plot

        # now, not when everything has been evaluated
        check_plot(plot)
    from aixsim_cli.eval import sweep as library
    from aixsim_cli.eval.measure import Calibration, Text
    from aixsim_cli.run import log
    from aixsim_cli.transforms.choice import read_choice
    from aixsim_cli.transforms.vary import parse_axis

    axes = [parse_axis(text) for text in vary]
    log.set_up(is_main=True)
    found = library.sweep(
        source,
        axes,
        Text(dataset, dataset_path, batch_size, num_batches, seq_len),
        Calibration(calibration_batches, calibration_path, recalibrate),
        read_choice(transform_config),
        repeats=repeats,
        folder=output,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        typer.echo(to_json(found))
    else:
        _print(found)
    if plot is not None:
        from aixsim_cli.eval.plot import plot_sweep

        plot_sweep(found, plot)
    rows = {"digital": found["digital"], "as it is": found["own"]}
    rows |= {library.name_of(point["values"]): point for point in found["points"]}
    wrong = [name for name, row in rows.items() if not math.isfinite(row["nll"])]
    if wrong:
        raise loss_not_finite(f"{source}: {'; '.join(wrong)}: the loss")


def _print(found: dict[str, Any]) -> None:
    from aixsim_cli.transforms.vary import as_word

    keys = [axis["key"] for axis in found["vary"]]
    rows = [
        ["digital", *[""] * (len(keys) - 1), *_cells(found["digital"])],
        ["as it is", *[""] * (len(keys) - 1), *_cells(found["own"])],
    ]
    for point in found["points"]:
        rows.append([*(as_word(point["values"][key]) for key in keys), *_cells(point)])
    seeds = found["repeats"]
    columns = (*keys, "nll", f"± over {seeds} seeds", "to digital", "±", "perplexity")
    title = f"{found['source']} on {found['dataset']} ({found['transform']}), "
    print_table(columns, rows, f"{title}{found['tokens']:,} tokens")


def _cells(record: dict[str, Any]) -> list[str]:
    return [
        f"{record['nll']:.5f}",
        _deviation(record["stdev"]),
        f"{record['delta']:+.5f}",
        _deviation(record["delta_stderr"]),
        f"{record['perplexity']:.4f}",
    ]


def _deviation(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"
