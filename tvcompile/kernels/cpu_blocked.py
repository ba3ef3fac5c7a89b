"""Any Spec, by matrix products over blocks of q rows; a block sees its whole kv range at once.

    s = scale * q_block k^T;  x = score(s) where kept, else -inf;  out = softmax(x) v
    backward: P = softmax(x) again;  dS = P (dO v^T - rowsum(dO out));  ds, dcaptures by autograd of score

    block [B,H,M,N] of scores, the heads of a group as rows of one product: [B,H_kv,G*M,N]

Memory is O(S): a block holds at most BUDGET scores. The softmax of a block is recomputed rather than
taken from lse: where all scores are about finfo.min, lse has lost log(S_kv).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import expr as E
from ..spec import AttentionSpec
from . import mods
from .dropout import keep_weights
from .mods import Scope, Span
from .problem import Gradients, Kernel, Problem

BUDGET = 1 << 21
BLOCK_M = 128


def supports(spec: AttentionSpec, dtype: torch.dtype, wanted: tuple[str, ...]) -> str | None:
    return None


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows of q in some batch elements and kv heads, and the kv positions they see."""

    b: Span
    h_kv: Span
    q: Span
    kv: Span

    def heads(self, group: int) -> Span:
        return self.h_kv[0] * group, self.h_kv[1] * group

    def scope(self, p: Problem) -> Scope:
        return p.scope.at(b=self.b, h=self.heads(p.group), q=self.q, kv=self.kv)

    def of_q(self, x: Tensor, group: int) -> Tensor:
        """[B,H,S_q,..] -> [b,h,M,..]"""
        h0, h1 = self.heads(group)
        return x[self.b[0] : self.b[1], h0:h1, self.q[0] : self.q[1]]

    def of_kv(self, x: Tensor) -> Tensor:
        """[B,H_kv,S_kv,D] -> [b,h_kv,N,D]"""
        return x[self.b[0] : self.b[1], self.h_kv[0] : self.h_kv[1], self.kv[0] : self.kv[1]]

    def fold(self, x: Tensor, group: int) -> Tensor:
        """[b,h,M,X] -> [b,h_kv,G*M,X]"""
        return x.reshape(x.shape[0], x.shape[1] // group, group * x.shape[2], x.shape[3])

    def unfold(self, x: Tensor, group: int) -> Tensor:
        """[b,h_kv,G*M,X] -> [b,h,M,X]"""
        return x.view(x.shape[0], x.shape[1] * group, x.shape[2] // group, x.shape[3])


def tiles(p: Problem) -> Iterator[Tile]:
    """Tiles that cover all rows, none with more than about BUDGET scores."""
    (B, _, S_q, _), H_kv, S_kv = p.q.shape, p.k.shape[1], p.k.shape[2]
    M = max(1, min(BLOCK_M, BUDGET // max(1, p.group * S_kv)))
    for q0 in range(0, S_q, M):
        q1 = min(S_q, q0 + M)
        per_head = p.group * (q1 - q0) * max(1, S_kv)
        heads = max(1, min(H_kv, BUDGET // per_head))
        batch = max(1, min(B, BUDGET // (per_head * H_kv)))
        for b0 in range(0, B, batch):
            for h0 in range(0, H_kv, heads):
                yield Tile(
                    (b0, min(B, b0 + batch)), (h0, min(H_kv, h0 + heads)), (q0, q1), (0, S_kv)
                )


def _dot(p: Problem, tile: Tile) -> Tensor:
    """s [b,h,M,N] in the compute dtype."""
    rows = tile.fold(tile.of_q(p.q, p.group).to(p.scope.dtype), p.group)
    s = torch.matmul(rows, tile.of_kv(p.k).to(p.scope.dtype).mT)
    return tile.unfold(s.mul_(p.spec.scale), p.group)


def _scores(p: Problem, scope: Scope, s: Tensor) -> Tensor:
    return s if p.spec.score == E.S else mods.tensor(p.spec.score, scope.at(s=s)).expand_as(s)


def _softmax(p: Problem, scope: Scope, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(weights [b,h,M,N], lse [b,h,M,1], empty rows [b,h,M,1]) of scores x, which it overwrites."""
    top = x.amax(-1, keepdim=True)
    empty = top == -math.inf
    weights = x.sub_(top if p.empty is None else top.masked_fill(empty, 0.0)).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = total.log() + top
    if p.spec.sink is not None:
        lse = torch.logaddexp(lse, mods.tensor(p.spec.sink, scope).expand_as(lse))
        empty = torch.zeros_like(empty)
        return weights.mul_((top.clamp_min(torch.finfo(x.dtype).min) - lse).exp_()), lse, empty
    if p.empty is not None:
        total, lse = total.masked_fill(empty, 1.0), lse.masked_fill(empty, math.inf)
    return weights.div_(total), lse, empty


def _masked(p: Problem, scope: Scope, x: Tensor) -> Tensor:
    """A fresh tensor with the scores, -inf where the pair is not kept."""
    if p.spec.keep is E.TRUE:
        return x.clone()
    return x.masked_fill(mods.tensor(p.spec.keep, scope).logical_not(), -math.inf)


def _fill_empty(p: Problem, weights: Tensor, empty: Tensor) -> None:
    """The weights of rows without any kept kv, in place."""
    if p.empty in (None, "zero") or not bool(empty.any()):
        return
    value = math.nan if p.empty.startswith("nan") else 1.0 / weights.shape[-1]
    weights.masked_fill_(empty, value)


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    out, lse = p.results()
    if p.k.shape[2] == 0:
        return out.fill_(0.0), lse.fill_(math.inf)
    for tile in tiles(p):
        scope = tile.scope(p)
        x = _masked(p, scope, _scores(p, scope, _dot(p, tile)))
        weights, tile_lse, empty = _softmax(p, scope, x)
        _fill_empty(p, weights, empty)
        if p.spec.dropout:
            weights = weights * keep_weights(p.seed, scope, p.spec.dropout)
        rows = torch.matmul(tile.fold(weights, p.group), tile.of_kv(p.v).to(p.scope.dtype))
        tile.of_q(out, p.group).copy_(tile.unfold(rows, p.group))
        tile.of_q(lse, p.group).copy_(tile_lse[..., 0])
    return out, lse


def backward(
    p: Problem, grad_out: Tensor, out: Tensor, lse: Tensor, wanted: tuple[str, ...]
) -> Gradients:
    sums = Gradients(
        *(torch.zeros_like(x, dtype=p.scope.dtype) for x in (p.q, p.k, p.v)),
        {n: torch.zeros_like(p.scope.captures[n], dtype=p.scope.dtype) for n in wanted},
    )
    if p.k.shape[2]:
        for tile in tiles(p):
            backward_tile(p, tile, grad_out, out, sums)
    return sums


def backward_tile(p: Problem, tile: Tile, grad_out: Tensor, out: Tensor, sums: Gradients) -> None:
    """Adds the gradients of one tile."""
    G, dtype = p.group, p.scope.dtype
    leaves = {n: p.scope.captures[n].detach().requires_grad_() for n in sums.captures}
    scope = tile.scope(p).at(captures={**p.scope.captures, **leaves})
    s = _dot(p, tile).requires_grad_(p.spec.score != E.S)
    with torch.enable_grad():
        x = _scores(p, scope, s)
    with torch.no_grad():
        weights, tile_lse, empty = _softmax(p, scope, _masked(p, scope, x.detach()))
        _fill_empty(p, weights, empty)
        d_out, v = tile.of_q(grad_out, G).to(dtype), tile.of_kv(p.v).to(dtype)
        delta = (d_out * tile.of_q(out, G)).sum(-1, keepdim=True)
        d_weights = tile.unfold(torch.matmul(tile.fold(d_out, G), v.mT), G)
        dropped = weights
        if p.spec.dropout:
            drop = keep_weights(p.seed, scope, p.spec.dropout)
            dropped, d_weights = weights * drop, d_weights * drop
        tile.of_kv(sums.dv).add_(torch.matmul(tile.fold(dropped, G).mT, tile.fold(d_out, G)))
        d_x = weights * d_weights.sub_(delta)
        if p.empty in ("nan_cut", "mean_cut"):
            d_x.masked_fill_(empty, 0.0)
    d_s = _score_gradient(x, s, d_x, leaves, sums)
    if p.spec.sink is not None:
        _sink_gradient(p, scope, delta, tile_lse, leaves, sums)
    d_s = tile.fold(d_s.mul(p.spec.scale), G)
    rows, keys = tile.fold(tile.of_q(p.q, G).to(dtype), G), tile.of_kv(p.k).to(dtype)
    tile.of_q(sums.dq, G).add_(tile.unfold(torch.matmul(d_s, keys), G))
    tile.of_kv(sums.dk).add_(torch.matmul(d_s.mT, rows))


def _score_gradient(
    x: Tensor, s: Tensor, d_x: Tensor, leaves: dict[str, Tensor], sums: Gradients
) -> Tensor:
    """ds; the captures' part goes to the sums."""
    if x is s:
        return d_x
    names = list(leaves)
    d_s, *others = torch.autograd.grad(x, [s, *leaves.values()], d_x, allow_unused=True)
    for name, g in zip(names, others):
        if g is not None:
            sums.captures[name].add_(g)
    return torch.zeros_like(d_x) if d_s is None else d_s


def _sink_gradient(
    p: Problem,
    scope: Scope,
    delta: Tensor,
    lse: Tensor,
    leaves: dict[str, Tensor],
    sums: Gradients,
) -> None:
    """dsink = -exp(sink - lse) * rowsum(dO out)"""
    with torch.enable_grad():
        sink = mods.tensor(p.spec.sink, scope).expand_as(lse)
    if not sink.requires_grad:
        return
    d_sink = -(sink.detach() - lse).exp() * delta
    grads = torch.autograd.grad(sink, list(leaves.values()), d_sink, allow_unused=True)
    for name, g in zip(leaves, grads):
        if g is not None:
            sums.captures[name].add_(g)


BLOCKED = Kernel("cpu.blocked", "cpu", supports, forward, backward)
