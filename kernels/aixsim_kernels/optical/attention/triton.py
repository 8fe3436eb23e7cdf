"""Optical attention on a GPU: what `cpu.py` computes, without ever holding the scores.

Operands are the integers c of `triton_grid.py`; see there. The forward goes over the keys
twice: first for each row's largest detected score and the sum of its exponentials, then for the
quantised probabilities and their product with the values. The backward goes over them once for the
queries and once for the keys; the noise, a function of row and column, is drawn again.

The softmax's gradient takes the probabilities before they were quantised, and so does

    delta = sum_j p_j (g . v_j) = g . smooth,        smooth = sum_j p_j v_j

which the forward leaves behind beside what its softmax takes off and divides by. The pass over
queries leaves v's offset times the row sum of g, less delta, to that over keys. Ranges never set
are found on the device as in `linear/triton.py`: each pass is launched a second time, until the
host knows that they are set.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from aixsim_kernels.common.noise import seed_word
from aixsim_kernels.common.triton_launch import launch
from aixsim_kernels.optical.attention.triton_backward import (
    key_grad_pass,
    mask_grad_pass,
    query_grad_pass,
)
from aixsim_kernels.optical.attention.triton_forward import row_pass, value_pass
from aixsim_kernels.optical.light import lamp_results, lamps_of
from aixsim_kernels.optical.settings import Settings
from aixsim_kernels.optical.tiles import AttentionTile, attention_tiles, padded
from aixsim_kernels.optical.triton_grid import noise_kind, operand_type
from aixsim_kernels.optical.triton_operands import (
    Modulated,
    Operand,
    by_rows,
    operand_programs,
    operands,
    row_strides,
)
from aixsim_kernels.optical.triton_ranges import Findings, of_operands

# what a mask can be
_NONE, _BOOL, _ADDITIVE = 0, 1, 2


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    ranges: Tensor,
    key: Tensor,
    settings: Settings,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `cpu.forward`, with ranges by the extremes.

    Returns:
        What that returns; of each row what is taken off its exponents, and the sum of its
        exponentials less the largest exponent, float32 (2, B, H, M); product of the probabilities,
        before they are quantised, with the values (B, H, M, Dv) in `out_dtype`.
    """
    q, k, v = map(by_rows, (q, k, v))
    kind = operand_type(out_dtype, settings.levels)
    widest, has_light = max(q.shape[3], v.shape[3]), settings.has_light
    tiles = attention_tiles(q.device, widest, kind == torch.float32, has_light)
    of_q, of_k, of_v = map(operand_programs, (q, k, v))
    of_rows, of_values = (_programs(q, tile.m) for tile in (tiles.rows, tiles.values))
    own = of_operands(ranges, 5)
    lamps = lamps_of(ranges[5:], settings)
    findings = Findings(own, [of_q, of_k, of_rows, of_v, of_values])
    tensors, q_operand, _ = _operands(q, k, v, mask, findings, settings, kind)

    out = q.new_empty(*q.shape[:3], v.shape[3], dtype=out_dtype)
    smooth = torch.empty_like(out)
    rows = q.new_empty(2, *q.shape[:3], dtype=torch.float32)
    mass = q.new_empty(of_values, 2, dtype=torch.float32)
    tensors |= _rows(rows) | {"key_ptr": key}
    tensors |= {"q_sum_ptr": q_operand.sums, "seed": seed_word(settings.stream, 0)}
    of_output: dict[str, Any] = {"out_ptr": out, "smooth_ptr": smooth, "mass_ptr": mass}
    of_output["output_seed"] = seed_word(settings.stream, 1)
    how = tensors | _shapes_and_settings(q, k, v, mask, key, settings, tiles.rows)
    # of each program the light of the scores, and how many; of the outputs
    of_scores = q.new_empty(of_rows, 2, dtype=torch.float32) if lamps else None
    of_outputs = q.new_empty(of_values, dtype=torch.float32) if lamps else None
    # light is known when a pass has ended: where no lamp was ever set, it begins anew
    times = 2 if lamps and not findings.known else 1
    how |= {"lamp_ptr": None, "light_ptr": of_scores}
    for _ in range(times):
        how["lamp_ptr"] = lamps[0].of_kernels(settings) if lamps else None
        findings.look(row_pass, 2, **how)
        if of_scores is not None:
            light, pairs = of_scores.sum(0, dtype=torch.float64)
            lamps[0].see(light, pairs, q.shape[3])
    how |= of_output | _shapes_and_settings(q, k, v, mask, key, settings, tiles.values)
    how |= {"lamp_ptr": lamps[0].of_kernels(settings) if lamps else None, "light_ptr": of_outputs}
    for _ in range(times):
        how["own_lamp_ptr"] = lamps[1].of_kernels(settings) if lamps else None
        findings.look(value_pass, 4, **how)
        if of_outputs is not None:
            keys = pairs / max(q.shape[:3].numel(), 1)
            lamps[1].see(of_outputs.sum(dtype=torch.float64), out.numel(), keys)
    kept_mass = q.new_empty((), dtype=torch.float32)
    findings.settle(mass, kept_mass)
    seen, used = lamp_results(lamps, findings.seen, findings.used)
    return out, seen, kept_mass, used, rows, smooth


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    used: Tensor,
    key: Tensor,
    rows: Tensor,
    smooth: Tensor,
    settings: Settings,
    wants_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `cpu.backward`; rows and smooth as the forward left them."""
    q, k, v = map(by_rows, (q, k, v))
    kind = operand_type(smooth.dtype, settings.levels)
    # the type of the products: the gradient's range, and tensor cores where the forward had them
    grad = grad.to(torch.float32 if kind == torch.float32 else grad.dtype).contiguous()
    tensors, of_q, of_k = _operands(q, k, v, mask, used, settings, kind, grad.dtype)
    exact = grad.dtype == torch.float32
    # what the first pass leaves behind for the others
    delta, by_row = torch.empty_like(rows)
    noise = torch.empty_like(delta, dtype=torch.int32)
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    widest = max(q.shape[3], v.shape[3])
    tiles = attention_tiles(q.device, widest, exact, settings.has_light)
    tensors |= _rows(rows) | {"used_ptr": used, "key_ptr": key}
    lamps = lamps_of(used[5:], settings)
    tensors |= {"lamp_ptr": lamps[0].of_kernels(settings) if lamps else None}
    tensors |= {"grad_ptr": grad, "delta_ptr": delta, "noise_ptr": noise, "by_row_ptr": by_row}
    of_queries: dict[str, Any] = {"smooth_ptr": smooth, "out_ptr": dq, "q_sum_ptr": of_q.sums}
    of_queries |= {"x_ptr": q, "x_strides": row_strides(q)}
    of_queries |= {"k_of_grad_ptr": of_k.other, "seed": seed_word(settings.stream, 0)}
    of_keys: dict[str, Any] = {"k_out_ptr": dk, "v_out_ptr": dv, "k_value_ptr": k, "v_value_ptr": v}
    of_keys |= {"q_of_grad_ptr": of_q.other}
    of_keys |= {"k_strides": row_strides(k), "v_strides": row_strides(v)}
    passes: list[tuple[int, AttentionTile, Any, dict[str, Any]]] = [
        (_programs(q, tiles.query_grad.m), tiles.query_grad, query_grad_pass, of_queries),
        (_programs(k, tiles.key_grad.n), tiles.key_grad, key_grad_pass, of_keys),
    ]
    for programs, tile, kernel, own in passes:
        how = tensors | own | _shapes_and_settings(q, k, v, mask, key, settings, tile)
        launch(kernel, programs, **how)
    grad_mask = q.new_empty(0, dtype=torch.float32)
    if mask is not None and wants_mask:
        # smaller than that of the first pass: the sum, a tile too, stays in registers
        m, n, warps, _ = tiles.rows
        tile = AttentionTile(m // 2, n // 2, warps // 2, 1)
        how = tensors | _shapes_and_settings(q, k, v, mask, key, settings, tile)
        grad_mask = _mask_grad(mask, q, tile, how)
    return dq, dk, dv, grad_mask


def _mask_grad(mask: Tensor, q: Tensor, tile: AttentionTile, how: dict[str, Any]) -> Tensor:
    """Gradient of the mask, in its own shape: tiles that share its elements are summed in turn."""
    batches, heads, rows, columns = shape = (1,) * (4 - mask.dim()) + mask.shape
    out = torch.zeros(mask.shape, dtype=mask.dtype, device=mask.device)
    programs: Any = batches * heads * triton.cdiv(rows, tile.m) * triton.cdiv(columns, tile.n)
    if q.numel():
        ones = zip(("ONE_BATCH", "ONE_HEAD", "ONE_ROW", "ONE_COLUMN"), shape, strict=True)
        launch(
            mask_grad_pass,
            programs,
            mask_out_ptr=out,
            batches=q.shape[0],
            **{name: size == 1 for name, size in ones},
            **how,
        )
    return out


def _programs(x: Tensor, height: int) -> int:
    """How many programs go over the rows of (B, H, n, D)."""
    return triton.cdiv(x.shape[2], height) * x.shape[0] * x.shape[1]  # pyright: ignore[reportReturnType]


def _operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    used: Tensor | Findings,
    settings: Settings,
    kind: torch.dtype,
    of_grad: torch.dtype | None = None,
) -> tuple[dict[str, Any], Operand, Operand]:
    """Operands and mask as all passes take them, and what is made of q and of k.

    `of_grad` is the type of the output's gradient: q and k are wanted in it too, and v, which
    nothing else multiplies there, in it alone. `used` as `operands` takes it.
    """

    shown = [
        Modulated(q, 0, 0.0, kind, of_grad),
        Modulated(k, 1, settings.lut_min, kind, of_grad),
        Modulated(v, 3, settings.lut_min, of_grad or kind),
    ]
    of_q, of_k, of_v = operands(shown, used, settings.levels)
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    tensors = {
        "q_ptr": of_q.c,
        "k_ptr": of_k.c,
        "k_sum_ptr": of_k.sums,
        "v_ptr": of_v.c,
        "mask_ptr": mask,
    }
    return tensors, of_q, of_k


def _rows(rows: Tensor) -> dict[str, Tensor]:
    """The rows of `forward`, (2, B, H, M)."""
    return {"shift_ptr": rows[0], "total_ptr": rows[1]}


def _shapes_and_settings(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    key: Tensor,
    settings: Settings,
    tile: AttentionTile,
) -> dict[str, Any]:
    """Shapes, strides, numbers and constants that all passes take."""
    batches, heads, queries, head_dim = q.shape
    strides, kind, shut = (0, 0, 0, 0), _NONE, 0.0
    if mask is not None:
        strides = mask.expand(batches, heads, queries, k.shape[2]).stride()
        kind = _BOOL if mask.dtype == torch.bool else _ADDITIVE
        shut = 0.0 if kind == _BOOL else torch.finfo(mask.dtype).min / 2
    return {
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "stride_b": strides[0],
        "stride_h": strides[1],
        "stride_m": strides[2],
        "stride_l": strides[3],
        "shut": shut,
        "scale": settings.scale,
        "heads": heads,
        "M": queries,
        "L": k.shape[2],
        "D": head_dim,
        "DV": v.shape[3],
        "REPEATS": heads // k.shape[1],
        "LEVELS": settings.levels,
        "LEVELS_OUT": settings.detector_levels,
        "NOISE": noise_kind(settings),
        "PLACED": key.dim() > 0,
        "CAUSAL": settings.is_causal,
        "ROWMAX": settings.rowmax,
        "MASK": kind,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_D": padded(head_dim),
        "BLOCK_V": padded(v.shape[3]),
    }
