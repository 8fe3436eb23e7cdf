"""Launch parameters of the Triton kernels, by table: no search while a model trains.

A search at run time makes ranks of one job wait for each other, or pick different kernels. The
table is by compute capability and shape; `None` stands for what is not listed.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
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


# not yet measured on a GPU: the largest tiles whose epilogue spills no register (256 columns do),
# and as many stages as shared memory holds
LARGE, SMALL, EXACT = Tile(128, 128, 64, 8, 4), Tile(32, 64, 64, 4, 4), Tile(64, 64, 32, 4, 3)
_OLDER = (Tile(128, 128, 64, 8, 3), Tile(32, 64, 64, 4, 3), EXACT)
_TABLE: dict[tuple[int, int] | None, tuple[Tile, Tile, Tile]] = {
    (9, 0): (LARGE, SMALL, EXACT),
    None: _OLDER,
}


def tile_for(capability: tuple[int, int] | None, rows: int, columns: int, exact: bool) -> Tile:
    """The tile of a product.

    Args:
        capability: of the device, as torch tells it.
        rows: of the output.
        columns: of the output.
        exact: whether operands are float32, which no tensor core multiplies.
    """
    large, small, with_floats = _TABLE.get(capability, _OLDER)
    if exact:
        return with_floats
    return small if min(rows, columns) <= 64 else large
