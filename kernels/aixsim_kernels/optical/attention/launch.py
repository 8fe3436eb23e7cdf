"""Launch parameters of the attention kernels, by table: no search while a model trains."""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """How a head's scores are cut, and how a program runs.

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


class Tiles(NamedTuple):
    """A tile for each pass over the scores."""

    rows: Tile
    values: Tile
    query_grad: Tile
    key_grad: Tile


# not yet measured on a GPU: the largest tiles that spill no register, with as many stages as shared
# memory holds. (capability, or None for what is not listed, largest padded head dimension) -> tiles
_TABLE = {
    ((9, 0), 64): Tiles(
        Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 8, 3)
    ),
    ((9, 0), 128): Tiles(
        Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(128, 64, 8, 2), Tile(32, 64, 8, 1)
    ),
    (None, 64): Tiles(
        Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)
    ),
    (None, 128): Tiles(
        Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 64, 8, 1), Tile(32, 32, 8, 1)
    ),
    (None, 256): Tiles(
        Tile(32, 32, 4, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)
    ),
}
# float32 operands, which no tensor core multiplies
_EXACT = Tiles(*[Tile(32, 32, 8, 1)] * 4)
# largest head dimension that a program can hold
MAX_HEAD_DIM = 256


def padded(head_dim: int) -> int:
    """Head dimension as a program holds it: a power of two, and no less than a product takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tiles_for(device: torch.device, head_dim: int, exact: bool) -> Tiles:
    """The tiles of a call.

    Args:
        device: that it runs on.
        head_dim: the larger of the two padded head dimensions.
        exact: whether operands are float32.
    """
    if exact:
        return _EXACT
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    for known in (capability, None):
        for (listed, largest), tiles in _TABLE.items():
            if listed == known and head_dim <= largest:
                return tiles
    raise ValueError(f"head dimension {head_dim}: at most {MAX_HEAD_DIM}")
