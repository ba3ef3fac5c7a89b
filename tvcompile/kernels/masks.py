"""Which pairs of a tile are dropped, evaluated only in its PARTIAL columns.

The part of keep that depends on nothing but kv - q is the same in many tiles: it is evaluated once and
kept. Everything else is evaluated where it is needed.
"""

from __future__ import annotations

import dataclasses
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
KEPT_SCORES = 1 << 20  # of a problem whose additive masks are kept from call to call


def hide(p: Problem, tile: Tile, x: Tensor) -> Tensor:
    """x [X,H,M,N] with -inf where the pair is not kept, in place."""
    for (c0, c1), dropped in _dropped_columns(p.spec.keep, tile, p.scope):
        x[..., c0:c1].masked_fill_(dropped, HIDDEN)
    return x


def additive(p: Problem, tile: Tile, bias: Expr) -> Tensor | None:
    """bias [X,H,M,N], -inf where the pair is not kept; None if that is 0 everywhere. Dims may be 1."""
    if p.scores > KEPT_SCORES or _captures(p.spec.keep) or _captures(bias):
        return _additive(p.spec.keep, bias, tile, p.scope)
    whole = Outline(p.scope.dtype, tuple(p.scope.sizes.items()))
    return _additive_of_positions(p.spec.keep, bias, tile, whole)


@functools.lru_cache(maxsize=1024)
def _captures(e: Expr) -> bool:
    return bool(E.loads(e))


@dataclasses.dataclass(frozen=True)
class Outline:
    """What a formula without captures reads of a scope."""

    dtype: torch.dtype
    sizes: tuple[tuple[str, int], ...]


@functools.lru_cache(maxsize=32)
def _additive_of_positions(keep: Expr, bias: Expr, tile: Tile, whole: Outline) -> Tensor | None:
    nowhere, cpu = (0, 0), torch.device("cpu")
    scope = Scope(nowhere, nowhere, nowhere, nowhere, {}, dict(whole.sizes), whole.dtype, cpu)
    return _additive(keep, bias, tile, scope)


def _additive(keep: Expr, bias: Expr, tile: Tile, whole: Scope) -> Tensor | None:
    columns = _dropped_columns(keep, tile, whole)
    if not columns and E.constant(bias) == 0.0:
        return None
    pieces = tile.scopes(whole)
    parts = [mods.tensor(bias, scope) for _, scope in pieces]
    shape = torch.broadcast_shapes(*[(*x.shape[:3], 1) for x in (*parts, *(d for _, d in columns))])
    mask = torch.empty(*shape[:3], tile.width, dtype=whole.dtype, device=whole.device)
    for ((c0, c1), _), part in zip(pieces, parts):
        mask[..., c0:c1] = part
    for (c0, c1), dropped in columns:
        mask[..., c0:c1].masked_fill_(dropped, HIDDEN)
    return mask


def _dropped_columns(keep: Expr, tile: Tile, whole: Scope) -> list[tuple[Span, Tensor]]:
    """(columns, True where the pair is not kept) for the columns where that needs a look."""
    if keep is E.TRUE:
        return []
    return [(cols, _dropped(keep, scope)) for cols, scope in tile.scopes(whole, tile.masked)]


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
    shared = [t for t in terms if t.free_symbols <= {E.Q, E.KV} and not E.loads(t) and mods.moves(t)]
    return E.and_(*shared), E.and_(*(t for t in terms if t not in shared))
