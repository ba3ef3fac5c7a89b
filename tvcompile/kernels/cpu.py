"""Any Spec on a CPU: matrix products over tiles, each of which sees its whole kv range at once.

    s = scale * q_tile k_tile^T;  x = score(s), -inf where dropped;  P = softmax(x);  out = P v_tile
    backward: P again;  dS = P (dO v^T - rowsum(P dO v^T));  ds and dcaptures by autograd of score;
              dq = scale ds k;  dk += scale ds^T q;  dv += P^T dO

    tile [X,H,M,N] of scores; the heads of a group are rows of one product [X*H_kv, G*M, N]

Products are made in the tensors' dtype where the CPU has instructions for it, everything else in the
compute dtype. The softmax of a tile is recomputed rather than taken from lse: where all scores are
about finfo.min, lse has lost log(S_kv). Memory is O(S): the Config's scores at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import expr as E
from . import mods
from .dropout import keep_weights
from .masks import hide
from .mods import Tap
from .problem import Given, Gradients, Kernel, Need, Problem
from .tiles import Tile, tiles

ForwardTile = Callable[[Problem, Tile], tuple[Tensor, Tensor]]


def supports(need: Need) -> str | None:
    return None


# Products


@functools.lru_cache(maxsize=8)
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that matrix products are made in."""
    native = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype if dtype not in native or native[dtype]() else torch.float32


def product(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """scale * a @ b for [Y,M,K] and [Y,K,N]."""
    if scale == 1.0:
        return torch.bmm(a, b)
    return torch.baddbmm(a.new_zeros(()), a, b, beta=0, alpha=scale)


def fold(p: Problem, x: Tensor) -> Tensor:
    """[X,H,M,Y] -> [X*H_kv,G*M,Y] in the products' dtype."""
    X, H, M, Y = x.shape
    return x.to(product_dtype(p.q.dtype)).reshape(X * H // p.group, p.group * M, Y)


def fold_keys(p: Problem, x: Tensor) -> Tensor:
    """[X,H_kv,N,Y] -> [X*H_kv,N,Y] in the products' dtype."""
    return x.to(product_dtype(p.q.dtype)).flatten(0, 1)


def unfold(tile: Tile, x: Tensor, rows: int) -> Tensor:
    """[X*H_kv,G*rows,Y] -> [X,H,rows,Y]; with G = 1, [X*H_kv,rows,Y] -> [X,H_kv,rows,Y]."""
    X = (tile.b[1] - tile.b[0]) * tile.stack
    return x.view(X, -1, rows, x.shape[-1])


# One tile


@dataclasses.dataclass
class Weights:
    """Of one tile: P [X,H,M,N]; lse, empty [X,H,M,1]; sink [X,H,M,1] if there is one."""

    P: Tensor
    lse: Tensor
    empty: Tensor | None
    sink: Tensor | None


def _scores(p: Problem, tile: Tile, q: Tensor, k: Tensor) -> Tensor:
    """s [X,H,M,N], freshly made: in the products' dtype if nothing edits it, else the compute dtype."""
    s = unfold(tile, product(q, k.mT, p.spec.scale), tile.height)
    return s if p.spec.score == E.S and not p.spec.dropout else s.to(p.scope.dtype)


def _edited(p: Problem, tile: Tile, s: Tensor) -> Tensor:
    """score(s)"""
    if p.spec.score == E.S:
        return s
    parts = [
        mods.tensor(p.spec.score, scope.at(s=s[..., c0:c1])).expand_as(s[..., c0:c1])
        for (c0, c1), scope in tile.scopes(p.scope)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _row_max(x: Tensor) -> Tensor:
    """[..,N] -> [..,1]. 16-bit floats are compared as integers, which is eight times as fast: positive
    ones are in the order of their bits, negative ones in the opposite order."""
    if x.element_size() != 2:
        return x.amax(-1, keepdim=True)
    bits = x.view(torch.int16)
    high, low = bits.amax(-1, keepdim=True), bits.amin(-1, keepdim=True)
    return torch.where(high >= 0, high, low).view(x.dtype).float()


def _softmax(p: Problem, tile: Tile, x: Tensor) -> Weights:
    """The weights of scores with -inf where dropped; rows without any kept kv get 0."""
    top = _row_max(x)
    P = torch.softmax(x, -1)
    lse = top - _row_max(P).log_()
    empty = None if p.empty is None else top == -math.inf
    if empty is not None and bool(empty.any()):
        P.masked_fill_(empty, 0.0)
        lse.masked_fill_(empty, math.inf if p.spec.sink is None else -math.inf)
    if p.spec.sink is None:
        return Weights(P, lse, empty, None)
    (_, scope), *_ = tile.scopes(p.scope)
    sink = mods.tensor(p.spec.sink, scope).expand_as(lse)
    total = torch.logaddexp(lse, sink.detach())
    return Weights(P.mul_((lse - total).exp_()), total, empty, sink)


def _dropout(p: Problem, tile: Tile) -> Tensor:
    parts = [keep_weights(p.seed, scope, p.spec.dropout) for _, scope in tile.scopes(p.scope)]
    return torch.cat(parts, -1)


def forward_tile(p: Problem, tile: Tile) -> tuple[Tensor, Tensor]:
    """(out [X,H,M,D_v], lse [X,H,M])"""
    q = fold(p, tile.rows(p.q))
    k, v = (fold_keys(p, tile.keys(x)) for x in (p.k, p.v))
    x = _edited(p, tile, _scores(p, tile, q, k))
    w = _softmax(p, tile, hide(p, tile, x.contiguous()))
    P = w.P * _dropout(p, tile) if p.spec.dropout else w.P
    return unfold(tile, product(fold(p, P), v), tile.height), w.lse.squeeze(-1)


def backward_tile(p: Problem, tile: Tile, given: Given, sums: Gradients) -> None:
    """Adds the gradients of one tile."""
    p = dataclasses.replace(p, scope=p.scope.at(wanted=tuple(sums.captures), taps=[]))
    q, d_out = (fold(p, tile.rows(x)) for x in (p.q, given.grad_out))
    k, v = (fold_keys(p, tile.keys(x)) for x in (p.k, p.v))
    # In 16 bits the weights of a row do not add up to 1, and dS not to 0: K would drift.
    s = _scores(p, tile, q, k).to(p.scope.dtype)
    with mods.recorded():
        x = _edited(p, tile, s if p.spec.score == E.S else s.requires_grad_())
        shown = s if x is s else x.detach().contiguous()
        # What the formula saved for its own backward stays as it is.
        shown = shown.clone() if x is not s and tile.masked else shown
        w = _softmax(p, tile, hide(p, tile, shown))
    P = _weighed(p, w)
    d_P = unfold(tile, product(d_out, v.mT), tile.height).to(P.dtype)
    dropped = P
    if p.spec.dropout:
        drop = _dropout(p, tile)
        dropped, d_P = P * drop, d_P * drop
    tile.add_keys(sums.dv, unfold(tile, product(fold(p, dropped).mT, d_out), tile.width))
    d_x = torch._softmax_backward_data(d_P, P, -1, P.dtype)
    if p.empty in ("nan_cut", "mean_cut"):
        d_x.masked_fill_(w.empty, 0.0)
    if w.sink is not None and w.sink.requires_grad:
        # dsink = -exp(sink - lse) * rowsum(dO out)
        delta = (P * d_P).sum(-1, keepdim=True, dtype=p.scope.dtype)
        pull(w.sink, -(w.sink.detach() - w.lse).exp() * delta, p.scope.taps, sums)
    d_s = d_x if x is s else pull(x, d_x, p.scope.taps, sums, s)
    d_s = fold(p, torch.zeros_like(d_x) if d_s is None else d_s)
    d_q = product(d_s, k, p.spec.scale)
    tile.put_rows(sums.dq, unfold(tile, d_q, tile.height))
    tile.add_keys(sums.dk, unfold(tile, product(d_s.mT, q, p.spec.scale), tile.width))


def _weighed(p: Problem, w: Weights) -> Tensor:
    """P, where rows without any kept kv have the weights that `empty` says; w sees every kv then."""
    if w.empty is None or p.empty in (None, "zero") or not bool(w.empty.any()):
        return w.P
    return w.P.masked_fill_(w.empty, math.nan if "nan" in p.empty else 1.0 / w.P.shape[-1])


def pull(
    value: Tensor, d_value: Tensor, taps: list[Tap] | None, sums: Gradients, s: Tensor | None = None
) -> Tensor | None:
    """Differentiates a formula's value: the captures' part goes to the sums, that of s is returned."""
    taps = taps or []
    leaves = [tap.leaf for tap in taps] + ([] if s is None else [s])
    if not value.requires_grad or not leaves:
        return None
    found = torch.autograd.grad(value, leaves, d_value, allow_unused=True)
    for tap, g in zip(taps, found):
        if g is not None:
            tap.add(sums.captures[tap.name], g)
    return None if s is None else found[-1]


# All tiles


def forward(p: Problem, one_tile: ForwardTile = forward_tile) -> tuple[Tensor, Tensor]:
    out, lse = p.results()
    if p.k.shape[2] == 0 or lse.numel() == 0:
        return out.zero_(), lse.fill_(math.inf)
    for tile in tiles(p):
        rows, tile_lse = (one_tile if tile.spans else _blind_tile)(p, tile)
        tile.put_rows(out, rows)
        tile.put_rows(lse, tile_lse)
    return fill_empty(p, out, lse), lse


def _blind_tile(p: Problem, tile: Tile) -> tuple[Tensor, Tensor]:
    """(0, log(exp(sink)) or +inf): rows that see no kv at all."""
    heads = (tile.h_kv[1] - tile.h_kv[0]) * p.group
    shape = ((tile.b[1] - tile.b[0]) * tile.stack, heads, tile.height, 1)
    lse = p.q.new_full(shape, math.inf, dtype=p.scope.dtype)
    if p.spec.sink is not None:
        lse = mods.tensor(p.spec.sink, tile.scope(p.scope, (0, 0))).expand(shape)
    return p.q.new_zeros((*shape[:3], p.v.shape[3])), lse.reshape(shape[:3])


def fill_empty(p: Problem, out: Tensor, lse: Tensor) -> Tensor:
    """Writes what rows without any kept kv give into `out`, where lse is +inf."""
    if p.empty in (None, "zero"):
        return out
    empty = (lse == math.inf).unsqueeze(-1)
    if not bool(empty.any()):
        return out
    if "nan" in p.empty:
        return out.masked_fill_(empty, math.nan)
    if p.spec.dropout:
        return _fill_dropped_mean(p, out, empty)
    mean = p.v.mean(2, keepdim=True, dtype=p.scope.dtype).to(out.dtype)
    return out.copy_(torch.where(empty, mean.repeat_interleave(p.group, 1), out))


def _fill_dropped_mean(p: Problem, out: Tensor, empty: Tensor) -> Tensor:
    S_kv = p.k.shape[2]
    for tile in (e for t in tiles(p) for e in t.everything(S_kv, p.config.scores)):
        rows = tile.rows(empty)
        if bool(rows.any()):
            P = fold(p, _dropout(p, tile).div_(S_kv).expand(*rows.shape[:3], S_kv))
            mean = unfold(tile, product(P, fold_keys(p, tile.keys(p.v))), tile.height)
            tile.put_rows(out, torch.where(rows, mean.to(out.dtype), tile.rows(out)))
    return out


BackwardTile = Callable[[Problem, Tile, Given, Gradients], None]


def backward(
    p: Problem,
    given: Given,
    wanted: tuple[str, ...],
    one_tile: BackwardTile = backward_tile,
    spoilt: Callable[[Tensor], Tensor] | None = None,
) -> Gradients:
    """`spoilt` tells from lse the rows whose tiles backward_tile serves instead of `one_tile`."""
    sums = Gradients.zeros(p, wanted)
    if p.k.shape[2] == 0 or given.lse.numel() == 0:
        return sums
    averaging = None if p.empty in (None, "zero") else _some(given.lse == math.inf)
    apart = None if spoilt is None else _some(spoilt(given.lse))
    for tile in tiles(p):
        if averaging is not None and bool(tile.rows(averaging).any()):
            for dense in tile.everything(p.k.shape[2], p.config.scores):
                backward_tile(p, dense, given, sums)
        elif tile.spans and apart is not None and bool(tile.rows(apart).any()):
            backward_tile(p, tile, given, sums)
        elif tile.spans:
            one_tile(p, tile, given, sums)
    return sums


def _some(rows: Tensor) -> Tensor | None:
    return rows if bool(rows.any()) else None


KERNEL = Kernel("cpu.products", "cpu", supports, forward, backward)
