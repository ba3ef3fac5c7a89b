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
from .flash_fwd import LOG2E, Config, _head, _load, _offsets, _store, arguments, padded, runs_of
from .problem import Given, Gradients, Problem, heads_last


@triton.jit
def _slopes(
    s, dp, lse, delta, b, h, q, kv, scale, weight, data, S_kv,
    SCORE: tl.constexpr, KEEP: tl.constexpr, SLOPE: tl.constexpr, GRADIENTS: tl.constexpr,
    MASKED: tl.constexpr, EMPTIES: tl.constexpr, GUARDED: tl.constexpr,
):  # fmt: skip
    """(p, ds) of a block of products s = <q,k> and dp, in either orientation: lse and delta broadcast like q."""
    raw = s * scale
    x = raw
    if SCORE is not None:
        x = SCORE(raw, b, h, q, kv, data) * LOG2E
    if EMPTIES:
        p = tl.where((lse == float("inf")) & (kv < S_kv), weight, 0.0) + tl.zeros_like(x)
    else:
        p = tl.math.exp2(x - lse * LOG2E)
        if GUARDED:
            # Rows beyond the end have lse = +inf, and a score that may be NaN: where they are added up, they count 0.
            p = tl.where(lse == float("inf"), 0.0, p)
        if MASKED:
            p = tl.where(kv < S_kv, p, 0.0)
            if KEEP is not None:
                p = tl.where(KEEP(b, h, q, kv, data), p, 0.0)
    dx = p * (dp - delta)
    if MASKED or EMPTIES:
        dx = tl.where(p == 0.0, 0.0, dx)
    if GRADIENTS is not None:
        GRADIENTS(dx, raw, b, h, q, kv, data)
    if SLOPE is not None:
        dx = tl.where(dx != 0.0, dx * SLOPE(raw, b, h, q, kv, data), 0.0)
    return p, dx


@triton.jit
def _dq_sweep(
    dq, q, dout, lse, delta, k_ptr, v_ptr, k_at, v_at, stride_kn, stride_vn, lo, hi, S_kv, b, h, rows, scale, weight,
    data,
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
            s, dp, lse, delta, b, h, rows, start + columns[None, :], scale, weight, data, S_kv,
            SCORE, KEEP, SLOPE, GRADIENTS, MASKED, EMPTIES, GRADIENTS is not None,
        )  # fmt: skip
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        k_ptr += BLOCK_N * stride_kn
        v_ptr += BLOCK_N * stride_vn
    return dq


@triton.jit
def attention_dq(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, runs_ptr, data, scale,
    q_strides, k_strides, v_strides, dout_strides, dq_strides, H, G, S_q, S_kv, factor, weight, n_full, n_runs,
    SCORE: tl.constexpr, KEEP: tl.constexpr, SLOPE: tl.constexpr, GRADIENTS: tl.constexpr, AVERAGING: tl.constexpr,
    D: tl.constexpr, D_v: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    first = block * BLOCK_M
    positions = first + tl.arange(0, BLOCK_M)
    rows = positions[:, None]
    q_at, dout_at = _offsets(q_strides, BLOCK_M, BLOCK_D), _offsets(dout_strides, BLOCK_M, BLOCK_DV)
    k_at, v_at = _offsets(k_strides, BLOCK_N, BLOCK_D), _offsets(v_strides, BLOCK_N, BLOCK_DV)
    q = _load(_head(q_ptr, q_strides, b, h, first), q_at, first, S_q, True, D, BLOCK_M, BLOCK_D, False)
    dout = _load(_head(dout_ptr, dout_strides, b, h, first), dout_at, first, S_q, True, D_v, BLOCK_M, BLOCK_DV, False)
    k_ptr = _head(k_ptr, k_strides, b, h // G, block * 0)
    v_ptr = _head(v_ptr, v_strides, b, h // G, block * 0)
    line = (b.to(tl.int64) * H + h) * S_q + first + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + line, mask=positions < S_q, other=float("inf"))[:, None]
    delta = tl.load(delta_ptr + line, mask=positions < S_q, other=0.0)[:, None]
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    run_ptr = runs_ptr + block * n_runs * 2
    for MASKED in tl.static_range(2):
        for run in range(n_full * MASKED, n_runs if MASKED else n_full):
            lo, hi = tl.load(run_ptr + 2 * run), tl.load(run_ptr + 2 * run + 1)
            dq = _dq_sweep(
                dq, q, dout, lse, delta, k_ptr, v_ptr, k_at, v_at, k_strides[2], v_strides[2], lo, hi, S_kv,
                b, h, rows, scale, weight, data, SCORE, KEEP, SLOPE, GRADIENTS, MASKED == 1, False,
                D, D_v, BLOCK_N, PRECISION,
            )  # fmt: skip
    if AVERAGING:
        lse = tl.where(rows < S_q, lse, 0.0)
        if tl.max(tl.max(lse, 0), 0) == float("inf"):
            dq = _dq_sweep(
                dq, q, dout, lse, delta, k_ptr, v_ptr, k_at, v_at, k_strides[2], v_strides[2], block * 0, S_kv,
                S_kv, b, h, rows, scale, weight, data, SCORE, KEEP, SLOPE, GRADIENTS, True, True,
                D, D_v, BLOCK_N, PRECISION,
            )  # fmt: skip
    _store(_head(dq_ptr, dq_strides, b, h, first), dq_strides, first, S_q, dq * factor, D)


@triton.jit
def _dkdv_sweep(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_at, dout_at, stride_qm, stride_dom, lo, hi, S_q, S_kv,
    b, h, kv, scale, weight, data,
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
            s, dp, lse[None, :], delta[None, :], b, h, rows[None, :], kv, scale, weight, data, S_kv,
            SCORE, KEEP, SLOPE, None, MASKED, EMPTIES, MASKED and SCORE is not None,
        )  # fmt: skip
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        if not (EMPTIES and CUT):
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        q_ptr += BLOCK_M * stride_qm
        dout_ptr += BLOCK_M * stride_dom
    return dk, dv


@triton.jit
def attention_dkdv(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, runs_ptr, data, scale,
    q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides, H, G, S_q, S_kv, factor, weight,
    n_full, n_runs,
    SCORE: tl.constexpr, KEEP: tl.constexpr, SLOPE: tl.constexpr, AVERAGING: tl.constexpr, CUT: tl.constexpr,
    D: tl.constexpr, D_v: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    b, h_kv = tl.program_id(1) // (H // G), tl.program_id(1) % (H // G)
    first = block * BLOCK_N
    kv = first + tl.arange(0, BLOCK_N)[:, None]
    k_at, v_at = _offsets(k_strides, BLOCK_N, BLOCK_D), _offsets(v_strides, BLOCK_N, BLOCK_DV)
    q_at, dout_at = _offsets(q_strides, BLOCK_M, BLOCK_D), _offsets(dout_strides, BLOCK_M, BLOCK_DV)
    k = _load(_head(k_ptr, k_strides, b, h_kv, first), k_at, first, S_kv, True, D, BLOCK_N, BLOCK_D, False)
    v = _load(_head(v_ptr, v_strides, b, h_kv, first), v_at, first, S_kv, True, D_v, BLOCK_N, BLOCK_DV, False)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    run_ptr = runs_ptr + block * n_runs * 2
    for member in range(G):
        h = h_kv * G + member
        q_head = _head(q_ptr, q_strides, b, h, block * 0)
        dout_head = _head(dout_ptr, dout_strides, b, h, block * 0)
        line = (b.to(tl.int64) * H + h) * S_q
        for MASKED in tl.static_range(2):
            for run in range(n_full * MASKED, n_runs if MASKED else n_full):
                lo, hi = tl.load(run_ptr + 2 * run), tl.load(run_ptr + 2 * run + 1)
                dk, dv = _dkdv_sweep(
                    dk, dv, k, v, q_head, dout_head, lse_ptr + line, delta_ptr + line, q_at, dout_at,
                    q_strides[2], dout_strides[2], lo, hi, S_q, S_kv, b, h, kv, scale, weight, data,
                    SCORE, KEEP, SLOPE, CUT, MASKED == 1, False, D, D_v, BLOCK_M, PRECISION,
                )  # fmt: skip
        if AVERAGING:
            for start in tl.range(block * 0, S_q, BLOCK_M):
                rows = start + tl.arange(0, BLOCK_M)
                lse = tl.load(lse_ptr + line + rows, mask=rows < S_q, other=0.0)
                if tl.max(lse, 0) == float("inf"):
                    dk, dv = _dkdv_sweep(
                        dk, dv, k, v, q_head, dout_head, lse_ptr + line, delta_ptr + line, q_at, dout_at,
                        q_strides[2], dout_strides[2], start, start + BLOCK_M, S_q, S_kv, b, h, kv, scale, weight, data,
                        SCORE, KEEP, SLOPE, CUT, True, True, D, D_v, BLOCK_M, PRECISION,
                    )  # fmt: skip
    _store(_head(dk_ptr, dk_strides, b, h_kv, first), dk_strides, first, S_kv, dk * factor, D)
    _store(_head(dv_ptr, dv_strides, b, h_kv, first), dv_strides, first, S_kv, dv, D_v)


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
        p.q, p.k, p.v, dout, lse, delta, dq, runs, *args, *strides, dq.stride(), *counts, n_full, runs.shape[1],
        **formulas, GRADIENTS=gradients, AVERAGING=averaging and not cut, **shared,
        BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    c = dkdv_config
    runs, n_full = runs_of(p, c.BLOCK_M, c.BLOCK_N, of_keys=True)
    attention_dkdv[(triton.cdiv(S_kv, c.BLOCK_N), B * H_kv)](
        p.q, p.k, p.v, dout, lse, delta, dk, dv, runs, *args, *strides, dk.stride(), dv.stride(), *counts,
        n_full, runs.shape[1], **formulas, AVERAGING=averaging, CUT=cut, **shared,
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
