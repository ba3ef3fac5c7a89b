"""Experts on the CPU: the pairs sorted once, then one product per projection of each expert that has pairs.

    X = x[tokens];  pre = X up[e] + up_bias[e];  y = act(pre) down[e] + down_bias[e];  out[t] = sum_k w[t,k] y[t,k]
    backward:  G = dout[tokens];  D = G down[e]^T;  dw = <D, act> + G down_bias[e]
               dpre = w D act'(pre);  ddown[e] = act^T (w G);  dup[e] = X^T dpre;  dx[t] = sum_k (dpre up[e]^T)[t,k]
    weigh=input:  X = w x[tokens], and w is nowhere else;  dw = <dpre up[e]^T, x[tokens]>

    X, G, pre, dpre: a row for each of the n pairs of one expert. y of all pairs [T*K,H_out] in the compute dtype

Weights are never gathered. Products are made in x's dtype where the CPU has instructions for it, everything else in
the compute dtype, float32 or wider. D serves both dw and dpre, so that y need not be kept. Experts with few pairs are
taken together (Batch), so that what is computed for each element is computed for many at a time.
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


def supports(need) -> str | None:
    return None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def times(out: Tensor, rows: Tensor, W: Tensor) -> None:
    """out [n,N] = rows [n,M] W [M,N]"""
    dtype = product_dtype(rows.dtype)
    if dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # torch.mm takes another library, which needs up to five times as long for few rows.
        out.copy_(torch.ops.mkldnn._linear_pointwise(rows.to(dtype), W.mT.to(dtype), None, "none", [], ""))
    else:
        multiply(out, rows, W)


def multiply(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a b"""
    dtype = product_dtype(a.dtype)
    if dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a.to(dtype) @ b.to(dtype))


# Batches


@dataclasses.dataclass(frozen=True)
class Batch:
    """Consecutive experts and their n pairs: rows `at` in the order of experts, of tokens [n], with weights w [n,1].

    shares: (e, the rows of e among the n)
    """

    at: slice
    shares: tuple[tuple[int, slice], ...]
    tokens: Tensor
    w: Tensor

    @staticmethod
    def all(p: Experts, routing: Routing) -> Iterator[Batch]:
        """Of the experts that have pairs."""
        bounds, most = routing.offsets.tolist(), p.config.batch // p.features[1]
        tokens = routing.order // max(1, p.ids.shape[1])
        w = p.weights.reshape(-1)[routing.order].to(compute_dtype(p.x.dtype))[:, None]
        first = 0
        for e in range(1, p.count + 1):
            a, b = bounds[first], bounds[e]
            if e < p.count and bounds[e + 1] - a <= most:
                continue
            spans = ((i, bounds[i] - a, bounds[i + 1] - a) for i in range(first, e))
            shares = tuple((i, slice(start, stop)) for i, start, stop in spans if start < stop)
            if shares:
                yield Batch(slice(a, b), shares, tokens[a:b], w[a:b])
            first = e

    def chunks(self, F: int, most: int) -> Iterator[slice]:
        """Rows with at most so many activations per thread."""
        step = max(1, most * torch.get_num_threads() // F)
        for i in range(0, len(self.tokens), step):
            yield slice(i, i + step)


def gather(p: Experts, batch: Batch) -> Tensor:
    """X [n,H]"""
    rows = p.x[batch.tokens]
    return rows * batch.w.to(rows.dtype) if p.spec.weigh == "input" else rows


def project(p: Experts, batch: Batch, X: Tensor, pre: Tensor) -> None:
    """Writes pre [n,P*F]."""
    for e, rows in batch.shares:
        ups, biases = p.of_expert(p.up, e), p.of_expert(p.up_bias, e)
        parts = pre[rows].chunk(len(ups), -1)
        for part, W in zip(parts, ups):
            times(part, X[rows], W)
        for part, bias in zip(parts, biases):
            part += bias


def gather_sum(p: Experts, routing: Routing, rows: Tensor, weighed: bool) -> Tensor:
    """[T,Y]: sum_k of the rows of (t, k) in rows [T*K,Y], times weights[t,k] if `weighed`; in the order of k."""
    if rows.numel() == 0:
        return rows.new_zeros(p.ids.shape[0], rows.shape[1])
    place = torch.empty_like(routing.order)
    place[routing.order] = torch.arange(len(place))
    weights = None
    if weighed:
        dropped = (p.ids < 0) | (p.ids >= p.count)
        weights = p.weights.to(rows.dtype).masked_fill(dropped, 0.0)
    return embedding_bag(place.view(p.ids.shape), rows, mode="sum", per_sample_weights=weights)


# Forward and backward


def forward(p: Experts, save: bool) -> tuple[Tensor, Tensor]:
    T, K = p.ids.shape
    _, F, H_out = p.features
    wide = p.spec.parts * F
    routing = Routing.of(p.ids, p.count)
    kept = int(routing.offsets[-1])
    hidden, y = p.x.new_empty((T * K, wide) if save else 0), p.x.new_empty(T * K, H_out)
    y[kept:] = 0
    if save:
        hidden[kept:] = 0
    for batch in Batch.all(p, routing):
        pre = hidden[batch.at] if save else p.x.new_empty(len(batch.tokens), wide)
        project(p, batch, gather(p, batch), pre)
        h = p.x.new_empty(len(pre), F)
        for part in batch.chunks(F, p.config.chunk):
            h[part] = activate(p.spec.act, p.split(pre[part].to(batch.w.dtype)))
        for e, rows in batch.shares:
            times(y[batch.at][rows], h[rows], p.of_expert(p.down, e)[0])
            for bias in p.of_expert(p.down_bias, e):
                y[batch.at][rows] += bias
    out = gather_sum(p, routing, y.to(compute_dtype(y.dtype)), p.spec.weigh == "output")
    return out.to(p.out_dtype), hidden


def backward(p: Experts, grad_out: Tensor, hidden: Tensor, wanted: Wanted) -> ExpertGradients:
    T, K = p.ids.shape
    routing = Routing.of(p.ids, p.count)
    sums = _unwritten(p, routing, wanted)
    dw = p.x.new_zeros(T * K, dtype=compute_dtype(p.x.dtype))
    dX = p.x.new_zeros((T * K, p.x.shape[1]) if wanted.x else 0)
    for batch in Batch.all(p, routing):
        X = gather(p, batch)
        if hidden.numel():
            pre = hidden[batch.at]
        else:
            project(p, batch, X, pre := p.x.new_empty(len(X), p.spec.parts * p.features[1]))
        dpre = _through_down(p, batch, pre, grad_out[batch.tokens], dw[batch.at], wanted, sums)
        d_rows = _through_up(p, batch, X, dpre, wanted, sums)
        if wanted.x:
            dX[batch.at] = d_rows
        if d_rows is not None and p.spec.weigh == "input":
            dw[batch.at] = (d_rows.to(dw.dtype) * p.x[batch.tokens]).sum(-1)
    if wanted.x:
        sums.x.copy_(gather_sum(p, routing, dX.to(dw.dtype), p.spec.weigh == "input"))
    if wanted.weights:
        sums.weights.view(-1)[routing.order] = dw.to(p.weights.dtype)
    return sums


def _unwritten(p: Experts, routing: Routing, wanted: Wanted) -> ExpertGradients:
    """Memory for the gradients, zero for experts without pairs."""

    def like(t: Tensor, want: bool) -> Tensor:
        return torch.empty_like(t) if want else t.new_empty(0)

    lists = (p.up, wanted.projections), (p.down, wanted.projections), (p.up_bias, wanted.biases)
    found = [[like(t, want) for t in ts] for ts, want in (*lists, (p.down_bias, wanted.biases))]
    for ts, want in zip(found, (wanted.projections, wanted.projections, wanted.biases, wanted.biases)):
        for e in (routing.offsets.diff() == 0).nonzero().flatten().tolist() if want else ():
            for t in p.of_expert(ts, e):
                t.zero_()
    weights = p.weights.new_empty(p.weights.shape if wanted.weights else 0)
    return ExpertGradients(like(p.x, wanted.x), weights, *found)


@functools.lru_cache(maxsize=256)
def _slopes(act: Expr, gated: bool) -> Expr:
    """(act, d act / d u, d act / d g) as one formula, so that they share what they have in common."""
    return sympy.Tuple(act, derivative(act, E.UP), *([derivative(act, E.GATE)] * gated))


def _through_down(
    p: Experts, batch: Batch, pre: Tensor, G: Tensor, dw: Tensor, wanted: Wanted, sums: ExpertGradients
) -> Tensor:
    """dpre [n,P*F]; writes dw [n] unless weigh=input, and ddown and ddown_bias of the batch."""
    outside, slopes = p.spec.weigh == "output", _slopes(p.spec.act, p.spec.parts == 2)
    D, narrow = p.x.new_empty(len(G), p.features[1]), G.to(p.x.dtype)
    for e, rows in batch.shares:
        times(D[rows], narrow[rows], p.of_expert(p.down, e)[0].mT)
    dpre, h = torch.empty_like(pre), D
    for part in batch.chunks(D.shape[1], p.config.chunk):
        act, *slope = mods.evaluate(slopes, p.split(pre[part].to(dw.dtype)))
        d, target = D[part].to(dw.dtype), p.split(dpre[part])
        if outside:
            dw[part] = (d * act).sum(-1)
            d = d * batch.w[part]
        for into, s in zip((target.u, target.g), slope):
            into.copy_(d * s)
        h[part] = act  # from here on D holds the activations
    G = G.to(dw.dtype)
    for e, rows in batch.shares if outside else ():
        for bias in p.of_expert(p.down_bias, e):
            dw[rows] += G[rows] @ bias.to(dw.dtype)
    G = G * batch.w if outside else G
    narrow = G.to(p.x.dtype)
    for e, rows in batch.shares:
        if wanted.projections:
            multiply(p.of_expert(sums.down, e)[0], h[rows].mT, narrow[rows])
        if wanted.biases and p.down_bias:
            p.of_expert(sums.down_bias, e)[0].copy_(G[rows].sum(0))
    return dpre


def _through_up(
    p: Experts, batch: Batch, X: Tensor, dpre: Tensor, wanted: Wanted, sums: ExpertGradients
) -> Tensor | None:
    """dpre up^T [n,H] if wanted; writes dup and dup_bias of the batch."""
    found = torch.empty_like(X) if wanted.x or (wanted.weights and p.spec.weigh == "input") else None
    for e, rows in batch.shares:
        ups = p.of_expert(p.up, e)
        parts = dpre[rows].chunk(len(ups), -1)
        if wanted.projections:
            for dW, part in zip(p.of_expert(sums.up, e), parts):
                multiply(dW, X[rows].mT, part)
        if wanted.biases and p.up_bias:
            for db, part in zip(p.of_expert(sums.up_bias, e), parts):
                db.copy_(part.sum(0, dtype=batch.w.dtype))
        if found is not None:
            times(found[rows], parts[0], ups[0].mT)
            for part, W in zip(parts[1:], ups[1:]):
                times(more := torch.empty_like(found[rows]), part, W.mT)
                found[rows] += more
    return found


KERNEL = ExpertKernel("cpu.experts", "cpu", supports, forward, backward)
