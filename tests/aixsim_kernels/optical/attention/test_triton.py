"""What the passes of the optical attention compile to for an H100, which needs no GPU."""

import re

import pytest
from aixsim_kernels.optical.attention import triton_backward, triton_forward
from aixsim_kernels.optical.tiles import AttentionTile, table

PASSES = {
    "rows": triton_forward.row_pass,
    "values": triton_forward.value_pass,
    "query_grad": triton_backward.query_grad_pass,
    "key_grad": triton_backward.key_grad_pass,
}


@pytest.fixture
def built(compiled):
    """(pass, head dimension, exact) -> the tile, and the pass compiled for an H100."""

    def build(name, head_dim, exact=False):
        kernel = PASSES[name]
        shapes = "exact" if exact else str(head_dim)
        tile = AttentionTile(*table()["9.0"]["attention"][shapes][name])
        constants = {
            "REPEATS": 3, "LEVELS": 256, "NOISE": True, "PLACED": False, "CAUSAL": True,
            "ROWMAX": False, "MASK": 0,
            "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_D": head_dim, "BLOCK_V": head_dim,
            "SECOND": False, "mask_ptr": None,
        }  # fmt: skip
        operands = ("q_ptr", "k_ptr", "v_ptr")
        values = ("out_ptr", "smooth_ptr", "grad_ptr", "x_ptr", "k_out_ptr", "v_out_ptr")
        values += ("k_value_ptr", "v_value_ptr")
        sizes = ("stride_b", "stride_h", "stride_m", "stride_l", "heads", "M", "L", "D", "DV")
        types = dict.fromkeys(operands, "*fp32" if exact else "*fp16")
        types |= dict.fromkeys(values, "*fp32" if exact else "*bf16")
        types |= dict.fromkeys(sizes, "i32") | dict.fromkeys(("shut", "scale"), "fp32")
        types = {key: kind for key, kind in types.items() if key in kernel.arg_names}
        constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
        aligned = {n for n in kernel.arg_names if n.endswith("_ptr")} - {"mask_ptr"}
        return tile, *compiled(kernel, types, constants, aligned | {"M", "L", "D", "DV"}, tile)

    return build


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", PASSES)
def test_compiled_for_sm_90(built, name, head_dim):
    tile, ptx, instructions = built(name, head_dim)
    products = set(re.findall(r"(?:wgmma.mma_async|mma.sync)\S*", ptx))
    assert products and all("f32.f16.f16" in p or "f32.bf16.bf16" in p for p in products)
    assert any("wgmma" in product for product in products)
    assert "tf32" not in ptx
    assert not any(line.startswith(("LDL", "STL")) for line in instructions), "registers spill"
    if name != "rows":
        return
    first, last = (
        next(i for i, line in lines if line.startswith("HGMMA"))
        for lines in (list(enumerate(instructions)), list(enumerate(instructions))[::-1])
    )
    end = next(i for i in range(last, len(instructions)) if instructions[i].startswith("BRA"))
    a_score = (end - first) / (tile.m * tile.n / (tile.warps * 32))
    # noise, read-out, extremes, exponential, causal mask; measured 46
    assert a_score < 55


def test_float32_operands_are_not_rounded_to_tf32(built):
    _, ptx, _ = built("values", 64, exact=True)
    assert "tf32" not in ptx and "mma" not in ptx
