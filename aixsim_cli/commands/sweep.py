"""`aixsim eval sweep`: the loss over parameters of the hardware."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from aixsim_cli.commands.output import energy_cell, light_cell, print_table, to_json
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
    hardware: Annotated[
        str | None,
        typer.Option(
            help="Energy of a token too, by a price list: engineered, tiles-512, …, or a file."
        ),
    ] = None,
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
    Where light is counted, or hardware has prices, photons and energy of a token's forward follow.
    """
    if plot is not None:
        from aixsim_cli.eval.plot import check_plot

        # now, not when everything has been evaluated
        check_plot(plot)
    from aixsim_cli.energy.hardware import read_hardware
    from aixsim_cli.eval import sweep as library
    from aixsim_cli.eval.measure import Calibration, Text
    from aixsim_cli.run import log
    from aixsim_cli.transforms.choice import read_choice
    from aixsim_cli.transforms.vary import parse_axis

    axes = [parse_axis(text) for text in vary]
    prices = None if hardware is None else read_hardware(hardware)
    log.set_up(is_main=True)
    found = library.sweep(
        source,
        axes,
        Text(dataset, dataset_path, batch_size, num_batches, seq_len),
        Calibration(calibration_batches, calibration_path, recalibrate),
        read_choice(transform_config),
        repeats=repeats,
        folder=output,
        hardware=prices,
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
    all_rows = [found["digital"], found["own"], *found["points"]]
    has_light = any(row["photons_per_token"] is not None for row in all_rows)
    columns = [
        *keys,
        "nll",
        f"± ({found['repeats']} seeds)",
        "to digital",
        "± (text)",
        "perplexity",
    ]
    columns += ["photons/token"] * has_light + ["energy/token"] * bool(found["hardware"])
    names = [["digital"], ["as it is"]]
    names += [[as_word(point["values"][key]) for key in keys] for point in found["points"]]
    rows = []
    for name, row in zip(names, all_rows, strict=True):
        cells = [*name, *[""] * (len(keys) - len(name))]
        cells += [f"{row['nll']:.5f}", _deviation(row["stdev"]), f"{row['delta']:+.5f}"]
        cells += [_deviation(row["delta_stderr"]), f"{row['perplexity']:.4f}"]
        if has_light:
            cells.append(light_cell(row["photons_per_token"]))
        if joules := row.get("joules_per_token"):
            cells.append(energy_cell(joules))
        rows.append(cells)
    prices = f" on {found['hardware']}" if found["hardware"] else ""
    title = f"{found['source']} ({found['transform']}{prices}) on {found['dataset']}"
    print_table(columns, rows, f"{title}, {found['tokens']:,} tokens")


def _deviation(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"
