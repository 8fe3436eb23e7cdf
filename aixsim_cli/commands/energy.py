"""`aixsim energy`: what a model takes of hardware, a token, and what that costs."""

import textwrap
from typing import Annotated, Any

import typer

from aixsim_cli.commands.output import print_table, to_json
from aixsim_cli.config.recipe import RECIPE
from aixsim_cli.options import AsJson, NoTransform, TransformConfigPath, TrustRemoteCode

_JOULES_A_KWH = 3.6e6


def energy(
    model: Annotated[
        str,
        typer.Argument(
            metavar="FLAVOR|MODEL",
            help="60M, llama3/8B, …; or a step-N folder, a Hugging Face folder, a hub name.",
        ),
    ],
    hardware: Annotated[
        str, typer.Option(help="A price list: engineered, tiles-512, …, or a file.")
    ] = "engineered",
    transform_config: TransformConfigPath = None,
    no_transform: NoTransform = False,
    seq_len: Annotated[
        int, typer.Option(min=1, help="Tokens of a sequence; what a new one sees in decoding.")
    ] = RECIPE.training.seq_len,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    decode: Annotated[
        bool, typer.Option("--decode", help="A token after the other; else a sequence at once.")
    ] = False,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Of a flavor; default: generate-cfg's tokenizer's.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Energy, light and time of a model's forward a token: what its products take, times prices.

    Of a flavor nothing is loaded; of a model, its config. What a transform leaves digital has the
    price of digital hardware. Every number of a price list has a source, printed at the end.
    """
    from aixsim_cli.energy.hardware import read_hardware
    from aixsim_cli.energy.layout import Work
    from aixsim_cli.energy.report import report
    from aixsim_cli.energy.source import find_shape
    from aixsim_cli.transforms.choice import read_choice

    prices = read_hardware(hardware)
    shape, transform = find_shape(
        model,
        read_choice(transform_config, no_transform),
        vocab_size=vocab_size,
        trust_remote_code=trust_remote_code,
    )
    found = report(shape, transform, prices, Work(seq_len, batch, decode))
    if as_json:
        typer.echo(to_json(found))
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    layers, total = found["layers"], found["joules_per_token"]
    scale, unit = _unit(total[1])
    named = f"{found['model']}, {found['transform'] or 'digital'}, on {found['hardware']['name']}"
    _show_layers(layers, named, scale, unit)
    light = sum(row["joules"]["light"][1] for row in layers)
    per_mac = found["joules_per_mac"][1] * 1e15
    for name, band in [("sum", total), *found["alternatives"].items()]:
        typer.echo(f"{name}: {_band(band, scale)} {unit} a token (low to high)")
    typer.echo(f"{_number(per_mac)} fJ/MAC; light {_number(light * 1e9)} nJ a token")
    typer.echo(f"time of the arrays: {_number(found['seconds_per_token'] * 1e9)} ns a token")
    _show_references(found, scale, unit)
    _show_training(found["training"])
    for kind in ("warnings", "assumptions"):
        typer.echo(f"{kind}:{'' if found[kind] else ' none'}")
        for line in found[kind]:
            typer.echo(_wrapped(f"- {line}"))
    rows = [
        [row["name"], *map(_number, row["value"]), row["unit"], row["source"]]
        for row in found["prices"]
    ]
    title = f"prices of {found['hardware']['name']}: {found['hardware']['what']}"
    print_table(("price", "low", "nominal", "high", "unit", "source"), rows, title)


def _show_layers(layers: list[dict[str, Any]], named: str, scale: float, unit: str) -> None:
    columns = ("layers", "computed", "MMAC", "photons/MAC", "photons", "fJ/MAC")
    rows = [
        [
            row["kind"],
            row["computed"],
            _number(row["macs"] / 1e6),
            _number(row["photons_per_mac"]),
            _number(row["photons"]),
            _number(row["joules_per_mac"] and row["joules_per_mac"] * 1e15),
        ]
        for row in layers
    ]
    print_table(columns, rows, f"{named}: a token")
    parts = list(layers[0]["joules"])
    rows = [
        [
            row["kind"],
            *(_number(row["joules"][part][1] * scale) for part in parts),
            _number(row["total"][1] * scale),
            f"{row['share']:.0%}",
        ]
        for row in layers
    ]
    sums = [sum(row["joules"][part][1] for row in layers) * scale for part in parts]
    rows.append(["sum", *map(_number, [*sums, sum(sums)]), "100%"])
    print_table(("layers", *parts, "sum", "share"), rows, f"{unit} a token, nominal")


def _show_references(found: dict[str, Any], scale: float, unit: str) -> None:
    rows = [
        [
            row["name"],
            _number(row["joules_per_mac"][1] * 1e12),
            _number(row["joules_per_token"] * scale),
            f"{_times(row['ratio'][1])} ({_times(row['ratio'][0])}–{_times(row['ratio'][2])})",
            row["source"],
        ]
        for row in found["references"]
    ]
    columns = ("digital", "pJ/MAC", unit, "over this", "source")
    print_table(
        columns,
        rows,
        "digital machines with the same operations around; over this one, and its ends",
    )


def _show_training(run: dict[str, Any]) -> None:
    kwh = (run["joules"] / _JOULES_A_KWH, run["digital_joules"] / _JOULES_A_KWH)
    typer.echo(
        _wrapped(
            f"a training of {run['tokens']:.3g} tokens, its backward digital and its weights "
            f"written each step: {kwh[0]:.3g} kWh, all digital {kwh[1]:.3g}; {run['saved']:.0%} "
            f"saved of at most {run['most']:.0%}, the forward's share"
        )
    )


def _number(value: float | None) -> str:
    """Three digits, in few characters."""
    if value is None:
        return "-"
    if 0 < value < 0.001:
        return "<.001"
    if value >= 1e6:
        return f"{value:.1e}"
    return f"{value:.3f}" if 0 < value < 1 else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _times(ratio: float) -> str:
    return f"{ratio:.2g}x" if ratio < 10 else f"{ratio:.0f}x"


def _band(band: tuple[float, float, float], scale: float) -> str:
    low, nominal, high = (_number(value * scale) for value in band)
    return f"{nominal} ({low} to {high})"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 80, subsequent_indent="  ", break_long_words=False)


def _unit(joules: float) -> tuple[float, str]:
    """The largest scale by which a value has at most four digits, and its name."""
    scales = ((1e9, "nJ"), (1e6, "µJ"), (1e3, "mJ"))
    return next(((scale, unit) for scale, unit in scales if joules * scale < 10_000), (1.0, "J"))
