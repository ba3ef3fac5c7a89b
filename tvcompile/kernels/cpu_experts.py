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

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .. import expr as E
from ..derive import underivable
from . import cpu_fused
from .cpu_products import float32_is_faster, multiply, round_up, times
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
    clear: bool = True,
) -> Tensor:
    """[n,N]: pair r's row, rows[places[r]] or rows[r], times W of its expert, plus the bias of its expert if any.

    offsets [E+1]: expert e has the pairs offsets[e] up to offsets[e+1]; pairs after the last get zeros if `clear`, else
    whatever is in memory. W, bias: one of the lists of tv::moe; of gates and ups apart, the columns of g come first. A
    package of AOTInductor hands over an empty list as None.
    """
    bounds, (W, bias) = offsets.tolist(), (unstacked(W, 2), unstacked(bias or (), 1))
    sets, total = len(W) // count, len(rows if places is None else places)
    spans = [(e, slice(a, b)) for e, (a, b) in enumerate(zip(bounds, bounds[1:])) if a < b]
    # Products write over the first rows of the next expert, whose own come after them.
    out = rows.new_empty(room(total, spans), sets * W[0].shape[1])
    for e, own in spans:
        more = whole(own)
        fits = places is None and more.stop <= total
        X = rows[more] if fits else taken(rows, own if places is None else places[own], more.stop - more.start)
        for part, w, each in zip(out[more].chunk(sets, 1), W[e::count], bias[e::count] or [None] * sets):
            times(part, X, w, each)
    if clear:
        out[bounds[-1] :] = 0
    return out[:total]


def whole(own: slice) -> slice:
    """The rows that a product takes for these (see round_up)."""
    return slice(own.start, own.start + round_up(own.stop - own.start))


def room(total: int, spans: Sequence[tuple[int, slice]]) -> int:
    """How many rows it takes that each span of `total` has its whole."""
    return max([total, *(whole(own).stop for _, own in spans)])


def taken(rows: Tensor, at: slice | Tensor, count: int) -> Tensor:
    """[count,N]: rows[at], and behind them whatever is in memory."""
    out = rows.new_empty(count, rows.shape[1])
    if isinstance(at, slice):
        out[: at.stop - at.start] = rows[at]
    else:
        torch.index_select(rows, 0, at, out=out[: len(at)])
    return out


ARGUMENTS = "Tensor rows, Tensor? places, Tensor offsets, int count, Tensor[] W, Tensor[]? bias, bool clear=True"
SCHEMA = f"({ARGUMENTS}) -> Tensor"
OPAQUE_PRODUCTS = torch.library.custom_op("tv::expert_products", products, mutates_args=(), schema=SCHEMA)


@OPAQUE_PRODUCTS.register_fake
def _fake_products(rows, places, offsets, count, W, bias, clear=True):
    n, sets = (rows if places is None else places).shape[0], len(W) if W[0].dim() == 3 else len(W) // count
    return rows.new_empty(n, sets * W[0].shape[-1])


def unstacked(tensors: Sequence[Tensor], dims: int) -> Sequence[Tensor]:
    """Those of each expert, of so many dims, of one stacked tensor or of a list; of two sets one after the other."""
    return [t for stack in tensors for t in stack.unbind()] if tensors and tensors[0].dim() > dims else tensors


# Batches


@dataclasses.dataclass(frozen=True)
class Batch:
    """Consecutive experts and their n pairs: rows `at` in the order of experts, of tokens [n], with weights w [n,1].

    shares: (e, the rows of e among the n); room: how many rows it takes that products take more than n
    """

    at: slice
    shares: tuple[tuple[int, slice], ...]
    tokens: Tensor
    w: Tensor

    @functools.cached_property
    def room(self) -> int:
        return room(len(self.tokens), self.shares)

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
    pre = project(p, routing, run, clear=save)
    y = run(activations(p, pre), None, routing.offsets, p.count, p.down, p.down_bias)
    out = gather_sum(p, routing, y, p.spec.weigh == "output", p.out_dtype)
    return out, pre if save else pre.new_empty(0)


def project(p: Experts, routing: Routing, run: Callable[..., Tensor] = products, clear: bool = True) -> Tensor:
    """pre of all pairs [T*K,P*F]"""
    X, tokens = p.x, routing.order // max(1, p.ids.shape[1])
    if p.spec.weigh == "input":
        X, tokens = X[tokens] * p.weights.reshape(-1)[routing.order, None].to(X.dtype), None
    return run(X, tokens, routing.offsets, p.count, p.up, p.up_bias, clear)


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
    routing = Routing.of(p.ids, p.count)
    batches = list(Batch.all(p, routing))
    most, (_, F, _) = max((b.room for b in batches), default=0), p.features
    pairs = max((b.at.start + b.room for b in batches), default=0)
    inputs = wanted.x or wanted.weights and p.spec.weigh == "input"
    run = Backward(
        p, grad_out, hidden if hidden.numel() else project(p, routing), wanted, _unwritten(p, routing, wanted),
        dw=p.x.new_zeros(p.ids.numel(), dtype=compute_dtype(p.x.dtype)),
        dX=p.x.new_empty(max(pairs, p.ids.numel()), p.x.shape[1]) if inputs else None,
        D=p.x.new_empty(most, F),
        dpre=p.x.new_empty(most, p.spec.parts * F),
    )  # fmt: skip
    for batch in batches:
        run.through_down(batch)
        run.through_activation(batch)
        run.through_up(batch)
    sums, dw, dX = run.sums, run.dw, run.dX
    del run  # and with it the memory for a batch
    if wanted.x and dX is not None:
        dX[routing.offsets[-1] :] = 0
        sums = dataclasses.replace(
            sums, x=gather_sum(p, routing, dX[: p.ids.numel()], p.spec.weigh == "input", p.x.dtype)
        )
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


def _dense(t: Tensor) -> Tensor:
    """With neighbours in a row: columns of an interleaved layout are taken out first."""
    return t if t.stride(-1) == 1 else t.contiguous()


@dataclasses.dataclass(frozen=True)
class Backward:
    """One batch after the other.

    Of all pairs, in the order of experts: hidden, dw [T*K], and dX [T*K,H] where it is needed, the rows that dx is
    summed from. Of the n pairs of a batch: D [n,F], which become the activations, and dpre [n,P*F], in memory for the
    largest. sums: the gradients of the weights.
    """

    p: Experts
    grad_out: Tensor
    hidden: Tensor
    wanted: Wanted
    sums: ExpertGradients
    dw: Tensor
    dX: Tensor | None
    D: Tensor
    dpre: Tensor

    @property
    def outside(self) -> bool:
        return self.p.spec.weigh == "output"

    def G(self, batch: Batch) -> Tensor:
        """[room,H_out]; gathered again where it is needed, so that it need not be kept."""
        return taken(self.grad_out, batch.tokens, batch.room).to(self.p.x.dtype)

    def through_down(self, batch: Batch) -> None:
        """Writes D = G down^T, what the bias of down adds to dw, and ddown_bias."""
        p, G, dw = self.p, self.G(batch), self.dw[batch.at]
        for e, rows in batch.shares:
            more = whole(rows)
            times(self.D[more], G[more], p.of_expert(p.down, e)[0].mT)
            for bias in p.of_expert(p.down_bias, e) if self.outside else ():
                dw[rows] += G[rows].to(dw.dtype) @ bias.to(dw.dtype)
            for db in p.of_expert(self.sums.down_bias, e) if self.wanted.biases and p.down_bias else ():
                w = batch.w[rows] if self.outside else torch.ones_like(batch.w[rows])
                db.copy_((w.mT @ G[rows].to(dw.dtype))[0])

    def through_activation(self, batch: Batch) -> None:
        """Writes dpre and dw, weighted activations in D's place, and ddown."""
        p, n = self.p, len(batch.tokens)
        D, dw, units, target = self.D[:n], self.dw[batch.at], p.split(self.hidden[batch.at]), p.split(self.dpre[:n])
        compiled = p.compiled and p.ids.numel() * p.features[1] >= cpu_fused.LARGE
        step = cpu_fused.step_of(p.spec, p.x.dtype, dw.dtype, compiled)
        for part in chunks(D, p.config.chunk):
            D[part], found, *slopes = step(D[part], batch.w[part], *(_dense(t[part]) for t in units.parts))
            dw[part] += found
            for into, each in zip(target.parts, slopes):
                into[part] = each
        if self.wanted.projections:
            _over_rows([p.of_expert(self.sums.down, e) for e, _ in batch.shares], batch, self.D, self.G(batch))

    def through_up(self, batch: Batch) -> None:
        """Writes dX, dup and dup_bias; with weigh=input dw."""
        p, X = self.p, taken(self.p.x, batch.tokens, batch.room)
        for e, rows in batch.shares:
            ups = p.of_expert(p.up, e)
            if self.wanted.biases and p.up_bias:
                for db, part in zip(p.of_expert(self.sums.up_bias, e), self.dpre[rows].chunk(len(ups), -1)):
                    db.copy_(part.sum(0, dtype=self.dw.dtype))
            if self.dX is not None:
                more = whole(rows)
                found, parts = self.dX[batch.at.start :][more], self.dpre[more].chunk(len(ups), -1)
                times(found, parts[0], ups[0].mT)
                for part, W in zip(parts[1:], ups[1:]):
                    times(added := torch.empty_like(found), part, W.mT)
                    found += added
        n = len(batch.tokens)
        if self.dX is not None and not self.outside:
            self.dw[batch.at] = (self.dX[batch.at].to(self.dw.dtype) * X[:n]).sum(-1)
        if self.wanted.projections:
            if not self.outside:
                X[:n] *= batch.w.to(X.dtype)
            _over_rows([p.of_expert(self.sums.up, e) for e, _ in batch.shares], batch, X, self.dpre)


def _over_rows(sums: Sequence[Sequence[Tensor]], batch: Batch, left: Tensor, right: Tensor) -> None:
    """sums[i] = left^T right over the rows of share i, in columns for several; left and right are lost.

    Last share first: the rows behind one's own, which the product takes too, are done with and become zeros.
    """
    for into, (_, rows) in reversed(list(zip(sums, batch.shares))):
        more = whole(rows)
        if rows != more:
            left[rows.stop : more.stop] = 0
            right[rows.stop : more.stop] = 0
        for dW, part in zip(into, right[more].chunk(len(into), -1)):
            multiply(dW, left[more].mT, part)


KERNEL = ExpertKernel("cpu.experts", "cpu", supports, forward, backward)
