"""The passes of the backward over the scores; `triton.py` explains them.

Legend: M queries, L keys, D and DV the head dimensions of q, k and of v; a tile of scores is
[BLOCK_M, BLOCK_N], a tile of an operand [rows, BLOCK_D or BLOCK_V]. `total` is a row's sum of
exponentials, `shift` what was taken off their exponents, `share` is 1 / total. A comment gives the
shape of a value, [] of a number.

Gradients: `g` of the output, `ds` of the scores, `dp` of the probabilities, less its mean under
them; `delta` is the part of that which depends on a row alone, v's offset times the row sum of g,
less g . smooth. `of_grad` are operands in the gradient's type, where that is another. What depends
on a row alone the first pass leaves behind for the others. The second has keys for rows, so that
its products take probabilities as the registers hold them.
"""

# triton's types say that a jit function returns nothing
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from aixsim_kernels.optical.attention.triton_scores import (
    detected,
    detected_by_key,
    exponentials,
    keys_before,
    load_left_behind,
    load_queries,
    load_softmax,
    load_tile,
    place,
    probabilities,
    step_and_offset,
    store_inside,
    used_detector,
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
    shift_ptr,
    total_ptr,
    grad_ptr,
    delta_ptr,
    noise_ptr,
    by_row_ptr,
    smooth_ptr,
    k_of_grad_ptr,
    x_ptr,
    x_strides,
    out_ptr,
    used_ptr,
    lamp_ptr,
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
    LEVELS_OUT: tl.constexpr,
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
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    head, kv_head, mask_offset, rows, free, end, later = place(
        heads, M, L, stride_b, stride_h, REPEATS, key_ptr, CAUSAL, MASK, PLACED, BLOCK_M, BLOCK_N
    )
    at, lit = used_detector(used_ptr, lamp_ptr, D, scale, LEVELS, LEVELS_OUT, NOISE, EXACT)
    q, by_row, _, keys = load_queries(
        q_ptr, q_sum_ptr, head, rows, heads, M, D, at, key_ptr, seed, PLACED, BLOCK_D
    )
    shift, share = load_softmax(shift_ptr, total_ptr, head * M + rows, rows < M)
    # [BLOCK_M]
    tl.store(noise_ptr + head * M + rows, keys.to(tl.int32, bitcast=True), mask=rows < M)
    g = load_tile(grad_ptr, head * M, rows, M, DV, BLOCK_V)  # [BLOCK_M, BLOCK_V]
    smooth = load_tile(smooth_ptr, head * M, rows, M, DV, BLOCK_V)  # [BLOCK_M, BLOCK_V]
    v_step, v_offset = step_and_offset(used_ptr, 3, LEVELS)
    delta = tl.sum(g.to(tl.float32) * smooth.to(tl.float32), 1)
    delta = v_offset * tl.sum(g.to(tl.float32), 1) - delta
    tl.store(delta_ptr + head * M + rows, delta, mask=rows < M)  # [BLOCK_M]
    tl.store(by_row_ptr + head * M + rows, by_row, mask=rows < M)  # [BLOCK_M]
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    sum_ds = tl.zeros((BLOCK_M,), tl.float32)
    for MASKED in tl.static_range(1 if MASK != 0 else 0, 2):
        for start in range(free if MASKED else 0, end if MASKED else free, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            k = load_tile(k_ptr, kv_head * L, columns, L, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            k_of_grad = k
            if k_of_grad_ptr is not None:
                # [BLOCK_N, BLOCK_D]
                k_of_grad = load_tile(k_of_grad_ptr, kv_head * L, columns, L, D, BLOCK_D)
            v = load_tile(v_ptr, kv_head * L, columns, L, DV, BLOCK_V)  # [BLOCK_N, BLOCK_V]
            # [BLOCK_N]
            k_sum = tl.load(k_sum_ptr + kv_head * L + columns, mask=columns < L, other=0.0)
            sees, added = visible(
                mask_ptr, mask_offset, rows[:, None], columns[None, :], stride_m, stride_l, shut,
                M, L, later, CAUSAL, MASK,
            )  # fmt: skip
            score = detected(q, k, k_sum, by_row, at, lit, keys, start, D, LEVELS_OUT, NOISE, EXACT)
            weights = exponentials(score, sees, added, shift[:, None], at, MASKED, MASK, EXACT)
            # [BLOCK_M, BLOCK_V] @ [BLOCK_V, BLOCK_N] -> [BLOCK_M, BLOCK_N]
            dp = tl.fma(tl.dot(g, tl.trans(v), input_precision="ieee"), v_step, delta[:, None])
            ds = probabilities(weights, share[:, None], ROWMAX, MASK, EXACT) * dp
            sum_ds += tl.sum(ds, 1)
            # [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_D] -> [BLOCK_M, BLOCK_D]
            acc = tl.dot(ds.to(g.dtype), k_of_grad, acc, input_precision="ieee")
    k_step, k_offset = step_and_offset(used_ptr, 1, LEVELS)
    acc = scale * (k_step * acc + k_offset * sum_ds[:, None])
    # [BLOCK_M, BLOCK_D]
    store_inside(acc, x_ptr, x_strides, out_ptr, used_ptr, head, heads, rows, M, D, BLOCK_D)


@triton.jit
def key_grad_pass(
    q_ptr,
    k_ptr,
    k_sum_ptr,
    v_ptr,
    mask_ptr,
    shift_ptr,
    total_ptr,
    grad_ptr,
    delta_ptr,
    noise_ptr,
    by_row_ptr,
    q_of_grad_ptr,
    k_value_ptr,
    v_value_ptr,
    k_strides,
    v_strides,
    k_out_ptr,
    v_out_ptr,
    used_ptr,
    lamp_ptr,
    key_ptr,
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
    LEVELS_OUT: tl.constexpr,
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
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    tiles = tl.cdiv(L, BLOCK_N)
    kv_head = (tl.program_id(0) // tiles).to(tl.int64)
    start = (tl.program_id(0) % tiles) * BLOCK_N
    columns = start + tl.arange(0, BLOCK_N)
    at, lit = used_detector(used_ptr, lamp_ptr, D, scale, LEVELS, LEVELS_OUT, NOISE, EXACT)
    of_k = at[2]
    k = load_tile(k_ptr, kv_head * L, columns, L, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v = load_tile(v_ptr, kv_head * L, columns, L, DV, BLOCK_V)  # [BLOCK_N, BLOCK_V]
    # [BLOCK_N]
    by_column = of_k * tl.load(k_sum_ptr + kv_head * L + columns, mask=columns < L, other=0.0)
    v_step, _ = step_and_offset(used_ptr, 3, LEVELS)
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    sum_ds = tl.zeros((BLOCK_N,), tl.float32)
    later = keys_before(key_ptr, M, L, PLACED)
    # queries before the first see none of these keys; from `free` on, in whole tiles, they see all
    first, free = 0, M if start + BLOCK_N > L else 0
    if CAUSAL:
        first = tl.maximum(start - later, 0) // BLOCK_M * BLOCK_M
        free = tl.maximum(
            free, tl.cdiv(tl.maximum(start + BLOCK_N - 1 - later, 0), BLOCK_M) * BLOCK_M
        )
    free = tl.minimum(free, M) if MASK == 0 else M
    kv_heads = heads // REPEATS
    for repeat in range(REPEATS):
        head = (kv_head // kv_heads) * heads + (kv_head % kv_heads) * REPEATS + repeat
        mask_offset = (head // heads) * stride_b + (head % heads) * stride_h
        for MASKED in tl.static_range(1 if MASK != 0 else 0, 2):
            for row in range(first if MASKED else free, free if MASKED else M, BLOCK_M):
                rows = row + tl.arange(0, BLOCK_M)
                q = load_tile(q_ptr, head * M, rows, M, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
                q_of_grad = q
                if q_of_grad_ptr is not None:
                    # [BLOCK_M, BLOCK_D]
                    q_of_grad = load_tile(q_of_grad_ptr, head * M, rows, M, D, BLOCK_D)
                g = load_tile(grad_ptr, head * M, rows, M, DV, BLOCK_V)  # [BLOCK_M, BLOCK_V]
                places = head * M + rows
                here = rows < M
                by_row, delta, keys = load_left_behind(
                    by_row_ptr, delta_ptr, noise_ptr, places, here
                )
                shift, share = load_softmax(shift_ptr, total_ptr, places, rows < M)
                sees, added = visible(
                    mask_ptr, mask_offset, rows[None, :], columns[:, None], stride_m, stride_l,
                    shut, M, L, later, CAUSAL, MASK,
                )  # fmt: skip
                score = detected_by_key(
                    q, k, by_row, by_column, at, lit, keys, columns, D, LEVELS_OUT, NOISE, EXACT
                )
                weights = exponentials(score, sees, added, shift[None, :], at, MASKED, MASK, EXACT)
                p = probabilities(weights, share[None, :], ROWMAX, MASK, EXACT)
                code = nearest((weights if ROWMAX else p) * (LEVELS - 1))
                shown = (g.to(tl.float32) * share[:, None]).to(g.dtype) if ROWMAX else g
                # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_V] -> [BLOCK_N, BLOCK_V]
                grad_v = tl.dot(code.to(g.dtype), shown, grad_v, input_precision="ieee")
                # [BLOCK_N, BLOCK_V] @ [BLOCK_V, BLOCK_M] -> [BLOCK_N, BLOCK_M]
                dp = tl.fma(tl.dot(v, tl.trans(g), input_precision="ieee"), v_step, delta[None, :])
                ds = p * dp
                sum_ds += tl.sum(ds, 1)
                # [BLOCK_N, BLOCK_M] @ [BLOCK_M, BLOCK_D] -> [BLOCK_N, BLOCK_D]
                grad_k = tl.dot(ds.to(g.dtype), q_of_grad, grad_k, input_precision="ieee")
    q_step, q_offset = step_and_offset(used_ptr, 0, LEVELS)
    grad_k = scale * (q_step * grad_k + q_offset * sum_ds[:, None])
    # [BLOCK_N, BLOCK_D]
    store_inside(
        grad_k, k_value_ptr, k_strides, k_out_ptr, used_ptr + 2, kv_head, kv_heads, columns, L, D,
        BLOCK_D,
    )  # fmt: skip
    # [BLOCK_N, BLOCK_V]
    store_inside(
        grad_v * (1.0 / (LEVELS - 1)), v_value_ptr, v_strides, v_out_ptr, used_ptr + 6, kv_head,
        kv_heads, columns, L, DV, BLOCK_V,
    )  # fmt: skip


@triton.jit
def mask_grad_pass(
    q_ptr,
    k_ptr,
    k_sum_ptr,
    v_ptr,
    mask_ptr,
    shift_ptr,
    total_ptr,
    grad_ptr,
    delta_ptr,
    noise_ptr,
    by_row_ptr,
    mask_out_ptr,
    used_ptr,
    lamp_ptr,
    key_ptr,
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
    LEVELS_OUT: tl.constexpr,
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
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    at, lit = used_detector(used_ptr, lamp_ptr, D, scale, LEVELS, LEVELS_OUT, NOISE, EXACT)
    v_step, _ = step_and_offset(used_ptr, 3, LEVELS)
    later = keys_before(key_ptr, M, L, PLACED)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(shared):
        # a dimension that is shared counts from 0, any other stays where the program is
        batch = (own_batch + i // shared_columns // shared_rows // shared_heads).to(tl.int64)
        head = (own_head + i // shared_columns // shared_rows % shared_heads).to(tl.int64)
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
        places = head * M + rows
        by_row, delta, keys = load_left_behind(by_row_ptr, delta_ptr, noise_ptr, places, rows < M)
        k_sum = tl.load(k_sum_ptr + kv_head * L + columns, mask=columns < L, other=0.0)  # [BLOCK_N]
        shift, share = load_softmax(shift_ptr, total_ptr, places, rows < M)
        sees, added = visible(
            mask_ptr, mask_offset, rows[:, None], columns[None, :], stride_m, stride_l, shut,
            M, L, later, CAUSAL, MASK,
        )  # fmt: skip
        score = detected(q, k, k_sum, by_row, at, lit, keys, start, D, LEVELS_OUT, NOISE, EXACT)
        weights = exponentials(score, sees, added, shift[:, None], at, True, MASK, EXACT)
        # [BLOCK_M, BLOCK_V] @ [BLOCK_V, BLOCK_N] -> [BLOCK_M, BLOCK_N]
        dp = tl.fma(tl.dot(g, tl.trans(v), input_precision="ieee"), v_step, delta[:, None])
        acc += probabilities(weights, share[:, None], ROWMAX, MASK, EXACT) * dp
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
