"""A mixture of experts on a GPU, forward: products of each expert's rows with its weights, pairs sorted by expert.

    pre[r]  = x[order[r] // K] up[e] + up_bias[e]            act[r] = act(pre[r])             experts_up
    y[p]    = weights[p] (act[r] down[e] + down_bias[e])     p = order[r]                     experts_rows
    out[t]  = sum_k y[t*K + k], in the order of k                                             experts_combine

    x [T,H]   order [T*K]   act [T*K,F]   hidden [T*K,P*F]   y [T*K,H_out]   out [T,H_out]      r rows, p pairs

One program makes BLOCK_M rows of one expert times BLOCK_N columns; routing.py says which rows. BLOCK_N counts the
columns of g and u together: both come from one pass over x, as one sum that is split, or else as two.
The rows are gathered while they are loaded, so no sorted copy of x is made. Rows beyond an expert's last repeat it and
are not stored. Weights are read by pointers or by descriptors; in which order their memory lies is told by strides.
The loops: grouped_products.py. Not here: float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .grouped_products import gathered, rows_times, unknown, within

GROUP = tl.constexpr(8)  # blocks of rows that go over the columns together, so that L2 holds what they share


@triton.jit
def place(n_blocks, COLUMNS: tl.constexpr):
    """(block of rows, block of columns) of a program.

    What a block of rows is, the kernels load themselves: PyTorch takes what a function returns for a part of any tensor
    that it was given, and so would see the table written.
    """
    pid = tl.program_id(0)
    group = pid // (GROUP * COLUMNS) * GROUP
    size = tl.minimum(n_blocks - group, GROUP)
    within = pid % (GROUP * COLUMNS)
    return group + within % size, within // size


@triton.jit
def pick(tensors, e):
    """Tensor e of a tuple; the one there is where experts are stacked."""
    found = tensors[0]
    for i in tl.static_range(1, len(tensors)):
        found = tl.where(e == i, tensors[i], found)
    return found


@triton.jit
def expert(tensors, e, strides):
    """Where the weights or the bias of expert e begin; strides[0] is 0 for tensors of their own."""
    return pick(tensors, e) + tl.cast(e, tl.int64) * strides[0]


@triton.jit
def distance(first, second, ALIGNED: tl.constexpr):
    """How many elements one tensor lies behind another; ALIGNED: both at a multiple of 16 bytes."""
    SIZE: tl.constexpr = first.dtype.element_ty.primitive_bitwidth // 8
    n = (second.to(tl.int64) - first.to(tl.int64)) // SIZE
    if ALIGNED:
        n = tl.multiple_of(n, 16 // SIZE)
    return n


@triton.jit
def halves(x):
    """(even, odd) columns"""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def braid(even, odd):
    """The inverse of halves."""
    return tl.reshape(tl.join(even, odd), [even.shape[0], even.shape[1] * 2])


@triton.jit
def sides(x):
    """(left, right) half of the columns"""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def bias_row(ptr, stride, columns, N: tl.constexpr):
    """[1,BLOCK_N] float32"""
    return tl.load(ptr + columns * stride, mask=columns < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def store_tile(ptr, rows, stride, columns, value, inside, N: tl.constexpr):
    """value [BLOCK_M,BLOCK_N] at 64-bit row numbers `rows` of a matrix [.,N], where `inside`."""
    at = ptr + (rows * stride)[:, None] + columns[None, :]
    tl.store(at, value.to(ptr.dtype.element_ty), mask=inside[:, None] & (columns < N)[None, :])


@triton.jit
def _activate(
    acc, other, w, r, inside, first, e, biases, bias_strides, act_ptr, hidden_ptr,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, F: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Writes act and hidden for sums in columns from `first` on: of g, `other` of u; of u; or of both by turns."""
    N: tl.constexpr = 2 * F if LAYOUT == "interleave" else F
    WIDTH: tl.constexpr = F if LAYOUT == "plain" else 2 * F
    columns, rows = first + tl.arange(0, COLUMNS), r.to(tl.int64)
    if w is not None:
        acc *= w
    if biases is not None:
        acc += bias_row(expert(biases[0], e, bias_strides), bias_strides[1], columns, N)
    if hidden_ptr is not None:
        store_tile(hidden_ptr, rows, WIDTH, columns, acc, inside, N)
    if other is not None:
        if w is not None:
            other *= w
        if biases is not None:
            b_ptr = expert(biases[len(biases) - 1], e, bias_strides)
            if LAYOUT == "chunk":
                b_ptr += F * bias_strides[1]
            other += bias_row(b_ptr, bias_strides[1], columns, N)
        if hidden_ptr is not None:
            store_tile(hidden_ptr + F, rows, WIDTH, columns, other, inside, N)
    if act_ptr is not None:
        if LAYOUT == "interleave":
            g, u = halves(acc)
            store_tile(act_ptr, rows, F, first // 2 + tl.arange(0, COLUMNS // 2), ACT(g, u), inside, F)
        else:
            store_tile(act_ptr, rows, F, columns, ACT(acc, acc if other is None else other), inside, F)


@triton.jit
def experts_up(
    x_ptr, order_ptr, offsets_ptr, table_ptr, weights_ptr, ups, biases, act_ptr, hidden_ptr,
    x_stride, up_strides, bias_strides, T, n_blocks,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, TOP: tl.constexpr, E: tl.constexpr, H: tl.constexpr, F: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, SPECIALIZE: tl.constexpr, HALVED: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    PAIR: tl.constexpr = LAYOUT == "chunk" or LAYOUT == "separate"
    BRAIDED: tl.constexpr = LAYOUT == "interleave"
    # g and u are one tile wherever one can be loaded: A is then read once for both.
    FOLDED: tl.constexpr = PAIR and not DESCRIPTORS or LAYOUT == "chunk" and not WIDE
    BLOCK_F: tl.constexpr = BLOCK_N if LAYOUT == "plain" else BLOCK_N // 2
    COLUMNS: tl.constexpr = BLOCK_F if PAIR else BLOCK_N
    TILE: tl.constexpr = BLOCK_F if PAIR and not FOLDED else BLOCK_N
    N: tl.constexpr = 2 * F if BRAIDED else F
    AT: tl.constexpr = F if LAYOUT == "chunk" else 0  # where u begins in its tensor
    row_block, block = place(n_blocks, tl.cdiv(N, COLUMNS))
    e, first_row = tl.load(table_ptr + row_block), tl.load(table_ptr + n_blocks + row_block)
    if e < E:
        end = tl.load(offsets_ptr + e + 1)
        r = first_row + tl.arange(0, BLOCK_M)
        inside = r < end
        pairs = tl.load(order_ptr + tl.minimum(r, end - 1))
        tokens = pairs // TOP
        a_at = gathered(x_ptr, tokens, x_stride, T, H, BLOCK_K, ROWS)
        first = block * COLUMNS
        w_ptr = expert(ups[0], e, up_strides)
        v_ptr = expert(ups[len(ups) - 1], e, up_strides) + AT * up_strides[2]
        j = tl.arange(0, TILE)
        if not FOLDED:
            n = within(first + j, N, COLUMNS, WIDE)
            columns_at = n * up_strides[2]
        else:
            gap = AT * up_strides[2] if LAYOUT == "chunk" else distance(w_ptr, v_ptr, ALIGNED)
            if WIDE:
                n = first + j % BLOCK_F
                columns_at = j // BLOCK_F * gap + n * up_strides[2]
            else:
                n = within(first + j // 2, N, COLUMNS, WIDE)
                columns_at = j % 2 * gap + n * up_strides[2]
        acc = tl.zeros([BLOCK_M, TILE], tl.float32)
        other = tl.zeros([BLOCK_M, TILE], tl.float32) if PAIR and not FOLDED else None
        acc, other = rows_times(
            acc, other, x_ptr, a_at, 0, tokens, w_ptr, v_ptr, up_strides, first, columns_at,
            n < N if WIDE and N % COLUMNS != 0 else None, end, H, N, TILE, BLOCK_K, PRECISION, DESCRIPTORS, WIDE,
            LAYOUT == "chunk" and not WIDE, ROWS, SPECIALIZE, HALVED,
        )  # fmt: skip
        if FOLDED:
            acc, other = sides(acc) if WIDE or DESCRIPTORS else halves(acc)
        w = None if weights_ptr is None else tl.load(weights_ptr + pairs).to(tl.float32)[:, None]
        # One half after the other: of a whole tile what it is split into, its bias and where it goes take registers.
        HALF: tl.constexpr = COLUMNS // 2
        for i in tl.static_range(2):
            _activate(
                sides(acc)[i], sides(other)[i] if PAIR else None, w, r, inside, first + i * HALF, e, biases,
                bias_strides, act_ptr, hidden_ptr, ACT, LAYOUT, F, HALF,
            )  # fmt: skip


@triton.jit
def experts_rows(
    a_ptr, order_ptr, offsets_ptr, table_ptr, weights_ptr, ws, biases, out_ptr, x_ptr, dots_ptr,
    w_strides, bias_strides, x_stride, n_rows, n_blocks,
    TOP: tl.constexpr, E: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, SPECIALIZE: tl.constexpr, HALVED: tl.constexpr,
):  # fmt: skip
    """out[p] = weights[p] (sum_s A[r, s*K:(s+1)*K] ws[s][e] + bias[e]), p = order[r]; A [T*K,len(ws)*K], out [T*K,N].

    dots [T*K,blocks of columns], where there are any: what each block adds to <out[p] / weights[p], x[p // TOP]>.
    """
    BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N  # in triton 3.6 tl.cdiv gives no constant
    SETS: tl.constexpr = len(ws)
    row_block, block = place(n_blocks, BLOCKS)
    e, first_row = tl.load(table_ptr + row_block), tl.load(table_ptr + n_blocks + row_block)
    if e < E:
        end = tl.load(offsets_ptr + e + 1)
        r = first_row + tl.arange(0, BLOCK_M)
        inside = r < end
        last = tl.minimum(r, end - 1)
        first = block * BLOCK_N
        n = within(first + tl.arange(0, BLOCK_N), N, BLOCK_N, WIDE)
        there = n < N if WIDE and N % BLOCK_N != 0 else None
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        # By pointers a loop over the sets: those of two have no room in registers next to each other.
        RUN: tl.constexpr = SETS if ROWS == "offsets" and not DESCRIPTORS else 1
        stop = unknown(RUN, end) if RUN > 1 else 1
        for s in tl.static_range(0, SETS, RUN):
            for i in tl.range(s, s + stop):
                if ROWS == "block":
                    a_at = tl.make_tensor_descriptor(a_ptr + i * K, [n_rows, K], [SETS * K, 1], [BLOCK_M, BLOCK_K])
                else:
                    a_at = last.to(tl.int64)[:, None] * (SETS * K)
                w_ptr = expert(ws[0], e, w_strides)
                if SETS > 1:
                    w_ptr = tl.where(i == 0, w_ptr, expert(ws[SETS - 1], e, w_strides))
                acc, _ = rows_times(
                    acc, None, a_ptr, a_at, i * K, first_row, w_ptr, w_ptr, w_strides, first, n * w_strides[2], there,
                    end, K, N, BLOCK_N, BLOCK_K, PRECISION, DESCRIPTORS, WIDE, False, ROWS, SPECIALIZE, HALVED,
                )  # fmt: skip
        pairs = tl.load(order_ptr + last)
        w = None if weights_ptr is None else tl.load(weights_ptr + pairs).to(tl.float32)[:, None]
        dots = tl.zeros([BLOCK_M], tl.float32)
        HALF: tl.constexpr = BLOCK_N // 2  # as in experts_up
        for i in tl.static_range(2):
            part, columns = sides(acc)[i], first + i * HALF + tl.arange(0, HALF)
            if biases is not None:
                part += bias_row(expert(biases[0], e, bias_strides), bias_strides[1], columns, N)
            if dots_ptr is not None:
                x_at = x_ptr + (pairs // TOP).to(tl.int64)[:, None] * x_stride + columns[None, :]
                x = tl.load(x_at, mask=(columns < N)[None, :], other=0.0)
                # Beyond the last column a part repeats it: infinity times the zero of x would be NaN.
                dots += tl.sum(tl.where((columns < N)[None, :], part * x.to(tl.float32), 0.0), 1)
            if w is not None:
                part *= w
            if out_ptr is not None:
                store_tile(out_ptr, pairs.to(tl.int64), N, columns, part, inside, N)
        if dots_ptr is not None:
            tl.store(dots_ptr + pairs.to(tl.int64) * BLOCKS + block, dots, mask=inside)


@triton.jit
def experts_combine(
    y_ptr, ids_ptr, out_ptr, T, TOP: tl.constexpr, E: tl.constexpr, N: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[t] = sum_k y[t*K + k] in the order of k; pairs without an expert, whose y nobody wrote, give nothing."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for k in tl.static_range(TOP):
        pairs = t.to(tl.int64) * TOP + k
        e = tl.load(ids_ptr + pairs, mask=t < T, other=-1)
        chosen = ((e >= 0) & (e < E))[:, None] & (columns < N)[None, :]
        y = tl.load(y_ptr + pairs[:, None] * N + columns[None, :], mask=chosen, other=0.0)
        acc += y.to(tl.float32)
    store_tile(out_ptr, t.to(tl.int64), N, columns, acc, t < T, N)
