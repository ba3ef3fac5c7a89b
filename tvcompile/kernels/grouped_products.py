"""The inner loops of a mixture of experts on a GPU: rows A [BLOCK_M,K] of one expert times its weights W [K,BLOCK_N].

Rows are gathered while they are loaded, or come by a descriptor; weights by pointers or by descriptors, in whichever
order they lie in memory. By pointers an address should take one instruction of the trip, and for all of its steps:
`rows_times_halved`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weights_at(
    ptr, strides, columns_at, K: tl.constexpr, N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDE: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """How weight_tile reads W [K,N] at ptr in columns of these offsets; WIDE: they lie next to each other.

    TWO: by a descriptor of both halves [2,N,K], whose parts are one tile. (Of [K,2,N] it would go through registers.)
    """
    if DESCRIPTORS:
        if TWO:
            at = tl.make_tensor_descriptor(ptr, [2, N, K], [N * strides[2], strides[2], 1], [2, BLOCK_N // 2, BLOCK_K])
        elif WIDE:
            at = tl.make_tensor_descriptor(ptr, [K, N], [strides[1], 1], [BLOCK_K, BLOCK_N])
        else:
            at = tl.make_tensor_descriptor(ptr, [N, K], [strides[2], 1], [BLOCK_N, BLOCK_K])
    else:
        at = tl.arange(0, BLOCK_K)[:, None] * strides[1] + columns_at[None, :]
    return at


@triton.jit
def within(columns, N: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Columns of W to read for columns in blocks of BLOCK: beyond the last it is repeated, which takes no mask.

    Not where they lie next to each other: such are loaded several at once.
    """
    return columns if WIDE or N % BLOCK == 0 else tl.minimum(columns, N - 1)


@triton.jit
def load_where(ptrs, mask, there):
    """Zero where one of the masks is False; None for one that is True everywhere."""
    if mask is None and there is None:
        x = tl.load(ptrs)
    elif mask is None:
        x = tl.load(ptrs, mask=there, other=0.0)
    elif there is None:
        x = tl.load(ptrs, mask=mask, other=0.0)
    else:
        x = tl.load(ptrs, mask=mask & there, other=0.0)
    return x


@triton.jit
def weight_tile(
    ptr, at, k, rows, first, there, K: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDE: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """Rows [k, k + BLOCK_K) of W in its columns from `first` on, zero outside.

    ptr: where row k lies; rows: 0 to BLOCK_K [BLOCK_K,1]; WHOLE: whether there are as many
    there [BLOCK_K,BLOCK_N]: which columns to load, None for all
    """
    if DESCRIPTORS:
        if TWO:
            tile = tl.reshape(at.load([0, first, k]), [BLOCK_N, BLOCK_K]).T
        elif WIDE:
            tile = at.load([k, first])
        else:
            tile = at.load([first, k]).T
    else:
        tile = load_where(ptr + at, None if WHOLE else k + rows < K, there)
    return tile


@triton.jit
def gathered(ptr, rows, stride, S, K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr):
    """How rows_times reads these rows of the [S,K] tensor at ptr."""
    if ROWS == "gather":
        at = tl.make_tensor_descriptor(ptr, [S, K], [stride, 1], [1, BLOCK_K])
    else:
        at = rows.to(tl.int64)[:, None] * stride
    return at


@triton.jit
def unknown(n: tl.constexpr, end):
    """n, for an end > 0 that only memory knows.

    LLVM unrolls loops of few trips that it can count, which takes registers, and widens counters that it can follow.
    """
    return tl.multiple_of(n + tl.minimum(end, 0), n)


@triton.jit
def apart(acc):
    """acc, by no instruction: Triton doesn't see that the products before and after it are of one sum.

    Where it sees that, it gives each warp a strip of the result, which reads more from shared memory than a square.
    """
    return tl.trans(tl.trans(acc).to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def rows_times(
    acc, other, a_ptr, a_at, begin, row_at, w_ptr, v_ptr, strides, first, columns_at, there, end,
    K: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDE: tl.constexpr, TWO: tl.constexpr, ROWS: tl.constexpr,
    SPECIALIZE: tl.constexpr, HALVED: tl.constexpr,
):  # fmt: skip
    """(acc + A W, other + A V) for rows of A [.,K] and columns from `first` on; without `other` A W is given twice.

    end    of the expert's rows, > 0
    columns_at: offsets of the columns [BLOCK_N]; there: which of them to load, None for all
    ROWS   where they are: "offsets" a_at + begin from a_ptr; of a descriptor a_at, "block": from row_at on, "gather":
           rows row_at
    SPECIALIZE   whether loads and products run in warps of their own
    HALVED       whether a trip takes its BLOCK_K in two steps, whose loads share addresses; only by pointers
    """
    if HALVED:
        acc = rows_times_halved(
            acc, a_ptr, a_at, begin, w_ptr, strides, columns_at, there, end, K, BLOCK_N, BLOCK_K, PRECISION
        )
    else:
        WHOLE: tl.constexpr = K % BLOCK_K == 0
        w_at = weights_at(w_ptr, strides, columns_at, K, N, BLOCK_K, BLOCK_N, DESCRIPTORS, WIDE, TWO)
        if other is not None:
            v_at = weights_at(v_ptr, strides, columns_at, K, N, BLOCK_K, BLOCK_N, DESCRIPTORS, WIDE, TWO)
        columns, rows = tl.arange(0, BLOCK_K)[None, :], tl.arange(0, BLOCK_K)[:, None]
        if ROWS == "offsets":
            a_at += begin + columns
        if there is not None:
            there = tl.broadcast_to(there[None, :], [BLOCK_K, BLOCK_N])
        for k in tl.range(0, K, BLOCK_K, warp_specialize=SPECIALIZE):
            if ROWS == "block":
                a = a_at.load([row_at, k])
            elif ROWS == "gather":
                a = a_at.gather(row_at, k)
            else:
                a = load_where(a_ptr + a_at, None if WHOLE else k + columns < K, None)
            w = weight_tile(w_ptr, w_at, k, rows, first, there, K, WHOLE, BLOCK_N, BLOCK_K, DESCRIPTORS, WIDE, TWO)
            acc = tl.dot(a, w, acc, input_precision=PRECISION)
            if other is not None:
                v = weight_tile(v_ptr, v_at, k, rows, first, there, K, WHOLE, BLOCK_N, BLOCK_K, DESCRIPTORS, WIDE, TWO)
                other = tl.dot(a, v, other, input_precision=PRECISION)
                v_ptr += BLOCK_K * strides[1]
            a_ptr += BLOCK_K
            w_ptr += BLOCK_K * strides[1]
    return acc, acc if other is None else other  # triton 3.6 gives no None back


@triton.jit
def rows_times_halved(
    acc, a_ptr, a_at, begin, w_ptr, strides, columns_at, there, end,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + A W, by pointers; names as in rows_times.

    An address is a pointer that stays plus a 32-bit offset of the trip: one instruction, where a pointer that moves
    takes two. The second step's addresses are those of the first and a constant.
    """
    HALF: tl.constexpr = BLOCK_K // 2
    WHOLE: tl.constexpr = K % BLOCK_K == 0
    # What is the same in all trips, and a counter for each step: products that share an operation are seen as one sum.
    columns, rows = tl.arange(0, HALF)[None, :], tl.arange(0, HALF)[:, None]
    a_at = a_ptr + (a_at + columns)
    w_at = (w_ptr - begin * strides[1]) + (rows * strides[1] + columns_at[None, :])
    if there is not None:
        there = tl.broadcast_to(there[None, :], [HALF, BLOCK_N])
    by = unknown(BLOCK_K, end)
    even, odd = begin, begin
    for _ in tl.range(0, unknown(K, end), BLOCK_K):
        for i in tl.static_range(2):
            k = odd if i else even
            a = load_where(a_at + k + i * HALF, None if WHOLE else k + i * HALF + columns < begin + K, None)
            at = w_at + k * strides[1] + i * HALF * strides[1]
            w = load_where(at, None if WHOLE else k + i * HALF + rows < begin + K, there)
            acc = apart(tl.dot(a, w, acc, input_precision=PRECISION))
        even += by
        odd += by
    return acc
