"""Softmax attention on a GPU, backward: the weights again from lse, in two passes without atomics between them.

    p     = exp2(x - lse log2 e)        dp = dout v^T       delta = rowsum(dout out)
    dx    = p (dp - delta)              ds = dx dscore/ds   dcapture += dx dscore/dcapture
    dq    = scale ds k                  one program per q block and head
    dk    = scale ds^T q,  dv = p^T dout   one program per kv block and head of K, over the q heads of its group

    q, dout, out [B,H,S_q,D or D_v]   k, v [B,H_kv,S_kv,...]   lse, delta [B,H,S_q] float32
    runs as in the forward; of the second pass, for each kv block the ranges of q

Rows in which nothing was kept have lse = +inf, hence p = 0 in both passes. What they mean comes from `empty`: where it
averages or is NaN, each pass adds these rows once more, over every kv, with the weights that they have.
Gradients of captures are added with atomics, so their last bits depend on the order; those of dq, dk, dv do not.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import expr as E
from . import mods
from .flash_fwd import LOG2E, Config, _load, arguments, padded, runs_of
from .problem import Given, Gradients, Problem, heads_last


@triton.jit
def _slopes(
    s, dp, lse, delta, b, h, q, kv, scale, weight, captures, layout, sizes, S_kv,
    SCORE: tl.constexpr, KEEP: tl.constexpr, SLOPE: tl.constexpr, GRADIENTS: tl.constexpr,
    MASKED: tl.constexpr, EMPTIES: tl.constexpr,
):  # fmt: skip
    """(p, ds) of a block of products s = <q,k> and dp, in either orientation: lse and delta broadcast like q."""
    raw = s * scale
    x = raw
    if SCORE is not None:
        x = SCORE(raw, b, h, q, kv, captures, layout, sizes) * LOG2E
    if EMPTIES:
        p = tl.where((lse == float("inf")) & (kv < S_kv), weight, 0.0) + tl.zeros_like(x)
    else:
        p = tl.math.exp2(x - lse * LOG2E)
        if MASKED:
            p = tl.where(kv < S_kv, p, 0.0)
            if KEEP is not None:
                p = tl.where(KEEP(b, h, q, kv, captures, layout, sizes), p, 0.0)
    dx = p * (dp - delta)
    if MASKED or EMPTIES:
        dx = tl.where(p == 0.0, 0.0, dx)
    if GRADIENTS is not None:
        GRADIENTS(dx, raw, b, h, q, kv, captures, layout, sizes)
    if SLOPE is not None:
        dx = tl.where(dx != 0.0, dx * SLOPE(raw, b, h, q, kv, captures, layout, sizes), 0.0)
    return p, dx


@triton.jit
def _dq_sweep(
    dq, q, dout, lse, delta, k_ptr, v_ptr, k_at, v_at, stride_kn, stride_vn, lo, hi, S_kv, b, h, rows, scale, weight,
    captures, layout, sizes,
    SCORE: tl.constexpr, KEEP: tl.constexpr, SLOPE: tl.constexpr, GRADIENTS: tl.constexpr,
    MASKED: tl.constexpr, EMPTIES: tl.constexpr,
    D: tl.constexpr, D_v: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_N)
    k_ptr += tl.cast(lo, tl.int64) * stride_kn
    v_ptr += tl.cast(lo, tl.int64) * stride_vn
    for start in tl.range(lo, hi, BLOCK_N):
        k = _load(k_ptr, k_at, start, S_kv, MASKED, D, BLOCK_N, q.shape[1], False)
        v = _load(v_ptr, v_at, start, S_kv, MASKED, D_v, BLOCK_N, dout.shape[1], False)
        s = tl.dot(q, k.T, input_precision=PRECISION)
        dp = tl.dot(dout, v.T, input_precision=PRECISION)
        _, ds = _slopes(
            s, dp, lse, delta, b, h, rows, start + columns[None, :], scale, weight, captures, layout, sizes, S_kv,
            SCORE, KEEP, SLOPE, GRADIENTS, MASKED, EMPTIES,
        )  # fmt: skip
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        k_ptr += BLOCK_N * stride_kn
        v_ptr += BLOCK_N * stride_vn
    return dq


@triton.jit
def attention_dq(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, runs_ptr, captures, layout, sizes, scale,
    q_strides, k_strides, v_strides, dout_strides, dq_strides, H, G, S_q, S_kv, factor, weight, n_full, n_runs,
    SCORE: tl.constexpr, KEEP: tl.constexpr, SLOPE: tl.constexpr, GRADIENTS: tl.constexpr, AVERAGING: tl.constexpr,
    D: tl.constexpr, D_v: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    b_wide, h_wide, kv_head = b.to(tl.int64), h.to(tl.int64), (h // G).to(tl.int64)
    d, d_v, columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_N)
    first = (block * BLOCK_M).to(tl.int64)
    local = tl.arange(0, BLOCK_M)
    rows = block * BLOCK_M + local[:, None]
    q_at = local[:, None] * q_strides[2] + d[None, :] * q_strides[3]
    dout_at = local[:, None] * dout_strides[2] + d_v[None, :] * dout_strides[3]
    q_ptr += b_wide * q_strides[0] + h_wide * q_strides[1] + first * q_strides[2]
    dout_ptr += b_wide * dout_strides[0] + h_wide * dout_strides[1] + first * dout_strides[2]
    k_ptr += b_wide * k_strides[0] + kv_head * k_strides[1]
    v_ptr += b_wide * v_strides[0] + kv_head * v_strides[1]
    k_at = columns[:, None] * k_strides[2] + d[None, :] * k_strides[3]
    v_at = columns[:, None] * v_strides[2] + d_v[None, :] * v_strides[3]
    q = _load(q_ptr, q_at, block * BLOCK_M, S_q, True, D, BLOCK_M, BLOCK_D, False)
    dout = _load(dout_ptr, dout_at, block * BLOCK_M, S_q, True, D_v, BLOCK_M, BLOCK_DV, False)
    # Rows beyond the end are like NaN-free empty ones: lse = +inf makes their weights 0.
    line = (b_wide * H + h) * S_q + block * BLOCK_M + local
    inside = block * BLOCK_M + local < S_q
    lse = tl.load(lse_ptr + line, mask=inside, other=float("inf"))[:, None]
    delta = tl.load(delta_ptr + line, mask=inside, other=0.0)[:, None]
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    run_ptr = runs_ptr + block * n_runs * 2
    for run in range(n_full):
        lo, hi = tl.load(run_ptr + 2 * run), tl.load(run_ptr + 2 * run + 1)
        dq = _dq_sweep(
            dq, q, dout, lse, delta, k_ptr, v_ptr, k_at, v_at, k_strides[2], v_strides[2], lo, hi, S_kv, b, h, rows,
            scale, weight, captures, layout, sizes, SCORE, KEEP, SLOPE, GRADIENTS, False, False,
            D, D_v, BLOCK_N, PRECISION,
        )  # fmt: skip
    for run in range(n_full, n_runs):
        lo, hi = tl.load(run_ptr + 2 * run), tl.load(run_ptr + 2 * run + 1)
        dq = _dq_sweep(
            dq, q, dout, lse, delta, k_ptr, v_ptr, k_at, v_at, k_strides[2], v_strides[2], lo, hi, S_kv, b, h, rows,
            scale, weight, captures, layout, sizes, SCORE, KEEP, SLOPE, GRADIENTS, True, False,
            D, D_v, BLOCK_N, PRECISION,
        )  # fmt: skip
    if AVERAGING:
        known = tl.where(inside, tl.reshape(lse, [BLOCK_M]), 0.0)
        if tl.max(known, 0) == float("inf"):
            lse = known[:, None]
            dq = _dq_sweep(
                dq, q, dout, lse, delta, k_ptr, v_ptr, k_at, v_at, k_strides[2], v_strides[2], block * 0, S_kv, S_kv,
                b, h, rows, scale, weight, captures, layout, sizes, SCORE, KEEP, SLOPE, GRADIENTS, True, True,
                D, D_v, BLOCK_N, PRECISION,
            )  # fmt: skip
    dq_ptr += b_wide * dq_strides[0] + h_wide * dq_strides[1] + first * dq_strides[2]
    dq_at = local[:, None] * dq_strides[2] + d[None, :] * dq_strides[3]
    shown = inside[:, None] & (d[None, :] < D)
    tl.store(dq_ptr + dq_at, (dq * factor).to(dq_ptr.dtype.element_ty), mask=shown)


@triton.jit
def _dkdv_sweep(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_at, dout_at, stride_qm, stride_dom, lo, hi, S_q, S_kv,
    b, h, kv, scale, weight, captures, layout, sizes,
    SCORE: tl.constexpr, KEEP: tl.constexpr, SLOPE: tl.constexpr, CUT: tl.constexpr,
    MASKED: tl.constexpr, EMPTIES: tl.constexpr,
    D: tl.constexpr, D_v: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    local = tl.arange(0, BLOCK_M)
    q_ptr += tl.cast(lo, tl.int64) * stride_qm
    dout_ptr += tl.cast(lo, tl.int64) * stride_dom
    for start in tl.range(lo, hi, BLOCK_M):
        rows = start + local
        if MASKED:
            lse = tl.load(lse_ptr + rows, mask=rows < S_q, other=0.0 if EMPTIES else float("inf"))
            delta = tl.load(delta_ptr + rows, mask=rows < S_q, other=0.0)
        else:
            lse, delta = tl.load(lse_ptr + rows), tl.load(delta_ptr + rows)
        q = _load(q_ptr, q_at, start, S_q, MASKED, D, BLOCK_M, k.shape[1], False)
        dout = _load(dout_ptr, dout_at, start, S_q, MASKED, D_v, BLOCK_M, v.shape[1], False)
        s = tl.dot(k, q.T, input_precision=PRECISION)
        dp = tl.dot(v, dout.T, input_precision=PRECISION)
        p, ds = _slopes(
            s, dp, lse[None, :], delta[None, :], b, h, rows[None, :], kv, scale, weight, captures, layout, sizes, S_kv,
            SCORE, KEEP, SLOPE, None, MASKED, EMPTIES,
        )  # fmt: skip
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        if not (EMPTIES and CUT):
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        q_ptr += BLOCK_M * stride_qm
        dout_ptr += BLOCK_M * stride_dom
    return dk, dv


@triton.jit
def attention_dkdv(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, runs_ptr, captures, layout, sizes, scale,
    q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides, H, G, S_q, S_kv, factor, weight,
    n_full, n_runs,
    SCORE: tl.constexpr, KEEP: tl.constexpr, SLOPE: tl.constexpr, AVERAGING: tl.constexpr, CUT: tl.constexpr,
    D: tl.constexpr, D_v: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    H_kv = H // G
    b, h_kv = tl.program_id(1) // H_kv, tl.program_id(1) % H_kv
    b_wide, h_wide = b.to(tl.int64), h_kv.to(tl.int64)
    d, d_v, columns, local = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    first = (block * BLOCK_N).to(tl.int64)
    kv = block * BLOCK_N + columns[:, None]
    k_ptr += b_wide * k_strides[0] + h_wide * k_strides[1] + first * k_strides[2]
    v_ptr += b_wide * v_strides[0] + h_wide * v_strides[1] + first * v_strides[2]
    k_at = columns[:, None] * k_strides[2] + d[None, :] * k_strides[3]
    v_at = columns[:, None] * v_strides[2] + d_v[None, :] * v_strides[3]
    k = _load(k_ptr, k_at, block * BLOCK_N, S_kv, True, D, BLOCK_N, BLOCK_D, False)
    v = _load(v_ptr, v_at, block * BLOCK_N, S_kv, True, D_v, BLOCK_N, BLOCK_DV, False)
    q_at = local[:, None] * q_strides[2] + d[None, :] * q_strides[3]
    dout_at = local[:, None] * dout_strides[2] + d_v[None, :] * dout_strides[3]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    run_ptr = runs_ptr + block * n_runs * 2
    for member in range(G):
        h = h_kv * G + member
        q_head = q_ptr + b_wide * q_strides[0] + h.to(tl.int64) * q_strides[1]
        dout_head = dout_ptr + b_wide * dout_strides[0] + h.to(tl.int64) * dout_strides[1]
        line = (b_wide * H + h) * S_q
        for run in range(n_full):
            lo, hi = tl.load(run_ptr + 2 * run), tl.load(run_ptr + 2 * run + 1)
            dk, dv = _dkdv_sweep(
                dk, dv, k, v, q_head, dout_head, lse_ptr + line, delta_ptr + line, q_at, dout_at,
                q_strides[2], dout_strides[2], lo, hi, S_q, S_kv, b, h, kv, scale, weight, captures, layout, sizes,
                SCORE, KEEP, SLOPE, CUT, False, False, D, D_v, BLOCK_M, PRECISION,
            )  # fmt: skip
        for run in range(n_full, n_runs):
            lo, hi = tl.load(run_ptr + 2 * run), tl.load(run_ptr + 2 * run + 1)
            dk, dv = _dkdv_sweep(
                dk, dv, k, v, q_head, dout_head, lse_ptr + line, delta_ptr + line, q_at, dout_at,
                q_strides[2], dout_strides[2], lo, hi, S_q, S_kv, b, h, kv, scale, weight, captures, layout, sizes,
                SCORE, KEEP, SLOPE, CUT, True, False, D, D_v, BLOCK_M, PRECISION,
            )  # fmt: skip
        if AVERAGING:
            for start in tl.range(block * 0, S_q, BLOCK_M):
                rows = start + local
                lse = tl.load(lse_ptr + line + rows, mask=rows < S_q, other=0.0)
                if tl.max(lse, 0) == float("inf"):
                    dk, dv = _dkdv_sweep(
                        dk, dv, k, v, q_head, dout_head, lse_ptr + line, delta_ptr + line, q_at, dout_at,
                        q_strides[2], dout_strides[2], start, start + BLOCK_M, S_q, S_kv, b, h, kv, scale, weight,
                        captures, layout, sizes, SCORE, KEEP, SLOPE, CUT, True, True, D, D_v, BLOCK_M, PRECISION,
                    )  # fmt: skip
    inside = kv < S_kv
    dk_ptr += b_wide * dk_strides[0] + h_wide * dk_strides[1] + first * dk_strides[2]
    dv_ptr += b_wide * dv_strides[0] + h_wide * dv_strides[1] + first * dv_strides[2]
    dk_at = columns[:, None] * dk_strides[2] + d[None, :] * dk_strides[3]
    dv_at = columns[:, None] * dv_strides[2] + d_v[None, :] * dv_strides[3]
    tl.store(dk_ptr + dk_at, (dk * factor).to(dk_ptr.dtype.element_ty), mask=inside & (d[None, :] < D))
    tl.store(dv_ptr + dv_at, dv.to(dv_ptr.dtype.element_ty), mask=inside & (d_v[None, :] < D_v))


# The launcher


def backward(p: Problem, given: Given, wanted: tuple[str, ...], dq_config: Config, dkdv_config: Config) -> Gradients:
    """Gradients of a problem that `supports` admits; `wanted`: the float captures that need one."""
    B, H, S_q, D = p.q.shape
    H_kv, S_kv, D_v = p.k.shape[1], p.k.shape[2], p.v.shape[3]
    buffers = {n: torch.zeros(p.scope.captures[n].shape, dtype=torch.float32, device=p.q.device) for n in wanted}
    dq, dk, dv = (heads_last(x, x.shape) for x in (p.q, p.k, p.v))
    if given.lse.numel() == 0 or S_kv == 0:
        return Gradients(dq.zero_(), dk.zero_(), dv.zero_(), buffers)
    dout = given.grad_out
    delta = (dout.float() * given.out.float()).sum(-1).contiguous()
    lse = given.lse.contiguous()
    if p.spec.sink is not None:
        _sink_gradient(p, delta, lse, buffers)
    args, formulas = arguments(p, {n: x for n, x in buffers.items() if n in _loaded(p.spec.score)})
    gradients = formulas.pop("GRADIENTS")
    averaging, cut = p.empty not in (None, "zero"), p.empty in ("nan_cut", "mean_cut")
    shared = {"D": D, "D_v": D_v, "BLOCK_D": padded(D), "BLOCK_DV": padded(D_v), "PRECISION": "ieee"}
    weight = math.nan if p.empty in ("nan", "nan_cut") else 1.0 / S_kv
    strides = [x.stride() for x in (p.q, p.k, p.v, dout)]
    counts = H, p.group, S_q, S_kv, p.spec.scale, weight

    c = dq_config
    runs, n_full = runs_of(p, c.BLOCK_M, c.BLOCK_N)
    attention_dq[(triton.cdiv(S_q, c.BLOCK_M), B * H)](
        p.q, p.k, p.v, dout, lse, delta, dq, runs, *args, *strides, dq.stride(), *counts, n_full, runs.shape[2],
        **formulas, GRADIENTS=gradients, AVERAGING=averaging and not cut, **shared,
        BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    c = dkdv_config
    runs, n_full = runs_of(p, c.BLOCK_M, c.BLOCK_N, of_keys=True)
    attention_dkdv[(triton.cdiv(S_kv, c.BLOCK_N), B * H_kv)](
        p.q, p.k, p.v, dout, lse, delta, dk, dv, runs, *args, *strides, dk.stride(), dv.stride(), *counts,
        n_full, runs.shape[2], **formulas, AVERAGING=averaging, CUT=cut, **shared,
        BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return Gradients(dq, dk, dv, buffers)


def _loaded(e: E.Expr) -> set[str]:
    return {E.operands(x)[0].name for x in E.loads(e)}


def _sink_gradient(p: Problem, delta: Tensor, lse: Tensor, buffers: dict[str, Tensor]) -> None:
    """dsink = -exp(sink - lse) delta for every row, handed to the captures that the sink reads."""
    taps: list[mods.Tap] = []
    with torch.enable_grad():
        sink = mods.tensor(p.spec.sink, p.scope.at(wanted=tuple(buffers), taps=taps)).expand(*lse.shape, 1)
    leaves = [tap.leaf for tap in taps]
    if sink.requires_grad and leaves:
        d_sink = -(sink.detach()[..., 0] - lse).exp() * delta
        for tap, g in zip(taps, torch.autograd.grad(sink, leaves, d_sink.unsqueeze(-1), allow_unused=True)):
            if g is not None:
                tap.add(buffers[tap.name], g)
