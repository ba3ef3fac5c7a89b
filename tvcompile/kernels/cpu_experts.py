"""Experts on the CPU: the pairs sorted once, then one product per projection of each expert that has pairs.

    X = x[tokens];  pre = X up[e] + up_bias[e];  y = act(pre) down[e] + down_bias[e];  out[t] = sum_k w[t,k] y[t,k]
    backward:  G = dout[tokens];  D = G down[e]^T;  dw = <D, act> + G down_bias[e]
               dpre = w D act'(pre);  ddown[e] = act^T (w G);  dup[e] = X^T dpre;  dx[t] = sum_k (dpre up[e]^T)[t,k]
    weigh=input:  X = w x[tokens], and w is nowhere else;  dw = <dpre up[e]^T, x[tokens]>

    X, G, pre, dpre: a row for each of the n pairs of one expert. y of all pairs [T*K,H_out] in the compute dtype

Weights are never gathered. Products are made in x's dtype where the CPU has instructions for it, everything else in
the compute dtype, float32 or wider. Two rows of D serve both dw and dpre, so that y need not be kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import sympy
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .. import expr as E
from ..derive import derivative
from ..expr import Expr
from . import mods
from .cpu import product_dtype
from .experts import ExpertGradients, ExpertKernel, Experts, Routing, Wanted, activate

CHUNK = 1 << 16  # activations per thread that are computed at a time: a few such tensors stay in cache


def supports(need) -> str | None:
    return None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for [M,K] and [K,N], in a's dtype or a wider one."""
    dtype = product_dtype(a.dtype)
    a, b = a.to(dtype), b.to(dtype)
    if dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # Of the two libraries in PyTorch, mm takes the one that is up to five times slower with few rows.
        return torch.ops.mkldnn._linear_pointwise(a, b.mT, None, "none", [], "")
    return torch.mm(a, b)


def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, for an `out` too large to be copied."""
    dtype = product_dtype(a.dtype)
    if dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a.to(dtype) @ b.to(dtype))


# The pairs of one expert


@dataclasses.dataclass(frozen=True)
class Share:
    """The n pairs of expert e: rows a to b in the order of experts; their tokens [n]; their weights [n,1]."""

    e: int
    a: int
    b: int
    tokens: Tensor
    w: Tensor

    def chunks(self, F: int) -> Iterator[slice]:
        """Rows such that CHUNK bounds their activations."""
        step = max(1, CHUNK * torch.get_num_threads() // F)
        for i in range(0, self.b - self.a, step):
            yield slice(i, i + step)


def shares(p: Experts, routing: Routing) -> Iterator[Share]:
    """Of the experts that have pairs."""
    tokens = routing.order // p.ids.shape[1]
    w = p.weights.reshape(-1)[routing.order].to(compute_dtype(p.x.dtype))[:, None]
    bounds = routing.offsets.tolist()
    for e, (a, b) in enumerate(zip(bounds, bounds[1:])):
        if a < b:
            yield Share(e, a, b, tokens[a:b], w[a:b])


def rows_of(p: Experts, share: Share) -> Tensor:
    """X [n,H]"""
    rows = p.x[share.tokens]
    return rows * share.w.to(rows.dtype) if p.spec.weigh == "input" else rows


def project(p: Experts, share: Share, rows: Tensor) -> Tensor:
    """pre [n,P*F], as `hidden` has it."""
    parts = [product(rows, W) for W in p.of_expert(p.up, share.e)]
    for part, bias in zip(parts, p.of_expert(p.up_bias, share.e)):
        part += bias
    return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).to(p.x.dtype)


def gather_sum(p: Experts, routing: Routing, rows: Tensor, weighed: bool) -> Tensor:
    """[T,Y]: sum_k of the rows of (t, k) in rows [T*K,Y], times weights[t,k] if `weighed`; in the order of k.

    Rows from offsets[E] on belong to dropped pairs and may hold anything.
    """
    T, K = p.ids.shape
    rows[int(routing.offsets[-1]) :] = 0
    place = torch.empty_like(routing.order)
    place[routing.order] = torch.arange(T * K)
    weights = None
    if weighed:
        dropped = (p.ids < 0) | (p.ids >= p.count)
        weights = p.weights.to(rows.dtype).masked_fill(dropped, 0.0)
    return embedding_bag(place.view(T, K), rows, mode="sum", per_sample_weights=weights)


# Forward and backward


def forward(p: Experts, save: bool) -> tuple[Tensor, Tensor]:
    T, K = p.ids.shape
    _, F, H_out = p.features
    hidden = p.x.new_empty((T * K, p.spec.parts * F) if save else 0)
    if T * K == 0:
        return p.x.new_zeros((T, H_out), dtype=p.out_dtype), hidden
    routing = Routing.of(p.ids, p.count)
    y = p.x.new_empty((T * K, H_out), dtype=compute_dtype(p.x.dtype))
    for share in shares(p, routing):
        pre = project(p, share, rows_of(p, share))
        if save:
            hidden[share.a : share.b] = pre
        h = pre.new_empty(len(pre), F)
        for part in share.chunks(F):
            h[part] = activate(p.spec.act, p.split(pre[part].to(y.dtype)))
        y[share.a : share.b] = product(h, p.of_expert(p.down, share.e)[0])
        if p.down_bias:
            y[share.a : share.b] += p.of_expert(p.down_bias, share.e)[0]
    if save:
        hidden[int(routing.offsets[-1]) :] = 0
    return gather_sum(p, routing, y, p.spec.weigh == "output").to(p.out_dtype), hidden


def backward(p: Experts, grad_out: Tensor, hidden: Tensor, wanted: Wanted) -> ExpertGradients:
    T, K = p.ids.shape
    compute = compute_dtype(p.x.dtype)
    gradients = _zeros(p, wanted)
    if T * K == 0:
        return gradients
    routing = Routing.of(p.ids, p.count)
    dX = p.x.new_empty((T * K, p.x.shape[1]) if wanted.x else 0, dtype=compute)
    dw = p.x.new_zeros(T * K, dtype=compute)
    for share in shares(p, routing):
        rows = rows_of(p, share)
        pre = hidden[share.a : share.b] if hidden.numel() else project(p, share, rows)
        dpre, dw_down = _through_down(p, share, pre, grad_out, wanted, gradients)
        d_rows = _through_up(p, share, rows, dpre, wanted, gradients)
        if wanted.x:
            dX[share.a : share.b] = d_rows
        if wanted.weights:
            dw[share.a : share.b] = dw_down if p.spec.weigh == "output" else (d_rows * p.x[share.tokens]).sum(-1)
    if wanted.x:
        gradients.x.copy_(gather_sum(p, routing, dX, p.spec.weigh == "input"))
    if wanted.weights:
        gradients.weights.view(-1)[routing.order] = dw.to(p.weights.dtype)
    return gradients


def _zeros(p: Experts, wanted: Wanted) -> ExpertGradients:
    def like(t: Tensor, want: bool) -> Tensor:
        return torch.zeros_like(t) if want else t.new_empty(0)

    lists = ((p.up, wanted.projections), (p.down, wanted.projections), (p.up_bias, wanted.biases))
    found = [[like(t, want) for t in ts] for ts, want in (*lists, (p.down_bias, wanted.biases))]
    weights = p.weights.new_zeros(p.weights.shape if wanted.weights else 0)
    return ExpertGradients(like(p.x, wanted.x), weights, *found)


@functools.lru_cache(maxsize=256)
def _slopes(act: Expr, gated: bool) -> Expr:
    """(act, d act / d u, d act / d g) as one formula, so that they share what they have in common."""
    return sympy.Tuple(act, derivative(act, E.UP), *([derivative(act, E.GATE)] * gated))


def _through_down(
    p: Experts, share: Share, pre: Tensor, grad_out: Tensor, wanted: Wanted, gradients: ExpertGradients
) -> tuple[Tensor, Tensor]:
    """(dpre [n,P*F], dw [n] unless weigh=input); writes ddown and ddown_bias of the expert."""
    down, compute, outside = p.of_expert(p.down, share.e)[0], share.w.dtype, p.spec.weigh == "output"
    G = grad_out[share.tokens]
    D = product(G.to(p.x.dtype), down.mT)
    dpre, h = torch.empty_like(pre), torch.empty_like(D, dtype=p.x.dtype)
    dw = D.new_zeros(len(D), dtype=compute)
    slopes = _slopes(p.spec.act, p.spec.parts == 2)
    for part in share.chunks(D.shape[1]):
        units, target = p.split(pre[part].to(compute)), p.split(dpre[part])
        act, *slope = mods.evaluate(slopes, units)
        d = D[part].to(compute)
        h[part] = act
        if outside:
            dw[part] = (d * act).sum(-1)
            d = d * share.w[part]
        for into, s in zip((target.u, target.g), slope):
            into.copy_(d * s)
    G = G.to(compute)
    if outside and p.down_bias:
        dw += G @ p.of_expert(p.down_bias, share.e)[0].to(compute)
    G = G * share.w if outside else G
    if wanted.projections:
        product_into(p.of_expert(gradients.down, share.e)[0], h.mT, G.to(p.x.dtype))
    if wanted.biases and p.down_bias:
        p.of_expert(gradients.down_bias, share.e)[0].copy_(G.sum(0))
    return dpre, dw


def _through_up(
    p: Experts, share: Share, rows: Tensor, dpre: Tensor, wanted: Wanted, gradients: ExpertGradients
) -> Tensor | None:
    """dpre up^T [n,H] if wanted; writes dup and dup_bias of the expert."""
    ups = p.of_expert(p.up, share.e)
    parts = dpre.chunk(len(ups), -1)
    if wanted.projections:
        for dW, part in zip(p.of_expert(gradients.up, share.e), parts):
            product_into(dW, rows.mT, part)
    if wanted.biases and p.up_bias:
        for db, part in zip(p.of_expert(gradients.up_bias, share.e), parts):
            db.copy_(part.sum(0, dtype=share.w.dtype))
    if not (wanted.x or (wanted.weights and p.spec.weigh == "input")):
        return None
    total, *more = (product(part, W.mT).to(share.w.dtype) for part, W in zip(parts, ups))
    for x in more:
        total += x
    return total


KERNEL = ExpertKernel("cpu.experts", "cpu", supports, forward, backward)
