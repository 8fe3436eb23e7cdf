"""What the optical linear's main kernel compiles to for an H100, which needs no GPU."""

import re

import pytest
import torch
from aixsim_kernels.optical.linear.triton import _product
from aixsim_kernels.optical.tiles import LinearTile, linear_tile, table

TILES = {name: LinearTile(*tile) for name, tile in table()["9.0"]["linear"].items()}
# instructions an output, measured, by the kernel's NOISE: of a level, of light, of light with an
# offset; docs/design.md has them
EPILOGUE = {1: 30.5, 2: 58.3, 3: 60.0}


@pytest.fixture
def product(compiled):
    """(tile, operand, noise) -> the product compiled for an H100: as `compiled`."""

    def build(tile, operand, noise=1):
        constants = {
            "LEVELS": 256, "LEVELS_OUT": 256, "NOISE": noise, "PLACED": False, "SECOND": False,
            "EVEN": True, "WHOLE": True, "bias_ptr": None,
            "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k,
        }  # fmt: skip
        if noise == 1:
            constants |= dict.fromkeys(("lit_row_ptr", "lit_column_ptr", "lamp_ptr"))
        types = {"code_ptr": "*u8", "w_ptr": operand, "y_ptr": "*bf16", "M": "i32", "N": "i32"}
        aligned = {"code_ptr", "w_ptr", "y_ptr", "M", "N", "K"}
        return compiled(_product, types | {"K": "i32"}, constants, aligned, tile)

    return build


@pytest.mark.parametrize(("tile", "instruction"), [("large", "m64n128k16"), ("small", "m16n8k16")])
def test_compiled_for_sm_90(product, tile, instruction):
    tile = TILES[tile]
    ptx, instructions, _ = product(tile, "*fp16")
    kind = "wgmma.mma_async" if tile.m >= 64 else "mma.sync"
    products = set(re.findall(rf"{kind}\S*", ptx))
    assert products and all(instruction in name and ".f32.f16.f16" in name for name in products)
    assert "tf32" not in ptx
    # the interpreter's minimum is NaN where an operand is; a GPU's has to be told
    assert {"min.NaN.f32", "max.NaN.f32"} <= set(re.findall(r"m\w\w\.NaN\.f32", ptx))
    assert not any(line.startswith(("LDL", "STL")) for line in instructions), "registers spill"
    if tile.m < 64:
        return
    # noise, read-out, extremes, what is clipped, and store
    assert abs(an_output(instructions, tile) - EPILOGUE[1]) < 0.5


def an_output(instructions, tile):
    """Instructions behind the product, for each of its outputs."""
    last = max(i for i, line in enumerate(instructions) if line.startswith("HGMMA"))
    return (len(instructions) - last) / (tile.m * tile.n / (tile.warps * 32))


@pytest.mark.parametrize("noise", [2, 3])
def test_light_compiled_for_sm_90(product, noise):
    tile = linear_tile(torch.device("cpu"), 999, 999, exact=False, has_light=True)
    tile = TILES["large"]._replace(n=tile.n)
    _, instructions, _ = product(tile, "*fp16", noise)
    assert not any(line.startswith(("LDL", "STL")) for line in instructions), "registers spill"
    assert abs(an_output(instructions, tile) - EPILOGUE[noise]) < 0.5


def test_float32_operands_are_not_rounded_to_tf32(product):
    ptx, instructions, _ = product(TILES["exact"], "*fp32")
    assert "tf32" not in ptx and "mma" not in ptx
    assert any(line.startswith("FFMA") for line in instructions)
