"""Rows of one expert after the other, joined by torch.cat.

index_add(0, cat([tok0, tok1]), y)      adds y[r] to tok0[r], y[len(tok0) + r] to tok1[r]
cat([y[s == 0], y[s == 1]]), s sorted   row r of part e is the r-th place where s is e, so all are as they were
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy
from torch import fx

from .. import expr as E
from ..expr import Expr
from .chosen import numbered
from .rows import RowReader


def pieces(r: RowReader, index: fx.Node) -> list[tuple[fx.Node, Expr]]:
    """The lists that a list of places was joined from, and where each begins."""
    if r.name(index) != "cat":
        return [(index, sympy.Integer(0))]
    parts, starts = r.arguments(index)["tensors"], [sympy.Integer(0)]
    for part in parts:
        starts.append(sympy.expand(starts[-1] + r.shape(part)[0]))
    return list(zip(parts, starts))


def piece_at(r: RowReader, tensors: Sequence[fx.Node], d: int, at: Expr) -> tuple[fx.Node, Expr] | None:
    """(the tensor, the position in it) of a position that is where one begins and a position of it."""
    start = sympy.Integer(0)
    for tensor in tensors:
        own, size = sympy.expand(at - start), r.shape(tensor)[d]
        if own in r.ranges and r.ranges[own] == size:
            return tensor, own
        start = sympy.expand(start + size)
    return None


def sorted_parts(r: RowReader, tensors: Sequence[fx.Node]) -> list[fx.Node]:
    """A mask for each tensor, where their rows are those of all places in order; [] if that is not proven.

    They are if the masks say that ascending ids are 0, 1, and so on: before them and between them is none.
    """
    masks = [r.chosen_by(r.shape(t)[0]) for t in tensors]
    held = [m for m in masks if m is not None and len(r.shape(m)) == 1]
    if len(held) < len(masks) or len({r.shape(m) for m in held}) != 1:
        return []
    place = r.fresh(r.shape(held[0])[0], "p")
    found = [numbered(r.truth(E.as_bool(r.read(m, (place,), r.position[m])))) for m in held]
    ids = found[0][0] if found[0] else sympy.Integer(-1)
    if found != [(ids, n) for n in range(len(held))] or r.bounds(ids)[0] != 0:
        return []
    return held if any(_is_sorted(r, x, place, ids) for x in E.walk(ids) if E.op_of(x) == "perm") else []


def _is_sorted(r: RowReader, perm: Expr, place: Expr, ids: Expr) -> bool:
    """Is the id of a place the one that a sort put there, the least first?"""
    name, at = E.operands(perm)
    sort = r.nodes[name.name]
    a = r.arguments(sort)
    return at == place and not a.get("descending") and r.read(a["self"], (perm,), r.position[sort]) == ids
