"""Integer formulas that number places: cases, ranges, and what an equation of places says about its parts.

    where(keep, ids*C + place, E*C) = e*C + c     keep  and  ids = e  and  place = c     (0 <= place < C)

A place is a running sum of a one-hot, read at the token's own expert, less one: so it is no less than 0. Sums over
experts under their one-hot are opened: sum_e (ids = e) f(e) is f(ids), where ids is proven to be one of the e.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Iterator

import sympy

from .. import expr as E
from ..expr import Expr, IntCall
from .counts import summed, whole
from .ids import at_own_ids, compared, distinct, in_range
from .movement import axis
from .rows import RowReader, over as positions_of
from .terms_of import terms_of

ARITHMETIC = ("clamp_min", "clamp_max", "min", "max", "where", "neg")


def solved(guard: Expr, symbol: Expr) -> Expr | None:
    """P where the guard says P == symbol."""
    if E.op_of(guard) != "eq" or not E.mentions(guard, symbol):
        return None
    gap = E.operands(guard)[0]
    for sign in (1, -1):
        other = sympy.expand(sign * gap + symbol)
        if not E.mentions(other, symbol):
            return other
    return None


def flat(conditions: Iterable[Expr]) -> tuple[Expr, ...]:
    return tuple(x for c in conditions for x in (c.args if isinstance(c, sympy.And) else [c]))


def exclude(*conditions: Expr) -> bool:
    """Do conditions exclude each other?"""
    parts = set(flat(conditions))
    return any(E.not_(x) in parts for x in parts) or E.and_(*parts) is E.FALSE or _two_numbers(parts)


def _two_numbers(conditions: Collection[Expr]) -> bool:
    """Is one formula said to be two numbers?"""
    found: dict[Expr, Expr] = {}
    for c in conditions:
        if E.op_of(c) == "eq":
            number, rest = E.operands(c)[0].as_coeff_Add()
            if rest not in found and -rest in found:
                number, rest = -number, -rest
            if found.setdefault(rest, number) != number:
                return True
    return False


def cases(e: Expr, guards: tuple[Expr, ...] = ()) -> Iterator[tuple[tuple[Expr, ...], Expr]]:
    """(conditions, value there) for every way that the choices in a formula of numbers may go."""
    choice = next((x for x in _numbers(e) if E.op_of(x) == "where"), None)
    if choice is None:
        yield guards, e
        return
    c, a, b = E.operands(choice)
    for condition, value in ((c, a), (E.not_(c), b)):
        if not exclude(condition, *guards):
            yield from cases(sympy.expand(E.substitute(e, {choice: value})), (*guards, condition))


def _numbers(e: Expr) -> Iterator[Expr]:
    """The parts of a formula that it is computed from, not where tensors are read."""
    yield e
    if isinstance(e, (sympy.Add, sympy.Mul)) or E.op_of(e) in ARITHMETIC:
        for x in E.operands(e):
            if E.kind(x) != "bool":
                yield from _numbers(x)


# Sums over experts


def opened(r: RowReader, e: Expr, known: Collection[Expr]) -> Expr:
    """A formula in which sums over experts under a one-hot are their only term, and what is known to hold holds."""
    e = at_own_ids(r, e)
    table: dict[Expr, Expr] = {}
    for x in e.atoms(IntCall, E.BoolCall):
        if E.op_of(x) == "count":
            only = _only_term(r, x, known)
            if only is not None:
                table[x] = only
    table |= {x: E.TRUE for x in known if x != e}
    e = E.substitute(e, table) if table else e
    return _clamped(r, e, known)


def _only_term(r: RowReader, count: Expr, known: Collection[Expr]) -> Expr | None:
    """sum_e (ids = e) f(e) is f(ids)."""
    node = r.nodes[E.operands(count)[0].name]
    source, at, gone = positions_of(r, node, E.operands(count)[1:])
    if len(gone) != 1 or gone[0] == 0:
        return None
    total = sympy.Integer(0)
    for term in terms_of(r, whole(r, source, at, r.position[node])):
        own = next((i for g in term.guards if (i := _only_place(r, g, gone[0])) is not None), None)
        if own is None or term.bound or term.links:
            return None
        guards = (r.truth(E.substitute(g, {gone[0]: own})) for g in term.guards)
        if not {g for g in guards if g is not E.TRUE} <= set(known):
            return None
        total = total + sympy.Mul(*[E.substitute(f, {gone[0]: own}) for f in term.factors])
    return sympy.expand(total)


def _only_place(r: RowReader, guard: Expr, s: Expr) -> Expr | None:
    """The one value of s where a guard holds: of ids = s, or of ids[t,s] = ids[t,k] where ids differ."""
    ids = compared(guard, s)
    if ids is not None:
        return ids if in_range(r, ids, r.ranges[s]) else None
    sides = [x.as_coeff_Mul() for x in sympy.Add.make_args(E.operands(guard)[0])] if E.op_of(guard) == "eq" else []
    if len(sides) != 2 or any(E.op_of(x) != "load" for _, x in sides) or {a for a, _ in sides} != {1, -1}:
        return None
    (name, *at), (other, *there) = sorted((E.operands(x) for _, x in sides), key=lambda x: x[-1] != s)
    alike = name == other and at[:-1] == there[:-1] and at[-1] == s and not E.mentions(sympy.Tuple(*there), s)
    return there[-1] if alike and distinct(r, r.nodes[name.name[1:]]) else None


def only_factors(r: RowReader, e: Expr, known: Collection[Expr]) -> Expr:
    """The same of floats: a sum of products over experts is its only one, where the rest of its conditions is known."""
    table = {}
    for x in e.atoms(E.FloatCall):
        terms = terms_of(r, x) if E.op_of(x) in ("dot", "reduce") else []
        if len(terms) != 1 or len(terms[0].bound) != 1 or terms[0].links:
            continue
        (term,), (expert,) = terms, terms[0].bound
        own = next((i for g in term.guards if (i := compared(g, expert)) is not None), None)
        if own is None or not in_range(r, own, r.ranges[expert]):
            continue
        rest = {E.substitute(g, {expert: own}) for g in term.guards if compared(g, expert) != own}
        if rest <= set(known):
            factors = (E.substitute(f, {expert: own}) for f in term.factors)
            table[x] = functools.reduce(lambda a, b: E.apply("mul", a, b), factors, E.number(1.0))
    return E.substitute(e, table) if table else e


def _clamped(r: RowReader, e: Expr, known: Collection[Expr]) -> Expr:
    """min(x, n) is x where x <= n is known; max(x, 0) is x where x is no less than 0."""
    for op, holds in (
        ("max", lambda value, other: other == 0 and (low := least(r, value, known)) is not None and low >= 0),
        ("min", lambda value, other: E.le(value, other) in known),
    ):
        table = {}
        for x in e.atoms(IntCall):
            if E.op_of(x) in (op, {"max": "clamp_min", "min": "clamp_max"}[op]) and holds(*E.operands(x)):
                table[x] = E.operands(x)[0]
        e = E.substitute(e, table) if table else e
    return e


# Ranges


def least(r: RowReader, e: Expr, known: Collection[Expr] = ()) -> int | None:
    """A number that an opened formula is never below where what is known holds, or None."""
    if e.is_Integer:
        return int(e)
    if e in r.ranges:
        return 0
    if isinstance(e, sympy.Add):
        parts = [least(r, x, known) for x in e.args]
        return None if any(p is None for p in parts) else sum(p for p in parts if p is not None)
    if isinstance(e, sympy.Mul):
        lows = [least(r, x, known) for x in e.args]
        return None if any(x is None or x < 0 for x in lows) else math.prod(x for x in lows if x is not None)
    op, args = E.op_of(e), E.operands(e)
    if op in ("clamp_min", "max", "clamp_max", "min"):
        lows = [least(r, x, known) for x in args]
        found = [x for x in lows if x is not None]
        if op in ("clamp_min", "max"):
            return max(found, default=None)
        return min(found) if len(found) == 2 else None
    if op in ("load", "rank", "rank_of", "//", "%"):
        low, _ = r.bounds(e)
        return int(low) if low is not None and low.is_Integer else None
    if op == "where":
        lows = [least(r, x, known) for x in args[1:]]
        return None if any(x is None for x in lows) else min(x for x in lows if x is not None)
    return _least_sum(r, e, known) if op in ("count", "cumsum") else None


def _least_sum(r: RowReader, e: Expr, known: Collection[Expr]) -> int | None:
    """Sums of ones and zeros: 0, or 1 for a running sum that has counted its own place."""
    node = r.nodes[E.operands(e)[0].name]
    at = E.operands(e)[1:]
    source = r.arguments(node)["self"]
    low = least(r, whole(r, source, summed(r, node), r.position[node]))
    if low is None or low < 0:
        return None
    own = opened(r, whole(r, source, at, r.position[node]), known) if E.op_of(e) == "cumsum" else 0
    return 1 if own == 1 else 0


def decided(r: RowReader, guards: Collection[Expr]) -> list[Expr] | None:
    """Guards without those that ranges prove; None where ranges exclude one."""
    left = []
    for g in guards:
        call = g.args[0] if isinstance(g, sympy.Not) else g
        low = least(r, opened(r, E.operands(call)[0], guards), guards) if E.op_of(call) == "le" else None
        if low is None or low < 1:
            left.append(g)
        elif call is g:
            return None
    return left


def below(r: RowReader, e: Expr, size: Expr, known: Collection[Expr]) -> bool:
    """Is e < size, where what is known holds?"""
    if E.op_of(e) in ("clamp_max", "min") and any(x.is_Integer and E.at_most(x + 1, size) for x in E.operands(e)):
        return True
    low, high = r.bounds(e)
    if high is not None and E.at_most(high + 1, size):
        return True
    return exclude(E.not_(E.lt(e, size)), *known)


# Equations


def digits(r: RowReader, guards: tuple[Expr, ...], symbols: Collection[Expr]) -> tuple[Expr, ...]:
    """Guards in which e*C + c = v*C + p became e = v and c = p, where 0 <= p < C is proven; e may be a number."""
    guards, found = flat(guards), []
    for g in guards:
        found += _digits(r, g, symbols, guards) if E.op_of(g) == "eq" else [g]
    return tuple(found)


def _digits(r: RowReader, guard: Expr, symbols: Collection[Expr], guards: tuple[Expr, ...]) -> list[Expr]:
    parts = [(x, *x.as_coeff_Mul()) for x in sympy.Add.make_args(E.operands(guard)[0])]
    found = [(int(a), s) for _, a, s in parts if s in symbols and a.is_Integer]
    left, right = [p for p in found if p[0] < 0], [p for p in found if p[0] > 0]
    moving = sorted(left if len(left) > len(right) else right, key=lambda p: abs(p[0]))
    if not moving:
        return [guard]
    value = sympy.Add(*(x for x, a, s in parts if (a, s) not in moving)) * (-1 if moving[0][0] > 0 else 1)
    (one, low), *rest = [(abs(a), s) for a, s in moving]
    size = r.ranges[low]
    if one != 1 or not size.is_Integer or any(a % size for a, _ in rest) or E.mentions(value, *(s for _, s in moving)):
        return [guard]
    number, terms = sympy.expand(value).as_coeff_Add()
    high = sympy.Add(*(x for x in sympy.Add.make_args(terms) if x.as_coeff_Mul()[0] % size == 0))
    if not rest and high == 0:
        return [guard]
    known = {opened(r, g, ()) for g in guards}
    for part in dict.fromkeys((number, number % size, number % size - size)):
        digit = sympy.expand(terms - high + part)
        shown = opened(r, digit, known)
        bottom = least(r, shown)
        if bottom is not None and bottom >= 0 and below(r, shown, size, known):
            above = sympy.Add(*(a // size * s for a, s in rest))
            more = E.eq(above, sympy.expand((high + number - part) / size))
            return [E.eq(low, digit), *_digits(r, more, symbols, guards)]
    return [guard]


def dim_of(r: RowReader, call: Expr) -> int:
    """Along which dim a running sum runs."""
    node = r.nodes[E.operands(call)[0].name]
    a = r.arguments(node)
    return axis(a["dim"], len(r.shape(a["self"])))
