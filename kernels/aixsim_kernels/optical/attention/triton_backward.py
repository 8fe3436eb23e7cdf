"""The passes of the backward over the scores; `triton.py` explains them.

Legend: M queries, L keys, D and DV the head dimensions of q, k and of v; a tile of scores is
[BLOCK_M, BLOCK_N], a tile of an operand [rows, BLOCK_D or BLOCK_V]. `peak` and `total` are a row's
largest detected score and sum of exponentials, `share` is 1 / total. A comment gives the shape of a
value, [] of a number. Gradients: `g` of the output, `dp` of the probabilities, `ds` of the scores;
`delta` is the row sum of p dp.
"""

# triton's types say that a jit function returns nothing
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from aixsim_kernels.common.triton_noise import global_rows, row_keys
from aixsim_kernels.optical.attention.triton_scores import (
    exponentials,
    keys_before,
    largest_share,
    load_tile,
    place,
    raw_scores,
    step_and_offset,
    store_inside,
    visible,
)
from aixsim_kernels.optical.triton_grid import nearest


@triton.jit(do_not_specialize=["seed"])
def query_grad_pass(
    q_ptr,
    q_sum_ptr,
    k_ptr,
    k_sum_ptr,
    v_ptr,
    mask_ptr,
    peak_ptr,
    total_ptr,
    grad_ptr,
    delta_ptr,
    smooth_ptr,
    x_ptr,
    out_ptr,
    used_ptr,
    key_ptr,
    seed,
    stride_b,
    stride_h,
    stride_m,
    stride_l,
    shut,
    scale,
    heads,
    M,
    L,
    D,
    DV,
    REPEATS: tl.constexpr,
    LEVELS: tl.constexpr,
    NOISE: tl.constexpr,
    PLACED: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWMAX: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    head, kv_head, mask_offset, rows, end, later = place(
        heads, M, L, stride_b, stride_h, REPEATS, key_ptr, CAUSAL, PLACED, BLOCK_M
    )
    q = load_tile(q_ptr, head * M, rows, M, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    q_sum = tl.load(q_sum_ptr + head * M + rows, mask=rows < M, other=0.0)  # [BLOCK_M]
    peak = tl.load(peak_ptr + head * M + rows, mask=rows < M, other=0.0)  # [BLOCK_M]
    # [BLOCK_M]
    share = largest_share(tl.load(total_ptr + head * M + rows, mask=rows < M, other=0.0))
    of_whole = global_rows(key_ptr, head, rows, heads, M, PLACED)
    keys = row_keys(of_whole, tl.load(key_ptr), seed)  # [BLOCK_M], of the key []
    g = load_tile(grad_ptr, head * M, rows, M, DV, BLOCK_V)  # [BLOCK_M, BLOCK_V]
    smooth = load_tile(smooth_ptr, head * M, rows, M, DV, BLOCK_V)  # [BLOCK_M, BLOCK_V]
    delta = tl.sum(g.to(tl.float32) * smooth.to(tl.float32), 1)
    tl.store(delta_ptr + head * M + rows, delta, mask=rows < M)  # [BLOCK_M]
    v_step, v_offset = step_and_offset(used_ptr, 3, LEVELS)
    g_sum = v_offset * tl.sum(g.to(tl.float32), 1) - delta
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    sum_ds = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, kv_head * L, columns, L, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        v = load_tile(v_ptr, kv_head * L, columns, L, DV, BLOCK_V)  # [BLOCK_N, BLOCK_V]
        k_sum = tl.load(k_sum_ptr + kv_head * L + columns, mask=columns < L, other=0.0)  # [BLOCK_N]
        sees, added = visible(
            mask_ptr, mask_offset, rows, columns, stride_m, stride_l, shut,
            M, L, later, CAUSAL, MASK,
        )  # fmt: skip
        raw = raw_scores(q, q_sum, k, k_sum, used_ptr, D, LEVELS)  # [BLOCK_M, BLOCK_N]
        weights = exponentials(raw, sees, added, peak, scale, used_ptr, keys, start, LEVELS, NOISE)
        # [BLOCK_M, BLOCK_V] @ [BLOCK_V, BLOCK_N] -> [BLOCK_M, BLOCK_N]
        dp = v_step * tl.dot(g, tl.trans(v.to(g.dtype)), input_precision="ieee")
        ds = weights * share[:, None] * (dp + g_sum[:, None])
        sum_ds += tl.sum(ds, 1)
        # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_D] -> [BLOCK_M, BLOCK_D]
        acc = tl.dot(ds.to(g.dtype), k.to(g.dtype), acc, input_precision="ieee")
    k_step, k_offset = step_and_offset(used_ptr, 1, LEVELS)
    acc = scale * (k_step * acc + k_offset * sum_ds[:, None])
    store_inside(acc, x_ptr, out_ptr, used_ptr, head * M, rows, M, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]


@triton.jit(do_not_specialize=["seed"])
def key_grad_pass(
    q_ptr,
    q_sum_ptr,
    k_ptr,
    k_sum_ptr,
    v_ptr,
    mask_ptr,
    peak_ptr,
    total_ptr,
    grad_ptr,
    delta_ptr,
    k_value_ptr,
    v_value_ptr,
    k_out_ptr,
    v_out_ptr,
    used_ptr,
    key_ptr,
    seed,
    stride_b,
    stride_h,
    stride_m,
    stride_l,
    shut,
    scale,
    heads,
    M,
    L,
    D,
    DV,
    REPEATS: tl.constexpr,
    LEVELS: tl.constexpr,
    NOISE: tl.constexpr,
    PLACED: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWMAX: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    tiles = tl.cdiv(L, BLOCK_N)
    kv_head = (tl.program_id(0) // tiles).to(tl.int64)
    start = (tl.program_id(0) % tiles) * BLOCK_N
    columns = start + tl.arange(0, BLOCK_N)
    k = load_tile(k_ptr, kv_head * L, columns, L, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v = load_tile(v_ptr, kv_head * L, columns, L, DV, BLOCK_V)  # [BLOCK_N, BLOCK_V]
    k_sum = tl.load(k_sum_ptr + kv_head * L + columns, mask=columns < L, other=0.0)  # [BLOCK_N]
    v_step, v_offset = step_and_offset(used_ptr, 3, LEVELS)
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    sum_ds = tl.zeros((BLOCK_N,), tl.float32)
    later = keys_before(key_ptr, M, L, PLACED)
    first = 0
    if CAUSAL:
        first = tl.maximum(start - later, 0) // BLOCK_M * BLOCK_M
    kv_heads = heads // REPEATS
    for repeat in range(REPEATS):
        head = (kv_head // kv_heads) * heads + (kv_head % kv_heads) * REPEATS + repeat
        mask_offset = (head // heads) * stride_b + (head % heads) * stride_h
        for row in range(first, M, BLOCK_M):
            rows = row + tl.arange(0, BLOCK_M)
            q = load_tile(q_ptr, head * M, rows, M, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
            g = load_tile(grad_ptr, head * M, rows, M, DV, BLOCK_V)  # [BLOCK_M, BLOCK_V]
            q_sum = tl.load(q_sum_ptr + head * M + rows, mask=rows < M, other=0.0)  # [BLOCK_M]
            peak = tl.load(peak_ptr + head * M + rows, mask=rows < M, other=0.0)  # [BLOCK_M]
            # [BLOCK_M]
            share = largest_share(tl.load(total_ptr + head * M + rows, mask=rows < M, other=0.0))
            delta = tl.load(delta_ptr + head * M + rows, mask=rows < M, other=0.0)  # [BLOCK_M]
            of_whole = global_rows(key_ptr, head, rows, heads, M, PLACED)
            keys = row_keys(of_whole, tl.load(key_ptr), seed)  # [BLOCK_M], of the key []
            sees, added = visible(
                mask_ptr, mask_offset, rows, columns, stride_m, stride_l, shut,
                M, L, later, CAUSAL, MASK,
            )  # fmt: skip
            raw = raw_scores(q, q_sum, k, k_sum, used_ptr, D, LEVELS)  # [BLOCK_M, BLOCK_N]
            weights = exponentials(
                raw, sees, added, peak, scale, used_ptr, keys, start, LEVELS, NOISE
            )
            p = weights * share[:, None]
            code = nearest((weights if ROWMAX else p) * (LEVELS - 1))
            shown = g
            if ROWMAX:
                shown = (g.to(tl.float32) * share[:, None]).to(g.dtype)
            # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_V] -> [BLOCK_N, BLOCK_V]
            grad_v = tl.dot(tl.trans(code.to(g.dtype)), shown, grad_v, input_precision="ieee")
            # [BLOCK_M, BLOCK_V] @ [BLOCK_V, BLOCK_N] -> [BLOCK_M, BLOCK_N]
            dp = v_step * tl.dot(g, tl.trans(v.to(g.dtype)), input_precision="ieee")
            g_sum = v_offset * tl.sum(g.to(tl.float32), 1) - delta
            ds = p * (dp + g_sum[:, None])
            sum_ds += tl.sum(ds, 0)
            # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_D] -> [BLOCK_N, BLOCK_D]
            grad_k = tl.dot(tl.trans(ds.to(g.dtype)), q.to(g.dtype), grad_k, input_precision="ieee")
    q_step, q_offset = step_and_offset(used_ptr, 0, LEVELS)
    grad_k = scale * (q_step * grad_k + q_offset * sum_ds[:, None])
    # [BLOCK_N, BLOCK_D]
    store_inside(grad_k, k_value_ptr, k_out_ptr, used_ptr + 2, kv_head * L, columns, L, D, BLOCK_D)
    grad_v *= 1.0 / (LEVELS - 1)
    # [BLOCK_N, BLOCK_V]
    store_inside(grad_v, v_value_ptr, v_out_ptr, used_ptr + 6, kv_head * L, columns, L, DV, BLOCK_V)


@triton.jit(do_not_specialize=["seed"])
def mask_grad_pass(
    q_ptr,
    q_sum_ptr,
    k_ptr,
    k_sum_ptr,
    v_ptr,
    mask_ptr,
    peak_ptr,
    total_ptr,
    grad_ptr,
    delta_ptr,
    mask_out_ptr,
    used_ptr,
    key_ptr,
    seed,
    batches,
    stride_b,
    stride_h,
    stride_m,
    stride_l,
    shut,
    scale,
    heads,
    M,
    L,
    D,
    DV,
    ONE_BATCH: tl.constexpr,
    ONE_HEAD: tl.constexpr,
    ONE_ROW: tl.constexpr,
    ONE_COLUMN: tl.constexpr,
    REPEATS: tl.constexpr,
    LEVELS: tl.constexpr,
    NOISE: tl.constexpr,
    PLACED: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWMAX: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A program makes a tile of the mask's gradient, from all tiles of scores it was added to."""
    row_tiles, column_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(L, BLOCK_N)
    # along each dimension how many places the mask has, and how many of the scores share one
    own_columns = 1 if ONE_COLUMN else column_tiles
    own_rows = 1 if ONE_ROW else row_tiles
    own_heads = 1 if ONE_HEAD else heads
    own_column = tl.program_id(0) % own_columns
    own_row = tl.program_id(0) // own_columns % own_rows
    own_head = tl.program_id(0) // own_columns // own_rows % own_heads
    own_batch = tl.program_id(0) // own_columns // own_rows // own_heads
    shared_columns = column_tiles if ONE_COLUMN else 1
    shared_rows = row_tiles if ONE_ROW else 1
    shared_heads = heads if ONE_HEAD else 1
    shared = shared_columns * shared_rows * shared_heads * (batches if ONE_BATCH else 1)
    v_step, v_offset = step_and_offset(used_ptr, 3, LEVELS)
    later = keys_before(key_ptr, M, L, PLACED)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(shared):
        # a dimension that is shared counts from 0, any other stays where the program is
        batch = (own_batch + i // shared_columns // shared_rows // shared_heads).to(tl.int64)
        head = own_head + i // shared_columns // shared_rows % shared_heads
        rows = (own_row + i // shared_columns % shared_rows) * BLOCK_M + tl.arange(0, BLOCK_M)
        start = (own_column + i % shared_columns) * BLOCK_N
        columns = start + tl.arange(0, BLOCK_N)
        mask_offset = batch * stride_b + head * stride_h
        kv_head = batch * (heads // REPEATS) + head // REPEATS
        head += batch * heads
        q = load_tile(q_ptr, head * M, rows, M, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        k = load_tile(k_ptr, kv_head * L, columns, L, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        v = load_tile(v_ptr, kv_head * L, columns, L, DV, BLOCK_V)  # [BLOCK_N, BLOCK_V]
        g = load_tile(grad_ptr, head * M, rows, M, DV, BLOCK_V)  # [BLOCK_M, BLOCK_V]
        q_sum = tl.load(q_sum_ptr + head * M + rows, mask=rows < M, other=0.0)  # [BLOCK_M]
        k_sum = tl.load(k_sum_ptr + kv_head * L + columns, mask=columns < L, other=0.0)  # [BLOCK_N]
        peak = tl.load(peak_ptr + head * M + rows, mask=rows < M, other=0.0)  # [BLOCK_M]
        # [BLOCK_M]
        share = largest_share(tl.load(total_ptr + head * M + rows, mask=rows < M, other=0.0))
        delta = tl.load(delta_ptr + head * M + rows, mask=rows < M, other=0.0)  # [BLOCK_M]
        of_whole = global_rows(key_ptr, head, rows, heads, M, PLACED)
        keys = row_keys(of_whole, tl.load(key_ptr), seed)  # [BLOCK_M], of the key []
        sees, added = visible(
            mask_ptr, mask_offset, rows, columns, stride_m, stride_l, shut,
            M, L, later, CAUSAL, MASK,
        )  # fmt: skip
        raw = raw_scores(q, q_sum, k, k_sum, used_ptr, D, LEVELS)  # [BLOCK_M, BLOCK_N]
        weights = exponentials(raw, sees, added, peak, scale, used_ptr, keys, start, LEVELS, NOISE)
        # [BLOCK_M, BLOCK_V] @ [BLOCK_V, BLOCK_N] -> [BLOCK_M, BLOCK_N]
        dp = v_step * tl.dot(g, tl.trans(v.to(g.dtype)), input_precision="ieee")
        g_sum = v_offset * tl.sum(g.to(tl.float32), 1) - delta
        acc += weights * share[:, None] * (dp + g_sum[:, None])
    rows = own_row * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = own_column * BLOCK_N + tl.arange(0, BLOCK_N)
    height, width = M, L
    if ONE_ROW:
        acc = tl.broadcast_to(tl.expand_dims(tl.sum(acc, 0), 0), (BLOCK_M, BLOCK_N))
        height = 1
    if ONE_COLUMN:
        acc = tl.broadcast_to(tl.expand_dims(tl.sum(acc, 1), 1), (BLOCK_M, BLOCK_N))
        width = 1
    first = (own_batch * own_heads + own_head).to(tl.int64) * height
    offsets = (first + rows[:, None]) * width + columns[None, :]
    inside = (rows[:, None] < height) & (columns[None, :] < width)
    # [BLOCK_M, BLOCK_N]
    tl.store(mask_out_ptr + offsets, acc.to(mask_out_ptr.dtype.element_ty), mask=inside)
