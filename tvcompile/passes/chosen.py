"""Which expert a term belongs to: the ids that its conditions compare with a number, and under which others it counts.

sum_k  where ids[t,k] = 3 and place[t,k] < C:  w[t,k] y(t,k)    ->    ids[t,k], k, (place[t,k] < C,), (w[t,k],)
"""

from __future__ import annotations

import dataclasses

import sympy
from torch import fx

from .. import expr as E
from ..expr import Expr
from ..spec import Refuse
from .ids import compared, distinct, is_read
from .places import solved
from .rows import RowReader, over
from .terms_of import Term


@dataclasses.dataclass(frozen=True)
class Token:
    """The token's number t in [0, size)."""

    t: Expr
    size: Expr


def numbered(guard: Expr) -> tuple[Expr, int] | None:
    """(I, n) where the guard says that I is n, and I is read from tensors, or what is left of that by a division."""
    if E.op_of(guard) != "eq":
        return None
    number, rest = E.operands(guard)[0].as_coeff_Add()
    for sign in (1, -1):
        if is_read(ids := sympy.expand(sign * rest)):
            return ids, int(-number * sign)
    return None


@dataclasses.dataclass(frozen=True)
class Chosen:
    """ids[t, k] as a formula, k (0 where K is 1), the conditions under which a pair counts, its weight's factors."""

    ids: Expr
    k: Expr
    counts: tuple[Expr, ...]
    factors: tuple[Expr, ...]


class Unchosen(Refuse):
    """Every token goes through an expert, as through a shared one."""

    def __init__(self, more: str, node: fx.Node | None):
        super().__init__(f"no comparison with the ids says which tokens an expert gets{more}", node)


def chosen(r: RowReader, term: Term, expert: Expr, token: Token, ids: Expr | None = None) -> Chosen:
    """The ids that the term compares with its expert's number, or the number itself where it is read from ids.

    ids: a position that is summed, where every token has all experts
    """
    guards = list(term.guards)
    if ids is None and any(E.op_of(x) == "load" for x in E.walk(expert)):
        ids = expert
    elif ids is None:
        for g in guards:
            ids = compared(g, expert)
            if ids is not None:
                guards.remove(g)
                break
    if ids is None:
        raise Unchosen(": every expert gets every token", None)
    if any(E.op_of(x) in ("perm", "inv", "nth", "rank") for e in (ids, *guards, *term.factors) for x in E.walk(e)):
        raise Refuse("the weight of an expert is read at another row than its result", None)
    guards = [g for g in guards if not implied(r, g, ids, expert)]
    table = {expert: ids} if expert in term.bound else {}
    bound = [b for b in term.bound if b != expert or b == ids]
    counts, factors = ([E.substitute(e, table) for e in es] for es in (guards, term.factors))
    counts = [g for g in counts if g is not E.TRUE]
    for b in [b for b in bound if not E.mentions(ids, b)]:
        place = next((p for g in counts if (p := solved(g, b)) is not None), None)
        if place is not None:
            # sum_c (c = place) f(c) is f(place) where place is one of them.
            bound.remove(b)
            table = {b: place}
            inside = [E.le(sympy.Integer(0), place), E.lt(place, r.ranges[b])]
            counts = [g for g in (r.truth(E.substitute(e, table)) for e in counts) if g is not E.TRUE]
            counts += [g for g in map(r.truth, inside) if g is not E.TRUE and g not in counts]
            factors = [E.substitute(e, table) for e in factors]
    k = [b for b in bound if E.mentions(ids, b)]
    if len(bound) > 1 or len(k) != len(bound):
        raise Refuse("what is added up for a token runs over more than its experts", None)
    strange = set().union(*(e.free_symbols for e in (ids, *counts, *factors))) & set(r.ranges)
    if strange - {token.t, *k}:
        raise Refuse("the weight of an expert depends on more than token and choice", None)
    return Chosen(ids, k[0] if k else sympy.Integer(0), tuple(counts), tuple(factors))


def implied(r: RowReader, guard: Expr, ids: Expr, expert: Expr) -> bool:
    """Does ids == expert imply the guard: that any of the token's ids is?"""
    body, positions = any_of(r, guard)
    if body is None or (other := compared(body, expert)) is None:
        return False
    return any(
        E.substitute(other, {p: b}) == ids
        for p in positions if p != 0 for b in sorted(ids.free_symbols, key=str) if b in r.ranges
    ) or other == ids  # fmt: skip


def of_any(r: RowReader, term: Term) -> Term:
    """Where any of a token's ids is n, the one that is: ids of one token differ."""
    if any(numbered(g) for g in term.guards):
        return term
    for g in term.guards:
        body, positions = any_of(r, g)
        if body is None or (found := numbered(body)) is None or len(positions) != 1:
            continue
        name, *at = E.operands(found[0])
        if at[-1] == positions[0] and distinct(r, r.nodes[name.name[1:]]):
            guards = (body, *(x for x in term.guards if x is not g))
            return dataclasses.replace(term, guards=guards).under([b for b in positions if b not in term.bound])
    return term


def any_of(r: RowReader, guard: Expr) -> tuple[Expr | None, list[Expr]]:
    """(condition, positions) where a guard says that a condition holds at any of these positions."""
    if isinstance(guard, sympy.Or):
        return _any_by_name(r, guard)
    call = guard
    if E.op_of(guard) == "le":  # 1 - count <= 0
        call = sympy.expand(1 - E.operands(guard)[0])
    elif isinstance(guard, sympy.Not) and E.op_of(guard.args[0]) == "eq":
        call = E.operands(guard.args[0])[0]
    if E.op_of(call) not in ("any", "count"):
        return None, []
    node = r.nodes[E.operands(call)[0].name]
    source, at, positions = over(r, node, E.operands(call)[1:])
    value = r.read(source, at, r.position[node])
    body = r.truth(E.as_bool(value))
    return (body, positions) if value in (body, E.as_int(body), E.as_float(body)) else (None, [])


def _any_by_name(r: RowReader, guard: Expr) -> tuple[Expr | None, list[Expr]]:
    """ids[t, 0] = e or ids[t, 1] = e, of all choices: ids[t, k] = e at any k"""
    found = {(x, call) for x in guard.args for call in E.loads(x)}
    if len(found) != len(guard.args) or len({E.operands(call)[0] for _, call in found}) != 1:
        return None, []
    _, first = next(iter(found))
    k = r.fresh(r.shape(r.nodes[E.operands(first)[0].name[1:]])[-1], "k")
    bodies = {E.substitute(x, {call: call.func(*call.args[:-1], k)}) for x, call in found}
    choices = {E.operands(call)[-1] for _, call in found}
    every = k in r.ranges and choices == set(map(sympy.Integer, range(len(found)))) and r.ranges[k] == len(found)
    return (bodies.pop(), [k]) if every and len(bodies) == 1 else (None, [])
