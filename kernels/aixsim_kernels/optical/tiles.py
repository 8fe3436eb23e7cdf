"""Launch parameters of the Triton kernels, by table: no search while a model trains.

A search at run time makes ranks of one job wait for each other, or pick different kernels. The
table, `tiles.json`, is by compute capability ("other" is what is not listed), operation and class
of shapes; `scripts/tune_kernels.py` measures it on the device at hand. "exact" is for float32
operands, which no tensor core multiplies.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

TABLE = Path(__file__).with_name("tiles.json")
# largest head dimension that the attention's registers hold
MAX_HEAD_DIM = 256


class LinearTile(NamedTuple):
    """How a matrix product is cut.

    Args:
        m: rows of the output a program computes.
        n: columns.
        k: depth of a step.
        warps: of a program.
        stages: steps whose operands are loaded ahead.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int


class AttentionTile(NamedTuple):
    """How a head's scores are cut.

    Args:
        m: queries of a tile.
        n: keys of a tile.
        warps: of a program.
        stages: tiles whose operands are loaded ahead.
    """

    m: int
    n: int
    warps: int
    stages: int


class AttentionTiles(NamedTuple):
    """A tile for each pass over the scores."""

    rows: AttentionTile
    values: AttentionTile
    query_grad: AttentionTile
    key_grad: AttentionTile


@cache
def table() -> dict[str, Any]:
    """The table: capability -> operation -> class -> launch parameters."""
    return json.loads(TABLE.read_text())


def capability(device: torch.device) -> str:
    """Compute capability of a device as the table has it."""
    if device.type != "cuda":
        return "other"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def linear_class(rows: int, columns: int, exact: bool) -> str:
    """Class of a product by its output's shape; `exact`: its operands are float32."""
    if exact:
        return "exact"
    return "small" if min(rows, columns) <= 64 else "large"


def linear_tile(
    device: torch.device, rows: int, columns: int, exact: bool, has_light: bool = False
) -> LinearTile:
    """Launch parameters of a product; one with light holds more at a time, of a smaller tile."""
    tile = LinearTile(*_of(device)["linear"][linear_class(rows, columns, exact)])
    return tile._replace(n=tile.n // 2) if has_light and tile.n > 64 else tile


def padded(head_dim: int) -> int:
    """Head dimension as a program holds it: a power of two, and no less than a product takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def attention_class(head_dim: int, exact: bool) -> str:
    """Class of an attention by the larger of its two head dimensions.

    Raises:
        ValueError: the head dimension is beyond `MAX_HEAD_DIM`.
    """
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head dimension {head_dim}: at most {MAX_HEAD_DIM}")
    return "exact" if exact else str(max(64, padded(head_dim)))


def attention_tiles(
    device: torch.device, head_dim: int, exact: bool, has_light: bool = False
) -> AttentionTiles:
    """Launch parameters of an attention's passes; raises as `attention_class`.

    With light operands are there twice, and tiles are those of heads twice as wide.
    """
    name = attention_class(head_dim, exact)
    if has_light and not exact:
        name = attention_class(min(2 * int(name), MAX_HEAD_DIM), exact)
    found = dict(_of(device)["attention"][name])
    if has_light:
        # its operands are as wide as before, and its scores are held twice
        m, n, *rest = found["rows"]
        found["rows"] = (m, min(n, 32), *rest)
    return AttentionTiles(**{name: AttentionTile(*tile) for name, tile in found.items()})


def _of(device: torch.device) -> dict[str, Any]:
    return table().get(capability(device), table()["other"])


def write(new: dict[str, Any]) -> None:
    """Replace the table's file, one class of shapes a line."""
    lines = []
    for device, operations in new.items():
        parts = [
            f'    "{operation}": {{\n'
            + ",\n".join(f'      "{name}": {json.dumps(value)}' for name, value in classes.items())
            + "\n    }"
            for operation, classes in operations.items()
        ]
        lines.append(f'  "{device}": {{\n' + ",\n".join(parts) + "\n  }")
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
