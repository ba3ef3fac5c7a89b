"""What the attention kernels share: reading and writing blocks, finding those that `keep` leaves, dropping weights.

A kernel goes over the other side's blocks in runs: stretches of FULL blocks first, then of PARTIAL ones. It finds them
itself, CHUNK blocks at a time, by KINDS(b, h, q_low, q_high, kv_low, kv_high, data): 0 EMPTY, 1 PARTIAL, 2 FULL, minted
from the interval arithmetic of bounds.py. So there is no table of blocks, nothing comes from the host, and sizes
may change from call to call.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = tl.constexpr(32)


@triton.jit
def load_block(
    ptr, at, start, S,
    MASKED: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Rows [start, start + ROWS) of [S,D], zero outside: from a descriptor `at`, or at ptr + offsets `at`."""
    if DESCRIPTORS:
        block = at.load([start, 0])
    elif MASKED:
        rows = (start + tl.arange(0, ROWS))[:, None] < S
        if D == COLUMNS:
            block = tl.load(ptr + at, mask=rows, other=0.0)
        else:
            block = tl.load(ptr + at, mask=rows & (tl.arange(0, COLUMNS)[None, :] < D), other=0.0)
    elif D == COLUMNS:
        block = tl.load(ptr + at)
    else:
        block = tl.load(ptr + at, mask=tl.arange(0, COLUMNS)[None, :] < D, other=0.0)
    return block


@triton.jit
def store_block(ptr, at, first, S, value, D: tl.constexpr):
    """Writes rows [first, first + ROWS) of [S,D] at ptr + offsets `at`."""
    rows, columns = first + tl.arange(0, value.shape[0])[:, None], tl.arange(0, value.shape[1])[None, :]
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=(rows < S) & (columns < D))


@triton.jit
def head(ptr, strides, b, h, row):
    """Where `row` of one head of a [B,H,S,D] tensor begins."""
    return (
        ptr
        + tl.cast(b, tl.int64) * strides[0]
        + tl.cast(h, tl.int64) * strides[1]
        + tl.cast(row, tl.int64) * strides[2]
    )


@triton.jit
def offsets(strides, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """32-bit offsets of a block [ROWS,COLUMNS] for one pointer that moves: a block of pointers costs registers."""
    return row_offsets(strides, tl.arange(0, ROWS), COLUMNS)


@triton.jit
def row_offsets(strides, rows, COLUMNS: tl.constexpr):
    return rows[:, None] * strides[2] + tl.arange(0, COLUMNS)[None, :] * strides[3]


@triton.jit
def moving(
    ptr, strides, S, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr
):  # fmt: skip
    """How load_block reads blocks of the [S,D] tensor at ptr, one after the other."""
    if DESCRIPTORS:
        at = tl.make_tensor_descriptor(ptr, [S, D], [strides[2], 1], [ROWS, COLUMNS])
    else:
        at = offsets(strides, ROWS, COLUMNS)
    return at


@triton.jit
def packed_offsets(strides, rows, S_q, COLUMNS: tl.constexpr):
    """Offsets of rows that count the positions of one head after the other."""
    at = (rows // S_q).to(tl.int64) * strides[1] + (rows % S_q) * strides[2]
    return at[:, None] + tl.arange(0, COLUMNS)[None, :] * strides[3]


@triton.jit
def same_in_warp(x):
    """A scalar that a reduction found, as one that the compiler knows to be the same in every lane.

    A loop over what came out of shared memory counts as divergent: on Hopper and Blackwell 70 instructions more per
    trip, elsewhere spills.
    """
    return tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def same_in_wave(x):
    """`same_in_warp` for AMD."""
    return tl.inline_asm_elementwise("v_readfirstlane_b32 $0, $1", "=s,v", [x], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def same(x):
    """`same_in_warp` for the interpreter."""
    return x


@triton.jit
def kinds_of(i, n, b, h, h_last, low, high, S, data, KINDS: tl.constexpr, BLOCK: tl.constexpr, OVER_Q: tl.constexpr):
    """The kinds of blocks i over kv for rows [low, high] of q, or, OVER_Q, over q for kv [low, high]; -1 beyond n."""
    start = i * BLOCK
    end = tl.minimum(start + BLOCK, S) - 1
    if OVER_Q:
        found = KINDS(b, h, h_last, start, end, low, high, data)
    else:
        found = KINDS(b, h, h_last, low, high, start, end, data)
    # A block that reaches beyond the end is PARTIAL.
    found = tl.where(start + BLOCK > S, tl.minimum(found, 1), found)
    return tl.where(i < n, found, -1)


@triton.jit
def count_runs(
    at, n, b, h, h_last, low, high, S, data,
    WANT: tl.constexpr, KINDS: tl.constexpr, BLOCK: tl.constexpr, OVER_Q: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """How often next_run has to be called from `at` on: once for each run, and once for each further chunk."""
    if KINDS is None:
        # Everything is FULL but a block that reaches beyond the end.
        whole = tl.minimum(S // BLOCK, n)
        runs = tl.where(at < whole, 1, 0) if WANT == 2 else tl.where(tl.maximum(at, whole) < n, 1, 0)
    else:
        runs = n * 0 - 1
        for start in range(at // CHUNK * CHUNK, n, CHUNK):
            i = start + tl.arange(0, CHUNK)
            here = kinds_of(i, n, b, h, h_last, low, high, S, data, KINDS, BLOCK, OVER_Q) == WANT
            before = kinds_of(i - 1, n, b, h, h_last, low, high, S, data, KINDS, BLOCK, OVER_Q) == WANT
            runs += 1 + tl.sum((here & (i >= at) & ~(before & (i > at) & (i > start))).to(tl.int32), 0)
        runs = SAME(runs)
    return runs


@triton.jit
def next_run(
    at, n, b, h, h_last, low, high, S, data,
    WANT: tl.constexpr, KINDS: tl.constexpr, BLOCK: tl.constexpr, OVER_Q: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """The next stretch [first, last) of blocks of one kind in the chunk of `at`; there, from `last` on is still unseen.

    Without a loop: one here costs the loop over FULL blocks its registers.
    """
    if KINDS is None:
        whole = tl.minimum(S // BLOCK, n)
        first = at if WANT == 2 else tl.maximum(at, whole)
        last = whole if WANT == 2 else n
    else:
        start = at // CHUNK * CHUNK
        stop = start + CHUNK
        i = start + tl.arange(0, CHUNK)
        found = (kinds_of(i, n, b, h, h_last, low, high, S, data, KINDS, BLOCK, OVER_Q) == WANT) & (i >= at)
        first = SAME(tl.min(tl.where(found, i, stop), 0))
        last = SAME(tl.min(tl.where((i > first) & ~found, i, stop), 0))
    return first, last


@triton.jit
def hull(
    n, b, h, h_last, low, high, S, data, KINDS: tl.constexpr, BLOCK: tl.constexpr, SAME: tl.constexpr
):  # fmt: skip
    """[first, last) around every kv block that is not EMPTY; [n, 0) where all are."""
    first = n
    last = n * 0
    for at in range(0, n, CHUNK):
        i = at + tl.arange(0, CHUNK)
        found = kinds_of(i, n, b, h, h_last, low, high, S, data, KINDS, BLOCK, False)
        first = tl.minimum(first, tl.min(tl.where(found > 0, i, n), 0))
        last = tl.maximum(last, tl.max(tl.where(found > 0, i + 1, 0), 0))
    return SAME(first), SAME(last)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def kept_weights(seed, row, kv, LIMIT: tl.constexpr):
    """Which softmax weights stay: the hash of dropout.py, in 32-bit integers. row: (b*H + h)*S_q + q."""
    first = _mix(row.to(tl.uint32) + seed.to(tl.uint32))
    first = _mix(first + (seed >> 32).to(tl.uint32))
    return _mix(first ^ kv.to(tl.uint32)) < tl.full([1, 1], LIMIT, tl.uint32)
