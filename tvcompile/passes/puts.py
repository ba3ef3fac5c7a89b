"""Rows that are put into a tensor at numbered places, or where a mask holds: added to what is there, or in its place.

    out[i] = y:  out[t, d] = sum_r (i[r] = t) y[r, d] + what was there before, where nothing is put

Of results that others take the place of it has to be proven that a token has one alone (parts.check_whole).
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

import sympy
from torch import fx

from .. import expr as E
from ..spec import Refuse
from .ids import once
from .movement import Index, axis
from .places import solved
from .rows import RowReader, mask_of
from .terms_of import Term

if TYPE_CHECKING:
    from .sums import Sums


def _scatter(s: Sums, a, n, idx):
    """out.scatter(0, i[:, None].expand_as(y), y) is out[i] = y."""
    r, rows, index = s.r, a.get("src"), a["index"]
    if axis(a["dim"], len(idx)) != 0 or not isinstance(rows, fx.Node) or a.get("reduce") is not None:
        raise Refuse("scatter along another dim than that of the tokens, or of a number", n)
    row = r.fresh(r.shape(rows)[0], "r")
    at = E.as_int(r.read(index, (row, *idx[1:]), r.position[n]))
    features = [x for x in idx[1:] if x.free_symbols]
    if r.shape(rows) != r.shape(index) or r.shape(rows)[1:] != r.shape(n)[1:] or E.mentions(at, *features):
        raise Refuse("scatter sends the features of one row to several tokens, or not all of them", n)
    return _put(s, n, a["self"], ((at,), (row,), rows), idx, replaced=True)


def _index_put(s: Sums, a, n, idx):
    """out[m] += y, out[m] = y, index_put(accumulate=True)"""
    r = s.r
    base, indices, values, adds = a["self"], a["indices"], a["values"], a.get("accumulate")
    if not r.shape(values):
        raise Refuse("results of experts are replaced by a number", n)
    row = (r.fresh(r.shape(values)[0], "r"), *_ones(n, indices))
    at = _places(r, n, indices, row)
    replaced = not adds
    if replaced and (new := _added_in_place(s, base, indices, values)) is not None:
        if mask_of(n) is None and not once(r, at):
            raise Refuse("out[i] += y adds only one of the rows that meet at one token", n)
        values, replaced = new, False
    return _put(s, n, base, (at, row, values), idx, replaced)


def _index_copy(s: Sums, a, n, idx):
    r = s.r
    if axis(a["dim"], len(idx)) != 0 or a["index"].meta["val"].dim() != 1:
        raise Refuse("index_copy along another dim than that of the tokens", n)
    row = r.fresh(r.shape(a["source"])[0], "r")
    at = (E.as_int(r.read(a["index"], (row,), r.position[n])),)
    return _put(s, n, a["self"], (at, (row,), a["source"]), idx, replaced=True)


def _masked_scatter(s: Sums, a, n, idx):
    """base.masked_scatter(m[:, None].expand_as(base), rows) is base[m] = rows."""
    r, mask, rows = s.r, a["mask"], a["source"]
    while mask.op == "call_function" and r.name(mask) in (
        "expand",
        "expand_as",
        "unsqueeze",
        "view",
        "reshape",
        "broadcast_to",
    ):
        mask = mask.args[0]
    lead = mask.meta["val"].dim()
    whole = E.as_bool(r.operand(a["mask"], idx, r.position[n]))
    alike = lead < len(idx) and whole == E.as_bool(r.read(mask, idx[:lead], r.position[n]))
    if not alike or r.shape(rows)[1:] != r.shape(n)[lead:] or r.shape(a["self"]) != r.shape(n):
        raise Refuse("masked_scatter takes single elements, not rows", n)
    row = r.fresh(r.shape(rows)[0], "r")
    at = tuple(r.nth(mask, c, row) for c in range(lead))
    return _put(s, n, a["self"], (at, (row,), rows), idx, replaced=True)


def _put(s: Sums, n: fx.Node, base: fx.Node, put: tuple[Index, Index, fx.Node], idx: Index, replaced: bool):
    """The terms of a base to which rows are added, or in which they take the places of what was there."""
    here, (at, row, values) = s.r.position[n], put
    links, places = list(zip(at, idx)), idx[: len(at)] if replaced else ()
    if len(s.r.shape(values)) != len(idx) - len(at) + len(row):
        raise Refuse("what is put is not a row for each place", n)
    before, rows = s.of(base, idx, here), [_at_its_id(s.r, t) for t in s.of(values, (*row, *idx[len(at) :]), here)]
    # What is put under a condition of its own is zero elsewhere, where the place is replaced too.
    everywhere = [not (t.bound or t.guards or t.links) for t in rows]
    if places and any(t.product for t in before) and not (all(everywhere) and any(t.product for t in rows)):
        raise Refuse("results of experts are replaced where there may be none", n)
    whole = places if before or not once(s.r, at) else ()  # else nothing is replaced: what is put is added to zeros
    after = [
        t.under(row[:1], links=links, whole=whole, puts=[n.name] if places and everywhere[i] else ())
        for i, t in enumerate(rows)
    ]
    if places:
        before = [t if t.product or t.links else t.under(puts=[n.name]) for t in before]
    return before + after


def _at_its_id(r: RowReader, t: Term) -> Term:
    """sum_e (ids[t] = e) p[t,e] is p[t, ids[t]], without a condition, where each id is one of the e."""
    for b, g in itertools.product(t.bound, t.guards):
        place = solved(g, b)
        if place is not None and E.within(place, r.ranges[b], r.bounds):
            bound, guards = (tuple(x for x in xs if x is not y) for xs, y in ((t.bound, b), (t.guards, g)))
            return _at_its_id(r, dataclasses.replace(t, bound=bound, guards=guards).put({b: place}, r.bounds))
    return t


def _ones(n: fx.Node, indices: list) -> Index:
    """Positions in the dims of 1 that a list of places [n,1] has behind its rows."""
    lists = [i for i in indices if i is not None] if mask_of(n) is None else []
    return (sympy.Integer(0),) * max((i.meta["val"].dim() - 1 for i in lists), default=0)


def _places(r: RowReader, n: fx.Node, indices: list, row: Index) -> Index:
    """Where row `row` is put."""
    if (mask := mask_of(n)) is not None:
        if indices[0] is not mask:
            raise Refuse("results of experts are put along another dim than that of the tokens", n)
        return tuple(r.nth(mask, c, row[0]) for c in range(mask.meta["val"].dim()))
    sizes = tuple(r.ranges.get(x, sympy.Integer(1)) for x in row)
    if any(i is None or r.shape(i) != sizes for i in indices):
        raise Refuse("results of experts are put at places that are no list with one for each row", n)
    return tuple(E.as_int(r.read(i, row, r.position[n])) for i in indices)


def _added_in_place(s: Sums, base: fx.Node, indices: list, values: fx.Node) -> fx.Node | None:
    """y of `out[i] = out[i] + y`"""
    total = s.uncast(values)
    if s.r.name(total) != "add" or len(total.args) != 2 or total.kwargs:
        return None
    parts = {x: s.uncast(x) for x in total.args if isinstance(x, fx.Node)}
    old = [x for x, y in parts.items() if s.r.name(y) == "index" and y.args[0] is base]
    if len(old) != 1 or not _same_places(s.r, parts[old[0]].args[1], indices):
        return None
    return next(x for x in total.args if x is not old[0])


def _same_places(r: RowReader, a: list, b: list) -> bool:
    if len(a) != len(b):
        return False
    return all(x is y or (x is not None and y is not None and _alike(r, x, y)) for x, y in zip(a, b))


def _alike(r: RowReader, x: fx.Node, y: fx.Node) -> bool:
    probe = tuple(r.fresh(n, "p") for n in r.shape(x))
    return r.shape(x) == r.shape(y) and r.read(x, probe, r.position[x] + 1) == r.read(y, probe, r.position[y] + 1)


PUTS = {
    "scatter": _scatter,
    "index_put": _index_put,
    "index_copy": _index_copy,
    "masked_scatter": _masked_scatter,
}
