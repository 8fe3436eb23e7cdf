"""`aixsim eval`: measure models, whatever their format."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from aixsim_cli.commands.flags import Command
from aixsim_cli.commands.output import energy_cell, light_cell, print_table, to_json
from aixsim_cli.commands.sweep import sweep
from aixsim_cli.errors import loss_not_finite
from aixsim_cli.files import check_new, write_atomic
from aixsim_cli.options import (
    AsJson,
    BatchSize,
    CalibrationBatches,
    CalibrationPath,
    Dataset,
    DatasetPath,
    DTypeName,
    NoTransform,
    NumBatches,
    Recalibrate,
    SeqLen,
    Source,
    TransformConfigPath,
    TrustRemoteCode,
)

app = typer.Typer(no_args_is_help=True, help="Evaluate a model.")
app.command(cls=Command)(sweep)


@app.command(cls=Command)
def ppl(
    source: Source,
    dataset: Dataset = "builtin",
    dataset_path: DatasetPath = None,
    batch_size: BatchSize = 8,
    num_batches: NumBatches = None,
    seq_len: SeqLen = None,
    dtype: DTypeName = "float32",
    transform_config: TransformConfigPath = None,
    no_transform: NoTransform = False,
    calibration_batches: CalibrationBatches = 8,
    calibration_path: CalibrationPath = None,
    recalibrate: Recalibrate = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Perplexity on a dataset's held-out part: exp of the mean nats per token.

    A model that was not trained with its transform is calibrated first: some batches of training
    text set its ranges.
    """
    from aixsim_cli.eval.measure import Calibration, Text, measure
    from aixsim_cli.transforms.choice import read_choice

    record = measure(
        source,
        Text(dataset, dataset_path, batch_size, num_batches, seq_len),
        Calibration(calibration_batches, calibration_path, recalibrate),
        read_choice(transform_config, no_transform),
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        typer.echo(to_json(record))
    else:
        name = Path(dataset_path).name if dataset_path else dataset
        typer.echo(
            f"{source} on {name} ({record['transform'] or 'digital'}): {record['tokens']:,} tokens "
            f"scored, nll {record['nll']:.5f}, perplexity {record['perplexity']:.4f}"
        )
    _check_finite([record])


@app.command(cls=Command)
def compare(
    sources: Annotated[list[str], typer.Argument(help="Checkpoints, folders or hub names.")],
    dataset: Dataset = "builtin",
    dataset_path: DatasetPath = None,
    batch_size: BatchSize = 8,
    num_batches: NumBatches = None,
    seq_len: SeqLen = None,
    dtype: DTypeName = "float32",
    transform_config: Annotated[
        list[str] | None,
        typer.Option(help="Also evaluate every source under this file; may be repeated."),
    ] = None,
    no_transform: Annotated[
        bool, typer.Option("--no-transform", help="Also evaluate every source digitally.")
    ] = False,
    calibration_batches: CalibrationBatches = 8,
    calibration_path: CalibrationPath = None,
    recalibrate: Recalibrate = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the perplexities: file.png.")] = None,
    energy: Annotated[
        str | None, typer.Option(help="Add light and energy a token, by this price list.")
    ] = None,
) -> None:
    """One table of several models and transforms, on the same tokens.

    Every source is evaluated as it is, and again under each --transform-config and, with
    --no-transform, digitally. "nll to first" is the change of the nll from the first row's, in per
    cent of that. --energy adds detected photons and joules a token, of a causal forward on the
    hardware of that price list (`aixsim energy`).
    """
    prices = None
    if energy is not None:
        from aixsim_cli.energy.hardware import read_hardware

        prices = read_hardware(energy)
    if plot is not None:
        from aixsim_cli.eval.plot import check_plot

        # now, not when everything has been evaluated
        check_plot(plot)
    from aixsim_cli.eval.measure import Calibration, Text, measure
    from aixsim_cli.transforms.choice import DIGITAL, KEEP_OWN, Choice, read_choice

    choices: list[Choice] = [KEEP_OWN, *([DIGITAL] if no_transform else [])]
    choices += [read_choice(path) for path in transform_config or ()]
    text = Text(dataset, dataset_path, batch_size, num_batches, seq_len)
    records: list[dict[str, Any]] = []
    for source in sources:
        for choice in choices:
            digital = choice is DIGITAL
            if digital and records and not records[-1]["transform"]:
                # as it is, it is digital
                continue
            records.append(
                measure(
                    source,
                    text,
                    Calibration(calibration_batches, calibration_path, recalibrate and not digital),
                    choice,
                    dtype=dtype,
                    trust_remote_code=trust_remote_code,
                )
            )
            if prices is not None:
                records[-1] |= _energy(records[-1], choice, prices, trust_remote_code)
            # the same tokens for all: windows as long as the first model's
            text = replace(text, seq_len=records[0]["seq_len"])
    if as_json:
        typer.echo(to_json(records))
    else:
        columns = ["source", "transform", "tokens", "nll", "perplexity", "nll to first"]
        columns += ["photons/token", "energy/token"] if prices is not None else []
        print_table(columns, [_row(record, records[0]) for record in records])
    if plot is not None:
        from aixsim_cli.eval.plot import plot_perplexities

        plot_perplexities(records, plot)
    _check_finite(records)


@app.command(
    "lm-eval",
    cls=Command,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": False},
)
def lm_eval(
    context: typer.Context,
    source: Source,
    tasks: Annotated[str | None, typer.Option(help="lm-eval's names, comma-separated.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0)] = None,
    limit: Annotated[
        float | None, typer.Option(min=0, help="Requests a task; below 1 a fraction of them.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Of a digital model; a noisy one runs one by one.")
    ] = 8,
    dtype: DTypeName = "float32",
    output: Annotated[Path | None, typer.Option(help="Folder for results.json.")] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of task files; they run code.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Noise seeds; mean and deviation.")] = 1,
    transform_config: TransformConfigPath = None,
    no_transform: NoTransform = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Tasks of lm-eval (extra `eval`): its table, and its JSON with --output.

    A task file is a program: lm-eval runs its !function entries and its templates. Use your own.

    aixsim eval lm-eval -- ARGUMENTS hands everything to lm-eval's own command, which then knows
    the model type aixsim: -- run --model aixsim --model_args pretrained=DIR --tasks …
    """
    from aixsim_cli.errors import UserError

    try:
        from aixsim_cli.eval import harness
    except ModuleNotFoundError as error:
        raise UserError(
            f"lm-eval is not installed ({error.name}); expected: pip install 'aixsim[eval]'"
        ) from error
    # after `--` the first word lands here
    if source.startswith("-") or (context.args and tasks is None):
        harness.run_lm_eval_command([source, *context.args])
        return
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if not names:
        got = "missing" if tasks is None else f"got {tasks!r}"
        raise UserError(f"--tasks: {got}; expected names such as wikitext,arc_easy")
    if limit is not None and not 0 < limit < math.inf:
        raise UserError(f"--limit: got {limit}; expected more than 0")
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path: {include_path}: no such folder; expected task files")
    path = None if output is None else output / "results.json"
    if path is not None:
        check_new(path, "--output")
    from aixsim_cli.eval.measure import load_for_generation
    from aixsim_cli.transforms.choice import read_choice

    transform = read_choice(transform_config, no_transform)
    model = load_for_generation(source, transform, dtype=dtype, trust_remote_code=trust_remote_code)
    found = harness.evaluate(
        model,
        names,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        include_path=include_path,
        repeats=repeats,
    )
    typer.echo(harness.table(found))
    if path is not None:
        found |= {"source": source, "transform": model.transform and model.transform.name}
        write_atomic(path, to_json(found, indent=2, default=str) + "\n")
        typer.echo(f"wrote {path}")


def _check_finite(records: list[dict[str, Any]]) -> None:
    """A measurement that came to no number is shown, and is a failure."""
    wrong = [record["source"] for record in records if not math.isfinite(record["nll"])]
    if wrong:
        raise loss_not_finite(f"{', '.join(wrong)}: the loss")


def _energy(
    record: dict[str, Any], choice: Any, prices: Any, trust_remote_code: bool
) -> dict[str, Any]:
    """Light (None = none, or not said) and [low, nominal, high] joules of a record's model."""
    from aixsim_cli.energy.account import token_energy
    from aixsim_cli.energy.source import shape_of_source
    from aixsim_cli.transforms.config import TransformConfig

    trust = trust_remote_code
    shape, own = shape_of_source(record["source"], choice, trust_remote_code=trust)
    transform = choice if isinstance(choice, TransformConfig) else own
    found = token_energy(shape, transform, prices, seq_len=record["seq_len"])
    return {
        "hardware": prices.name,
        "photons_per_token": found.photons_per_token,
        "joules_per_token": found.joules_per_token,
    }


def _row(record: dict[str, Any], first: dict[str, Any]) -> list[str]:
    name = record["transform"] or "digital"
    if record["transform_config"]:
        name = f"{name} ({Path(record['transform_config']).name})"
    return [
        record["source"],
        name + (", calibrated" if record["calibrated"] else ""),
        f"{record['tokens']:,}",
        f"{record['nll']:.5f}",
        f"{record['perplexity']:.4f}",
        _change(record["nll"], first["nll"]),
        *_light_and_energy(record),
    ]


def _light_and_energy(record: dict[str, Any]) -> list[str]:
    if "joules_per_token" not in record:
        return []
    return [light_cell(record["photons_per_token"]), energy_cell(record["joules_per_token"])]


def _change(nll: float, first: float) -> str:
    change = nll / first - 1 if first else math.nan
    return f"{change:+.2%}" if math.isfinite(change) else "-"
