"""A mixture of experts on a GPU, backward; shapes and names in grouped.py.

    dact[r]    = w[r] (g[t] down[e]^T)                      t = order[r] // K, g: d out           experts_dact
    dpre[r]    = dact[r] act'(pre[r])                       by g and by u
    dw[p]      = <g[t] down[e]^T, act[r]> + <g[t], down_bias[e]>; weigh=input: <dpre[r] up[e]^T, x[t]>  experts_dweights
    dx[t]      = sum_k (dpre up^T)[t*K + k]                 experts_rows and experts_combine of grouped.py
    dup[e]     = sum_r x[t]^T dpre[r]      ddown[e] = sum_r (w act)[r]^T g[t]                            experts_outer
    dbias[e]   = sum_r dpre[r], or sum_r w g[t]                                                          experts_sum

Every sum has one order, so results repeat bit by bit: no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .grouped import braid, expert, halves, place, sides, store_tile
from .grouped_products import gathered, rows_times, within


@triton.jit
def _through_act(
    dact, r, inside, last, pairs, first, weights_ptr, hidden_ptr, dpre_ptr, act_ptr,
    ACT: tl.constexpr, SLOPE_G: tl.constexpr, SLOPE_U: tl.constexpr, LAYOUT: tl.constexpr, F: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Writes columns [first, first + BLOCK_N) of dpre and w act; returns what they add to <dact, act> [BLOCK_M]."""
    WIDTH: tl.constexpr = F if LAYOUT == "plain" else 2 * F
    columns, wide = first + tl.arange(0, BLOCK_N), 2 * first + tl.arange(0, 2 * BLOCK_N)
    rows, there = r.to(tl.int64), (columns < F)[None, :]
    h_ptr = hidden_ptr + (last.to(tl.int64) * WIDTH)[:, None]
    if LAYOUT == "interleave":
        g, u = halves(tl.load(h_ptr + wide[None, :], mask=(wide < WIDTH)[None, :], other=0.0).to(tl.float32))
    elif LAYOUT == "plain":
        u = tl.load(h_ptr + columns[None, :], mask=there, other=0.0).to(tl.float32)
        g = u
    else:
        g = tl.load(h_ptr + columns[None, :], mask=there, other=0.0).to(tl.float32)
        u = tl.load(h_ptr + F + columns[None, :], mask=there, other=0.0).to(tl.float32)
    act = ACT(g, u)
    dots = tl.sum(tl.where(there, dact * act, 0.0), 1)
    if weights_ptr is not None:
        w = tl.load(weights_ptr + pairs).to(tl.float32)[:, None]
        dact *= w
        act *= w
    if act_ptr is not None:
        store_tile(act_ptr, rows, F, columns, act, inside, F)
    if dpre_ptr is not None:
        du = dact * SLOPE_U(g, u)
        if LAYOUT == "interleave":
            store_tile(dpre_ptr, rows, WIDTH, wide, braid(dact * SLOPE_G(g, u), du), inside, WIDTH)
        elif LAYOUT == "plain":
            store_tile(dpre_ptr, rows, WIDTH, columns, du, inside, F)
        else:
            store_tile(dpre_ptr, rows, WIDTH, columns, dact * SLOPE_G(g, u), inside, F)
            store_tile(dpre_ptr + F, rows, WIDTH, columns, du, inside, F)
    return dots


@triton.jit
def experts_dact(
    g_ptr, order_ptr, offsets_ptr, table_ptr, weights_ptr, downs, hidden_ptr, dpre_ptr, act_ptr, dots_ptr,
    g_stride, down_strides, T, n_blocks,
    ACT: tl.constexpr, SLOPE_G: tl.constexpr, SLOPE_U: tl.constexpr, LAYOUT: tl.constexpr, TOP: tl.constexpr,
    E: tl.constexpr, F: tl.constexpr, H_out: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, SPECIALIZE: tl.constexpr, HALVED: tl.constexpr,
):  # fmt: skip
    """Writes dpre [T*K,P*F] and w act [T*K,F] by row, and parts of <g down^T, act> [T*K,blocks of columns] by pair.

    down_strides: of its transpose, whose rows are the columns of down
    """
    BLOCKS: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    row_block, block = place(n_blocks, BLOCKS)
    e, first_row = tl.load(table_ptr + row_block), tl.load(table_ptr + n_blocks + row_block)
    if e < E:
        end = tl.load(offsets_ptr + e + 1)
        r = first_row + tl.arange(0, BLOCK_M)
        inside = r < end
        last = tl.minimum(r, end - 1)
        pairs = tl.load(order_ptr + last)
        tokens = pairs // TOP
        g_at = gathered(g_ptr, tokens, g_stride, T, H_out, BLOCK_K, ROWS)
        w_ptr = expert(downs[0], e, down_strides)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        first = block * BLOCK_N
        columns = first + tl.arange(0, BLOCK_N)
        columns_at = within(columns, F, BLOCK_N, WIDE) * down_strides[2]
        acc, _ = rows_times(
            acc, None, g_ptr, g_at, 0, tokens, w_ptr, w_ptr, down_strides, first, columns_at,
            columns < F if WIDE and F % BLOCK_N != 0 else None, end, H_out,
            F, BLOCK_N, BLOCK_K, PRECISION, DESCRIPTORS, WIDE, False, ROWS, SPECIALIZE, HALVED,
        )  # fmt: skip
        # A quarter at a time: of whole tiles of g, u, the slopes and the results there would be more than registers.
        pairs = tl.load(order_ptr + last)
        left, right = sides(acc)
        dots = tl.zeros([BLOCK_M], tl.float32)
        for i in tl.static_range(4):
            quarter = sides(left if i < 2 else right)[i % 2]
            dots += _through_act(
                quarter, r, inside, last, pairs, first + i * (BLOCK_N // 4), weights_ptr, hidden_ptr, dpre_ptr, act_ptr,
                ACT, SLOPE_G, SLOPE_U, LAYOUT, F, BLOCK_N // 4,
            )  # fmt: skip
        if dots_ptr is not None:
            tl.store(dots_ptr + pairs.to(tl.int64) * BLOCKS + block, dots, mask=inside)


@triton.jit
def _rows(
    ptr, stride, tokens_ptr, start, end, columns,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Rows [start, start + BLOCK_K) of A [.,N], or A[tokens] where tokens are given; zero outside.

    [BLOCK_K,BLOCK_N], ACROSS [BLOCK_N,BLOCK_K]: a tile that is loaded as it is multiplied is copied asynchronously.
    """
    k = tl.arange(0, BLOCK_K)
    inside = start + k < end
    if tokens_ptr is None:
        ptr += tl.cast(start, tl.int64) * stride
        rows_at = k * stride
    elif MASKED:
        rows_at = tl.load(tokens_ptr + start + k, mask=inside, other=0).to(tl.int64) * stride
    else:
        rows_at = tl.load(tokens_ptr + start + k).to(tl.int64) * stride
    if ACROSS:
        at = ptr + (rows_at[None, :] + columns[:, None])
        inside, there = inside[None, :], (columns < N)[:, None]
    else:
        at = ptr + (rows_at[:, None] + columns[None, :])
        inside, there = inside[:, None], (columns < N)[None, :]
    if MASKED:
        x = tl.load(at, mask=inside & there, other=0.0)
    elif N % BLOCK_N != 0:
        x = tl.load(at, mask=there, other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def experts_outer(
    a_ptr, b_ptr, outs, a_tokens_ptr, b_tokens_ptr, offsets_ptr, w_ptr, a_stride, b_stride, out_strides,
    M: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """outs[e] [M,N] = sum of w[r] A[r]^T B[r] over the rows of expert e; 0 without any.

    tokens [T*K]: which row of A or B is row r, None: r itself; w [T*K] or None
    """
    TILES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    e, within = tl.program_id(0) // (TILES * COLUMNS), tl.program_id(0) % (TILES * COLUMNS)
    i = within % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    j = within // TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, end = tl.load(offsets_ptr + e), tl.load(offsets_ptr + e + 1)
    whole = begin + (end - begin) // BLOCK_K * BLOCK_K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for MASKED in tl.static_range(2):
        for start in tl.range(whole if MASKED else begin, end if MASKED else whole, BLOCK_K):
            a = _rows(a_ptr, a_stride, a_tokens_ptr, start, end, i, M, BLOCK_M, BLOCK_K, MASKED == 1, True)
            b = _rows(b_ptr, b_stride, b_tokens_ptr, start, end, j, N, BLOCK_N, BLOCK_K, MASKED == 1, False)
            if w_ptr is not None:
                r = start + tl.arange(0, BLOCK_K)
                a = (a.to(tl.float32) * tl.load(w_ptr + r, mask=r < end, other=0.0).to(tl.float32)[None, :]).to(b.dtype)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    out_ptr = expert(outs, e, out_strides)
    at = out_ptr + i.to(tl.int64)[:, None] * out_strides[1] + j.to(tl.int64)[None, :] * out_strides[2]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(i < M)[:, None] & (j < N)[None, :])


@triton.jit
def experts_sum(
    a_ptr, outs, tokens_ptr, offsets_ptr, w_ptr, a_stride, out_strides,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """outs[e] [N] = sum of w[r] A[r] over the rows of expert e; tokens and w as in experts_outer."""
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    e = tl.program_id(0) // COLUMNS
    j = tl.program_id(0) % COLUMNS * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, end = tl.load(offsets_ptr + e), tl.load(offsets_ptr + e + 1)
    acc = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for start in tl.range(begin, end, BLOCK_K):
        a = _rows(a_ptr, a_stride, tokens_ptr, start, end, j, N, BLOCK_N, BLOCK_K, True, False).to(tl.float32)
        if w_ptr is not None:
            r = start + tl.arange(0, BLOCK_K)
            a *= tl.load(w_ptr + r, mask=r < end, other=0.0).to(tl.float32)[:, None]
        acc += a
    out_ptr = expert(outs, e, out_strides)
    tl.store(out_ptr + j * out_strides[1], tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=j < N)


@triton.jit
def experts_dweights(
    dots_ptr, ids_ptr, g_ptr, biases, out_ptr, g_stride, bias_strides, PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    TOP: tl.constexpr, E: tl.constexpr, H_out: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[p] = sum of dots[p] [PARTS] + <g[t], bias[e]>, where there are biases; 0 for a pair without an expert."""
    p = tl.program_id(0).to(tl.int64)
    e = tl.load(ids_ptr + p).to(tl.int32)
    found = 0.0
    if (e >= 0) & (e < E):
        part = tl.arange(0, BLOCK_PARTS)
        found = tl.sum(tl.load(dots_ptr + p * PARTS + part, mask=part < PARTS, other=0.0), 0)
        if biases is not None:
            acc = tl.zeros([BLOCK_N], tl.float32)
            b_ptr = expert(biases[0], e, bias_strides)
            for start in tl.range(0, H_out, BLOCK_N):
                j = start + tl.arange(0, BLOCK_N)
                g = tl.load(g_ptr + p // TOP * g_stride + j, mask=j < H_out, other=0.0).to(tl.float32)
                acc += g * tl.load(b_ptr + j * bias_strides[1], mask=j < H_out, other=0.0).to(tl.float32)
            found += tl.sum(acc, 0)
    tl.store(out_ptr + p, found)
