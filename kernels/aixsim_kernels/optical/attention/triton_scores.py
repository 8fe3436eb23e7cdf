"""Tiles of scores inside Triton kernels: `scores.py`, and how tiles come and go.

Legend: M queries, L keys, D head dimension; a tile of scores is [BLOCK_M, BLOCK_N], a tile of an
operand [rows, BLOCK]. A comment gives the shape of a value, [] of a number.
"""

# triton's types say that a jit function returns nothing
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from aixsim_kernels.optical.triton_clipping import inside
from aixsim_kernels.optical.triton_grid import grid, readout, steps


@triton.jit
def load_tile(ptr, first, rows, n_rows, width, BLOCK: tl.constexpr):
    """Rows of a contiguous matrix whose first row is `first`, 0 behind its ends."""
    columns = tl.arange(0, BLOCK)
    mask = (rows[:, None] < n_rows) & (columns[None, :] < width)
    # [rows, BLOCK]
    return tl.load(ptr + (first + rows[:, None]) * width + columns[None, :], mask=mask, other=0.0)


@triton.jit
def step_and_offset(used_ptr, index, LEVELS: tl.constexpr):
    """step and offset of an operand's range."""
    lo, step, _, centre = grid(used_ptr, index, LEVELS)
    return step, lo + centre * step


@triton.jit
def raw_scores(q, q_sum, k, k_sum, used_ptr, D, LEVELS: tl.constexpr):
    """Raw accumulator of a tile of scores."""
    q_step, q_offset = step_and_offset(used_ptr, 0, LEVELS)
    k_step, k_offset = step_and_offset(used_ptr, 1, LEVELS)
    # [BLOCK_M, BLOCK_D] @ [BLOCK_D, BLOCK_N] -> [BLOCK_M, BLOCK_N]
    acc = tl.dot(q, tl.trans(k), input_precision="ieee")
    by_row = q_step * k_offset * q_sum + D * q_offset * k_offset
    return q_step * k_step * acc + by_row[:, None] + (q_offset * k_step * k_sum)[None, :]


@triton.jit
def place(
    heads,
    M,
    L,
    stride_b,
    stride_h,
    REPEATS: tl.constexpr,
    key_ptr,
    CAUSAL: tl.constexpr,
    PLACED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """What a program works on: head, its key-value head, its mask, its queries, end of its keys,
    and how many keys lie before the first query's."""
    tiles = tl.cdiv(M, BLOCK_M)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    kv_head = (head // heads) * (heads // REPEATS) + (head % heads) // REPEATS
    mask_offset = (head // heads) * stride_b + (head % heads) * stride_h
    rows = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    end = L
    later = keys_before(key_ptr, M, L, PLACED)
    if CAUSAL:
        end = tl.minimum(L, (tl.program_id(0) % tiles + 1) * BLOCK_M + later)
    return head, kv_head, mask_offset, rows, end, later


@triton.jit
def keys_before(key_ptr, M, L, PLACED: tl.constexpr):
    """How many keys lie before that of the first query: `Scores.later`."""
    if PLACED:
        # [], []
        return L - (tl.load(key_ptr + 2) - tl.load(key_ptr + 3)).to(tl.int32)
    return L - M


@triton.jit
def visible(
    mask_ptr,
    mask_offset,
    rows,
    columns,
    stride_m,
    stride_l,
    shut,
    M,
    L,
    later,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
):
    """Which keys a query sees, and what an additive mask adds to its scores."""
    sees = (rows[:, None] < M) & (columns[None, :] < L)
    if CAUSAL:
        sees = sees & (columns[None, :] <= rows[:, None] + later)
    added = tl.zeros(sees.shape, tl.float32)
    if MASK != 0:
        offsets = rows[:, None].to(tl.int64) * stride_m + columns[None, :].to(tl.int64) * stride_l
        offsets += mask_offset
        value = tl.load(mask_ptr + offsets, mask=sees, other=0)  # [BLOCK_M, BLOCK_N]
        if MASK == 1:
            sees = sees & (value != 0)
        else:
            added = value.to(tl.float32)
            sees = sees & (added > shut)
    return sees, added


@triton.jit
def exponentials(raw, sees, added, peak, scale, used_ptr, keys, start, LEVELS, NOISE: tl.constexpr):
    """exp(score - the row's largest), 0 where the mask shuts."""
    lo, hi = tl.load(used_ptr + 4), tl.load(used_ptr + 5)  # [], []
    step, per_level = steps(lo, hi, LEVELS)
    score = readout(raw, lo, step, per_level, keys, start, LEVELS, NOISE) * scale + added
    return tl.where(sees, tl.exp(score - peak[:, None]), 0.0)


@triton.jit
def largest_share(total):
    """1 / total, the largest probability of a row; 0 for a row with nothing to attend to."""
    # torch rounds a quotient; on a GPU the plain one is an approximation
    quotient = tl.div_rn(total * 0.0 + 1.0, tl.where(total >= 1, total, 1.0))
    return tl.where(total > 0, quotient, 0.0)


@triton.jit
def store_inside(
    grad, value_ptr, out_ptr, range_ptr, first, rows, n_rows, width, BLOCK: tl.constexpr
):
    """Store the gradient of an operand, 0 where it was clipped."""
    value = load_tile(value_ptr, first, rows, n_rows, width, BLOCK).to(tl.float32)  # [rows, BLOCK]
    # [rows, BLOCK], of ends []
    grad *= inside(value, tl.load(range_ptr), tl.load(range_ptr + 1)).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    mask = (rows[:, None] < n_rows) & (columns[None, :] < width)
    offsets = (first + rows[:, None]) * width + columns[None, :]
    tl.store(out_ptr + offsets, grad.to(out_ptr.dtype.element_ty), mask=mask)  # [rows, BLOCK]
