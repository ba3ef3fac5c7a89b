"""Softmax attention on a GPU, forward: one pass over the kv blocks that `keep` leaves, in O(S) memory.

    x      = score(scale <q, k>) log2(e)       in log2, so that exp is the hardware's exp2
    m'     = max(m, rowmax x);   p = exp2(x - m');   a = exp2(m - m')
    l'     = a l + rowsum p;     acc' = a acc + p v                         FlashAttention-2, arXiv 2307.08691
    out    = acc / l             lse = (m + log2 l) ln 2

    q [B,H,S_q,D]   k [B,H_kv,S_kv,D]   v [B,H_kv,S_kv,D_v]   out [B,H,S_q,D_v]   lse [B,H,S_q] float32
    runs [n_q, n_full + n_partial, 2] int32: for each q block the kv ranges of FULL blocks, then of PARTIAL ones;
    unused ranges are empty

One program makes BLOCK_M rows of one head. `keep` is tested in PARTIAL blocks only, where also the end of kv lies.
Not here: dropout, float64. No device chooses this kernel yet.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import bounds, expr as E
from ..bounds import FULL, PARTIAL
from ..derive import derivative
from .mint import mint, mint_gradients, unprintable
from .problem import Need, Problem

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@dataclasses.dataclass(frozen=True)
class Config:
    """How the forward is tiled: rows and kv positions of a block, warps, pipeline stages, whether K and V come
    through tensor descriptors (TMA)."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    descriptors: bool = False

    def __post_init__(self) -> None:
        if any(n & (n - 1) or n < 16 for n in (self.BLOCK_M, self.BLOCK_N)):
            raise ValueError(f"blocks have a power of two of rows, at least 16: {self}")


def supports(need: Need) -> str | None:
    if need.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"no {str(need.dtype)[6:]}"
    if need.spec.dropout:
        return "no dropout inside"
    return next(filter(None, map(unprintable, need.spec.formulas())), None)


# The kernel


@triton.jit
def _load(
    ptr, at, start, S,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Rows [start, start + BLOCK_N) of [S,D], zero outside: from a descriptor `at`, or at ptr + offsets `at`."""
    if DESCRIPTORS:
        block = at.load([start, 0])
    elif MASKED:
        rows = (start + tl.arange(0, BLOCK_N))[:, None] < S
        if D == BLOCK_D:
            block = tl.load(ptr + at, mask=rows, other=0.0)
        else:
            block = tl.load(ptr + at, mask=rows & (tl.arange(0, BLOCK_D)[None, :] < D), other=0.0)
    elif D == BLOCK_D:
        block = tl.load(ptr + at)
    else:
        block = tl.load(ptr + at, mask=tl.arange(0, BLOCK_D)[None, :] < D, other=0.0)
    return block


@triton.jit
def _head(ptr, strides, b, h, row):
    """Where `row` of one head of a [B,H,S,D] tensor begins."""
    return ptr + b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1] + row.to(tl.int64) * strides[2]


@triton.jit
def _offsets(strides, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """32-bit offsets of a block [ROWS,COLUMNS] for one pointer that moves: a block of pointers costs registers."""
    return tl.arange(0, ROWS)[:, None] * strides[2] + tl.arange(0, COLUMNS)[None, :] * strides[3]


@triton.jit
def _store(ptr, strides, first, S, value, D: tl.constexpr):
    """Writes a block [ROWS,COLUMNS] as rows [first, first + ROWS) of [S,D]."""
    rows, columns = first + tl.arange(0, value.shape[0])[:, None], tl.arange(0, value.shape[1])[None, :]
    at = ptr + _offsets(strides, value.shape[0], value.shape[1])
    tl.store(at, value.to(ptr.dtype.element_ty), mask=(rows < S) & (columns < D))


@triton.jit
def _sweep(
    acc, l, m, q, k_ptr, v_ptr, k_at, v_at, stride_kn, stride_vn, lo, hi, S_kv, b, h, rows, scale, data,
    SCORE: tl.constexpr, KEEP: tl.constexpr, MASKED: tl.constexpr, FOLDED: tl.constexpr,
    D: tl.constexpr, D_v: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The online softmax over the kv blocks of [lo, hi); nothing but arithmetic where they are FULL."""
    columns = tl.arange(0, BLOCK_N)
    k_ptr += tl.cast(lo, tl.int64) * stride_kn
    v_ptr += tl.cast(lo, tl.int64) * stride_vn
    for start in tl.range(lo, hi, BLOCK_N, num_stages=1 if MASKED and DESCRIPTORS else None, disable_licm=MASKED):
        kv = start + columns[None, :]
        k = _load(k_ptr, k_at, start, S_kv, MASKED, D, BLOCK_N, q.shape[1], DESCRIPTORS).T
        v = _load(v_ptr, v_at, start, S_kv, MASKED, D_v, BLOCK_N, acc.shape[1], DESCRIPTORS)
        s = tl.dot(q, k, input_precision=PRECISION)
        if SCORE is not None:
            s = SCORE(s * scale, b, h, rows, kv, data) * LOG2E
        elif not FOLDED:
            s = s * scale
        if MASKED:
            s = tl.where(kv < S_kv, s, float("-inf"))
            if KEEP is not None:
                s = tl.where(KEEP(b, h, rows, kv, data), s, float("-inf"))
        if FOLDED:
            m_new = tl.maximum(m, tl.max(s, 1) * scale)
        else:
            m_new = tl.maximum(m, tl.max(s, 1))
        # A row that has seen nothing yet: exp2(-inf - 0) is 0, exp2(-inf + inf) is not.
        base = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED or not FOLDED else m_new
        p = tl.math.exp2(s * scale - base[:, None]) if FOLDED else tl.math.exp2(s - base[:, None])
        a = tl.math.exp2(m - base)
        l = l * a + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * a[:, None], input_precision=PRECISION)
        m = m_new
        k_ptr += BLOCK_N * stride_kn
        v_ptr += BLOCK_N * stride_vn
    return acc, l, m


@triton.jit
def _mean_of(
    v_ptr, v_at, stride_vn, S_kv,
    D_v: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The mean of v over all kv: [1,D_v]"""
    total = tl.zeros([BLOCK_DV], tl.float32)
    for start in tl.range(0, S_kv, BLOCK_N):
        total += tl.sum(_load(v_ptr, v_at, start, S_kv, True, D_v, BLOCK_N, BLOCK_DV, DESCRIPTORS).to(tl.float32), 0)
        v_ptr += BLOCK_N * stride_vn
    return (total / S_kv)[None, :]


@triton.jit
def attention_fwd(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, runs_ptr, data, scale,
    q_strides, k_strides, v_strides, out_strides, H, G, S_q, S_kv, n_full, n_runs,
    SCORE: tl.constexpr, KEEP: tl.constexpr, SINK: tl.constexpr, EMPTY: tl.constexpr, FOLDED: tl.constexpr,
    D: tl.constexpr, D_v: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    # Late rows see most of a causal mask: they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    first = block * BLOCK_M
    positions = first + tl.arange(0, BLOCK_M)
    rows = positions[:, None]
    k_ptr = _head(k_ptr, k_strides, b, h // G, block * 0)
    v_ptr = _head(v_ptr, v_strides, b, h // G, block * 0)
    if DESCRIPTORS:
        k_at = tl.make_tensor_descriptor(k_ptr, [S_kv, D], [k_strides[2], 1], [BLOCK_N, BLOCK_D])
        v_at = tl.make_tensor_descriptor(v_ptr, [S_kv, D_v], [v_strides[2], 1], [BLOCK_N, BLOCK_DV])
    else:
        k_at = _offsets(k_strides, BLOCK_N, BLOCK_D)
        v_at = _offsets(v_strides, BLOCK_N, BLOCK_DV)
    q_at = _offsets(q_strides, BLOCK_M, BLOCK_D)
    q = _load(_head(q_ptr, q_strides, b, h, first), q_at, first, S_q, True, D, BLOCK_M, BLOCK_D, False)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)

    run_ptr = runs_ptr + block * n_runs * 2
    for MASKED in tl.static_range(2):
        for run in range(n_full * MASKED, n_runs if MASKED else n_full):
            lo, hi = tl.load(run_ptr + 2 * run), tl.load(run_ptr + 2 * run + 1)
            acc, l, m = _sweep(
                acc, l, m, q, k_ptr, v_ptr, k_at, v_at, k_strides[2], v_strides[2], lo, hi, S_kv, b, h, rows,
                scale, data, SCORE, KEEP, MASKED == 1, FOLDED, D, D_v, BLOCK_N, PRECISION, DESCRIPTORS,
            )  # fmt: skip

    if SINK is not None:
        sink = SINK(b, h, rows, 0, data) * LOG2E + tl.zeros([BLOCK_M, 1], tl.float32)
        sink = tl.reshape(sink, [BLOCK_M])
        m_new = tl.maximum(m, sink)
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        a = tl.math.exp2(m - base)
        l = l * a + tl.math.exp2(sink - base)
        acc = acc * a[:, None]
        m = m_new
    empty = l == 0.0
    out = acc / tl.where(empty, 1.0, l)[:, None]
    lse = tl.where(empty, float("inf"), (m + tl.math.log2(tl.where(empty, 1.0, l))) * LN2)
    if EMPTY == "nan":
        out = tl.where(empty[:, None], float("nan"), out)
    elif EMPTY == "mean":
        if tl.max(empty.to(tl.int32), 0) > 0:
            mean = _mean_of(v_ptr, v_at, v_strides[2], S_kv, D_v, BLOCK_N, BLOCK_DV, DESCRIPTORS)
            out = tl.where(empty[:, None], mean, out)
    _store(_head(out_ptr, out_strides, b, h, first), out_strides, first, S_q, out, D_v)
    tl.store(lse_ptr + (b.to(tl.int64) * H + h) * S_q + positions, lse, mask=positions < S_q)


# The launcher


def forward(p: Problem, config: Config) -> tuple[Tensor, Tensor]:
    """(out [B,H,S_q,D_v], lse [B,H,S_q]) of a problem that `supports` admits."""
    out, lse = p.results()
    B, H, S_q, D = p.q.shape
    S_kv, D_v = p.k.shape[2], p.v.shape[3]
    if out.numel() == 0 or S_kv == 0:
        return out.zero_(), lse.fill_(math.inf)
    runs, n_full = runs_of(p, config.BLOCK_M, config.BLOCK_N)
    args, formulas = arguments(p)
    n_q = triton.cdiv(S_q, config.BLOCK_M)
    attention_fwd[(n_q, B * H)](
        p.q, p.k, p.v, out, lse, runs, *args,
        p.q.stride(), p.k.stride(), p.v.stride(), out.stride(), H, p.group, S_q, S_kv,
        n_full, runs.shape[1],
        **formulas, D=D, D_v=D_v, BLOCK_D=padded(D), BLOCK_DV=padded(D_v),
        BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, PRECISION="ieee",
        DESCRIPTORS=config.descriptors and describable(p.k) and describable(p.v),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse


def padded(D: int) -> int:
    """The features of a block: the next power of two that the tensor cores take."""
    return max(16, triton.next_power_of_2(D))


def extent(x: Tensor) -> int:
    """The largest offset of an element."""
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))


def describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can name rows of x [B,H,S,D]: 16-byte steps, features next to each other."""
    steps = (x.storage_offset(), *x.stride()[:3])
    return x.stride(3) == 1 and all(n * x.element_size() % 16 == 0 for n in steps)


def arguments(p: Problem, buffers: dict[str, Tensor] | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """((the formulas' data, the scale), the formulas as jit functions) of a launch; buffers: captures' gradients."""
    spec, captures = p.spec, dict(p.scope.captures) | {f"d {name}": x for name, x in (buffers or {}).items()}
    shape = tuple((name, x.dim(), extent(x) >= 1 << 31) for name, x in captures.items())
    sizes = tuple(p.scope.sizes)
    minted = functools.partial(mint, captures=shape, sizes=sizes)
    pointers = tuple(x.view(torch.uint8) if x.dtype == torch.bool else x for x in captures.values())
    layout = tuple(n for x in captures.values() for n in (*x.shape, *x.stride()))
    scale = spec.scale * (LOG2E.value if spec.score == E.S else 1.0)
    formulas = {
        "SCORE": None if spec.score == E.S else minted(spec.score, scored=True),
        "KEEP": None if spec.keep is E.TRUE else minted(spec.keep),
    }
    if buffers is None:
        formulas["SINK"] = None if spec.sink is None else minted(spec.sink)
        formulas["EMPTY"] = (p.empty or "nan").removesuffix("_cut")
        formulas["FOLDED"] = spec.score == E.S and spec.scale > 0
    else:
        slope = derivative(spec.score, E.S)
        formulas["SLOPE"] = None if slope == E.number(1.0) else minted(slope, scored=True)
        formulas["GRADIENTS"] = mint_gradients(spec.score, tuple(buffers), shape, sizes) if buffers else None
    return ((pointers, layout, tuple(p.scope.sizes.values())), scale), formulas


def runs_of(p: Problem, M: int, N: int, of_keys: bool = False) -> tuple[Tensor, int]:
    """(runs, how many of them are FULL) of the q blocks; `of_keys`: of the kv blocks, ranges of q."""
    sizes = tuple(sorted(p.scope.sizes.items()))
    runs, n_full = _runs(p.spec.keep, p.q.shape[0], p.q.shape[2], p.k.shape[2], sizes, M, N, of_keys)
    return torch.from_numpy(runs).to(p.q.device), n_full


@functools.lru_cache(maxsize=256)
def _runs(
    keep: E.Expr, B: int, S_q: int, S_kv: int, sizes: tuple, M: int, N: int, of_keys: bool
) -> tuple[np.ndarray, int]:
    table = {name: (float(n), float(n)) for name, n in sizes} | {
        "b": (0.0, B - 1.0),
        "h": (0.0, dict(sizes)["H"] - 1.0),
        "q": bounds.blocks(S_q, M, 1),
        "kv": bounds.blocks(S_kv, N, 0),
    }
    kinds = np.array(np.broadcast_to(bounds.kinds(keep, table), (-(-S_q // M), -(-S_kv // N))))
    # A block that reaches beyond the end is PARTIAL.
    if S_kv % N and not of_keys:
        kinds[:, -1] = np.minimum(kinds[:, -1], PARTIAL)
    if of_keys:
        if S_q % M:
            kinds[-1] = np.minimum(kinds[-1], PARTIAL)
        kinds, N = kinds.T, M
    each = [[_ranges(row == kind, N) for row in kinds] for kind in (FULL, PARTIAL)]
    counts = [max(map(len, ranges), default=0) for ranges in each]
    runs: np.ndarray = np.zeros((len(kinds), max(1, sum(counts)), 2), np.int32)
    for ranges, start in zip(each, (0, counts[0])):
        for i, found in enumerate(ranges):
            for r, span in enumerate(found):
                runs[i, start + r] = span
    return runs, counts[0]


def _ranges(where: np.ndarray, N: int) -> list[tuple[int, int]]:
    """[start, stop) positions of the blocks that follow each other."""
    edges: np.ndarray = np.flatnonzero(np.diff(np.concatenate(([0], where.astype(np.int8), [0])))) * N
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))
