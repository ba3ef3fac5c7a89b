"""Rows put into a buffer of places: which rows a place of the buffer holds.

    zeros(E*C + 1, H).index_add(0, slot, rows)[n, h] = sum_r (slot[r] = n) rows[r, h]

Rows that are added meet in a place only where both are not zero; rows that are assigned replace what was there even
where they are zero. So a Way says apart under which conditions a row is put at a place, and when it is not zero there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from torch import fx

from .. import expr as E
from ..expr import Expr
from ..spec import Refuse
from .movement import Index, axis
from .places import cases, exclude, least, opened
from .projections import leaf_of
from .rows import EMPTY, RowReader, is_zeros
from .terms_of import Closed, Term, terms_of

ADDED = ("index_add", "scatter_add")
PUT = ("index_copy", "scatter", "index_put")


@dataclasses.dataclass(frozen=True)
class Way:
    """A sum of rows; of those that are put at a place, one that fails what it needs is zero."""

    term: Term
    needs: Term = Term()


def rows_put(
    r: RowReader, node: fx.Node, idx: Index, at: int, fix: Callable[[Expr], Expr], closed: Closed | None
) -> list[Way] | None:
    """The rows that a buffer holds at idx; None where it is no buffer. closed: how the rows are read."""
    node, idx, at = leaf_of(r, node, idx, at)
    if node.op != "call_function" or r.name(node) not in (*ADDED, *PUT) or r.cut(node):
        return None
    a, here = r.arguments(node), r.position[node]
    adds = r.name(node) in ADDED or bool(a.get("accumulate"))
    if a.get("alpha", 1) != 1 or a.get("reduce") is not None:
        raise Refuse("rows are scaled as they are added to the experts' places", node)
    found = _before(r, a["self"], idx, here, adds, fix, closed)
    rows, coordinates, value = _put_at(r, node, a, idx, r.read if closed is None else functools.partial(closed.read, r))
    terms = terms_of(r, fix(value))
    if not adds and not terms:
        raise Refuse("places of experts are overwritten", node)
    for guards, places in _cases(r, coordinates, node):
        address = [*guards, *(E.eq(r_at, place) for r_at, place in places)]
        for t in terms:
            row = Term(factors=t.factors, bound=t.bound, links=t.links)
            put = row.under(rows, [*address, *(t.guards if adds else ())])
            found.append(Way(put, Term() if adds else Term(guards=t.guards)))
    return found


def _before(r: RowReader, base: fx.Node, idx: Index, at: int, adds: bool, fix, closed) -> list[Way]:
    """What a buffer holds before rows are put there."""
    held = leaf_of(r, base, idx, at)[0]
    if is_zeros(r, held) or E.constant(r.read(base, idx, at)) == 0:
        return []
    if not adds and held.op == "call_function" and r.name(held) in EMPTY:
        return []
    ways = rows_put(r, base, idx, at, fix, closed)
    if ways is None:
        raise Refuse("the experts' places hold something before tokens are sent", base)
    return ways


def _put_at(
    r: RowReader, node: fx.Node, a: dict, idx: Index, read: Callable
) -> tuple[list[Expr], list[tuple[Expr, Expr]], Expr]:
    """(the rows, [(a position of the buffer, where the row is put)], the row's element)"""
    here = r.position[node]
    if r.name(node) == "index_put":
        indices = a["indices"]
        if any(i is None or i.meta["val"].dtype.itemsize == 1 for i in indices):
            raise Refuse("rows are put at places that are no lists of numbers", node)
        rank = max(len(r.shape(i)) for i in indices)
        sizes = [
            max((r.shape(i)[k - rank] for i in indices if len(r.shape(i)) >= rank - k), key=_large) for k in range(rank)
        ]
        rows = [r.fresh(n, "r") for n in sizes]
        at = [E.as_int(r.operand(i, tuple(rows), here)) for i in indices]
        value = read(a["values"], r.broadcast(a["values"], (*rows, *idx[len(at) :])), here)
        return rows, list(zip(idx, at)), value
    d = axis(a["dim"], len(idx))
    rows_of, index = a["source" if "source" in a else "src"] if "value" not in a else None, a["index"]
    if not isinstance(rows_of, fx.Node):
        raise Refuse("experts' places are filled with a number", node)
    shape = r.shape(rows_of)
    if (
        len(r.shape(index)) > 1
        and (r.shape(index) != shape)
        or any(n != m for k, (n, m) in enumerate(zip(shape, r.shape(node))) if k != d)
    ):
        raise Refuse("rows are put into a part of the experts' places", node)
    row = r.fresh(shape[d], "r")
    where = (*idx[:d], row, *idx[d + 1 :])
    at = r.operand(index, where if len(r.shape(index)) > 1 else (row,), here)
    return [row], [(idx[d], E.as_int(at))], read(rows_of, where, here)


def _large(n: Expr) -> tuple[bool, str]:
    return n != 1, str(n)


def _cases(r: RowReader, coordinates: list[tuple[Expr, Expr]], node: fx.Node):
    """(conditions, [(position, place)]) for every way that choices in the places go."""
    ways: list[tuple[tuple[Expr, ...], tuple]] = [((), ())]
    for position, place in coordinates:
        given = list(cases(place))
        ways = [((*g, *conditions), (*done, (position, x))) for g, done in ways for conditions, x in given]
    for guards, places in ways:
        if exclude(*guards):
            continue
        for _, place in places:
            low = least(r, opened(r, place, guards))
            if low is None or low < 0:
                raise Refuse("the places that tokens are sent to may count from the end", node)
        yield guards, places
