"""Experts with a capacity: each place (e, c) of an expert holds one token at most.

    rows[e, c] = sum_t dispatch[t, e, c] x[t]        dispatch[t, e, c] = (ids[t] = e) (c = place(t)) (place(t) < C)

Where place(t) counts the tokens of e up to t (a running sum of the ids' one-hot, less one), no two tokens of e have one
place. So what a token gets back from its place was computed from the token alone, and the sum over t is x[t]. Second
choices begin where the first ones of their expert end: place(t) + (number of first choices of e).
"""

from __future__ import annotations

import sympy
from torch import fx

from .. import expr as E
from ..expr import Expr, IntCall
from ..spec import Refuse
from .movement import axis
from .projections import number_of
from .routing import compared, solved
from .rows import RowReader, over as positions_of
from .terms_of import Term, terms_of

NOT_ALONE = "a place of an expert is not proven to hold one token at most"


def placed_row(
    r: RowReader, dispatched: list[Term], outer: Term, about: fx.Node, h: Expr, length: Expr, t: Expr
) -> fx.Node:
    """x where the row that `outer` reads back is x[t]."""
    ways = [way for term in dispatched for way in _alternatives(r, term)]
    alternatives = [alt for alt, _ in ways]
    sources, places = set(), []
    for alt in alternatives:
        (other,) = alt.bound
        if len(alt.factors) != 1 or E.op_of(alt.factors[0]) != "load" or alt.links:
            raise Refuse("the rows of an expert are no dispatched tokens", about)
        name, *idx = E.operands(alt.factors[0])
        node = r.nodes[name.name[1:]]
        if sympy.expand(number_of(r, node, tuple(idx)) - (other * length + h)) != 0 or r.ranges[other] != r.ranges.get(
            t, 1
        ):
            raise Refuse("the rows of an expert are no dispatched tokens", about)
        sources.add(node)
        places.append(_place(r, alt, outer, about))
    if len(sources) != 1:
        raise Refuse("the rows of an expert come from several tensors", about)
    _check_apart(r, places, about)
    if not any(_holds(alt, needs, outer, t) for alt, needs in ways):
        raise Refuse("the places that are read back are not those that tokens were sent to", about)
    return sources.pop()


def _alternatives(r: RowReader, term: Term) -> list[tuple[Term, tuple[Expr, ...]]]:
    """A condition `coefficient != 0` as the ways in which the coefficient is not zero, and its factors there."""
    for g in term.guards:
        if isinstance(g, sympy.Not) and E.op_of(g.args[0]) == "feq":
            x, zero = E.operands(g.args[0])
            if E.constant(zero) == 0:
                rest = Term(term.bound, tuple(o for o in term.guards if o is not g), term.links, term.factors)
                found = terms_of(r, x)
                if all(not f.bound and not f.links for f in found):
                    return [(rest.times(Term(guards=f.guards)), f.factors) for f in found]
    return [(term, ())]


def _holds(alt: Term, needs: tuple[Expr, ...], outer: Term, t: Expr) -> bool:
    """Was token t sent to the place that `outer` reads, unless its weight is zero?"""
    (other,) = alt.bound
    guards, factors = ({E.substitute(e, {other: t}) for e in es} for es in (alt.guards, needs))
    return guards <= set(outer.guards) and factors <= set(outer.factors)


def _place(r: RowReader, alt: Term, outer: Term, about: fx.Node) -> tuple[Expr, IntCall, Expr]:
    """(ids of the token, the running sum of their one-hot, what is added to it): the place is sum - 1 + added."""
    (other,) = alt.bound
    for e in outer.bound:
        ids = next((i for g in alt.guards if (i := compared(g, e)) is not None), None)
        if ids is not None:
            break
    else:
        raise Refuse(NOT_ALONE, about)
    known = {opened(r, E.substitute(g, {e: ids}), ids, set()) for g in alt.guards}
    for c in outer.bound:
        place = next((p for g in alt.guards if c != e and (p := solved(g, c)) is not None), None)
        if place is not None:
            break
    else:
        raise Refuse(NOT_ALONE, about)
    if E.op_of(place) in ("clamp_max", "min") and E.at_most(r.ranges[c], E.operands(place)[1]):
        place = E.operands(place)[0]  # min(x, n) = c < n is x = c
    place = opened(r, E.substitute(place, {e: ids}), ids, known)
    sums = [x for x in place.atoms(IntCall) if E.op_of(x) == "cumsum"]
    for x in sums:
        added = sympy.expand(place - x + 1)
        name, at, expert = E.operands(x) if len(E.operands(x)) == 3 else (None, None, None)
        if (
            at == other
            and expert == ids
            and not any(E.mentions(y, other) for y in _but(added, ids))
            and _counts(r, name, ids, other)
        ):
            return ids, x, added
    raise Refuse(NOT_ALONE, about)


def _but(e: Expr, ids: Expr) -> list[Expr]:
    """The formula with the token's expert made a constant."""
    return [E.substitute(e, {ids: sympy.Integer(0)})]


def _counts(r: RowReader, name, ids: Expr, other: Expr) -> bool:
    """Is the running sum one over tokens, of the one-hot of their ids?"""
    node = r.nodes[name.name]
    a = r.arguments(node)
    source = a["self"]
    if axis(a["dim"], len(r.shape(source))) != 0:
        return False
    e = r.fresh(r.shape(source)[1], "e")
    hit = r.read(source, (other, e), r.position[node])
    return hit == E.where(E.eq(ids, e), sympy.Integer(1), sympy.Integer(0))


def _check_apart(r: RowReader, places: list, about: fx.Node) -> None:
    """Places of later choices begin after all of the earlier ones, expert by expert."""
    expected = sympy.Integer(0)
    for ids, _, added in sorted(places, key=lambda p: len(sympy.Add.make_args(p[2])) if p[2] != 0 else 0):
        counts = [x for x in sympy.Add.make_args(added) if x != 0]
        if len(counts) != expected:
            raise Refuse(NOT_ALONE, about)
        for count, (_, before, _) in zip(counts, places):
            if E.op_of(count) != "count" or not _total(r, count, before, ids):
                raise Refuse(NOT_ALONE, about)
        expected = expected + 1
    if len({p[1] for p in places}) != len(places):
        raise Refuse(NOT_ALONE, about)


def _total(r: RowReader, count: Expr, running: IntCall, ids: Expr) -> bool:
    """Is a count the whole of an earlier running sum, at the same expert?"""
    node = r.nodes[E.operands(count)[0].name]
    source, at, gone = positions_of(r, node, E.operands(count)[1:])
    summed = r.arguments(r.nodes[E.operands(running)[0].name])["self"]
    if len(gone) != 1 or at[0] != gone[0] or at[1] != ids:
        return False
    probe = (r.fresh(r.shape(summed)[0], "p"), r.fresh(r.shape(summed)[1], "p"))
    return r.read(source, probe, r.position[node]) == r.read(summed, probe, r.position[node])


def opened(r: RowReader, e: Expr, ids: Expr, known: set[Expr]) -> Expr:
    """A formula at ids == e: sums over experts under their one-hot are their only term; what is known to hold holds."""
    table = {}
    for x in e.atoms(IntCall, E.BoolCall):
        if E.op_of(x) == "count":
            only = _only_term(r, x, ids, known)
            if only is not None:
                table[x] = only
    e = E.substitute(e, table) if table else e
    return _clamped(e, known)


def _only_term(r: RowReader, count: Expr, ids: Expr, known: set[Expr]) -> Expr | None:
    """sum_e (ids = e) f(e) is f(ids)."""
    node = r.nodes[E.operands(count)[0].name]
    source, at, gone = positions_of(r, node, E.operands(count)[1:])
    if len(gone) != 1:
        return None
    total = sympy.Integer(0)
    for term in terms_of(r, r.read(source, at, r.position[node])):
        hit = [g for g in term.guards if compared(g, gone[0]) == ids]
        rest = {E.substitute(g, {gone[0]: ids}) for g in term.guards if g not in hit}
        if not hit or term.bound or term.links or not rest <= known:
            return None
        total = total + sympy.Mul(*[E.substitute(f, {gone[0]: ids}) for f in term.factors])
    return sympy.expand(total)


def _clamped(e: Expr, known: set[Expr]) -> Expr:
    """min(x, n) is x where x <= n is known; a running sum over a token's own kind is at least 1 there."""
    table = {}
    for x in e.atoms(IntCall):
        if E.op_of(x) in ("clamp_min", "max") and E.operands(x)[1] == 0:
            value = E.operands(x)[0]
            if any(E.op_of(y) == "cumsum" for y in sympy.Add.make_args(sympy.expand(value + 1))):
                table[x] = value
    e = E.substitute(e, table) if table else e
    table = {}
    for x in e.atoms(IntCall):
        if E.op_of(x) in ("clamp_max", "min"):
            value, most = E.operands(x)
            if E.le(value, most) in known:
                table[x] = value
    return E.substitute(e, table) if table else e
