"""Which pairs of a tile are dropped, evaluated only in its PARTIAL columns.

The part of keep that depends on nothing but kv - q is the same in many tiles: it is evaluated once and
kept. Everything else is evaluated where it is needed.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .. import expr as E
from ..expr import Expr
from . import mods
from .mods import Scope, Span
from .problem import Problem
from .tiles import Tile

HIDDEN = -math.inf


def hide(p: Problem, tile: Tile, x: Tensor) -> Tensor:
    """x [X,H,M,N] with -inf where the pair is not kept, in place."""
    for (c0, c1), dropped in dropped_columns(p, tile):
        x[..., c0:c1].masked_fill_(dropped, HIDDEN)
    return x


def dropped_columns(p: Problem, tile: Tile) -> list[tuple[Span, Tensor]]:
    """(columns, True where the pair is not kept) for the columns where that needs a look."""
    if p.spec.keep is E.TRUE:
        return []
    return [(cols, _dropped(p.spec.keep, s)) for cols, s in tile.scopes(p, tile.masked)]


def _dropped(keep: Expr, scope: Scope) -> Tensor:
    shared, own = _parts(keep)
    found = None
    if shared is not E.TRUE:
        (q0, q1), (k0, k1) = scope.q, scope.kv
        found = _shared(shared, q1 - q0, k1 - k0, k0 - q0, scope.device)
    if own is not E.TRUE:
        dropped = mods.tensor(own, scope).logical_not()
        found = dropped if found is None else found | dropped
    assert found is not None
    return found


@functools.lru_cache(maxsize=512)
def _shared(keep: Expr, rows: int, columns: int, offset: int, device: torch.device) -> Tensor:
    q0 = max(0, -offset)
    scope = Scope(
        b=(0, 1),
        h=(0, 1),
        q=(q0, q0 + rows),
        kv=(q0 + offset, q0 + offset + columns),
        captures={},
        sizes={},
        dtype=torch.float32,
        device=device,
    )
    return mods.tensor(keep, scope).logical_not()


@functools.lru_cache(maxsize=256)
def _parts(keep: Expr) -> tuple[Expr, Expr]:
    """(a, b) with keep == a & b, where a depends on kv - q only."""
    terms = keep.args if isinstance(keep, E.sympy.And) else (keep,)
    shared = [t for t in terms if moves(t)]
    return E.and_(*shared), E.and_(*(t for t in terms if t not in shared))


@functools.lru_cache(maxsize=256)
def moves(e: Expr) -> bool:
    """Whether the formula keeps its value when q and kv move together."""
    if e.free_symbols - {E.Q, E.KV} or E.loads(e):
        return False
    t = E.index("t")
    return E.substitute(e, {E.Q: E.Q + t, E.KV: E.KV + t}) == e
