"""Softmax attention on a GPU, backward: the weights again from lse, in two passes without atomics between them.

    p     = exp(x - lse - rest)         dp = dout v^T       delta = rowsum(dout out)
    dx    = p (dp - delta)              ds = dx dscore/ds   dcapture += dx dscore/dcapture
    dq    = scale ds k                  one program per q block and head
    dk    = scale ds^T q,  dv = p^T dout   one program per kv block and head of K, over the q heads of its group
With dropout, drop(p) takes p's place in dv, and drop(dp) that of dp.

    q, dout, out [B,H,S_q,D or D_v]   k, v [B,H_kv,S_kv,...]   lse, delta [B,H,S_q] float32

Rows in which nothing was kept have lse = +inf, hence p = 0 in both passes. What they mean comes from `empty`: where it
averages or is NaN, each pass adds these rows once more, over every kv, with the weights that they have.
Gradients of captures are added with atomics, so their last bits depend on the order; those of dq, dk, dv do not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import count_runs, head, kept_weights, load_block, moving, next_run, offsets, store_block
from .flash_fwd import LOG2E


@triton.jit
def _slopes(
    s, dp, lse, rest, delta, b, h, q, kv, line, seed, data, S_kv,
    SCALE: tl.constexpr, SCORE: tl.constexpr, KEEP: tl.constexpr, SLOPE: tl.constexpr,
    GRADIENTS: tl.constexpr, LIMIT: tl.constexpr, GROW: tl.constexpr,
    MASKED: tl.constexpr, EMPTIES: tl.constexpr, GUARDED: tl.constexpr,
):  # fmt: skip
    """(drop(p), ds) of a block of products s = <q,k> and dp, in either orientation: lse and delta broadcast like q."""
    if SCORE is None:
        raw = s
        x = s * (SCALE * LOG2E)
    else:
        raw = s * SCALE
        x = SCORE(raw, b, h, q, kv, data)
    if EMPTIES == "nan":
        p = tl.where((lse == float("inf")) & (kv < S_kv), float("nan"), 0.0) + tl.zeros_like(x)
    elif EMPTIES == "mean":
        p = tl.where((lse == float("inf")) & (kv < S_kv), 1.0 / S_kv, 0.0) + tl.zeros_like(x)
    else:
        if SCORE is None:
            p = tl.math.exp2(x - lse * LOG2E)
        else:
            p = tl.math.exp2((x - lse) * LOG2E - rest * LOG2E)
        if GUARDED:
            # Rows beyond the end have lse = +inf, and a score that may be NaN: where they are added up, they count 0.
            p = tl.where(lse == float("inf"), 0.0, p)
        if MASKED:
            p = tl.where(kv < S_kv, p, 0.0)
            if KEEP is not None:
                p = tl.where(KEEP(b, h, q, kv, data), p, 0.0)
    dropped = p
    if LIMIT is not None:
        stays = kept_weights(seed, line, kv, LIMIT)
        dropped = tl.where(stays, p * GROW, 0.0)
        dp = tl.where(stays, dp * GROW, 0.0)
    dx = p * (dp - delta)
    if MASKED or EMPTIES is not None:
        dx = tl.where(p == 0.0, 0.0, dx)
    if GRADIENTS is not None:
        GRADIENTS(dx, raw, b, h, q, kv, data)
    if SLOPE is not None:
        # A score that a `where` replaced gets 0 even from NaN.
        slope = SLOPE(raw, b, h, q, kv, data) * tl.full([1, 1], 1.0, tl.float32)
        dx = tl.where((dx != 0.0) & (slope != 0.0), dx * slope, 0.0)
    return dropped, dx


@triton.jit
def _dq_sweep(
    dq, q, dout, lse, rest, delta, k_ptr, v_ptr, k_at, v_at, stride_kn, stride_vn, lo, hi, S_kv,
    b, h, rows, line, seed, data,
    SCALE: tl.constexpr, SCORE: tl.constexpr, KEEP: tl.constexpr, SLOPE: tl.constexpr,
    GRADIENTS: tl.constexpr, LIMIT: tl.constexpr, GROW: tl.constexpr, MASKED: tl.constexpr, EMPTIES: tl.constexpr,
    D: tl.constexpr, D_v: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, HOIST: tl.constexpr,
    DESCRIPTORS: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_N)
    k_ptr += tl.cast(lo, tl.int64) * stride_kn
    v_ptr += tl.cast(lo, tl.int64) * stride_vn
    for start in tl.range(
        lo, hi, BLOCK_N, num_stages=1 if MASKED and DESCRIPTORS else None,
        warp_specialize=SPECIALIZE and not MASKED, disable_licm=not HOIST,
    ):  # fmt: skip
        k = load_block(k_ptr, k_at, start, S_kv, MASKED, D, BLOCK_N, q.shape[1], DESCRIPTORS)
        v = load_block(v_ptr, v_at, start, S_kv, MASKED, D_v, BLOCK_N, dout.shape[1], DESCRIPTORS)
        s = tl.dot(q, k.T, input_precision=PRECISION)
        dp = tl.dot(dout, v.T, input_precision=PRECISION)
        _, ds = _slopes(
            s, dp, lse, rest, delta, b, h, rows, start + columns[None, :], line, seed, data, S_kv,
            SCALE, SCORE, KEEP, SLOPE, GRADIENTS, LIMIT, GROW, MASKED, EMPTIES, GRADIENTS is not None,
        )  # fmt: skip
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        k_ptr += BLOCK_N * stride_kn
        v_ptr += BLOCK_N * stride_vn
    return dq


@triton.jit
def attention_dq(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, rest_ptr, delta_ptr, dq_ptr, seed_ptr, data,
    q_strides, k_strides, v_strides, dout_strides, dq_strides, H, G, S_q, S_kv,
    SCALE: tl.constexpr, SCORE: tl.constexpr, KEEP: tl.constexpr, KINDS: tl.constexpr, SAME: tl.constexpr,
    SLOPE: tl.constexpr, GRADIENTS: tl.constexpr, LIMIT: tl.constexpr, GROW: tl.constexpr, AVERAGING: tl.constexpr,
    D: tl.constexpr, D_v: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, HOIST: tl.constexpr,
    DESCRIPTORS: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(S_q, BLOCK_M)
    first = (n_blocks - 1 - tl.program_id(0) % n_blocks) * BLOCK_M
    b, h = tl.program_id(0) // n_blocks // H, tl.program_id(0) // n_blocks % H
    positions = first + tl.arange(0, BLOCK_M)
    rows = positions[:, None]
    q_at, dout_at = offsets(q_strides, BLOCK_M, BLOCK_D), offsets(dout_strides, BLOCK_M, BLOCK_DV)
    q = load_block(head(q_ptr, q_strides, b, h, first), q_at, first, S_q, True, D, BLOCK_M, BLOCK_D, False)
    dout = load_block(
        head(dout_ptr, dout_strides, b, h, first), dout_at, first, S_q, True, D_v, BLOCK_M, BLOCK_DV, False
    )
    k_ptr = head(k_ptr, k_strides, b, h // G, 0)
    v_ptr = head(v_ptr, v_strides, b, h // G, 0)
    k_at = moving(k_ptr, k_strides, S_kv, D, BLOCK_N, BLOCK_D, DESCRIPTORS)
    v_at = moving(v_ptr, v_strides, S_kv, D_v, BLOCK_N, BLOCK_DV, DESCRIPTORS)
    line = ((b * H + h).to(tl.int64) * S_q + positions)[:, None]
    lse = tl.load(lse_ptr + line, mask=rows < S_q, other=float("inf"))
    rest = 0.0 if rest_ptr is None else tl.load(rest_ptr + line, mask=rows < S_q, other=0.0)
    delta = tl.load(delta_ptr + line, mask=rows < S_q, other=0.0)
    seed = tl.load(seed_ptr) if LIMIT is not None else 0
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    last_row = tl.minimum(first + BLOCK_M, S_q) - 1
    for MASKED in tl.static_range(2):
        at, end = tl.cast(0, tl.int32), tl.cast(tl.cdiv(S_kv, BLOCK_N), tl.int32)
        for _ in range(
            count_runs(at, end, b, h, h, first, last_row, S_kv, data, 2 - MASKED, KINDS, BLOCK_N, False, SAME)
        ):
            run, stop = next_run(at, end, b, h, h, first, last_row, S_kv, data, 2 - MASKED, KINDS, BLOCK_N, False, SAME)
            dq = _dq_sweep(
                dq, q, dout, lse, rest, delta, k_ptr, v_ptr, k_at, v_at, k_strides[2], v_strides[2],
                run * BLOCK_N, stop * BLOCK_N, S_kv, b, h, rows, line, seed, data,
                SCALE, SCORE, KEEP, SLOPE, GRADIENTS, LIMIT, GROW, MASKED == 1, None, D, D_v, BLOCK_N, PRECISION, HOIST,
                DESCRIPTORS, SPECIALIZE,
            )  # fmt: skip
            at = stop
    if AVERAGING is not None:
        lse = tl.where(rows < S_q, lse, 0.0)
        if tl.max(tl.max(lse, 0), 0) == float("inf"):
            dq = _dq_sweep(
                dq, q, dout, lse, rest, delta, k_ptr, v_ptr, k_at, v_at, k_strides[2], v_strides[2], 0, S_kv,
                S_kv, b, h, rows, line, seed, data,
                SCALE, SCORE, KEEP, SLOPE, GRADIENTS, LIMIT, GROW, True, AVERAGING, D, D_v, BLOCK_N, PRECISION, HOIST,
                DESCRIPTORS, SPECIALIZE,
            )  # fmt: skip
    dq_at = offsets(dq_strides, BLOCK_M, BLOCK_D)
    store_block(head(dq_ptr, dq_strides, b, h, first), dq_at, first, S_q, dq * SCALE, D)


@triton.jit
def _dkdv_sweep(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, rest_ptr, delta_ptr, q_at, dout_at, stride_qm, stride_dom, lo, hi,
    S_q, S_kv, b, h, kv, line, seed, data,
    SCALE: tl.constexpr, SCORE: tl.constexpr, KEEP: tl.constexpr, SLOPE: tl.constexpr,
    LIMIT: tl.constexpr, GROW: tl.constexpr, CUT: tl.constexpr, MASKED: tl.constexpr, EMPTIES: tl.constexpr,
    D: tl.constexpr, D_v: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr, HOIST: tl.constexpr,
    DESCRIPTORS: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    local = tl.arange(0, BLOCK_M)
    q_ptr += tl.cast(lo, tl.int64) * stride_qm
    dout_ptr += tl.cast(lo, tl.int64) * stride_dom
    for start in tl.range(lo, hi, BLOCK_M, warp_specialize=SPECIALIZE and not MASKED, disable_licm=not HOIST):
        rows = start + local
        if MASKED:
            lse = tl.load(lse_ptr + line + rows, mask=rows < S_q, other=float("inf") if EMPTIES is None else 0.0)
            delta = tl.load(delta_ptr + line + rows, mask=rows < S_q, other=0.0)
        else:
            lse, delta = tl.load(lse_ptr + line + rows), tl.load(delta_ptr + line + rows)
        if rest_ptr is None:
            rest = tl.zeros([BLOCK_M], tl.float32)
        elif MASKED:
            rest = tl.load(rest_ptr + line + rows, mask=rows < S_q, other=0.0)
        else:
            rest = tl.load(rest_ptr + line + rows)
        q = load_block(q_ptr, q_at, start, S_q, MASKED, D, BLOCK_M, k.shape[1], DESCRIPTORS)
        dout = load_block(dout_ptr, dout_at, start, S_q, MASKED, D_v, BLOCK_M, v.shape[1], DESCRIPTORS)
        s = tl.dot(k, q.T, input_precision=PRECISION)
        dp = tl.dot(v, dout.T, input_precision=PRECISION)
        p, ds = _slopes(
            s, dp, lse[None, :], rest[None, :], delta[None, :], b, h, rows[None, :], kv, (line + rows)[None, :], seed,
            data, S_kv,
            SCALE, SCORE, KEEP, SLOPE, None, LIMIT, GROW, MASKED, EMPTIES, MASKED and SCORE is not None,
        )  # fmt: skip
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        if EMPTIES is None or not CUT:
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        q_ptr += BLOCK_M * stride_qm
        dout_ptr += BLOCK_M * stride_dom
    return dk, dv


@triton.jit
def attention_dkdv(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, rest_ptr, delta_ptr, dk_ptr, dv_ptr, seed_ptr, data,
    q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides, H, G, S_q, S_kv,
    SCALE: tl.constexpr, SCORE: tl.constexpr, KEEP: tl.constexpr, KINDS: tl.constexpr, SAME: tl.constexpr,
    SLOPE: tl.constexpr, LIMIT: tl.constexpr, GROW: tl.constexpr, AVERAGING: tl.constexpr, CUT: tl.constexpr,
    D: tl.constexpr, D_v: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, HOIST: tl.constexpr,
    DESCRIPTORS: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(S_kv, BLOCK_N)
    first = tl.program_id(0) % n_blocks * BLOCK_N
    b, h_kv = tl.program_id(0) // n_blocks // (H // G), tl.program_id(0) // n_blocks % (H // G)
    kv = first + tl.arange(0, BLOCK_N)[:, None]
    last_kv = tl.minimum(first + BLOCK_N, S_kv) - 1
    k_at, v_at = offsets(k_strides, BLOCK_N, BLOCK_D), offsets(v_strides, BLOCK_N, BLOCK_DV)
    k = load_block(head(k_ptr, k_strides, b, h_kv, first), k_at, first, S_kv, True, D, BLOCK_N, BLOCK_D, False)
    v = load_block(head(v_ptr, v_strides, b, h_kv, first), v_at, first, S_kv, True, D_v, BLOCK_N, BLOCK_DV, False)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    seed = tl.load(seed_ptr) if LIMIT is not None else 0
    # Such a block takes all registers there are: what does not change from head to head is computed again.
    AGAIN: tl.constexpr = not HOIST and q_ptr.dtype.element_ty == tl.float32 and BLOCK_D == 256
    for member in tl.range(0, G, disable_licm=AGAIN):
        h = h_kv * G + member
        q_head = head(q_ptr, q_strides, b, h, 0)
        dout_head = head(dout_ptr, dout_strides, b, h, 0)
        q_at = moving(q_head, q_strides, S_q, D, BLOCK_M, BLOCK_D, DESCRIPTORS)
        dout_at = moving(dout_head, dout_strides, S_q, D_v, BLOCK_M, BLOCK_DV, DESCRIPTORS)
        line = (b * H + h).to(tl.int64) * S_q
        for MASKED in tl.static_range(2):
            at, end = tl.cast(0, tl.int32), tl.cast(tl.cdiv(S_q, BLOCK_M), tl.int32)
            for _ in range(
                count_runs(at, end, b, h, h, first, last_kv, S_q, data, 2 - MASKED, KINDS, BLOCK_M, True, SAME)
            ):
                run, stop = next_run(
                    at, end, b, h, h, first, last_kv, S_q, data, 2 - MASKED, KINDS, BLOCK_M, True, SAME
                )
                dk, dv = _dkdv_sweep(
                    dk, dv, k, v, q_head, dout_head, lse_ptr, rest_ptr, delta_ptr, q_at, dout_at,
                    q_strides[2], dout_strides[2], run * BLOCK_M, stop * BLOCK_M, S_q, S_kv,
                    b, h, kv, line, seed, data,
                    SCALE, SCORE, KEEP, SLOPE, LIMIT, GROW, CUT, MASKED == 1, None, D, D_v, BLOCK_M, PRECISION, HOIST,
                DESCRIPTORS, SPECIALIZE,
                )  # fmt: skip
                at = stop
        if AVERAGING is not None:
            for start in tl.range(0, S_q, BLOCK_M):
                rows = start + tl.arange(0, BLOCK_M)
                lse = tl.load(lse_ptr + line + rows, mask=rows < S_q, other=0.0)
                if tl.max(lse, 0) == float("inf"):
                    dk, dv = _dkdv_sweep(
                        dk, dv, k, v, q_head, dout_head, lse_ptr, rest_ptr, delta_ptr, q_at, dout_at,
                        q_strides[2], dout_strides[2], start, start + BLOCK_M, S_q, S_kv,
                        b, h, kv, line, seed, data,
                        SCALE, SCORE, KEEP, SLOPE, LIMIT, GROW, CUT, True, AVERAGING, D, D_v, BLOCK_M, PRECISION, HOIST,
                DESCRIPTORS, SPECIALIZE,
                    )  # fmt: skip
    dk_at, dv_at = offsets(dk_strides, BLOCK_N, BLOCK_D), offsets(dv_strides, BLOCK_N, BLOCK_DV)
    store_block(head(dk_ptr, dk_strides, b, h_kv, first), dk_at, first, S_kv, dk * SCALE, D)
    store_block(head(dv_ptr, dv_strides, b, h_kv, first), dv_at, first, S_kv, dv, D_v)
