"""Experts on the CPU: the pairs sorted once, then one product per projection of each expert that has pairs.

    X = x[tokens];  pre = X up[e] + up_bias[e];  y = act(pre) down[e] + down_bias[e];  out[t] = sum_k w[t,k] y[t,k]
    backward:  G = dout[tokens];  D = G down[e]^T;  dw = <D, act> + G down_bias[e]
               dpre = w D act'(pre);  ddown[e] = act^T (w G);  dup[e] = X^T dpre;  dx[t] = sum_k (dpre up[e]^T)[t,k]
    weigh=input:  X = w x[tokens], and w is nowhere else;  dw = <dpre up[e]^T, x[tokens]>

Weights are never gathered, rows of x only for one expert at a time. Products are made in x's dtype where the CPU has
instructions for it that are faster than those for float32, everything else in the compute dtype, float32 or wider.

Forward is a few steps of all pairs. In AOTAutograd they take the place of tv::moe, so that Inductor fuses all but the
products (tv::expert_products). Backward goes expert by expert, which takes less memory; those with few pairs are taken
together (Batch), so that what is computed for each element is computed for many at a time. D serves both dw and dpre,
so that y need not be kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import sympy
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .. import expr as E
from ..derive import derivative, underivable
from ..expr import Expr
from . import mods
from .cpu_products import float32_is_faster, multiply, times
from .experts import ExpertGradients, ExpertKernel, ExpertNeed, Experts, Routing, Wanted, activate


def supports(need: ExpertNeed) -> str | None:
    float32_is_faster(need.dtype)  # measured as a graph is compiled, not in a call
    return underivable(need.spec.act, E.UP, E.GATE) if need.backward else None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def products(
    rows: Tensor,
    places: Tensor | None,
    offsets: Tensor,
    count: int,
    W: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
) -> Tensor:
    """[n,N]: pair r's row, rows[places[r]] or rows[r], times W of its expert, plus the bias of its expert if any.

    offsets [E+1]: expert e has the pairs offsets[e] up to offsets[e+1]; pairs after the last get zeros. W, bias: one
    of the lists of tv::moe; of gates and ups apart, the columns of g come first. A package of AOTInductor hands over
    an empty list as None.
    """
    bounds, (W, bias) = offsets.tolist(), (unstacked(W, 2), unstacked(bias or (), 1))
    sets = len(W) // count
    out = rows.new_empty(len(rows) if places is None else len(places), sets * W[0].shape[1])
    out[bounds[-1] :] = 0
    for e, (a, b) in enumerate(zip(bounds, bounds[1:])):
        if a == b:
            continue
        X = rows[a:b] if places is None else rows.index_select(0, places[a:b])
        parts = out[a:b].chunk(sets, 1)
        for part, w in zip(parts, W[e::count]):
            times(part, X, w)
        for part, each in zip(parts, bias[e::count]):
            part += each
    return out


SCHEMA = "(Tensor rows, Tensor? places, Tensor offsets, int count, Tensor[] W, Tensor[]? bias) -> Tensor"
OPAQUE_PRODUCTS = torch.library.custom_op("tv::expert_products", products, mutates_args=(), schema=SCHEMA)


@OPAQUE_PRODUCTS.register_fake
def _fake_products(rows, places, offsets, count, W, bias):
    n, sets = (rows if places is None else places).shape[0], len(W) if W[0].dim() == 3 else len(W) // count
    return rows.new_empty(n, sets * W[0].shape[-1])


def unstacked(tensors: Sequence[Tensor], dims: int) -> Sequence[Tensor]:
    """Those of each expert, of so many dims, of one stacked tensor or of a list; of two sets one after the other."""
    return [t for stack in tensors for t in stack.unbind()] if tensors and tensors[0].dim() > dims else tensors


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


def chunks(rows: Tensor, most: int) -> Iterator[slice]:
    """So many rows at a time that each thread has at most that many of their numbers."""
    step = max(1, most * torch.get_num_threads() // rows.shape[1])
    for i in range(0, len(rows), step):
        yield slice(i, i + step)


def gather_sum(p: Experts, routing: Routing, rows: Tensor, weighed: bool, out_dtype: torch.dtype) -> Tensor:
    """[T,Y]: sum_k of the rows of (t, k) in rows [T*K,Y], times weights[t,k] if `weighed`; in the order of k.

    Added up in the compute dtype.
    """
    dtype, (T, K) = compute_dtype(rows.dtype), p.ids.shape
    place = torch.empty_like(routing.order)
    place[routing.order] = torch.arange(place.shape[0])  # len() would fix the number of tokens in a graph
    place, weights = place.view(T, K), None
    if weighed:
        dropped = (p.ids < 0) | (p.ids >= p.count)
        weights = p.weights.to(dtype).masked_fill(dropped, 0.0)
    if not p.config.chunk:
        found = rows[place].to(dtype)
        return (found if weights is None else found * weights[..., None]).sum(1).to(out_dtype)
    out = rows.new_zeros(T, rows.shape[1], dtype=out_dtype)
    bags = torch.arange(len(rows)).view(T, K)
    for part in chunks(out, p.config.chunk) if rows.numel() else ():
        found = rows.index_select(0, place[part].flatten()).to(dtype)
        w = None if weights is None else weights[part]
        out[part] = embedding_bag(bags[: len(place[part])], found, mode="sum", per_sample_weights=w)
    return out


# Forward


def forward(p: Experts, save: bool) -> tuple[Tensor, Tensor]:
    routing = Routing.of(p.ids, p.count)
    run = products if p.config.chunk else OPAQUE_PRODUCTS
    pre = project(p, routing, run)
    y = run(activations(p, pre), None, routing.offsets, p.count, p.down, p.down_bias)
    out = gather_sum(p, routing, y, p.spec.weigh == "output", p.out_dtype)
    return out, pre if save else pre.new_empty(0)


def project(p: Experts, routing: Routing, run: Callable[..., Tensor] = products) -> Tensor:
    """pre of all pairs [T*K,P*F]"""
    X, tokens = p.x, routing.order // max(1, p.ids.shape[1])
    if p.spec.weigh == "input":
        X, tokens = X[tokens] * p.weights.reshape(-1)[routing.order, None].to(X.dtype), None
    return run(X, tokens, routing.offsets, p.count, p.up, p.up_bias)


def activations(p: Experts, pre: Tensor) -> Tensor:
    """[n,F] of pre [n,P*F]"""
    dtype = compute_dtype(pre.dtype)
    if not p.config.chunk:
        return activate(p.spec.act, p.split(pre.to(dtype))).to(pre.dtype)
    h = pre.new_empty(len(pre), p.features[1])
    for part in chunks(h, p.config.chunk):
        h[part] = activate(p.spec.act, p.split(pre[part].to(dtype)))
    return h


# Backward


def backward(p: Experts, grad_out: Tensor, hidden: Tensor, wanted: Wanted) -> ExpertGradients:
    T, K = p.ids.shape
    routing = Routing.of(p.ids, p.count)
    sums = _unwritten(p, routing, wanted)
    dw = p.x.new_zeros(T * K, dtype=compute_dtype(p.x.dtype))
    again = wanted.x or wanted.weights and p.spec.weigh == "input"
    dX = p.x.new_empty((T * K, p.x.shape[1]) if again else 0)
    dX[routing.offsets[-1] :] = 0
    hidden = hidden if hidden.numel() else project(p, routing)
    for batch in Batch.all(p, routing):
        d_rows = dX[batch.at] if again else None
        _through_experts(p, batch, hidden[batch.at], grad_out, dw[batch.at], d_rows, wanted, sums)
        if d_rows is not None and p.spec.weigh == "input":
            dw[batch.at] = (d_rows.to(dw.dtype) * p.x[batch.tokens]).sum(-1)
    if wanted.x:
        sums = dataclasses.replace(sums, x=gather_sum(p, routing, dX, p.spec.weigh == "input", p.x.dtype))
    if wanted.weights:
        sums.weights.view(-1)[routing.order] = dw.to(p.weights.dtype)
    return sums


def _unwritten(p: Experts, routing: Routing, wanted: Wanted) -> ExpertGradients:
    """Memory for the gradients but that of x, zero for experts without pairs."""

    def like(t: Tensor, want: bool) -> Tensor:
        return torch.empty_like(t) if want else t.new_empty(0)

    lists = (p.up, wanted.projections), (p.down, wanted.projections), (p.up_bias, wanted.biases)
    found = [[like(t, want) for t in ts] for ts, want in (*lists, (p.down_bias, wanted.biases))]
    for ts, want in zip(found, (wanted.projections, wanted.projections, wanted.biases, wanted.biases)):
        for e in (routing.offsets.diff() == 0).nonzero().flatten().tolist() if want else ():
            for t in p.of_expert(ts, e):
                t.zero_()
    weights = p.weights.new_empty(p.weights.shape if wanted.weights else 0)
    return ExpertGradients(p.x.new_empty(0), weights, *found)


@functools.lru_cache(maxsize=256)
def _slopes(act: Expr, gated: bool) -> Expr:
    """(act, d act / d u, d act / d g) as one formula, so that they share what they have in common."""
    return sympy.Tuple(act, derivative(act, E.UP), *([derivative(act, E.GATE)] * gated))


def _through_experts(
    p: Experts,
    batch: Batch,
    pre: Tensor,
    grad_out: Tensor,
    dw: Tensor,
    d_rows: Tensor | None,
    wanted: Wanted,
    sums: ExpertGradients,
) -> None:
    """Writes dw and d_rows = dpre up^T [n,H], unless None, and the gradients of the batch's experts."""
    dpre = _through_down(p, batch, pre, grad_out, dw, wanted, sums)
    _through_up(p, batch, dpre, d_rows, wanted, sums)


def _through_down(
    p: Experts, batch: Batch, pre: Tensor, grad_out: Tensor, dw: Tensor, wanted: Wanted, sums: ExpertGradients
) -> Tensor:
    """dpre [n,P*F]; writes dw [n] unless weigh=input, and ddown and ddown_bias of the batch."""
    h = p.x.new_empty(len(pre), p.features[1])
    _down_rows(p, batch, grad_out, h, dw, wanted, sums)
    dpre = _through_activation(p, batch, pre, h, dw)
    if wanted.projections:
        G = rows_of(grad_out, batch, p.x.dtype)
        for e, rows in batch.shares:
            multiply(p.of_expert(sums.down, e)[0], h[rows].mT, G[rows])
    return dpre


def _through_activation(p: Experts, batch: Batch, pre: Tensor, rows: Tensor, dw: Tensor) -> Tensor:
    """dpre [n,P*F]; `rows` [n,F] are D, and then the activations, weighted as the results are."""
    outside, slopes = p.spec.weigh == "output", _slopes(p.spec.act, p.spec.parts == 2)
    dpre = torch.empty_like(pre)
    for part in chunks(rows, p.config.chunk):
        act, *slope = mods.evaluate(slopes, p.split(pre[part].to(dw.dtype)))
        D, target = rows[part].to(dw.dtype), p.split(dpre[part])
        if outside:
            dw[part] += (D * act).sum(-1)
            D, act = D * batch.w[part], act * batch.w[part]
        for into, s in zip((target.u, target.g), slope):
            into.copy_(D * s)
        rows[part] = act
    return dpre


def _down_rows(
    p: Experts, batch: Batch, grad_out: Tensor, D: Tensor, dw: Tensor, wanted: Wanted, sums: ExpertGradients
) -> None:
    """Writes D [n,F] = G down^T, what the bias of down adds to dw, and ddown_bias of the batch."""
    G, outside = rows_of(grad_out, batch, p.x.dtype), p.spec.weigh == "output"
    for e, rows in batch.shares:
        times(D[rows], G[rows], p.of_expert(p.down, e)[0].mT)
        for bias in p.of_expert(p.down_bias, e) if outside else ():
            dw[rows] += G[rows].to(dw.dtype) @ bias.to(dw.dtype)
        for db in p.of_expert(sums.down_bias, e) if wanted.biases and p.down_bias else ():
            w = batch.w[rows] if outside else torch.ones_like(batch.w[rows])
            db.copy_((w.mT @ G[rows].to(dw.dtype))[0])


def rows_of(grad_out: Tensor, batch: Batch, dtype: torch.dtype) -> Tensor:
    """G [n,H_out]; gathered again where it is needed, so that it need not be kept."""
    return grad_out.index_select(0, batch.tokens).to(dtype)


def _through_up(
    p: Experts, batch: Batch, dpre: Tensor, d_rows: Tensor | None, wanted: Wanted, sums: ExpertGradients
) -> None:
    """Writes d_rows [n,H], and dup and dup_bias of the batch."""
    X = p.x.index_select(0, batch.tokens)
    X = X * batch.w.to(X.dtype) if p.spec.weigh == "input" else X
    for e, rows in batch.shares:
        ups = p.of_expert(p.up, e)
        parts = dpre[rows].chunk(len(ups), -1)
        if wanted.projections:
            for dW, part in zip(p.of_expert(sums.up, e), parts):
                multiply(dW, X[rows].mT, part)
        if wanted.biases and p.up_bias:
            for db, part in zip(p.of_expert(sums.up_bias, e), parts):
                db.copy_(part.sum(0, dtype=batch.w.dtype))
        if d_rows is not None:
            times(d_rows[rows], parts[0], ups[0].mT)
            for part, W in zip(parts[1:], ups[1:]):
                times(more := torch.empty_like(d_rows[rows]), part, W.mT)
                d_rows[rows] += more


KERNEL = ExpertKernel("cpu.experts", "cpu", supports, forward, backward)
