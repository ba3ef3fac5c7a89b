"""Softmax attention on a GPU, forward: one pass over the kv blocks that `keep` leaves, in O(S) memory.

    x      = score(scale <q, k>)
    m'     = max(m, rowmax x);   p = exp(x - m');   a = exp(m - m')          exp by the hardware's exp2
    l'     = a l + rowsum p;     acc' = a acc + drop(p) v                   FlashAttention-2, arXiv 2307.08691
    where every row has m' <= m + 8 log 2, m stays and a is 1               as in FlashAttention-4
    out    = acc / l             lse = m + log l;   rest: what lse lost by rounding

    q [B,H,S_q,D]   k [B,H_kv,S_kv,D]   v [B,H_kv,S_kv,D_v]   out [B,H,S_q,D_v]   lse, rest [B,H,S_q] float32

One program makes BLOCK_M rows of one head; `keep` is tested in PARTIAL blocks only, where also the end of kv lies.
Where S_q is small, a program takes the q heads of a group together (PACKED: rows count the positions of one head after
the other), so that K and V are read once for all of them, and the blocks of kv are shared out to SPLITS programs, whose
results attention_merge adds up:  out = sum_i exp(lse_i - lse) out_i                    Flash-Decoding, 2023
Not here: float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    count_runs,
    head,
    hull,
    kept_weights,
    load_block,
    moving,
    next_run,
    offsets,
    packed_offsets,
    row_offsets,
    store_block,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SLACK = tl.constexpr(8.0)
# Triton 3.6 and 3.7 can't compile a question about all rows for sm100: "parent layout must have at least rank >= 2".
ASKS = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8))
# The maximum of a row that has seen nothing: from -inf, -inf could not be subtracted.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _sweep(
    acc, l, m, q, k_ptr, v_ptr, k_at, v_at, stride_kn, stride_vn, lo, hi, S_kv, b, h, rows, line, seed, data,
    SCALE: tl.constexpr, SCORE: tl.constexpr, KEEP: tl.constexpr, LIMIT: tl.constexpr, MASKED: tl.constexpr,
    D: tl.constexpr, D_v: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    SPECIALIZE: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    """The online softmax over the kv blocks of [lo, hi); nothing but arithmetic where they are FULL."""
    # A positive scale goes into the exponent's multiplication; x is then <q, k> itself.
    FOLDED: tl.constexpr = SCORE is None and SCALE > 0
    IN_LOG2: tl.constexpr = SCALE * LOG2E
    # What is carried in log2 is subtracted from as it is; a SCORE stays in natural units.
    UNIT: tl.constexpr = LOG2E if SCORE is not None else 1.0
    EAGER: tl.constexpr = not ASKS or SPECIALIZE and not MASKED
    columns = tl.arange(0, BLOCK_N)
    k_ptr += tl.cast(lo, tl.int64) * stride_kn
    v_ptr += tl.cast(lo, tl.int64) * stride_vn
    for start in tl.range(
        lo, hi, BLOCK_N, num_stages=1 if MASKED and DESCRIPTORS else None,
        warp_specialize=SPECIALIZE and not MASKED, disable_licm=MASKED or not HOIST,
    ):  # fmt: skip
        kv = start + columns[None, :]
        k = load_block(k_ptr, k_at, start, S_kv, MASKED, D, BLOCK_N, q.shape[1], DESCRIPTORS).T
        s = tl.dot(q, k, input_precision=PRECISION)
        if SCORE is not None:
            s = SCORE(s * SCALE, b, h, rows, kv, data)
        elif not FOLDED:
            s = s * IN_LOG2
        if MASKED:
            s = tl.where(kv < S_kv, s, float("-inf"))
            if KEEP is not None:
                s = tl.where(KEEP(b, h, rows, kv, data), s, float("-inf"))
        if FOLDED:
            m_new = tl.maximum(m, tl.max(s, 1) * IN_LOG2)
        else:
            m_new = tl.maximum(m, tl.max(s, 1))
        # As long as no row's maximum has outgrown the one it is measured by, the sums may stay as they are: weights of
        # up to 2^SLACK keep their precision. Warps of their own roles can't be asked whether all agree.
        if EAGER or tl.max(m_new - m, 0) * UNIT > SLACK:
            a = tl.math.exp2((m - m_new) * UNIT)
            acc = acc * a[:, None]
            l = l * a
            m = m_new
        if SCORE is not None:
            # A score near the largest float is subtracted from before it is multiplied.
            p = tl.math.exp2((s - m[:, None]) * LOG2E)
        else:
            p = tl.math.exp2(s * IN_LOG2 - m[:, None]) if FOLDED else tl.math.exp2(s - m[:, None])
        l += tl.sum(p, 1)
        if LIMIT is not None:
            p = tl.where(kept_weights(seed, line, kv, LIMIT), p, 0.0)
        v = load_block(v_ptr, v_at, start, S_kv, MASKED, D_v, BLOCK_N, acc.shape[1], DESCRIPTORS)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        k_ptr += BLOCK_N * stride_kn
        v_ptr += BLOCK_N * stride_vn
    return acc, l, m


@triton.jit
def _mean_of(
    v_ptr, v_at, stride_vn, S_kv, line, seed,
    LIMIT: tl.constexpr, GROW: tl.constexpr, D_v: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The mean of v over all kv, [1,D_v]; with dropout each row's own, [M,D_v]"""
    if LIMIT is None:
        total = tl.zeros([1, BLOCK_DV], tl.float32)
        for start in tl.range(0, S_kv, BLOCK_N):
            v = load_block(v_ptr, v_at, start, S_kv, True, D_v, BLOCK_N, BLOCK_DV, DESCRIPTORS)
            total += tl.sum(v.to(tl.float32), 0)[None, :]
            v_ptr += BLOCK_N * stride_vn
    else:
        total = tl.zeros([line.shape[0], BLOCK_DV], tl.float32)
        for start in tl.range(0, S_kv, BLOCK_N):
            v = load_block(v_ptr, v_at, start, S_kv, True, D_v, BLOCK_N, BLOCK_DV, DESCRIPTORS)
            stays = kept_weights(seed, line, start + tl.arange(0, BLOCK_N)[None, :], LIMIT)
            total = tl.dot(stays.to(v.dtype), v, total, input_precision=PRECISION)
            v_ptr += BLOCK_N * stride_vn
    return total * (GROW / S_kv)


@triton.jit
def _finish(
    acc, l, m, v_ptr, v_at, stride_vn, S_kv, b, h, rows, line, seed, data,
    SINK: tl.constexpr, EMPTY: tl.constexpr, EDITED: tl.constexpr, LIMIT: tl.constexpr, GROW: tl.constexpr,
    D_v: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """(out, lse, rest) of rows whose sums are complete; m: in log2, with a SCORE in natural units."""
    UNIT: tl.constexpr = 1.0 if EDITED else LN2
    INVERSE: tl.constexpr = 1.0 if EDITED else LOG2E
    if SINK is not None:
        sink = SINK(b, h, rows, 0, data) * INVERSE + tl.zeros([l.shape[0], 1], tl.float32)
        sink = tl.reshape(sink, [l.shape[0]])
        m_new = tl.maximum(m, sink)
        a = tl.math.exp2((m - m_new) * (UNIT * LOG2E))
        l = l * a + tl.math.exp2((sink - m_new) * (UNIT * LOG2E))
        acc = acc * a[:, None]
        m = m_new
    empty = l == 0.0
    m = tl.where(empty, 0.0, m)
    out = acc / tl.where(empty, 1.0, l)[:, None] * GROW
    log_l = tl.math.log2(tl.where(empty, 1.0, l)) * LN2
    lse = m * UNIT + log_l
    rest = (m * UNIT - lse) + log_l
    lse = tl.where(empty, float("inf"), lse)
    if EMPTY == "nan":
        out = tl.where(empty[:, None], float("nan"), out)
    elif EMPTY == "mean":
        if tl.max(empty.to(tl.int32), 0) > 0:
            mean = _mean_of(
                v_ptr, v_at, stride_vn, S_kv, line, seed,
                LIMIT, GROW, D_v, BLOCK_N, acc.shape[1], PRECISION, DESCRIPTORS,
            )  # fmt: skip
            out = tl.where(empty[:, None], mean, out)
    return out, lse, rest


@triton.jit
def attention_fwd(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, rest_ptr, seed_ptr, data,
    q_strides, k_strides, v_strides, out_strides, H, G, S_q, S_kv, splits, out_step, lse_step,
    SCALE: tl.constexpr, SCORE: tl.constexpr, KEEP: tl.constexpr, KINDS: tl.constexpr, SAME: tl.constexpr,
    SINK: tl.constexpr, EMPTY: tl.constexpr, LIMIT: tl.constexpr, GROW: tl.constexpr,
    PACKED: tl.constexpr, SPLIT: tl.constexpr,
    D: tl.constexpr, D_v: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    SPECIALIZE: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    members = G if PACKED else 1
    n_rows = S_q * members
    n_blocks = tl.cdiv(n_rows, BLOCK_M)
    # Late rows see most of a causal mask: they start first.
    first_row = (n_blocks - 1 - tl.program_id(0) % n_blocks) * BLOCK_M
    lane = tl.program_id(0) // n_blocks
    b, h = lane // (H // members), lane % (H // members) * members
    h_kv = h // G
    h_last = h + members - 1
    r = first_row + tl.arange(0, BLOCK_M)
    line = ((b * H + h).to(tl.int64) * S_q + r)[:, None]
    k_ptr = head(k_ptr, k_strides, b, h_kv, 0)
    v_ptr = head(v_ptr, v_strides, b, h_kv, 0)
    k_at = moving(k_ptr, k_strides, S_kv, D, BLOCK_N, BLOCK_D, DESCRIPTORS)
    v_at = moving(v_ptr, v_strides, S_kv, D_v, BLOCK_N, BLOCK_DV, DESCRIPTORS)
    if PACKED:
        q_ptr = head(q_ptr, q_strides, b, h, 0)
        q_at = packed_offsets(q_strides, tl.minimum(r, n_rows - 1), S_q, BLOCK_D)
        rows, heads = (r % S_q)[:, None], h + (r // S_q)[:, None]
        low, high = 0, S_q - 1
    else:
        q_ptr = head(q_ptr, q_strides, b, h, first_row)
        q_at = row_offsets(q_strides, tl.minimum(r, n_rows - 1) - first_row, BLOCK_D)
        rows, heads = r[:, None], h
        low, high = first_row, tl.minimum(first_row + BLOCK_M, S_q) - 1
    # Rows beyond the end read the last one: predicates would be kept for the end, in a register that loops need.
    q = load_block(q_ptr, q_at, first_row, n_rows, False, D, BLOCK_M, BLOCK_D, False)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    seed = tl.load(seed_ptr) if LIMIT is not None else 0

    begin = tl.cast(0, tl.int32)
    end = tl.cast(tl.cdiv(S_kv, BLOCK_N), tl.int32)
    if SPLIT:
        if KINDS is not None:
            begin, end = hull(end, b, h, h_last, low, high, S_kv, data, KINDS, BLOCK_N, SAME)
        share = tl.cdiv(tl.maximum(end - begin, 0), splits)
        begin += tl.program_id(1) * share
        end = tl.minimum(begin + share, end)
        out_ptr += tl.program_id(1).to(tl.int64) * out_step
        lse_ptr += tl.program_id(1).to(tl.int64) * lse_step
        if rest_ptr is not None:
            rest_ptr += tl.program_id(1).to(tl.int64) * lse_step
    for MASKED in tl.static_range(2):
        at = begin
        for _ in range(
            count_runs(at, end, b, h, h_last, low, high, S_kv, data, 2 - MASKED, KINDS, BLOCK_N, False, SAME)
        ):
            first, last = next_run(
                at, end, b, h, h_last, low, high, S_kv, data, 2 - MASKED, KINDS, BLOCK_N, False, SAME
            )
            acc, l, m = _sweep(
                acc, l, m, q, k_ptr, v_ptr, k_at, v_at, k_strides[2], v_strides[2], first * BLOCK_N, last * BLOCK_N,
                S_kv, b, heads, rows, line, seed, data,
                SCALE, SCORE, KEEP, LIMIT, MASKED == 1, D, D_v, BLOCK_N, PRECISION, DESCRIPTORS,
                SPECIALIZE, HOIST,
            )  # fmt: skip
            at = last

    out, lse, rest = _finish(
        acc, l, m, v_ptr, v_at, v_strides[2], S_kv, b, heads, rows, line, seed, data,
        None if SPLIT else SINK, "zero" if SPLIT else EMPTY, SCORE is not None, LIMIT, GROW,
        D_v, BLOCK_N, PRECISION, DESCRIPTORS,
    )  # fmt: skip
    # The rows are numbered anew: else those of the beginning are kept through the loops, in registers that these need.
    first_row = SAME(first_row)
    r = first_row + tl.arange(0, BLOCK_M)
    if PACKED:
        out_ptr = head(out_ptr, out_strides, b, h, 0)
        out_at = packed_offsets(out_strides, r, S_q, BLOCK_DV)
    else:
        out_ptr = head(out_ptr, out_strides, b, h, first_row)
        out_at = offsets(out_strides, BLOCK_M, BLOCK_DV)
    store_block(out_ptr, out_at, first_row, n_rows, out, D_v)
    at = (b * H + h).to(tl.int64) * S_q + r
    tl.store(lse_ptr + at, lse, mask=r < n_rows)
    if rest_ptr is not None:
        tl.store(rest_ptr + at, rest, mask=r < n_rows)


@triton.jit
def attention_merge(
    part_ptr, part_lse_ptr, part_rest_ptr, v_ptr, out_ptr, lse_ptr, rest_ptr, data,
    v_strides, out_strides, H, G, S_q, S_kv, splits, out_step, lse_step,
    SINK: tl.constexpr, EMPTY: tl.constexpr, D_v: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """part [splits,B,H,S_q,D_v], part_lse and part_rest [splits,B,H,S_q] float32; lse +inf: this part kept nothing."""
    n_rows = S_q * G
    n_blocks = tl.cdiv(n_rows, BLOCK_M)
    first_row = tl.program_id(0) % n_blocks * BLOCK_M
    lane = tl.program_id(0) // n_blocks
    b, h_kv = lane // (H // G), lane % (H // G)
    h = h_kv * G
    r = first_row + tl.arange(0, BLOCK_M)
    line = (b * H + h).to(tl.int64) * S_q + r
    columns = tl.arange(0, BLOCK_DV)[None, :]
    inside = (r < n_rows)[:, None] & (columns < D_v)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    part_at = line[:, None] * D_v + columns
    for _ in range(splits):
        lse = tl.load(part_lse_ptr + line, mask=r < n_rows, other=float("inf"))
        x = tl.where(lse == float("inf"), float("-inf"), lse)
        m_new = tl.maximum(m, x)
        a, w = tl.math.exp2((m - m_new) * LOG2E), tl.math.exp2((x - m_new) * LOG2E)
        if part_rest_ptr is not None:
            w *= tl.math.exp2(tl.load(part_rest_ptr + line, mask=r < n_rows, other=0.0) * LOG2E)
            part_rest_ptr += lse_step
        acc = acc * a[:, None] + w[:, None] * tl.load(part_ptr + part_at, mask=inside, other=0.0)
        l = l * a + w
        m = m_new
        part_ptr += out_step
        part_lse_ptr += lse_step
    v_at = offsets(v_strides, BLOCK_N, BLOCK_DV)
    rows, heads = (r % S_q)[:, None], h + (r // S_q)[:, None]
    out, lse, rest = _finish(
        acc, l, m, head(v_ptr, v_strides, b, h_kv, 0), v_at, v_strides[2], S_kv, b, heads, rows, line, 0, data,
        SINK, EMPTY, True, None, 1.0, D_v, BLOCK_N, "ieee", False,
    )  # fmt: skip
    out_at = packed_offsets(out_strides, r, S_q, BLOCK_DV)
    store_block(head(out_ptr, out_strides, b, h, 0), out_at, first_row, n_rows, out, D_v)
    tl.store(lse_ptr + line, lse, mask=r < n_rows)
    if rest_ptr is not None:
        tl.store(rest_ptr + line, rest, mask=r < n_rows)
