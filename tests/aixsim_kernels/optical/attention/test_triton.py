"""What the passes of the optical attention compile to for an H100, which needs no GPU."""

import re

import pytest
import torch
from aixsim_kernels.optical import tiles
from aixsim_kernels.optical.attention import triton_backward, triton_forward

PASSES = {
    "rows": triton_forward.row_pass,
    "values": triton_forward.value_pass,
    "query_grad": triton_backward.query_grad_pass,
    "key_grad": triton_backward.key_grad_pass,
}

# of a score, in tiles that are seen whole and in the others; docs/results.md has them
INSTRUCTIONS = {
    "rows": {64: (24.0, 28.5), 128: (25.1, 30.0)},
    "values": {64: (25.1, 28.8), 128: (27.5, 32.1)},
    "query_grad": {64: (23.2, 27.0), 128: (30.5, 34.1)},
    "key_grad": {64: (38.0, 40.7), 128: (42.8, 47.4)},
}
# the same with light
OF_LIGHT = {
    "rows": {64: (68.9, 73.7), 128: (153.8, 155.8)},
    "values": {64: (51.1, 55.4), 128: (222.0, 232.5)},
    "query_grad": {64: (47.9, 51.7), 128: (165.2, 175.5)},
    "key_grad": {64: (61.0, 65.6), 128: (116.6, 121.0)},
}


@pytest.fixture
def built(compiled):
    """(pass, head dimension, exact, noise) -> the tile, and the pass compiled, as `compiled`."""

    def build(name, head_dim, exact=False, noise=1):
        kernel = PASSES[name]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiles, "capability", lambda device: "9.0")
            device = torch.device("cpu")
            tile = getattr(tiles.attention_tiles(device, head_dim, exact, noise > 1), name)
        constants = {
            "REPEATS": 3, "LEVELS": 256, "LEVELS_OUT": 256, "NOISE": noise, "PLACED": False,
            "CAUSAL": True, "ROWMAX": False, "MASK": 0,
            "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_D": head_dim, "BLOCK_V": head_dim,
            "SECOND": False, "mask_ptr": None,
        }  # fmt: skip
        if noise == 1:
            constants |= dict.fromkeys(("lamp_ptr", "own_lamp_ptr", "light_ptr"))
        operands = ("q_ptr", "k_ptr", "v_ptr")
        values = ("out_ptr", "smooth_ptr", "grad_ptr", "x_ptr", "k_out_ptr", "v_out_ptr")
        values += ("k_value_ptr", "v_value_ptr")
        sizes = ("stride_b", "stride_h", "stride_m", "stride_l", "heads", "M", "L", "D", "DV")
        types = dict.fromkeys(operands, "*fp32" if exact else "*fp16")
        types |= dict.fromkeys(values, "*fp32" if exact else "*bf16")
        of_grad = ("q_of_grad_ptr", "k_of_grad_ptr")
        if exact:
            constants |= dict.fromkeys(of_grad)
        else:
            types |= dict.fromkeys(of_grad, "*bf16") | {"noise_ptr": "*i32"}
            types |= {"v_ptr": "*bf16"} if "grad" in name else {}
        types |= dict.fromkeys(sizes, "i32") | dict.fromkeys(("shut", "scale"), "fp32")
        types |= dict.fromkeys(("x_strides", "k_strides", "v_strides"), ("i32",) * 3)
        types = {key: kind for key, kind in types.items() if key in kernel.arg_names}
        constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
        aligned = {n for n in kernel.arg_names if n.endswith("_ptr")} - {"mask_ptr"}
        return tile, *compiled(kernel, types, constants, aligned | {"M", "L", "D", "DV"}, tile)

    return build


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", PASSES)
def test_compiled_for_sm_90(built, name, head_dim):
    tile, ptx, _, loops = built(name, head_dim)
    check(tile, ptx, loops, INSTRUCTIONS[name][head_dim])
    assert "wgmma" in ptx


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", PASSES)
def test_light_compiled_for_sm_90(built, name, head_dim):
    tile, ptx, _, loops = built(name, head_dim, noise=2)
    check(tile, ptx, loops, OF_LIGHT[name][head_dim])


def check(tile, ptx, loops, instructions):
    """Products on tensor cores, nothing spilled, and how much is done for a score."""
    products = set(re.findall(r"(?:wgmma.mma_async|mma.sync)\S*", ptx))
    assert products and all("f32.f16.f16" in p or "f32.bf16.bf16" in p for p in products)
    assert "tf32" not in ptx
    # the interpreter's minimum is NaN where an operand is; a GPU's has to be told
    assert {"min.NaN.f32", "max.NaN.f32"} <= set(re.findall(r"m\w\w\.NaN\.f32", ptx))
    assert len(loops) == 2
    assert not any(i.startswith(("LDL", "STL")) for loop in loops for i in loop), "registers spill"
    scores = tile.m * tile.n / (tile.warps * 32)
    # product, noise, read-out, exponential, and what the pass is for
    found = sorted(len(loop) / scores for loop in loops)
    assert found == pytest.approx(instructions, abs=0.5)


def test_float32_operands_are_not_rounded_to_tf32(built):
    _, ptx, _, _ = built("values", 64, exact=True)
    assert "tf32" not in ptx and "mma" not in ptx
