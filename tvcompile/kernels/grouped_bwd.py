"""A mixture of experts on a GPU, backward; shapes and names in grouped.py.

    dact[r]    = w[r] (g[t] down[e]^T)                      t = order[r] // K, g the gradient of out     experts_dact
    dpre[r]    = dact[r] act'(pre[r])                       by g and by u
    dw[p]      = <g[t] down[e]^T, act[r]> + <g[t], down_bias[e]>; weigh=input: <dpre[r] up[e]^T, x[t]>   experts_dweights
    dx[t]      = sum_k (dpre up^T)[t*K + k]                 experts_rows and experts_combine of grouped.py
    dup[e]     = sum_r x[t]^T dpre[r]      ddown[e] = sum_r (w act)[r]^T g[t]                            experts_outer
    dbias[e]   = sum_r dpre[r], or sum_r w g[t]                                                          experts_sum

Every sum has one order, so results repeat bit by bit: no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .grouped import braid, expert, halves, place, rows_times, store_tile


@triton.jit
def experts_dact(
    g_ptr, order_ptr, offsets_ptr, table_ptr, weights_ptr, downs, hidden_ptr, dpre_ptr, act_ptr, dots_ptr,
    g_stride, down_strides, n_blocks,
    ACT: tl.constexpr, SLOPE_G: tl.constexpr, SLOPE_U: tl.constexpr, LAYOUT: tl.constexpr, TOP: tl.constexpr,
    E: tl.constexpr, F: tl.constexpr, H_out: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Writes dpre [T*K,P*F] and w act [T*K,F] by row; dots [T*K,blocks of columns] by pair: parts of <g down^T, act>."""
    BLOCKS: tl.constexpr = tl.cdiv(F, BLOCK_N)
    WIDTH: tl.constexpr = F if LAYOUT == "plain" else 2 * F
    e, first_row, end, block = place(table_ptr, offsets_ptr, n_blocks, BLOCKS, E)
    if e < E:
        r = first_row + tl.arange(0, BLOCK_M)
        inside = r < end
        last = tl.minimum(r, end - 1)
        pairs = tl.load(order_ptr + last)
        g_at = (pairs // TOP).to(tl.int64)[:, None] * g_stride
        w_ptr = expert(downs[0], e, down_strides)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        # down^T: its rows are the columns of down.
        acc, _ = rows_times(
            acc, None, g_ptr, g_at, w_ptr, w_ptr, down_strides[2], down_strides[1], first_row, block * BLOCK_N,
            H_out, F, BLOCK_N, BLOCK_K, PRECISION, DESCRIPTORS, WIDE, False,
        )  # fmt: skip
        columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
        rows, there = r.to(tl.int64), (columns < F)[None, :]
        h_ptr = hidden_ptr + (last.to(tl.int64) * WIDTH)[:, None]
        if LAYOUT == "interleave":
            wide = block * BLOCK_N * 2 + tl.arange(0, 2 * BLOCK_N)
            g, u = halves(tl.load(h_ptr + wide[None, :], mask=(wide < WIDTH)[None, :], other=0.0).to(tl.float32))
        elif LAYOUT == "plain":
            u = tl.load(h_ptr + columns[None, :], mask=there, other=0.0).to(tl.float32)
            g = u
        else:
            g = tl.load(h_ptr + columns[None, :], mask=there, other=0.0).to(tl.float32)
            u = tl.load(h_ptr + F + columns[None, :], mask=there, other=0.0).to(tl.float32)
        act = ACT(g, u)
        if dots_ptr is not None:
            dots = tl.sum(tl.where(there, acc * act, 0.0), 1)
            tl.store(dots_ptr + pairs.to(tl.int64) * BLOCKS + block, dots, mask=inside)
        if weights_ptr is not None:
            w = tl.load(weights_ptr + pairs).to(tl.float32)[:, None]
            acc *= w
            act *= w
        if act_ptr is not None:
            store_tile(act_ptr, rows, F, columns, act, inside, F)
        if dpre_ptr is not None:
            du = acc * SLOPE_U(g, u)
            if LAYOUT == "interleave":
                wide = block * BLOCK_N * 2 + tl.arange(0, 2 * BLOCK_N)
                store_tile(dpre_ptr, rows, WIDTH, wide, braid(acc * SLOPE_G(g, u), du), inside, WIDTH)
            elif LAYOUT == "plain":
                store_tile(dpre_ptr, rows, WIDTH, columns, du, inside, F)
            else:
                store_tile(dpre_ptr, rows, WIDTH, columns, acc * SLOPE_G(g, u), inside, F)
                store_tile(dpre_ptr + F, rows, WIDTH, columns, du, inside, F)


@triton.jit
def _row_tile(
    ptr, stride, order_ptr, weights_ptr, start, end, columns,
    GATHER: tl.constexpr, TOP: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows [start, start + BLOCK_K) of an expert, [BLOCK_K,columns]: gathered by token, times the weight if there is one;
    zero outside."""
    r = start + tl.arange(0, BLOCK_K)
    if GATHER or weights_ptr is not None:
        pairs = tl.load(order_ptr + (tl.minimum(r, end - 1) if MASKED else r))
    rows = pairs // TOP if GATHER else r
    at = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if MASKED and N % BLOCK_N != 0:
        x = tl.load(at, mask=(r < end)[:, None] & (columns < N)[None, :], other=0.0)
    elif MASKED:
        x = tl.load(at, mask=(r < end)[:, None], other=0.0)
    elif N % BLOCK_N != 0:
        x = tl.load(at, mask=(columns < N)[None, :], other=0.0)
    else:
        x = tl.load(at)
    if weights_ptr is not None:
        x = (x.to(tl.float32) * tl.load(weights_ptr + pairs).to(tl.float32)[:, None]).to(x.dtype)
    return x


@triton.jit
def experts_outer(
    a_ptr, b_ptr, outs, order_ptr, offsets_ptr, weights_ptr, a_stride, b_stride, out_strides,
    GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, TOP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """outs[e] [M,N] = sum of A[r]^T B[r] over the rows of expert e; weights, where given, multiply A. 0 without any row."""
    TILES: tl.constexpr = tl.cdiv(M, BLOCK_M)
    COLUMNS: tl.constexpr = tl.cdiv(N, BLOCK_N)
    e, within = tl.program_id(0) // (TILES * COLUMNS), tl.program_id(0) % (TILES * COLUMNS)
    i = within % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    j = within // TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, end = tl.load(offsets_ptr + e), tl.load(offsets_ptr + e + 1)
    whole = begin + (end - begin) // BLOCK_K * BLOCK_K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for MASKED in tl.static_range(2):
        for start in tl.range(whole if MASKED else begin, end if MASKED else whole, BLOCK_K):
            a = _row_tile(
                a_ptr, a_stride, order_ptr, weights_ptr, start, end, i, GATHER_A, TOP, M, BLOCK_M, BLOCK_K, MASKED == 1
            )  # fmt: skip
            b = _row_tile(
                b_ptr, b_stride, order_ptr, None, start, end, j, GATHER_B, TOP, N, BLOCK_N, BLOCK_K, MASKED == 1
            )  # fmt: skip
            acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
    out_ptr = expert(outs, e, out_strides)
    at = out_ptr + i[:, None] * out_strides[1] + j[None, :] * out_strides[2]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(i < M)[:, None] & (j < N)[None, :])


@triton.jit
def experts_sum(
    a_ptr, outs, order_ptr, offsets_ptr, weights_ptr, a_stride, out_strides,
    GATHER: tl.constexpr, TOP: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """outs[e] [N] = sum of A[r] over the rows of expert e, of weights[p] A[r] where weights are given."""
    COLUMNS: tl.constexpr = tl.cdiv(N, BLOCK_N)
    e = tl.program_id(0) // COLUMNS
    j = tl.program_id(0) % COLUMNS * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, end = tl.load(offsets_ptr + e), tl.load(offsets_ptr + e + 1)
    acc = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for start in tl.range(begin, end, BLOCK_K):
        a = _row_tile(a_ptr, a_stride, order_ptr, None, start, end, j, GATHER, TOP, N, BLOCK_N, BLOCK_K, True).to(tl.float32)
        if weights_ptr is not None:
            pairs = tl.load(order_ptr + tl.minimum(start + tl.arange(0, BLOCK_K), end - 1))
            a *= tl.load(weights_ptr + pairs).to(tl.float32)[:, None]
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
